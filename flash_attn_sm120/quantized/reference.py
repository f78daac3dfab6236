"""Quantised attention on the CPU: what the kernels are to compute, rounding by rounding.

Per row, in the domain of log2: scores are sums in fp32 of the products of the quantised numbers; m
is their maximum, rounded up to an integer, so that P = 2^(s - m) has the same codes whatever the
tiles, their order and the splits; l is the sum of the unquantised P. Blocks of query rows keep
memory far below that of all scores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flash_attn_sm120.mods.reference import in_window
from flash_attn_sm120.quantized.formats import (
    E2M1_MAX,
    E4M3_MAX,
    from_e2m1,
    from_e8m0,
    groups_of,
    to_e2m1,
    to_e4m3,
    unpack,
)
from flash_attn_sm120.quantized.layout import (
    INT8_ROWS,
    MX_GROUP,
    NV_GROUP,
    Quantized,
    padded,
    v_tokens,
)

BLOCK_SCORES = 1 << 21  # of a block of query rows, of the heads of a KV head
# The largest P is 1. e4m3: 256 leaves the maximum, which lies above 128, in range; as in FA3.
P_SCALE = {"16bit": 1.0, "fp8": 256.0, "nvfp4": E4M3_MAX * E2M1_MAX}


def attend_into(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    options: dict[str, Any],
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """:func:`attend` with results that are there."""
    result, logs = attend(q, k, v, options)
    out.copy_(result)
    if lse is not None:
        lse.copy_(logs)


def fill_without_keys(out: Tensor, lse: Tensor | None, sink: Tensor | None) -> None:
    """What a call without any key returns."""
    out.zero_()
    if lse is not None:
        lse.copy_(torch.full_like(lse, -math.inf) if sink is None else sink[:, None])


def attend(
    q: Quantized, k: Quantized, v: Quantized, options: dict[str, Any],
    block_scores: int = BLOCK_SCORES,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(out, lse)`` in fp32 of checked operands."""
    out = q.data.new_zeros((q.batch, q.seqlen, q.heads, v.head_dim), dtype=torch.float32)
    lse = q.data.new_full((q.batch, q.heads, q.seqlen), -math.inf, dtype=torch.float32)
    sink = options["learnable_sink"]
    if not out.numel() or not k.seqlen:
        fill_without_keys(out, lse, sink)
        return out, lse
    group = q.heads // k.heads
    rows = max(1, block_scores // (group * k.seqlen))
    for b in range(q.batch):
        for h in range(k.heads):
            heads = slice(h * group, (h + 1) * group)
            queries = dequantize(q, b, heads)
            keys, values = dequantize(k, b, slice(h, h + 1)), dequantize(v, b, slice(h, h + 1))
            # K's mean: what it adds to all scores of a row
            left_out = _left_out(q, k, queries, b, h)
            for first in range(0, q.seqlen, rows):
                part = slice(first, min(first + rows, q.seqlen))
                shifts = None if left_out is None else left_out[:, part]
                weighted, logs = _attend_rows(
                    queries[:, part], keys, values, part, q.seqlen, v, shifts, options
                )
                is_empty = logs == -math.inf
                if v.mean is not None:
                    weighted = weighted + v.mean[b, h]
                if sink is not None:
                    weighted, logs = _with_sink(weighted, logs, sink[heads, None].float())
                out[b, part, heads] = weighted.masked_fill(is_empty[..., None], 0).transpose(0, 1)
                lse[b, heads, part] = logs
    return out, lse


def _left_out(q: Quantized, k: Quantized, queries: Tensor, b: int, h: int) -> Tensor | None:
    if k.mean is None:
        return None
    return queries @ k.mean[b, h]


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, rows: slice, seqlen_q: int, source: Quantized,
    left_out: Tensor | None, options: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scale, softcap = options["softmax_scale"], options["softcap"]
    s = q @ k.transpose(1, 2) * scale
    if softcap:
        s = s if left_out is None else s + left_out[..., None] * scale
        s = softcap * torch.tanh(s / softcap)
    query = torch.arange(rows.start, rows.stop)
    distance = query[:, None] + (k.shape[1] - seqlen_q) - torch.arange(k.shape[1])
    seen = in_window(distance, options)
    s = (s * math.log2(math.e)).masked_fill(~seen, -math.inf)
    highest = s.amax(dim=2, keepdim=True)
    is_empty = highest == -math.inf
    m = highest.ceil().masked_fill(is_empty, 0)
    p = torch.exp2(s - m)
    total = p.sum(dim=2, keepdim=True)
    weighted = _product(quantize_p(p, source), v, seen) / (total * P_SCALE[source.format])
    lse = (m + torch.log2(total)) * math.log(2)
    if left_out is not None and not softcap:
        lse = lse + left_out[..., None] * scale
    return weighted, lse.masked_fill(is_empty, -math.inf)[..., 0]


def _with_sink(weighted: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """The sink takes its share of the weights; P keeps its codes, in units of the largest score."""
    share = 1 / (1 + torch.exp(sink - lse))
    return weighted * share[..., None], torch.logaddexp(lse, sink)


def _product(p: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """P @ V, where 0 times the NaN of a masked key is 0."""
    is_nan = v.isnan()
    product = p @ v.masked_fill(is_nan, 0)
    if not is_nan.any():
        return product
    return product.masked_fill(seen.float() @ is_nan.float() > 0, math.nan)


def quantize_p(p: Tensor, v: Quantized) -> Tensor:
    """P times its scale, rounded as the second product reads it."""
    if v.format == "16bit":
        return p.to(v.dtype).float()
    p = p * P_SCALE[v.format]
    if v.format == "fp8":
        return to_e4m3(p).float()
    tokens = v_tokens(padded(p.shape[-1]), p.device)
    stored = torch.nn.functional.pad(p, (0, len(tokens) - p.shape[-1]))[..., tokens]
    groups = groups_of(stored, NV_GROUP)
    # Divided by the scale before it is rounded, as is cheapest in a kernel; multiplied by the
    # rounded one.
    scale = groups.amax(dim=-1, keepdim=True) / E2M1_MAX
    codes = to_e2m1((groups / scale).masked_fill(scale == 0, 0))
    rounded = (from_e2m1(codes) * to_e4m3(scale).float()).flatten(-2)
    return rounded[..., tokens.argsort()][..., : p.shape[-1]]


def dequantize(x: Quantized, b: int, heads: slice) -> Tensor:
    """(heads, seqlen, head_dim) float32, still without the mean, and rotated."""
    if x.operand == "v" and x.format == "nvfp4":
        assert x.scale is not None and x.head_scale is not None
        codes = groups_of(from_e2m1(unpack(x.data[b, heads])), NV_GROUP)
        stored = (codes * x.scale[b, heads].float()[..., None]).flatten(-2)
        where = v_tokens(padded(x.seqlen), stored.device).argsort()[: x.seqlen]
        return stored[..., where].transpose(1, 2) * x.head_scale[b, heads, None, None]
    data = x.data[b, :, heads].transpose(0, 1)
    if x.format == "nvfp4":
        assert x.scale is not None
        groups = groups_of(from_e2m1(unpack(data)), NV_GROUP)
        values = (groups * x.scale[b, :, heads].float().transpose(0, 1)[..., None]).flatten(-2)
    elif x.format == "mxfp8":
        assert x.scale is not None
        groups = groups_of(data.float(), MX_GROUP)
        values = (groups * from_e8m0(x.scale[b, :, heads]).transpose(0, 1)[..., None]).flatten(-2)
    else:
        values = data.float()
    if x.format == "int8":
        assert x.scale is not None
        of_row = x.scale[b, heads].repeat_interleave(INT8_ROWS[x.operand], dim=1)
        values = values * of_row[:, : x.seqlen, None]
    return values if x.head_scale is None else values * x.head_scale[b, heads, None, None]
