"""Rotary embedding in plain PyTorch: ``flash_attn.layers.rotary``.

One call of torch's own operations, whose gradients and compilation it has. A KV cache rotates what
it appends by itself: see :func:`flash_attn_sm120.fa2.flash_attn_with_kvcache`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func"]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """``x`` with its first ``rotary_dim`` dims rotated by each row's position, in float32.

    Args:
        x: ``(batch, seqlen, heads, head_dim)``, or ``(total, heads, head_dim)`` with ``cu_seqlens``
        cos, sin: ``(positions, rotary_dim / 2)``
        interleaved: dims ``2i`` and ``2i + 1`` are rotated together (GPT-J), else ``i`` and ``i +
            rotary_dim / 2`` (GPT-NeoX)
        inplace: write to ``x``, and return it
        seqlen_offsets: the position of a sequence's first row: of all, or ``(batch,)``
        cu_seqlens: ``(batch + 1,)`` int32: the sequences of a packed ``x``
        max_seqlen: not needed

    Rows at positions that ``cos`` and ``sin`` do not have stay as they are where the host does not
    know positions, that is with offsets or lengths on the device.

    Raises:
        ValueError: shapes, or positions known on the host that ``cos`` and ``sin`` do not have.
    """
    _check(x, cos, sin, cu_seqlens)
    if cu_seqlens is None and isinstance(seqlen_offsets, int):
        rows = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        if rows.start < 0 or rows.stop > cos.shape[0]:
            raise ValueError(
                f"cos and sin have {cos.shape[0]} positions, x has {rows.start} to {rows.stop - 1}"
            )
        cos, sin = cos[rows], sin[rows]
    else:
        cos, sin = _rows_of(cos, sin, _positions(x, seqlen_offsets, cu_seqlens))
    return _rotate(x, cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float(), interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb  # its older name


def _check(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> None:
    ndim = 4 if cu_seqlens is None else 3
    if x.ndim != ndim:
        raise ValueError(f"x must have {ndim} dimensions, got {tuple(x.shape)}")
    if cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            "cos and sin must be (positions, rotary_dim / 2) with a rotary_dim of at most "
            f"{x.shape[-1]}, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )


def _positions(x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of each row: ``(batch, seqlen)``, or ``(total,)``."""
    if cu_seqlens is None:
        assert isinstance(seqlen_offsets, Tensor)
        return seqlen_offsets[:, None] + torch.arange(x.shape[1], device=x.device)
    rows = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:-1].contiguous(), rows, right=True)
    first = cu_seqlens[sequence]
    if isinstance(seqlen_offsets, Tensor):
        first = first - seqlen_offsets[sequence]
    else:
        first = first - seqlen_offsets
    return rows - first


def _rows_of(cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of cos and sin at the positions; a rotation by 0 where they have none."""
    nearest = positions.clamp(0, cos.shape[0] - 1)
    missing = (positions != nearest)[..., None]
    return cos[nearest].masked_fill(missing, 1), sin[nearest].masked_fill(missing, 0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inplace: bool) -> Tensor:
    rotary_dim = 2 * cos.shape[-1]
    given = x[..., :rotary_dim].float()
    a, b = (given[..., ::2], given[..., 1::2]) if interleaved else given.chunk(2, dim=-1)
    parts = a * cos - b * sin, a * sin + b * cos
    rotated = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    if inplace:
        x[..., :rotary_dim].copy_(rotated)
        return x
    return torch.cat([rotated.to(x.dtype), x[..., rotary_dim:]], dim=-1)
