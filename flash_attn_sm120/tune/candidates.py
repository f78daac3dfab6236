"""The candidates of a cell: tiles that may be fast, each on the calls by which it is measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flash_attn_sm120 import _C, tuned_tiles
from flash_attn_sm120.interface import flash_attn_varlen_func
from flash_attn_sm120.plan import Plan, explain
from flash_attn_sm120.tune.grid import BUCKETS, Cell
from flash_attn_sm120.tuned_tiles import ANY, Row

Choices = dict[str, tuple[int, ...]]

# Fields of csrc/tiles.h and what to try in them; all others stay as the fallback has them.
CHOICES: Choices = {
    "tile_n": (16, 32, 64, 128),
    "sub_n": (16, 32, 64),
    "warps": (2, 4, 8),
    "warp_m": (16, 32),
    "stages": (2, 3, 4, 6),
}
QUICK_CHOICES: Choices = {
    "tile_n": (32, 64),
    "sub_n": (16, 32, 64),
    "warps": (4, 8),
    "warp_m": (16, 32),
    "stages": (2, 3),
}

# Of struct fa_backward_tile.
BACKWARD_CHOICES: Choices = {
    "warps": (4, 8, 16),
    "warp_n": (16, 32, 64),
    "tile_m": (32, 64, 128),
    "sub_m": (16, 32, 64),
    "stages": (1, 2),
}

# How K and V come to shared memory, by the names that csrc/tiles.c has for it.
CP_ASYNC = {"kernel": 0, "producer": 0}
FEEDS = {
    "CP_ASYNC": CP_ASYNC,
    "TMA_BARRIER": {"kernel": 1, "producer": 0},
    "TMA_THREAD": {"kernel": 1, "producer": 1},
    "TMA_WARP": {"kernel": 1, "producer": 2},
}


def candidate_rows(cell: Cell, fallback: Row, arch: int, choices: Choices) -> Iterator[Row]:
    """Rows that may be worth compiling; whether they fit the device is not asked yet."""
    for values in itertools.product(*choices.values()):
        row = fallback | cell.key(arch) | CP_ASYNC | dict(zip(choices, values, strict=True))
        if _is_promising(row, cell):
            yield row


def _is_promising(row: Row, cell: Cell) -> bool:
    """False, without asking a compiler, for what cannot run or would be slow on every GPU."""
    tile_m, ring = row["warps"] * row["warp_m"], row["stages"] * row["tile_n"]
    # Registers that a thread holds throughout: O, Q, the scores in fp32 and again in 16 bits.
    held = row["warp_m"] * (
        cell.head_dim_v / 32 + cell.head_dim / 64 + row["sub_n"] / 32 + row["sub_n"] / 64
    )
    return (
        row["tile_n"] % row["sub_n"] == 0
        and 64 <= ring <= 256  # fewer keys do not hide the latency of memory, more hide nothing
        and held <= 224  # of 255
        and row["warp_m"] * row["sub_n"] >= 512  # fewer mma at a time leave the tensor cores idle
        and (row["warps"] > 2 or cell.bucket.upto == BUCKETS[0].upto)
        and (cell.bucket.upto == ANY or tile_m <= 2 * cell.bucket.upto)
    )


def backward_tiles(head_dim: int, head_dim_v: int, choices: Choices) -> Iterator[Row]:
    """The tiles of the backward that may be worth compiling."""
    for values in itertools.product(*choices.values()):
        tile = dict(zip(choices, values, strict=True))
        if _is_promising_backward(tile, max(head_dim, head_dim_v)):
            yield tile


def _is_promising_backward(tile: Row, head_dim: int) -> bool:
    """As above."""
    group_warps, fragments = tile["warps"] // 2, tile["tile_m"] // 2 * head_dim // 32
    # Registers that a thread holds: K or V in 16 bits, dV or dK in fp32, and then a sub-tile of
    # scores, or its part of dQ.
    held = tile["warp_n"] * (head_dim / 64 + head_dim / 32)
    held += max(tile["sub_m"] * tile["warp_n"] / 32, fragments / group_warps)
    return (
        2 * tile["sub_m"] <= tile["tile_m"]
        and tile["tile_m"]
        >= min(4096 // head_dim, 128)  # fewer products do not hide a tile's barriers
        and (tile["sub_m"] * tile["warp_n"] >= 512 or head_dim > 128)  # nor an mma's latency
        and 64 <= group_warps * tile["warp_n"] <= 256  # keys
        and held <= (112 if tile["warps"] > 8 else 232)  # of 128, of 255
    )


def describe_tile(row: Row) -> dict[str, Any]:
    """What a row says of the tile, in words."""
    feeds = [name for name, feed in FEEDS.items() if feed.items() <= row.items()]
    return {**{name: row[name] for name in CHOICES}, "feed": feeds[0]}


class Call(NamedTuple):
    """The inputs of a measured call."""

    q: Any
    k: Any
    v: Any
    causal: bool
    lengths: dict[str, Any]  # of packed sequences; empty where q, k and v have a batch

    def plan(self, rows: Sequence[tuple[int, ...]]) -> Plan:
        """How the call is carried out where ``rows`` come before csrc/tiles.c."""
        _C.use_tiles(rows)
        return explain(self.q, self.k, self.v, **self.lengths, causal=self.causal, num_splits=1)

    def plan_with(self, row: tuple[int, ...]) -> Plan | None:
        """The plan with ``row``; None where the row does not serve the call, or does not fit."""
        try:
            plan = self.plan([row])
        except ValueError:  # a tile that no kernel has
            return None
        return plan if "use_tiles" in plan.reasons["tile"] else None


class Candidate(NamedTuple):
    """A tile on the calls of a cell. The fallback is one, too, which needs no row in the table."""

    row: Row
    rows: tuple[tuple[int, ...], ...]  # what comes before csrc/tiles.c: the row, or nothing
    calls: tuple[Call, ...]
    plans: tuple[Plan, ...]  # one for each call

    @classmethod
    def of_row(cls, row: Row, calls: tuple[Call, ...]) -> Candidate | None:
        """None where the row does not serve all the calls, or does not fit."""
        own = tuned_tiles.as_tuple(row)
        plans = tuple(plan for call in calls if (plan := call.plan_with(own)))
        return cls(row, (own,), calls, plans) if len(plans) == len(calls) else None

    @classmethod
    def fallback(cls, calls: tuple[Call, ...]) -> Candidate:
        """What csrc/tiles.c has for the first call: the first row that alone would serve it."""
        plans = tuple(call.plan(()) for call in calls)
        own = next(row for row in _C.tiles() if calls[0].plan_with(row))
        return cls(dict(zip(_C.tile_fields(), own, strict=True)), (), calls, plans)

    @property
    def name(self) -> str:
        """The variant of its kernel."""
        return str(self.plans[0].variant)

    def run(self, i: int) -> Any:
        """The output of the call ``i``."""
        return self._call(i)[0]

    def results(self, i: int) -> tuple[Any, Any]:
        """And its lse."""
        return self.run(i), self._call(i, return_lse=True)[1]

    def _call(self, i: int, *, return_lse: bool = False) -> tuple[Any, Any]:
        _C.use_tiles(self.rows)
        call = self.calls[i]
        options: dict[str, Any] = {"causal": call.causal, "num_splits": 1, "return_lse": return_lse}
        return flash_attn_varlen_func(call.q, call.k, call.v, **call.lengths, **options)
