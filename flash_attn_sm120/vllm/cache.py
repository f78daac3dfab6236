"""vLLM's KV cache, ``(pages, heads_kv, page_size, 2 * head_dim)``: read and written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_sm120 import _C, autograd

_CPU = 1  # as DLPack numbers devices


def keys_and_values(cache: Tensor) -> tuple[Tensor, Tensor]:
    """K and V, ``(pages, page_size, heads_kv, head_dim)``."""
    dim = cache.shape[-1] // 2
    rows = cache.transpose(1, 2)
    return rows[..., :dim], rows[..., dim:]


def write(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Token ``i`` becomes row ``slots[i] % page_size`` of page ``slots[i] // page_size``.

    ``slots`` may be shorter than key and value, which are padded; a negative slot is no place.

    To the kernel that appends, each token is a sequence of one page without queries. It drops rows
    for which there is no room.
    """
    page_size = cache.shape[2]
    tokens = len(slots)
    key, value = key[:tokens], value[:tokens]
    if slots.__dlpack_device__()[0] == _CPU:
        is_place = slots >= 0
        key, value, slots = key[is_place], value[is_place], slots[is_place]
    numbers = slots.to(torch.int32)
    pages = numbers.div(page_size, rounding_mode="floor")
    rows = numbers.remainder(page_size).masked_fill_(numbers < 0, page_size)
    k_cache, v_cache = keys_and_values(cache)
    _C.cache_forward(
        key.new_empty(len(key), 0, *key.shape[1:]),
        k_cache,
        v_cache,
        k=key.unsqueeze(1),
        v=value.unsqueeze(1),
        cache_seqlens=rows,
        page_table=pages.unsqueeze(1),
    )
    autograd.written_in_place(k_cache, v_cache)
