"""Quantisers on CUDA devices: Q, K and V together, in three launches at most.

1. kernels/quantize_statistics.cu: sums and extrema of chunks of tokens, for means and scales of
   heads
2. kernels/quantize_heads.cu: these means and scales
3. kernels/quantize.cu: the codes, and the scales of blocks and groups
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_sm120 import _C
from flash_attn_sm120.loaded_kernel import DTYPES, LoadedKernel, Strides
from flash_attn_sm120.quantized.formats import E2M1_MAX, E4M3_ARCH, E4M3_MAX, FORMATS
from flash_attn_sm120.quantized.layout import INT8_ROWS, Quantized, empty
from flash_attn_sm120.quantized.mean import THREADS, chunk_of
from flash_attn_sm120.quantized.recipes import Recipe

ROWS = 64  # tokens of a block of quantize.cu, where those of int8 do not share a scale
_HEAD_LARGEST = {"fp8": E4M3_MAX, "nvfp4": E4M3_MAX * E2M1_MAX}  # what the largest becomes


class Operand(ctypes.Structure):
    """``fa_quantize_operand`` of kernels/quantize.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "statistics", "data", "scale")),
        *((name, ctypes.c_void_p) for name in ("head_scale", "mean")),
        ("stride", Strides),
        *((name, ctypes.c_int) for name in ("batch", "seqlen", "heads", "chunk", "chunks", "rows")),
        ("head_largest", ctypes.c_float),
    ]


class Parameters(ctypes.Structure):
    """``fa_quantize_params`` of kernels/quantize.cuh."""

    _fields_ = [(name, Operand) for name in ("q", "k", "v")]


