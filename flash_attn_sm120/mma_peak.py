"""How fast mma.sync is on this GPU (kernels/mma_peak.cu): kernels reach a share of it."""

from __future__ import annotations

import torch

from flash_attn_sm120 import _measure
from flash_attn_sm120.loaded_kernel import LoadedKernel

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
        name = f"mma_peak_{'fp16' if fp16_sums else 'fp32'}"
        options = (f"-DDTYPE={DTYPE[fp16_sums]}", f"-DFP16_SUMS={fp16_sums:d}", f"-DWARPS={WARPS}")
        self._kernel = LoadedKernel("mma_peak", name, options)
        self.blocks = self._kernel.multiprocessors
        self.flops = float(self.blocks * WARPS * ITERATIONS * PRODUCTS * FLOPS_OF_PRODUCT)
        self.sums = torch.empty(self.blocks * WARPS * 32, device="cuda")

    def __call__(self) -> None:
        self._kernel((self.blocks, 1), WARPS * 32, self.sums, ITERATIONS)

    def timed(self) -> _measure.Timed:
        """To be timed beside other calls."""
        return _measure.Timed("mma.sync peak", self)
