"""Calls without memory: what plans are made of, and what they must keep within."""

import torch

SM120_SMEM = 99 * 1024  # bytes that a block may have on 12.x, and on every device here
EVERY_HEAD_DIM = tuple(range(8, 257, 8))


def shapes(
    head_dim=128, head_dim_v=None, seqlen_q=1024, seqlen_k=None, heads=(8, 2), batch=1, tma=False
):
    """q, k, v of a shape without its memory: one row seen many times.

    The strides of those are 0, which no tensor map has. With `tma` they are those of contiguous
    tensors, whose memory is never touched.
    """

    def make(seqlen, heads, dim):
        if tma:
            return torch.empty(batch, seqlen, heads, dim, dtype=torch.bfloat16)
        return torch.empty(dim, dtype=torch.bfloat16).expand(batch, seqlen, heads, dim)

    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    return (
        make(seqlen_q, heads[0], head_dim),
        make(seqlen_k, heads[1], head_dim),
        make(seqlen_k, heads[1], head_dim_v or head_dim),
    )
