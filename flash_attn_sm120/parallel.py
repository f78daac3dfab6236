"""Context parallelism: attention of sequences whose rows are spread over the ranks of a group.

Every rank has rows of q, k and v, and gets the rows of out that belong to its q. Keys and values
come to the queries: piece by piece around a ring (:func:`ring_flash_attn_func`), or all at once
(:func:`gathered_flash_attn_varlen_func`). What a query has seen of each piece is put together by
its log-sum-exp (:func:`merge`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from flash_attn_sm120 import ops
from flash_attn_sm120.interface import flash_attn_varlen_func
from flash_attn_sm120.plan import ScalarOptions, Window


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from that over each alone.

    Args:
        out_a, out_b: ``(batch, seqlen, heads, head_dim)``, or ``(total, heads, head_dim)``.
        lse_a, lse_b: ``(batch, heads, seqlen)``, or ``(heads, total)``, float32. A row of -inf has
            seen no key, in one of the two or in both.

    Returns:
        ``(out, lse)`` of the same shapes; out in the wider of the two types. Gradients flow through
        all four arguments. A row that saw no key in either has out 0 and lse -inf.
    """
    highest = torch.maximum(lse_a, lse_b).detach()
    base = highest.where(highest.isfinite(), 0.0)
    a, b = (lse_a - base).exp(), (lse_b - base).exp()
    has_keys = highest != -math.inf
    total = (a + b).where(has_keys, 1.0)  # so that no gradient is 0 / 0
    lse = (base + total.log()).where(has_keys, -math.inf)
    dtype = torch.promote_types(out_a.dtype, out_b.dtype)
    return (out_a * _by_row(a / total) + out_b * _by_row(b / total)).to(dtype), lse


def _by_row(weight: Tensor) -> Tensor:
    """(..., heads, rows) as (..., rows, heads, 1)."""
    return weight.transpose(-1, -2).unsqueeze(-1)


# ---- who has which rows --------------------------------------------------------------------------


def shard(x: Tensor, rank: int, size: int, *, dim: int = 1, zigzag: bool = False) -> Tensor:
    """The rows of ``x`` that rank ``rank`` of ``size`` has: its part of equal parts, in order.

    Args:
        x: a tensor of whole sequences.
        rank: in the group.
        size: of the group.
        dim: of the rows, a multiple of ``size``, or with ``zigzag`` of twice that.
        zigzag: parts ``rank`` and ``2 * size - 1 - rank`` of ``2 * size``, one behind the other: so
            all ranks have as much to do where attention is causal.
    """
    chunks = _chunks_of(rank, size, zigzag)
    count = size * len(chunks)
    if x.shape[dim] % count:
        raise ValueError(f"{x.shape[dim]} rows cannot be divided into {count} equal parts")
    parts = x.chunk(count, dim)
    return torch.cat([parts[i] for i in chunks], dim)


def _chunks_of(rank: int, size: int, zigzag: bool) -> tuple[int, ...]:
    return (rank, 2 * size - 1 - rank) if zigzag else (rank,)


class _Block(NamedTuple):
    """Rows of the local queries, rows of the keys that are here, and what those see of these."""

    queries: slice
    keys: slice
    window: Window


