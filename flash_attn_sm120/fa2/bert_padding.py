"""Padded batches to packed sequences and back: ``flash_attn.bert_padding``.

Rows are moved by torch's own indexing, whose gradients these functions have.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """``input[indices]``: rows of the first dimension."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """A tensor of ``first_axis_dim`` rows: ``values`` at ``indices``, which differ, else zeros."""
    rows = values.new_zeros(first_axis_dim, *values.shape[1:])
    return rows.index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of a padded batch that its masks have, one after the other.

    Args:
        hidden_states: ``(batch, seqlen, ...)``
        attention_mask: ``(batch, seqlen)``, bool or 0 and 1: what is used
        unused_mask: the same: what is packed, too, but not used

    Returns:
        The rows ``(total, ...)``, their ``indices (total,)`` in ``(batch * seqlen)``, ``cu_seqlens
        (batch + 1,)`` int32, ``max_seqlen``, for which the host waits, and ``seqused (batch,)``
        int32: of how many rows ``attention_mask`` has.
    """
    packed_mask = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = packed_mask.sum(dim=-1, dtype=torch.int32)
    seqused = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(packed_mask.flatten()).flatten()
    cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    max_seqlen = int(lengths.max()) if len(lengths) else 0
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, max_seqlen, seqused


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The rows that :func:`unpad_input` took, back in ``(batch, seqlen, ...)``; zeros elsewhere."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.view(batch, seqlen, *rows.shape[1:])
