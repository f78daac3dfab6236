"""Calls without memory: what plans are made of."""

import torch


def shapes(head_dim=128, head_dim_v=None, seqlen_q=1024, seqlen_k=None, heads=(8, 2), batch=1):
    """q, k, v of a shape without its memory: one row seen many times."""

    def make(seqlen, heads, dim):
        return torch.empty(dim, dtype=torch.bfloat16).expand(batch, seqlen, heads, dim)

    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    return (
        make(seqlen_q, heads[0], head_dim),
        make(seqlen_k, heads[1], head_dim),
        make(seqlen_k, heads[1], head_dim_v or head_dim),
    )
