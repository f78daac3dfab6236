"""How fast mma.sync is on this GPU (kernels/mma_peak.cu): kernels reach a share of it."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch

from flash_attn_sm120 import _C, _measure, jit

WARPS = 8  # of a block, of which a multiprocessor has one
PRODUCTS = 8  # of a warp in an iteration, each of 16 x 8 x 16
ITERATIONS = 16384  # about a millisecond on an H100
FLOPS_OF_PRODUCT = 2 * 16 * 8 * 16
DTYPE = {False: 2, True: 1}  # enum fa_dtype: bf16; fp16


class MmaPeak:
    """The kernel, loaded on torch's current CUDA device; a call launches it on torch's stream.

    Args:
        fp16_sums: of fp16 with accumulators in fp16, not of bf16 with accumulators in fp32.

    Raises:
        RuntimeError: it cannot be compiled or loaded.
    """

    def __init__(self, *, fp16_sums: bool = False) -> None:
        version, devices = _C.devices()
        device = devices[torch.cuda.current_device()]
        name = f"mma_peak_{'fp16' if fp16_sums else 'fp32'}"
        options = (f"-DDTYPE={DTYPE[fp16_sums]}", f"-DFP16_SUMS={fp16_sums:d}", f"-DWARPS={WARPS}")
        code = jit.compile("mma_peak", name, options, device["arch"], version)
        self.blocks = device["sms"]
        self.flops = float(self.blocks * WARPS * ITERATIONS * PRODUCTS * FLOPS_OF_PRODUCT)
        self.sums = torch.empty(self.blocks * WARPS * 32, device="cuda")
        self._driver: Any = importlib.import_module("cuda.bindings.driver")
        self._library = self._call("cuLibraryLoadData", code, [], [], 0, [], [], 0)
        self._kernel = self._call("cuLibraryGetKernel", self._library, b"mma_peak")

    def __call__(self) -> None:
        arguments = (self.sums.data_ptr(), ITERATIONS), (ctypes.c_void_p, ctypes.c_int)
        stream = torch.cuda.current_stream().cuda_stream
        function = self._driver.CUfunction(int(self._kernel))
        grid = (self.blocks, 1, 1, WARPS * 32, 1, 1)
        self._call("cuLaunchKernel", function, *grid, 0, stream, arguments, 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} failed: {status.name}")
        return values[0] if values else None

    def timed(self) -> _measure.Timed:
        """To be timed beside other calls."""
        return _measure.Timed("mma.sync peak", self)
