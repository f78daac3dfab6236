"""The mean of K and V over their tokens: sums in fp32, added in the order of the kernels
(``kernels/quantize_statistics.cuh``), so that it has the same bits on every device."""

from __future__ import annotations

import torch
from torch import Tensor

THREADS = 256  # of a block
VECTOR = 16  # dims of a thread
LEAST_CHUNK, MOST_CHUNKS = 256, 64  # tokens whose sum is a block's; how many a head has


def chunk_of(seqlen: int) -> int:
    """Tokens of a chunk."""
    return max(LEAST_CHUNK, -(-seqlen // MOST_CHUNKS))


def mean_of(x: Tensor) -> Tensor:
    """(batch, heads, head_dim) of float32 (batch, seqlen, heads, head_dim), seqlen not 0."""
    seqlen, head_dim = x.shape[1], x.shape[3]
    rows = THREADS // (head_dim // VECTOR)  # tokens that a block reads at a time
    power_of_two = 1 << (rows - 1).bit_length()
    # (batch, chunk, step, row, heads, head_dim)
    steps = _split(_split(x, 1, chunk_of(seqlen)), 2, rows)
    sums = torch.zeros_like(steps[:, :, 0])
    for step in steps.unbind(2):
        sums = sums + step
    sums = _split(sums, 2, power_of_two)[:, :, 0]
    while sums.shape[2] > 1:
        half = sums.shape[2] // 2
        sums = sums[:, :, :half] + sums[:, :, half:]
    total = torch.zeros_like(sums[:, 0, 0])
    for chunk in sums[:, :, 0].unbind(1):
        total = total + chunk
    return total / seqlen


def _split(x: Tensor, dim: int, size: int) -> Tensor:
    """A dimension as (parts, size), filled up with zeros."""
    missing = -x.shape[dim] % size
    if missing:
        shape = list(x.shape)
        shape[dim] = missing
        x = torch.cat([x, x.new_zeros(shape)], dim)
    return x.reshape(*x.shape[:dim], x.shape[dim] // size, size, *x.shape[dim + 1 :])
