"""The devices that calls are tested on, and what each can do.

A process has one driver. Without CUDA it is the emulator; with CUDA it can be, see
emulator/__main__.py.
"""

import os
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch

from emulator import EmulatedTensor, emulator, library, unavailable

os.environ["FA_SM120_TILES"] = ""  # not what was tuned on the developer's machine
if not os.environ.get("FA_SM120_DRIVER") and not torch.cuda.is_available() and not unavailable():
    os.environ["FA_SM120_DRIVER"] = str(library())

from flash_attn_sm120 import jit
from helpers.tiles import LARGE_TILES


@dataclass(frozen=True)
class Device:
    """One way of running a call, and what it can do so far."""

    name: str
    torch_device: str  # where its tensors live
    dtypes: tuple[torch.dtype, ...]  # of the tests of every type
    missing: str = ""  # why it cannot be used on this machine
    tensor_class: type[torch.Tensor] = torch.Tensor
    tiles: tuple[tuple[int, ...], ...] = ()  # rows that come before those of csrc/tiles.c

    def takes(self, turn):
        """Whether to run a case. A kernel for the emulator takes long to compile: there small tiles
        take the even turns and large ones the odd, so that pairs of features are covered."""
        return self.tensor_class is not EmulatedTensor or turn % 2 == bool(self.tiles)

    def place(self, tensor):
        """`tensor` where calls expect it; the same memory, if that is there already."""
        return tensor.to(self.torch_device).as_subclass(self.tensor_class)


def why_no_cuda():
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    if os.environ.get("FA_SM120_DRIVER"):
        return "the process has one driver, and FA_SM120_DRIVER names another than CUDA's"
    return ""


def why_no_emulator():
    if reason := unavailable():
        return reason
    driver = os.environ.get("FA_SM120_DRIVER")
    if not driver or driver != str(library()):
        return "the process has one driver, and FA_SM120_DRIVER does not name the emulator"
    try:
        jit.nvrtc_version()
    except RuntimeError as error:
        return str(error)
    return ""


CPU = Device("cpu", "cpu", (torch.float32, torch.bfloat16, torch.float16))
CUDA = Device(
    "cuda",
    "cuda",
    (torch.bfloat16, torch.float16),
    missing=why_no_cuda(),
)
EMULATOR = Device(
    "emulator",
    "cpu",
    (torch.bfloat16,),
    missing=why_no_emulator(),
    tensor_class=EmulatedTensor,
)


def with_large_tiles(device, **changes):
    return replace(device, name=f"{device.name}-large", tiles=LARGE_TILES, **changes)


# On the emulator the one size of tiles goes with the one type: of four pairs two have to do.
DEVICES = [CPU, EMULATOR, with_large_tiles(EMULATOR, dtypes=(torch.float16,))]
DEVICES += [CUDA, with_large_tiles(CUDA)]


def writable(tensor):
    """The emulator lets launches write to what says so, and to nothing else."""
    if isinstance(tensor, EmulatedTensor):
        tensor.writable = True
    return tensor


def reordered(device, seed):
    """Another order of blocks, warps and copies, where that can be had."""
    if device.tensor_class is not EmulatedTensor:
        return nullcontext()
    return emulator().settings(seed=seed, late_copies=seed % 2 == 1)


def params_of(*devices):
    """The parameters of a fixture of devices; conftest.py leaves out those that are missing."""
    return [pytest.param(device, id=device.name) for device in devices]


def each_on(devices, cases, emulated):
    """Parameters (device, case) of a test, `cases` by their ids. The emulator, for which kernels take
    long to compile, has those alone whose ids `emulated` holds."""
    return [
        pytest.param(device, case, id=f"{device.name}-{name}")
        for device in devices
        for name, case in cases.items()
        if device is not EMULATOR or name in emulated
    ]


def why_left_out(item):
    """Why a collected test cannot run on this machine; empty where it can."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    device, dtype = parameters.get("device"), parameters.get("dtype")
    if isinstance(device, Device):
        if device.missing:
            return f"on {device.name}: {device.missing}"
        if dtype is not None and dtype not in device.dtypes:
            return "of a dtype that the device is not tested with"
        if device is CPU and dtype in HALVES and dtype is not half_of(item.callspec.id):
            return "on the CPU in the other 16-bit dtype: each case runs in one of the two"
    if "cuda" in item.fixturenames and CUDA.missing:
        return f"on cuda: {CUDA.missing}"
    return ""


HALVES = (torch.bfloat16, torch.float16)


def half_of(case):
    """In the C code the two differ by the conversion of an element, which all cases share."""
    return HALVES[zlib.crc32(case.replace("bf16", "fp16").encode()) % 2]


def is_on_a_gpu(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    device = parameters.get("device")
    return "cuda" in item.fixturenames or getattr(device, "torch_device", "") == "cuda"
