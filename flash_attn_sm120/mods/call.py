"""What a call is apart from its mods."""

from __future__ import annotations

from typing import Any, NamedTuple


class Call(NamedTuple):
    q: Any
    k: Any
    v: Any
    sink: Any  # None where there is none
    tensors: dict[str, Any]  # lengths, pages, slopes, seed: those that it has
    options: dict[str, Any]  # and lists of blocks
