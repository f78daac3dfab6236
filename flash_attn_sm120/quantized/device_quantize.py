"""Quantisers on CUDA devices: Q, K and V together, by kernels/quantize.cu.

One launch, and one that sets its counters to zero, where there are means or scales of heads.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_sm120.loaded_kernel import DTYPES, LoadedKernel, Strides
from flash_attn_sm120.quantized.device import card_of
from flash_attn_sm120.quantized.formats import E2M1_MAX, E4M3_ARCH, E4M3_MAX, FORMATS
from flash_attn_sm120.quantized.layout import INT8_ROWS, Quantized, empty
from flash_attn_sm120.quantized.mean import THREADS, chunk_of
from flash_attn_sm120.quantized.recipes import Recipe

KERNEL = "quantize"
ROWS = 64  # tokens of a block that quantises, where those of int8 do not share a scale
# For each multiprocessor. Statistics are so far ahead of the codes; and what is read again counts
# as read once where no more lies between than this, half of the L2 of 12.x or less.
AHEAD_BYTES, CACHE_BYTES = 1 << 16, 1 << 18
_HEAD_LARGEST = {"fp8": E4M3_MAX, "nvfp4": E4M3_MAX * E2M1_MAX}  # what the largest becomes
_RESULTS = ("data", "scale", "head_scale", "mean")


class Operand(ctypes.Structure):
    """``fa_quantize_operand`` of kernels/quantize.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "statistics", "done", "data", "scale")),
        *((name, ctypes.c_void_p) for name in ("head_scale", "mean")),
        ("stride", Strides),
        *((name, ctypes.c_int) for name in ("batch", "seqlen", "heads", "chunk", "chunks", "rows")),
        *((name, ctypes.c_int) for name in ("parts", "lag")),
        ("head_largest", ctypes.c_float),
    ]


class Parameters(ctypes.Structure):
    """``fa_quantize_params`` of kernels/quantize.cuh."""

    _fields_ = [*((name, Operand) for name in ("q", "k", "v")), ("started", ctypes.c_void_p)]


