"""Rotary embedding, in torch."""

import torch


def rotate(x, positions, cos, sin, interleaved):
    """Rows x (rows, heads, dim) at their positions, in fp32, rounded to the type of x."""
    pairs = cos.shape[1]
    cos, sin = (table[positions].float()[:, None] for table in (cos, sin))
    rotated, rest = x[..., : 2 * pairs].float(), x[..., 2 * pairs :]
    first = slice(0, None, 2) if interleaved else slice(0, pairs)
    second = slice(1, None, 2) if interleaved else slice(pairs, None)
    y = torch.empty_like(rotated)
    y[..., first] = rotated[..., first] * cos - rotated[..., second] * sin
    y[..., second] = rotated[..., second] * cos + rotated[..., first] * sin
    return torch.cat([y.to(x.dtype), rest], dim=-1)
