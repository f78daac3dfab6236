"""Dropout: its seeds, which kernels read from memory, so that a CUDA graph draws new ones; and for
calls that torch computes, what ``kernels/philox.h`` drops.
"""

from __future__ import annotations

from typing import Any

import torch


def draw_seed(like: Any) -> torch.Tensor:
    """``[seed, offset]`` from torch's generator of the device of ``like``: every call drops anew.

    torch advances that generator at every replay of a CUDA graph, as for its own dropout.
    """
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=_device_of(like))


def _device_of(x: Any) -> torch.device:
    if isinstance(x, torch.Tensor):
        return x.device
    kind, index = x.__dlpack_device__() if hasattr(x, "__dlpack_device__") else (1, 0)
    return torch.device("cuda", index) if kind in (2, 13) else torch.device("cpu")


# ---- kernels/philox.h in torch -------------------------------------------------------------------

_ROUNDS, _WORD = 7, 0xFFFFFFFF
_QUERY_BIT, _KEY_BITS = 8, 24  # of a query and a key: which weight of a draw is theirs
_Words = tuple[torch.Tensor, torch.Tensor]


def factors(
    seed: torch.Tensor, dropout_p: float, sequence: int, head: torch.Tensor, query: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What weights are multiplied by, at coordinates that broadcast: 0, or 1 / (1 - p)."""
    words = [int(x) >> shift & _WORD for x in seed for shift in (0, 32)]
    threshold = min(int(dropout_p * 65536 + 0.5), 65535)
    head, query, key = (x.long() for x in (head, query, key))
    first, second, stream_key = _stream(words, sequence, head)
    x, y, before = first ^ (query & ~_QUERY_BIT), second ^ (key & ~_KEY_BITS), head
    for i in range(_ROUNDS):
        before = x
        high, low = _product(x, 0xD256D193)
        x, y = high ^ y ^ (stream_key + i * 0x9E3779B9 & _WORD), low
    word = torch.where((query & _QUERY_BIT) != 0, y, x)
    number = (word >> (key & _KEY_BITS) & 0xFF) << 8 | before >> 24
    return (number >= threshold).float() / (1 - threshold / 65536)


def _stream(
    seed: list[int], sequence: int, head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the counters of heads begin, and their keys."""
    a, b, c = (torch.full_like(head, x) for x in (seed[2], seed[3], sequence))
    d = head
    for i in range(_ROUNDS):
        (high_a, low_a), (high_c, low_c) = _product(a, 0xD2511F53), _product(c, 0xCD9E8D57)
        keys = (seed[0] + i * 0x9E3779B9 & _WORD, seed[1] + i * 0xBB67AE85 & _WORD)
        a, b, c, d = high_c ^ b ^ keys[0], low_c, high_a ^ d ^ keys[1], low_a
    return a, b, c


def _product(x: torch.Tensor, factor: int) -> _Words:
    """The upper and the lower word of a product of words, within int64."""
    low, high = (factor & 0xFFFF) * x, (factor >> 16) * x
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), (low & 0xFFFF) | (middle & 0xFFFF) << 16
