"""Attention with mods in plain torch, in fp32: what calls of CPU tensors are, and what mods mean.

Torch runs the traced graphs over blocks of indices; its autograd makes the gradients, those of
captured tensors, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from flash_attn_sm120 import dropout
from flash_attn_sm120.block_mask import pairs_of
from flash_attn_sm120.mods.call import Call
from flash_attn_sm120.mods.trace import Trace
from flash_attn_sm120.mods.translate import SAME_VALUE

BLOCK_SCORES = 1 << 20  # of a block of query rows, of all heads


class _Sequence(NamedTuple):
    number: int
    q: torch.Tensor  # (seqlen_q, heads_q, head_dim)
    k: torch.Tensor
    v: torch.Tensor
    place: tuple[Any, ...]  # of its rows in out


def attend(mods: dict[str, Trace], call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of a checked call."""
    q, k, v, sink, tensors, options = call
    is_packed = tensors.get("cu_seqlens_q") is not None
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    heads_first = (q.shape[-2], q.shape[0]) if is_packed else (q.shape[0], q.shape[-2], q.shape[1])
    lse = q.new_full(heads_first, -math.inf, dtype=torch.float32)
    for sequence in _sequences(q, k, v, tensors):
        with torch.autocast(q.device.type, enabled=False):  # which would round products
            rows, logs = _attend(sequence, sink, mods, tensors, options)
        out[sequence.place] = rows.to(q.dtype)
        where = (slice(None), *sequence.place) if is_packed else (
            sequence.number, slice(None), sequence.place[1]
        )  # fmt: skip
        lse[where] = logs
    return out, lse


def _sequences(q: Any, k: Any, v: Any, tensors: dict[str, Any]) -> Iterator[_Sequence]:
    cu_q, cu_k = tensors.get("cu_seqlens_q"), tensors.get("cu_seqlens_k")
    used_q, used_k = tensors.get("seqused_q"), tensors.get("seqused_k")
    table = tensors.get("page_table")
    batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    for b in range(batch):
        q_rows = slice(0, q.shape[1]) if cu_q is None else slice(int(cu_q[b]), int(cu_q[b + 1]))
        if used_q is not None:
            q_rows = slice(q_rows.start, q_rows.start + int(used_q[b]))
        place = (b, q_rows) if cu_q is None else (q_rows,)
        if table is not None:
            keys, values = (x[table[b].long()].flatten(0, 1) for x in (k, v))
        elif cu_k is not None:
            keys, values = (x[int(cu_k[b]) : int(cu_k[b + 1])] for x in (k, v))
        else:
            keys, values = k[b], v[b]
        if used_k is not None:
            keys, values = (x[: int(used_k[b])] for x in (keys, values))
        yield _Sequence(b, q[place], keys, values, place)


def _attend(
    sequence: _Sequence, sink: Any, mods: Any, tensors: Any, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (x.float().transpose(0, 1) for x in sequence[1:4])  # heads first
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    rows = max(1, BLOCK_SCORES // max(1, q.shape[0] * k.shape[1]))
    parts = [
        _attend_rows(sequence.number, q, k, v, range(first, min(first + rows, q.shape[1])), sink,
                     mods, tensors, options)
        for first in range(0, max(1, q.shape[1]), rows)
    ]  # fmt: skip
    out, lse = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    return out.transpose(0, 1), lse


def _attend_rows(
    batch: int, q: Any, k: Any, v: Any, rows: range, sink: Any, mods: Any, tensors: Any,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    scale, softcap = options.get("softmax_scale"), options.get("softcap")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    s = scale * q[:, rows.start : rows.stop] @ k.transpose(1, 2)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    device = q.device
    query = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int32)
    key = torch.arange(k.shape[1], device=device, dtype=torch.int32)
    head = torch.arange(q.shape[0], device=device, dtype=torch.int32)
    grid = torch.meshgrid(head, query, key, indexing="ij")
    coords = [torch.full_like(grid[0], batch), *grid]
    distance = query[:, None] + (k.shape[1] - q.shape[1]) - key
    seen = in_window(distance, options).expand(s.shape)
    if "score_mod" in mods:
        s = _map(mods["score_mod"], s, *coords)
    slopes = tensors.get("alibi_slopes")
    if slopes is not None:
        slope = slopes[batch] if slopes.dim() == 2 else slopes
        s = s - slope[:, None, None] * distance.abs()
    asked = _map(mods["mask_mod"], *coords) if "mask_mod" in mods else True
    if "key_blocks" in options:
        partial, full = pairs_of(options["key_blocks"], batch, query, key)
        asked = full | partial & asked
    seen = seen & asked
    p = options.get("dropout_p")
    kept = dropout.factors(tensors["dropout_seed"], p, batch, *grid) if p else 1
    return _weigh(s.masked_fill(~seen, -math.inf), v, sink, kept)


def _map(graph: Trace, *grids: torch.Tensor) -> torch.Tensor:
    """The graph over grids of numbers in place of single ones: all its operations are elementwise,
    once captured tensors have all their indices."""
    values: dict[fx.Node, Any] = {}
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, (*grids, *graph.captured), strict=True):
        values[node] = value
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            values[node] = getattr(graph.graph.owning_module, str(node.target))
        elif node.op == "call_function":
            values[node] = _run(node, *fx.map_arg((node.args, node.kwargs), values.__getitem__))
        elif node.op == "output":
            result: torch.Tensor = fx.map_arg(node.args[0], values.__getitem__)
    return result.expand(grids[0].shape)


def _run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    if name in SAME_VALUE:
        return args[0]
    if name not in ("index", "select"):
        return node.target(*args, **kwargs)  # type: ignore[operator]
    tensor, before = args[0] if isinstance(args[0], tuple) else (args[0], ())
    indices = (*before, *(args[1] if name == "index" else (torch.tensor(args[2]),)))
    if node.meta["val"].dim():
        return tensor, indices
    sizes = tensor.shape
    inside = [(x.long() + n * (x < 0)).clamp(0, n - 1) for x, n in zip(indices, sizes, strict=True)]
    if not tensor.requires_grad:
        return tensor[tuple(inside)]
    # Torch adds up the gradient one by one, where in fp32 threads do so in any order.
    return tensor.double()[tuple(inside)].to(tensor.dtype)


def in_window(distance: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Keys before the diagonal have a positive distance."""
    left, right = options.get("window_size") or (None, None)
    causal = options.get("causal")
    right = 0 if causal else right
    if left is not None and right is not None and left + right < 0:
        left, right = None, 0 if causal else None
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        seen &= distance <= left
    if right is not None:
        seen &= distance >= -right
    return seen


def _weigh(
    s: torch.Tensor, v: torch.Tensor, sink: Any, kept: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax in a form whose gradient is 0, not NaN, in rows that see no key; weights count
    ``kept`` times."""
    if sink is not None:
        s = torch.cat([s, sink.float()[:, None, None].expand(*s.shape[:2], 1)], dim=2)
    if not s.shape[2]:
        return s.new_zeros((*s.shape[:2], v.shape[2])), s.new_full(s.shape[:2], -math.inf)
    is_empty = (s == -math.inf).all(dim=2)
    s = s.masked_fill(is_empty[..., None], 0)
    lse = torch.logsumexp(s, dim=2)
    p = (s - lse[..., None]).exp().masked_fill(is_empty[..., None], 0)
    return (kept * p[..., : v.shape[1]]) @ v, lse.masked_fill(is_empty, -math.inf)
