"""The texts that take the place of kernels/score_mod.cuh and mask_mod.cuh, by their numbers.

A variant holds the number, a digest of the text: two equal mods are one variant. The text itself is
an ingredient of the key under which a kernel is cached on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

FILES = {"SCORE_MOD": "score_mod.cuh", "MASK_MOD": "mask_mod.cuh"}

_texts: dict[int, str] = {}


def register(text: str) -> int:
    """The number of a text, from 1 to 2^31 - 1."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1 or 1
    while _texts.setdefault(number, text) != text:  # another text of the same digest
        number = number % 0x7FFFFFFF + 1
    return number


def of(options: Iterable[str]) -> dict[str, bytes]:
    """File name -> text, of the mods among the compiler's options.

    Raises:
        RuntimeError: no callable of this process has that number.
    """
    files = {}
    for option in options:
        name, _, number = option.removeprefix("-D").partition("=")
        if name not in FILES or number == "0":
            continue
        if int(number) not in _texts:
            raise RuntimeError(f"{option}: this process has traced no such mod")
        files[FILES[name]] = _texts[int(number)].encode()
    return files


def text(number: int) -> str:
    return _texts[number]
