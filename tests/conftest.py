"""What all tests share: the devices, the seed, and inputs in every layout."""

import os
import zlib
from dataclasses import dataclass, replace

import pytest
import torch
from emulator import EmulatedTensor, library, unavailable

os.environ["FA_SM120_TILES"] = ""  # not what was tuned on the developer's machine

from tiles import LARGE_TILES, use_tiles

from flash_attn_sm120 import explain, frameworks, jit

# Tensors here are small: threads that wait for each other would only slow torch down.
torch.set_num_threads(1)


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
        """Whether to run a case. On the emulator, for which a kernel takes long to compile, those with
        small tiles take the even turns, those with large ones the odd: pairs of features have to do."""
        return self.tensor_class is not EmulatedTensor or turn % 2 == bool(self.tiles)

    def place(self, tensor):
        """`tensor` where calls expect it; the same memory, if that is there already."""
        return tensor.to(self.torch_device).as_subclass(self.tensor_class)


# A process has one driver. Without CUDA it is the emulator; with CUDA it can be, see emulator/__main__.py.
if not os.environ.get("FA_SM120_DRIVER") and not torch.cuda.is_available() and not unavailable():
    os.environ["FA_SM120_DRIVER"] = str(library())


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


def pytest_addoption(parser):
    parser.addoption(
        "--examples", type=int, help="random calls of test_together.py, others in every run"
    )


# Files of tests that take longest.
LONGEST = ("test_sanitizers.py", "test_resources.py", "test_package.py")


def pytest_collection_modifyitems(config, items):
    """Processes that share the tests start with the longest: short ones fill up the end evenly."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def driver_is_settled():
    """The C code reads its environment once; a process that a test starts has a driver of its own."""
    q = torch.empty(0, 1, 1, 8, dtype=torch.float16)
    explain(q, q, q, arch=120)
    os.environ.pop("FA_SM120_DRIVER", None)


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


def params_of(*devices):
    """The parameters of a fixture of devices."""
    return [
        pytest.param(
            device,
            id=device.name,
            marks=pytest.mark.skipif(bool(device.missing), reason=device.missing),
        )
        for device in devices
    ]


@pytest.fixture(params=params_of(*DEVICES))
def device(request):
    with use_tiles(*request.param.tiles):
        yield request.param


@pytest.fixture
def cuda():
    """For tests of torch's CUDA alone."""
    if CUDA.missing:
        pytest.skip(CUDA.missing)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request, device):
    if request.param not in device.dtypes:
        pytest.skip(f"no {request.param} on {device.name}")
    return request.param


@pytest.fixture(autouse=True)
def seed(request):
    """Every test draws numbers of its own, the same in every run and in every order of tests."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def outputs_full_of_nan(monkeypatch):
    """Memory that nobody wrote shows, whatever the allocator returns."""
    empty = frameworks.empty
    monkeypatch.setattr(frameworks, "empty", lambda *args: empty(*args).fill_(torch.nan))


# ---- inputs --------------------------------------------------------------------------------------


def _contiguous(shape, dtype):
    return torch.empty(shape, dtype=dtype)


def _heads_first(shape, dtype):
    """(B, S, H, D) as a view of (B, H, S, D): what a model in SDPA's layout hands over."""
    batch, seqlen, heads, head_dim = shape
    return torch.empty(batch, heads, seqlen, head_dim, dtype=dtype).transpose(1, 2)


def _sequence_first(shape, dtype):
    """(B, S, H, D) as a view of (S, B, H, D)."""
    batch, seqlen, heads, head_dim = shape
    return torch.empty(seqlen, batch, heads, head_dim, dtype=dtype).transpose(0, 1)


def _in_nan(shape, dtype):
    """A slice, in all four dimensions, of a larger tensor that is NaN everywhere else."""
    margins = (1, 3, 1, 8)  # 8 elements keep the last dimension aligned to 16 bytes in every type
    larger = torch.full(
        [n + 2 * margin for n, margin in zip(shape, margins, strict=True)], torch.nan, dtype=dtype
    )
    return larger[
        tuple(slice(margin, margin + n) for n, margin in zip(shape, margins, strict=True))
    ]


def _last_dim_strided(shape, dtype):
    """Every second element of rows twice as long: cannot be read in place."""
    return torch.empty(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


LAYOUTS = {
    "contiguous": _contiguous,
    "heads_first": _heads_first,
    "sequence_first": _sequence_first,
    "in_nan": _in_nan,
    "last_dim_strided": _last_dim_strided,
}


def random_tensor(device, shape, dtype, mean, layout):
    """Normal around `mean`, drawn on the CPU: the same on every device."""
    with torch.device(device.torch_device):
        tensor = device.place(LAYOUTS[layout](shape, dtype))
    return tensor.copy_(torch.randn(shape, device="cpu") + mean)


@pytest.fixture
def make_qkv(device):
    """make_qkv(...) -> q, k, v on the test's device: normal around `mean`, in one of LAYOUTS."""

    def make(
        batch=2,
        seqlen_q=64,
        seqlen_k=None,
        heads=4,
        heads_kv=None,
        head_dim=64,
        head_dim_v=None,
        *,
        dtype=torch.bfloat16,
        mean=0.0,
        layout="contiguous",
    ):
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        heads_kv = heads if heads_kv is None else heads_kv
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        shapes = (
            (batch, seqlen_q, heads, head_dim),
            (batch, seqlen_k, heads_kv, head_dim),
            (batch, seqlen_k, heads_kv, head_dim_v),
        )
        return [random_tensor(device, shape, dtype, mean, layout) for shape in shapes]

    return make
