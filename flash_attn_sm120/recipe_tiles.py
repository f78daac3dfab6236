"""Tiles of the kernel of recipes that ``tune`` measured: rows as those of csrc/tiles.h, in Python.

A row serves calls of its formats (``formats.FORMATS``) and mask, up to its bounds, that are above
others; the first that does is taken, and where none does, the kernel's own tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ANY = -1  # a bound that is none
WARP_M = 16  # queries of a warp


class Key(NamedTuple):
    """Which calls a row serves; and what a call has."""

    arch: int
    qk_format: int
    pv_format: int
    head_dim: int
    head_dim_v: int
    rows_per_sm: float
    mask_right: int


class Tile(NamedTuple):
    """What a block has. Results do not depend on it, but for the order of sums."""

    warps: int = 4
    stage_tiles: int = 1  # of keys, that come at a time

    @property
    def rows(self) -> int:
        """Queries of a block."""
        return self.warps * WARP_M


BOUNDS = ("head_dim", "head_dim_v", "rows_per_sm")
_FIXED = ("qk_format", "pv_format", "mask_right")
_rows: list[tuple[Key, Tile, tuple[int, ...]]] = []


def use(rows: Sequence[tuple[int, ...]]) -> None:
    """These from now on: the fields of Key and Tile, then what a call has to be above.

    Raises:
        ValueError: a row has other fields, or a tile that the kernel has not got.
    """
    keys, tiles = len(Key._fields), len(Tile._fields)
    found = []
    for row in rows:
        if len(row) not in (keys + tiles, keys + tiles + len(BOUNDS)):
            raise ValueError(f"a row of recipes has {keys + tiles} fields, got {len(row)}")
        tile = Tile(*row[keys : keys + tiles])
        if tile.warps not in (4, 8) or tile.stage_tiles not in (1, 2):
            raise ValueError(f"the kernel of recipes has no tile of {tuple(tile)}")
        above = row[keys + tiles :] or (0,) * len(BOUNDS)
        found.append((Key(*row[:keys]), tile, tuple(above)))
    _rows[:] = found


def find(call: Key) -> Tile | None:
    """The tile of the first row that serves a call."""
    for key, tile, above in _rows:
        if _serves(key, above, call):
            return tile
    return None


def _serves(key: Key, above: tuple[int, ...], call: Key) -> bool:
    if key.arch // 10 != call.arch // 10:
        return False
    if any(getattr(key, name) != getattr(call, name) for name in _FIXED):
        return False
    for name, least in zip(BOUNDS, above, strict=True):
        most, own = getattr(key, name), getattr(call, name)
        if own <= least or (most != ANY and own > most):
            return False
    return True