class Work(NamedTuple):
    """One operand, and what its blocks read and write."""

    x: Tensor  # readable
    narrow: Quantized
    statistics: Tensor | None  # (batch, heads, chunks, 3, head_dim) float32
    rows: int

    @property
    def chunks(self) -> int:
        """Of a head: blocks of quantize_statistics.cu."""
        return 0 if self.statistics is None else self.statistics.shape[2]

    @property
    def blocks(self) -> int:
        """Of a head: blocks of quantize.cu."""
        return -(-self.narrow.seqlen // self.rows)

    @property
    def heads(self) -> int:
        """Of all sequences."""
        return self.narrow.batch * self.narrow.heads

    def tensors(self) -> dict[str, Tensor]:
        """What pointers of the parameters point to."""
        of_result = {name: getattr(self.narrow, name) for name in _RESULTS}
        named = {"x": self.x, "statistics": self.statistics, **of_result}
        return {name: x for name, x in named.items() if x is not None}

    def parameters(self) -> Operand:
        """For all launches."""
        return Operand(
            **{name: x.data_ptr() for name, x in self.tensors().items()},
            stride=Strides(*self.x.stride()[:3]),
            batch=self.narrow.batch,
            seqlen=self.narrow.seqlen,
            heads=self.narrow.heads,
            chunk=chunk_of(self.narrow.seqlen),
            chunks=self.chunks,
            rows=self.rows,
            head_largest=_HEAD_LARGEST.get(self.narrow.format, 1),
        )

    def bytes_moved(self) -> tuple[int, int, int]:
        """By each launch: what its blocks read, as often as they do, and write."""
        of_head = _bytes(self.narrow.mean) + _bytes(self.narrow.head_scale)
        codes = _bytes(self.x) + _bytes(self.narrow.data) + _bytes(self.narrow.scale)
        codes += self.blocks * of_head
        if self.statistics is None:
            return 0, 0, codes
        of_chunks = _bytes(self.statistics)
        return _bytes(self.x) + of_chunks, of_chunks + of_head, codes

    def bytes_needed(self) -> int:
        """Of reading ``x`` once, and of writing the results."""
        return _bytes(self.x) + sum(_bytes(getattr(self.narrow, name)) for name in _RESULTS)


_RESULTS = ("data", "scale", "head_scale", "mean")


class Launch(NamedTuple):
    """One launch."""

    kernel: str
    options: tuple[str, ...]
    blocks: int
    bytes_moved: int


class Plan(NamedTuple):
    """The launches, in order, that quantise operands of one device and dtype."""

    works: dict[str, Work]
    launches: tuple[Launch, ...]
    parameters: Parameters

    @property
    def bytes_moved(self) -> int:
        """By all blocks of all launches."""
        return sum(launch.bytes_moved for launch in self.launches)

    @property
    def bytes_needed(self) -> int:
        """Of reading each operand once, and of writing the results."""
        return sum(work.bytes_needed() for work in self.works.values())


def has_kernel(x: Tensor, format: str) -> bool:
    """Whether kernels quantise ``x``."""
    if x.device.type != "cuda" or format == "16bit" or not x.numel():
        return False
    return _arch(x.device.index or 0) >= E4M3_ARCH


@torch.compiler.disable  # type: ignore[untyped-decorator]
def quantize(operands: dict[str, Tensor], recipe: Recipe) -> dict[str, Quantized]:
    """Checked operands, quantised; a graph of torch.compile ends here."""
    alike: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, x in operands.items():
        alike.setdefault((x.device, x.dtype), {})[name] = x
    narrow: dict[str, Quantized] = {}
    for (device, _), some in alike.items():
        plan = prepare(some, recipe)
        index = device.index or 0
        with torch.cuda.device(index):
            for launch in plan.launches:
                loaded = _loaded(launch.kernel, launch.options, index)
                loaded((launch.blocks, 1), THREADS, plan.parameters)
        narrow |= {name: work.narrow for name, work in plan.works.items()}
    return narrow


def prepare(operands: dict[str, Tensor], recipe: Recipe) -> Plan:
    """What quantises operands of one device and dtype, none of them empty."""
    works = {name: _work(x, name, recipe) for name, x in operands.items()}
    dims = {work.narrow.operand == "v": work.narrow.head_dim for work in works.values()}
    rotation = max(work.narrow.rotation for work in works.values())
    of_heads = {
        "DTYPE": DTYPES[next(iter(operands.values())).dtype],
        "HEAD_DIM": dims.get(False, dims.get(True)),
        "HEAD_DIM_V": dims.get(True, dims.get(False)),
        "ROTATION": rotation,
    }
    formats = {name: works[name].narrow.format if name in works else "16bit" for name in "qkv"}
    of_codes = of_heads | {f"{name.upper()}_FORMAT": FORMATS[x] for name, x in formats.items()}
    summed = [work for work in works.values() if work.statistics is not None]
    blocks = (
        sum(work.heads * work.chunks for work in summed),
        sum(work.heads for work in summed),
        sum(work.heads * work.blocks for work in works.values()),
    )
    moved = map(sum, zip(*(work.bytes_moved() for work in works.values()), strict=True))
    kernels = (
        ("quantize_statistics", of_heads),
        ("quantize_heads", of_heads),
        ("quantize", of_codes),
    )
    launches = (
        Launch(kernel, tuple(f"-D{key}={value}" for key, value in constants.items()), *counts)
        for (kernel, constants), *counts in zip(kernels, blocks, moved, strict=True)
    )
    parameters = Parameters(**{name: work.parameters() for name, work in works.items()})
    return Plan(works, tuple(launch for launch in launches if launch.blocks), parameters)


def _work(x: Tensor, operand: str, recipe: Recipe) -> Work:
    treatment = recipe.treatment(operand)
    batch, seqlen, heads, head_dim = x.shape
    narrow = empty(x, operand, treatment)
    statistics = None
    if treatment.subtracts_mean or narrow.head_scale is not None:
        shape = (batch, heads, -(-seqlen // chunk_of(seqlen)), 3, head_dim)
        statistics = torch.empty(shape, dtype=torch.float32, device=x.device)
    rows = INT8_ROWS[operand] if treatment.format == "int8" else ROWS
    return Work(_readable(x), narrow, statistics, rows)


def _readable(x: Tensor) -> Tensor:
    """In place, where vectors of 16 bytes can be read, as of any contiguous tensor."""
    steps = x.stride()[:3]
    is_aligned = x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps)
    return x if is_aligned and x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


def _bytes(x: Tensor | None) -> int:
    """Of its elements."""
    return 0 if x is None else x.numel() * x.element_size()


@functools.cache
def _arch(index: int) -> int:
    arch: int = _C.devices()[1][index]["arch"]
    return arch


@functools.cache
def _loaded(kernel: str, options: tuple[str, ...], index: int) -> LoadedKernel:
    """On the current device, which is ``index``."""
    return LoadedKernel(kernel, "_".join([kernel, *(x.split("=")[1] for x in options)]), options)
