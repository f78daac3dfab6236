"""Masks of other programs as the ``attn_bias`` of :func:`flash_attn_sm120.flash_attn_func`."""

from __future__ import annotations

import torch
from torch import Tensor


def as_bias(mask: Tensor, query: Tensor) -> Tensor:
    """What a mask adds to scores: 0, or -inf where a boolean one is False; else itself, in float32
    or the dtype of ``query``."""
    if mask.dtype is torch.bool:
        return torch.where(mask, query.new_zeros(()), -torch.inf)
    return mask if mask.dtype is torch.float32 else mask.to(query.dtype)


def in_rows(x: Tensor) -> Tensor:
    """As kernels read it: contiguous in the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()
