"""What ``demo`` and ``check`` compute with: random tensors, and attention in plain PyTorch."""

from __future__ import annotations

import torch

from flash_attn_sm120 import _measure


def normal(
    device: str, dtype: torch.dtype, seqlen: int, heads: tuple[int, ...], head_dim: int
) -> list[torch.Tensor]:
    """Random tensors with a mean that is not zero, (1, seqlen, h, head_dim) for each h of heads."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(1, seqlen, h, head_dim, generator=generator, device=device).add_(0.5).to(dtype)
        for h in heads
    ]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Plain PyTorch, every step in the dtype of the inputs, for seqlen_q == seqlen_k.

    One KV head at a time: the scores of all of them may not fit the GPU.
    """
    seqlen, heads_kv = q.shape[1], k.shape[2]
    visible = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device)
    visible = visible.tril() if causal else visible
    of_heads = [
        _measure.plain_attention(q_group, k[:, None, :, h], v[:, None, :, h], visible)
        for h, q_group in enumerate(q.transpose(1, 2).chunk(heads_kv, dim=1))
    ]
    return torch.cat(of_heads, dim=1).transpose(1, 2)


def in_pages(x: torch.Tensor, table: torch.Tensor, page_size: int) -> torch.Tensor:
    """The rows of ``x (1, seqlen, heads, dim)`` in the pages that ``table`` has, in its order."""
    cache = x.new_zeros(len(table), page_size, *x.shape[2:])
    for page, rows in zip(table.tolist(), torch.split(x[0], page_size), strict=True):
        cache[page, : len(rows)] = rows
    return cache