class _Ring(NamedTuple):
    """A rank's place in its group, and how rows and window lie."""

    group: Any  # of torch.distributed; None: all ranks
    rank: int
    size: int
    zigzag: bool
    seqlen_q: int  # local
    seqlen_k: int
    left: int | None  # the window, aligned bottom right of the whole
    right: int | None

    def source(self, step: int) -> int:
        """Whose keys are here in a step."""
        return (self.rank - step) % self.size

    def blocks(self, source: int) -> Iterator[_Block]:
        """The pairs of chunks that see something of each other."""
        chunks_q = _chunks_of(self.rank, self.size, self.zigzag)
        chunks_k = _chunks_of(source, self.size, self.zigzag)
        rows, keys = self.seqlen_q // len(chunks_q), self.seqlen_k // len(chunks_k)
        count = self.size * len(chunks_q)
        for i, chunk_q in enumerate(chunks_q):
            for j, chunk_k in enumerate(chunks_k):
                # By how much the diagonal of the whole is off that of the block.
                shift = chunk_q * rows - chunk_k * keys + (count - 1) * (keys - rows)
                left = None if self.left is None else self.left - shift
                right = None if self.right is None else self.right + shift
                if (left is not None and left <= -rows) or (right is not None and right <= -keys):
                    continue
                if left is not None and left >= keys - 1:
                    left = None
                if right is not None and right >= rows - 1:
                    right = None
                queries = slice(i * rows, (i + 1) * rows)
                yield _Block(queries, slice(j * keys, (j + 1) * keys), (left, right))

    def pass_on(self, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        """Starts to send to the next rank, and to receive from the one before; the result waits."""
        following, before = (
            self._global_rank((self.rank + step) % self.size) for step in (1, self.size - 1)
        )
        sent = [x.contiguous() for x in tensors]
        received = [torch.empty_like(x) for x in sent]
        transfers = []
        for x, y in zip(sent, received, strict=True):
            transfers.append(dist.P2POp(dist.isend, x, following, self.group))
            transfers.append(dist.P2POp(dist.irecv, y, before, self.group))
        works = dist.batch_isend_irecv(transfers)

        def wait(sent: list[Tensor] = sent) -> list[Tensor]:  # which it keeps in memory
            for work in works:
                work.wait()
            return received

        return wait

    def _global_rank(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


# ---- the ring ------------------------------------------------------------------------------------


def ring_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    zigzag: bool = False,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    softcap: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """:func:`flash_attn_func` of sequences that are spread over the ranks of a group.

    Each step computes with the keys that are here while the next ones arrive. Steps in which
    nothing is visible, as half of them are where attention is causal, only pass keys on. Partial
    results and the gradients of k and v are summed in float32.

    Args:
        q: ``(batch, seqlen_q, heads_q, head_dim)``, the rows of this rank: those of :func:`shard`.
        k, v: the same, of as many keys on every rank as of any other.
        group: a process group of torch.distributed; None: all ranks. All of them make the call.
        zigzag: how :func:`shard` has dealt the rows out.
        softmax_scale, causal, window_size, softcap, deterministic, return_lse: as in
            :func:`flash_attn_func`; causal and window are those of the whole sequences.

    Returns:
        ``(out, lse)``: the rows of this rank. Gradients flow through both.

    Raises:
        ValueError: a number of rows that has no two halves, with ``zigzag``.
    """
    if zigzag and (q.shape[1] % 2 or k.shape[1] % 2):
        raise ValueError(
            f"zigzag needs an even number of rows, got {q.shape[1]} of q and {k.shape[1]} of k"
        )
    left, right = (None, None) if window_size is None else window_size
    right = 0 if causal else right
    if left is not None and right is not None and left + right < 0:
        left, right = None, 0 if causal else None  # no window, as in flash_attn_func
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    ring = _Ring(group, rank, size, zigzag, q.shape[1], k.shape[1], left, right)
    options: ScalarOptions = {
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "deterministic": deterministic,
    }
    out, lse = _ring_attention(ring, options, q, k, v)
    return out, lse if return_lse else None


class _RingAttention(Function):
    """Keeps the local q, k, v, out and lse; the backward passes k and v around once more."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, ring: _Ring, options: ScalarOptions, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, *(results := _ring_forward(ring, options, q, k, v)))
        ctx.ring, ctx.options = ring, options
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[no-untyped-def]
        ctx, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        tensors = (dout, dlse, q, k, v, out, lse)
        return None, None, *_ring_backward(ctx.ring, ctx.options, *tensors)


_ring_attention: Any = _RingAttention.apply


def _ring_forward(
    ring: _Ring, options: ScalarOptions, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_zeros((batch, seqlen_q, heads, v.shape[3]), dtype=torch.float32)
    lse = q.new_full((batch, heads, seqlen_q), -math.inf, dtype=torch.float32)
    for step in range(ring.size):
        is_last = step + 1 == ring.size
        arriving = None if is_last else ring.pass_on(k, v)
        for rows, keys, window in ring.blocks(ring.source(step)):
            block = ops.run_forward(
                {**options, "window_size": window}, q[:, rows], k[:, keys], v[:, keys], None
            )
            so_far = out[:, rows], lse[:, :, rows]
            out[:, rows], lse[:, :, rows] = merge(*so_far, *block)
        if arriving:
            k, v = arriving()
    return out.to(q.dtype), lse


def _ring_backward(
    ring: _Ring,
    options: ScalarOptions,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv). With out and lse of all keys, each block's gradients are a term of the whole's.

    dk and dv travel with k and v, a step behind, and are home after the last.
    """
    dtype = q.dtype
    dq = torch.zeros_like(q, dtype=torch.float32)
    travelling = None
    for step in range(ring.size):
        is_last = step + 1 == ring.size
        arriving = None if is_last else ring.pass_on(k, v)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for rows, keys, window in ring.blocks(ring.source(step)):
            terms: Any = ops.run_backward(
                {**options, "window_size": window},
                dout[:, rows],
                None if dlse is None else dlse[:, :, rows],
                q[:, rows],
                k[:, keys],
                v[:, keys],
                None,
                out[:, rows],
                lse[:, :, rows],
            )
            for gradient, term in zip(
                (dq[:, rows], dk[:, keys], dv[:, keys]), terms[:3], strict=True
            ):
                gradient += term
        if travelling:
            for gradient, so_far in zip((dk, dv), travelling(), strict=True):
                gradient += so_far
        if ring.size > 1:
            travelling = ring.pass_on(dk, dv)
        if arriving:
            k, v = arriving()
    if travelling:
        dk, dv = travelling()
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


# ---- packed sequences ----------------------------------------------------------------------------


def gathered_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    group: Any = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    softcap: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """:func:`flash_attn_varlen_func` of packed sequences whose rows are spread over a group.

    The packed rows of all sequences are cut into as many equal parts as there are ranks, wherever
    that is; a sequence may lie on several. k and v of all ranks are gathered first, and their
    gradients summed in float32 and scattered after: no rank holds more than all of k and v. Lengths
    stay on the device.

    Args:
        q: ``(total / ranks, heads_q, head_dim)``, the rows of this rank: ``shard(dim=0)``.
        k, v: the same rows.
        cu_seqlens: ``(batch + 1,)`` int32, of the whole, the same on every rank.
        group: a process group of torch.distributed; None: all ranks. All of them make the call.
        max_seqlen: no sequence is longer.
        softmax_scale, causal, softcap, deterministic, return_lse: as in
            :func:`flash_attn_varlen_func`.
        window_size: as there; only with ``causal``.

    Returns:
        ``(out, lse)``: the rows of this rank. Gradients flow through both.

    Raises:
        NotImplementedError: a window without ``causal``.
    """
    left, right = (None, None) if window_size is None else window_size
    if not causal and (left is not None or right is not None):
        raise NotImplementedError(
            "gathered_flash_attn_varlen_func does not support a window without causal yet"
        )
    rows = q.shape[0]
    begin = rows * dist.get_rank(group)
    # No local row sees a key behind the last of them. Without those keys the diagonal of what lies
    # here of a sequence is where causal has it, bottom right.
    begins, ends = cu_seqlens[:-1], cu_seqlens[1:]
    used = (ends.clamp(max=begin + rows) - begins).clamp(min=0) if causal else None
    return flash_attn_varlen_func(
        q,
        _gather(k, group),
        _gather(v, group),
        cu_seqlens_q=(cu_seqlens - begin).clamp(0, rows),
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=None if max_seqlen is None else min(max_seqlen, rows),
        max_seqlen_k=max_seqlen,
        seqused_k=used,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(left, right),
        softcap=softcap,
        deterministic=deterministic,
        return_lse=return_lse,
    )


# PyTorch 2.13 has new names for both.
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _Gather(Function):
    """The rows of all ranks, in order; back, the sum of what all ranks say of one's own."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        gathered = x.new_empty((x.shape[0] * dist.get_world_size(group), *x.shape[1:]))
        _all_gather(gathered, x.contiguous(), group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        own = gradient.shape[0] // dist.get_world_size(ctx.group)
        total = gradient.new_empty((own, *gradient.shape[1:]), dtype=torch.float32)
        _reduce_scatter(total, gradient.float().contiguous(), group=ctx.group)
        return total.to(gradient.dtype), None


_gather: Any = _Gather.apply
