"""vLLM's KV cache, ``(pages, heads_kv, page_size, 2 * head_dim)``: read and written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_sm120 import _C, autograd


def keys_and_values(cache: Tensor) -> tuple[Tensor, Tensor]:
    """K and V, ``(pages, page_size, heads_kv, head_dim)``."""
    dim = cache.shape[-1] // 2
    rows = cache.transpose(1, 2)
    return rows.narrow(3, 0, dim), rows.narrow(3, dim, dim)  # faster than indices or split()


def write(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slots: Tensor,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Token ``i`` becomes row ``slots[i] % page_size`` of page ``slots[i] // page_size``.

    ``slots`` are int64 and may be fewer than the tokens of key and value, which are padded. A
    negative slot is none. To a cache in float8_e4m3fn go rows divided by the descales. One kernel,
    and no copy: the low halves of the slots are numbers, too.
    """
    k_cache, v_cache = keys_and_values(cache)
    _C.scatter(key, value, k_cache, v_cache, slots.view(torch.int32)[::2], k_descale, v_descale)
    autograd.written_in_place(k_cache, v_cache)