class Work(NamedTuple):
    """One operand, and what its blocks read and write."""

    x: Tensor  # readable
    narrow: Quantized
    statistics: Tensor | None  # (batch, heads, chunks, 3, head_dim) float32
    rows: int
    lag: int  # heads

    @property
    def heads(self) -> int:
        """Of all sequences."""
        return self.narrow.batch * self.narrow.heads

    @property
    def chunks(self) -> int:
        """Of a head."""
        return 0 if self.statistics is None else self.statistics.shape[2]

    @property
    def parts(self) -> int:
        """Of a head: blocks that quantise it."""
        return -(-self.narrow.seqlen // self.rows)

    def tensors(self) -> dict[str, Tensor]:
        """What pointers of the parameters point to."""
        results = {name: getattr(self.narrow, name) for name in _RESULTS}
        named = {"x": self.x, "statistics": self.statistics, **results}
        return {name: x for name, x in named.items() if x is not None}

    def parameters(self, done: Tensor | None) -> Operand:
        """With counters of the heads, where there are statistics."""
        return Operand(
            **{name: x.data_ptr() for name, x in self.tensors().items()},
            done=0 if done is None else done.data_ptr(),
            stride=Strides(*self.x.stride()[:3]),
            batch=self.narrow.batch,
            seqlen=self.narrow.seqlen,
            heads=self.narrow.heads,
            chunk=chunk_of(self.narrow.seqlen),
            chunks=self.chunks,
            rows=self.rows,
            parts=self.parts,
            lag=self.lag,
            head_largest=_HEAD_LARGEST.get(self.narrow.format, 1),
        )

    def bytes_needed(self) -> int:
        """Of reading ``x`` once, and of writing the results."""
        return _bytes(self.x) + sum(_bytes(getattr(self.narrow, name)) for name in _RESULTS)

    def bytes_moved(self, cache_bytes: int) -> int:
        """What all blocks read and write: ``x`` twice where there are statistics and more than
        ``cache_bytes`` lie between both readings."""
        if self.statistics is None:
            return self.bytes_needed()
        codes = _bytes(self.narrow.data) + _bytes(self.narrow.scale)
        # Between: heads that are added up, heads that are quantised, and their codes.
        between = ((2 * self.lag + 1) * _bytes(self.x) + self.lag * codes) // self.heads
        reads = 1 if between <= cache_bytes else 2
        of_heads = _bytes(self.narrow.mean) + _bytes(self.narrow.head_scale)
        return (
            reads * _bytes(self.x)
            + 2 * _bytes(self.statistics)
            + (1 + self.parts) * of_heads
            + codes
        )


class Plan(NamedTuple):
    """The launch that quantises operands of one device and dtype."""

    works: dict[str, Work]
    options: tuple[str, ...]
    blocks: int
    parameters: Parameters
    counters: Tensor | None  # int32 zeros, which the launch counts up
    multiprocessors: int

    @property
    def launches(self) -> int:
        """That of the zeros included."""
        return 1 if self.counters is None else 2

    def bytes_moved(self, cache_bytes: int | None = None) -> int:
        """By all blocks; by default with the L2 that a device of so many multiprocessors has."""
        if cache_bytes is None:
            cache_bytes = self.multiprocessors * CACHE_BYTES
        return sum(work.bytes_moved(cache_bytes) for work in self.works.values())

    def bytes_needed(self) -> int:
        """Of reading each operand once, and of writing the results."""
        return sum(work.bytes_needed() for work in self.works.values())


def has_kernel(x: Tensor, format: str) -> bool:
    """Whether kernels quantise ``x``."""
    if x.device.type != "cuda" or format == "16bit" or not x.numel():
        return False
    return card_of(x.device.index or 0).arch >= E4M3_ARCH


@torch.compiler.disable  # type: ignore[untyped-decorator]
def quantize(operands: dict[str, Tensor], recipe: Recipe) -> dict[str, Quantized]:
    """Checked operands, quantised; a graph of torch.compile ends here."""
    alike: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, x in operands.items():
        alike.setdefault((x.device, x.dtype), {})[name] = x
    narrow: dict[str, Quantized] = {}
    for (device, _), some in alike.items():
        index = device.index or 0
        plan = prepare(some, recipe, card_of(index).sms)
        with torch.cuda.device(index):
            _loaded(plan.options, index)((plan.blocks, 1), THREADS, plan.parameters)
        narrow |= {name: work.narrow for name, work in plan.works.items()}
    return narrow


def prepare(operands: dict[str, Tensor], recipe: Recipe, multiprocessors: int) -> Plan:
    """What quantises operands of one device and dtype, none of them empty."""
    ahead = multiprocessors * AHEAD_BYTES
    works = {name: _work(x, name, recipe, ahead) for name, x in operands.items()}
    parameters, counters = Parameters(), None
    summed = {name: work.heads for name, work in works.items() if work.chunks}
    if summed:
        size, device = 1 + sum(summed.values()), next(iter(operands.values())).device
        counters = torch.zeros(size, dtype=torch.int32, device=device)
        parameters.started = counters.data_ptr()
    begin = 1
    for name, work in works.items():
        heads = summed.get(name, 0)
        done = None if counters is None else counters[begin : begin + heads]
        setattr(parameters, name, work.parameters(done if heads else None))
        begin += heads
    blocks = sum(work.heads * (work.chunks + work.parts) for work in works.values())
    return Plan(works, _options(works), blocks, parameters, counters, multiprocessors)


def _options(works: dict[str, Work]) -> tuple[str, ...]:
    """The constants of the kernel. Where Q and K, or V, are not there, their head dim is that of
    the others."""
    narrow = {name: work.narrow for name, work in works.items()}
    of_qk = narrow.get("q") or narrow.get("k") or narrow["v"]
    of_v = narrow.get("v") or of_qk
    constants = {
        "DTYPE": DTYPES[of_qk.dtype],
        "HEAD_DIM": of_qk.head_dim,
        "HEAD_DIM_V": of_v.head_dim,
        "ROTATION": of_qk.rotation,
        **{
            f"{name.upper()}_FORMAT": FORMATS[narrow[name].format if name in narrow else "16bit"]
            for name in ("q", "k", "v")
        },
    }
    return tuple(f"-D{key}={value}" for key, value in constants.items())


def _work(x: Tensor, operand: str, recipe: Recipe, ahead_bytes: int) -> Work:
    treatment = recipe.treatment(operand)
    batch, seqlen, heads, head_dim = x.shape
    narrow = empty(x, operand, treatment)
    rows = INT8_ROWS[operand] if treatment.format == "int8" else ROWS
    if not treatment.subtracts_mean and narrow.head_scale is None:
        return Work(_readable(x), narrow, None, rows, 0)
    shape = (batch, heads, -(-seqlen // chunk_of(seqlen)), 3, head_dim)
    statistics = torch.empty(shape, dtype=torch.float32, device=x.device)
    lag = ahead_bytes // (seqlen * head_dim * x.element_size())
    return Work(_readable(x), narrow, statistics, rows, min(max(lag, 1), batch * heads))


def _readable(x: Tensor) -> Tensor:
    """In place, where vectors of 16 bytes can be read, as of any contiguous tensor."""
    steps = x.stride()[:3]
    is_aligned = x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps)
    return x if is_aligned and x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


def _bytes(x: Tensor | None) -> int:
    """Of its elements."""
    return 0 if x is None else x.numel() * x.element_size()


@functools.cache
def _loaded(options: tuple[str, ...], index: int) -> LoadedKernel:
    """On the current device, which is ``index``."""
    return LoadedKernel(KERNEL, "_".join([KERNEL, *(x.split("=")[1] for x in options)]), options)
