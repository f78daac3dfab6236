"""int8 and e4m3 on CUDA devices, by kernels/quantize_extrema.cu and kernels/quantize.cu."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_sm120 import _C
from flash_attn_sm120.loaded_kernel import DTYPES, LoadedKernel, Strides
from flash_attn_sm120.quantized.formats import E4M3, E4M3_ARCH
from flash_attn_sm120.quantized.layout import INT8_ROWS, Quantized

THREADS = 256
FORMATS = ("int8", "fp8")  # that have kernels
FP8_ROWS = 64  # tokens of a block; bits do not depend on it
LEAST_CHUNK, MOST_CHUNKS = 256, 64  # tokens whose sum is a block's; how many a head has


class Parameters(ctypes.Structure):
    """``fa_quantize_params`` of kernels/quantize.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "extrema", "data", "scale", "mean")),
        ("x_stride", Strides),
        *((name, ctypes.c_int) for name in ("seqlen", "heads", "chunk", "chunks", "rows")),
    ]


class Launch(NamedTuple):
    """One launch, and what it reads and writes."""

    kernel: str
    options: tuple[str, ...]
    blocks: int
    parameters: Parameters
    tensors: tuple[Tensor, ...]

    @property
    def variant(self) -> str:
        """Its canonical name."""
        return "_".join([self.kernel, *(x.split("=")[1] for x in self.options)])


def has_kernel(x: Tensor, format: str) -> bool:
    """Whether kernels quantise ``x``."""
    if x.device.type != "cuda" or format not in FORMATS:
        return False
    return x.numel() > 0 and x.stride(3) == 1 and _arch(x.device.index or 0) >= E4M3_ARCH


@torch.compiler.disable  # type: ignore[untyped-decorator]
def quantize(x: Tensor, format: str, operand: str, subtracts_mean: bool) -> Quantized:
    """Checked ``x``, quantised; a graph of torch.compile ends here."""
    narrow, launches = prepare(x, format, operand, subtracts_mean)
    index = x.device.index or 0
    with torch.cuda.device(index):
        for launch in launches:
            loaded = _loaded(launch.kernel, launch.variant, launch.options, index)
            loaded((launch.blocks, 1), THREADS, launch.parameters)
    return narrow


def prepare(
    x: Tensor, format: str, operand: str, subtracts_mean: bool
) -> tuple[Quantized, tuple[Launch, ...]]:
    """What the launches, in order, fill."""
    batch, seqlen, heads, head_dim = x.shape
    is_int8 = format == "int8"
    rows = INT8_ROWS[operand] if is_int8 else FP8_ROWS
    blocks = -(-seqlen // rows)
    chunk = max(LEAST_CHUNK, -(-seqlen // MOST_CHUNKS))
    chunks = -(-seqlen // chunk)
    floats = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    data = torch.empty(x.shape, dtype=torch.int8 if is_int8 else E4M3, device=x.device)
    scale = floats((batch, heads, blocks) if is_int8 else (batch, heads))
    mean = floats((batch, heads, head_dim)) if subtracts_mean else None
    has_extrema = subtracts_mean or not is_int8
    extrema = floats((batch, heads, chunks, head_dim, 3)) if has_extrema else None
    named = {"x": x, "extrema": extrema, "data": data, "scale": scale, "mean": mean}
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    parameters = Parameters(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        x_stride=Strides(x.stride(0), x.stride(1), x.stride(2)),
        seqlen=seqlen,
        heads=heads,
        chunk=chunk,
        chunks=chunks,
        rows=rows,
    )
    options = (f"-DDTYPE={DTYPES[x.dtype]}", f"-DHEAD_DIM={head_dim}")
    memory, all_heads = tuple(tensors.values()), batch * heads
    first = Launch("quantize_extrema", options, chunks * all_heads, parameters, memory)
    int8 = f"-DINT8={int(is_int8)}"
    second = Launch("quantize", (*options, int8), blocks * all_heads, parameters, memory)
    of_rows, of_head = (scale, None) if is_int8 else (None, scale)
    narrow = Quantized(operand, format, data, of_rows, of_head, mean, 1, seqlen, head_dim, x.dtype)
    return narrow, (first, second) if has_extrema else (second,)


@functools.cache
def _arch(index: int) -> int:
    arch: int = _C.devices()[1][index]["arch"]
    return arch


@functools.cache
def _loaded(kernel: str, variant: str, options: tuple[str, ...], index: int) -> LoadedKernel:
    """On the current device, which is ``index``."""
    return LoadedKernel(kernel, variant, options)
