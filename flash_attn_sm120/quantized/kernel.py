"""What a call of kernels/quantized_forward.cu is launched with, as far as no device is needed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_sm120.loaded_kernel import DTYPES, Strides
from flash_attn_sm120.quantized.formats import FORMATS
from flash_attn_sm120.quantized.layout import Quantized
from flash_attn_sm120.recipe_tiles import Tile

KERNEL = "quantized_forward"
TILE = Tile()  # where tune has no row
TILE_N = 64  # keys of a tile
STAGES = 2  # of K and V
SHARED_RESERVED = 1024  # bytes of a multiprocessor for each block, as in csrc/device.c
MOST_PARTS = 16
LEAST_TILES = 4  # of a part
SAVED_TILES = 12  # that take a block longer than a second kernel takes


class Parameters(ctypes.Structure):
    """``fa_quantized_params`` of kernels/quantized_block.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "q_scale", "k_scale", "v_scale")),
        *((name, ctypes.c_void_p) for name in ("q_head_scale", "k_head_scale", "v_head_scale")),
        *((name, ctypes.c_void_p) for name in ("k_mean", "v_mean", "sink", "out", "lse")),
        *((name, Strides) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_int) for name in ("batch", "heads_q", "heads_kv")),
        *((name, ctypes.c_int) for name in ("seqlen_q", "seqlen_k", "parts")),
        *((name, ctypes.c_int) for name in ("window_left", "window_right", "sink_dtype")),
        ("softmax_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class Variant(NamedTuple):
    """What is compiled, and the shared memory of its blocks."""

    name: str
    options: tuple[str, ...]
    shared_bytes: int
    blocks: int  # of a multiprocessor, for which registers are enough
    threads: int  # of a block


class Launch(NamedTuple):
    """One launch, and what it reads and writes."""

    variant: Variant
    blocks: int
    parameters: Parameters
    tensors: tuple[Tensor, ...]  # whose memory the parameters point to


class Steps(NamedTuple):
    """What happens to scores, beside masks."""

    softcap: bool = False
    sink: bool = False


class Target(NamedTuple):
    """What of a device decides about variants."""

    transposes_bytes: bool  # ldmatrix of 12.x
    mx_e4m3: bool  # GeForce-like: block-scaled products of e4m3 take half as long


def prepare(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    options: dict[str, Any],
    out: Tensor,
    lse: Tensor | None,
    target: Target,
    tile: Tile = TILE,
) -> Launch:
    """The launch that computes checked operands, with at least one row of ``out``.

    ``out (batch, seqlen_q, heads_q, head_dim_v)`` and ``lse (batch, heads_q, seqlen_q)`` may have
    another dimension in front, the parts: the keys are divided among them, and each part's results
    are those of its share of the keys alone.
    """
    parts = out.shape[0] if out.dim() == 5 else 1
    q_data, k_data, v_data = (_readable(x.data) for x in (q, k, v))
    sink = options["learnable_sink"]
    needs_mean = lse is not None or sink is not None or options["softcap"]
    k_mean = k.mean if needs_mean else None
    named = {
        "q": q_data, "k": k_data, "v": v_data,
        "q_scale": q.scale, "k_scale": k.scale, "v_scale": v.scale,
        "q_head_scale": q.head_scale, "k_head_scale": k.head_scale, "v_head_scale": v.head_scale,
        "k_mean": k_mean, "v_mean": v.mean, "sink": sink, "out": out, "lse": lse,
    }  # fmt: skip
    tensors = {
        name: x if name in ("q", "k", "v") else _in_words(x)
        for name, x in named.items()
        if x is not None
    }
    left, right = _window(options, q.seqlen, k.seqlen)
    parameters = Parameters(
        **{name: x.data_ptr() for name, x in tensors.items()},
        q_stride=_strides(q_data, q),
        k_stride=_strides(k_data, k),
        v_stride=_strides(v_data, v),
        batch=q.batch,
        heads_q=q.heads,
        heads_kv=k.heads,
        seqlen_q=q.seqlen,
        seqlen_k=k.seqlen,
        parts=parts,
        window_left=left,
        window_right=right,
        sink_dtype=0 if sink is None else DTYPES[sink.dtype],
        softmax_scale=options["softmax_scale"],
        softcap=options["softcap"],
    )
    v_dtype = v.dtype if v.format == "16bit" else torch.bfloat16  # one variant for both
    steps = Steps(options["softcap"] > 0, sink is not None)
    dims = (q.head_dim, v.head_dim)
    variant = variant_of(q.format, v.format, dims, v_dtype, out.dtype, steps, target, tile)
    blocks = blocks_of(out.shape[-4:-1], tile) * parts
    return Launch(variant, blocks, parameters, tuple(tensors.values()))


def blocks_of(queries: Sequence[int], tile: Tile = TILE) -> int:
    """Of ``(batch, seqlen, heads)``: each has rows of one head."""
    batch, seqlen, heads = queries
    return -(-seqlen // tile.rows) * heads * batch


def parts_of(blocks: int, seqlen_k: int, multiprocessors: int, asked: int = 0) -> int:
    """How many blocks share the keys of the same queries: as many as are asked for, if there are
    tiles for them; else 1 where two of them for each multiprocessor are there without, and then so
    few that each has some tiles of keys, if that saves each enough of them."""
    tiles = -(-seqlen_k // TILE_N)
    if asked:
        return min(asked, tiles)
    parts = max(1, min(MOST_PARTS, tiles // LEAST_TILES, 2 * multiprocessors // blocks))
    return parts if tiles - -(-tiles // parts) >= SAVED_TILES else 1


@functools.cache
def variant_of(
    qk: str,
    pv: str,
    head_dims: tuple[int, int],
    v_dtype: torch.dtype,
    out_dtype: torch.dtype,
    steps: Steps,
    target: Target,
    tile: Tile = TILE,
) -> Variant:
    """The constants that formats, head dims and types ask for."""
    shared = shared_bytes(qk, pv, *head_dims, tile)
    blocks = max(1, _blocks(qk, pv, head_dims, steps, target) * TILE.warps // tile.warps)
    constants = {
        "QK_FORMAT": FORMATS[qk],
        "PV_FORMAT": FORMATS[pv],
        "HEAD_DIM": head_dims[0],
        "HEAD_DIM_V": head_dims[1],
        "DTYPE": DTYPES[v_dtype],
        "OUT_DTYPE": DTYPES[out_dtype],
        "SOFTCAP": int(steps.softcap),
        "SINK": int(steps.sink),
        "MX_E4M3": int(target.mx_e4m3 and "fp8" in (qk, pv)),
        "TRANSPOSES_BYTES": int(target.transposes_bytes),
        "WARPS": tile.warps,
        "STAGE_TILES": tile.stage_tiles,
        "SMEM_BYTES": shared,
        "BLOCKS": blocks,
    }
    name = "_".join([KERNEL, *map(str, constants.values())])
    options = tuple(f"-D{key}={value}" for key, value in constants.items())
    return Variant(name, options, shared, blocks, 32 * tile.warps)


def _blocks(qk: str, pv: str, head_dims: tuple[int, int], steps: Steps, target: Target) -> int:
    """Of a tile of four warps, without spills."""
    if max(head_dims) > 128 or steps.softcap:
        return 1
    transposes_pairs = pv == "fp8" and not target.transposes_bytes
    return 2 if transposes_pairs or (qk, pv) == ("int8", "nvfp4") else 3


def resident_blocks(variant: Variant, shared_of_multiprocessor: int) -> int:
    """On a multiprocessor. 255 registers of a thread are enough for eight warps."""
    by_shared = shared_of_multiprocessor // (variant.shared_bytes + SHARED_RESERVED)
    return max(1, min(by_shared, max(variant.blocks, 256 // variant.threads)))


def shared_bytes(qk: str, pv: str, head_dim: int, head_dim_v: int, tile: Tile = TILE) -> int:
    """Two stages of K and V, or the rows of O in fp32 on their way out."""
    k = TILE_N * _padded(head_dim // 2 if qk == "nvfp4" else head_dim, 32)
    if pv == "nvfp4":
        v = _padded(head_dim_v, 64) * TILE_N // 2
    else:
        v = TILE_N * _padded(head_dim_v if pv == "fp8" else 2 * head_dim_v, 32)
    return max(STAGES * tile.stage_tiles * (k + v), tile.rows * head_dim_v * 4)


def products_of(qk: str, pv: str, head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """Instructions of both products that a warp has in a tile of keys, each of 32 bytes of a row
    of K, or of a column of V."""
    row = head_dim // 2 if qk == "nvfp4" else head_dim
    keys_of_step = {"16bit": 16, "fp8": 32, "nvfp4": 64}[pv]
    return TILE_N // 8 * -(-row // 32), head_dim_v // 8 * TILE_N // keys_of_step


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


def _readable(x: Tensor) -> Tensor:
    """Rows in place where they are contiguous and begin at chunks of 16 bytes, as cp.async wants
    them, or of 8, where a row of a contiguous tensor may."""
    size, row = x.element_size(), x.shape[3] * x.element_size()
    chunk = 16 if row % 16 == 0 else 8
    aligned = x.data_ptr() % chunk == 0 and all(step * size % chunk == 0 for step in x.stride()[:3])
    return x if aligned and x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


def _in_words(x: Tensor) -> Tensor:
    """Contiguous, from a multiple of four bytes on."""
    x = x.contiguous()
    return x if x.data_ptr() % 4 == 0 else x.clone()


def _strides(data: Tensor, x: Quantized) -> Strides:
    """Of V in 4 bits, (batch, heads, dim, tokens), rows are dims."""
    batch, row, head = data.stride()[:3]
    if x.operand == "v" and x.format == "nvfp4":
        row, head = head, row
    return Strides(*(step * data.element_size() for step in (batch, row, head)))


def _window(options: dict[str, Any], seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Keys before and after the diagonal."""
    left, right = options["window_size"]
    right = 0 if options["causal"] else right
    if left is not None and right is not None and left + right < 0:
        left, right = None, 0 if options["causal"] else None  # as everywhere: no window
    # Farther than these no query sees; sums with them stay within an int.
    left = seqlen_k if left is None else max(-seqlen_q, min(left, seqlen_k))
    right = seqlen_q if right is None else max(-seqlen_k - 1, min(right, seqlen_q))
    return left, right
