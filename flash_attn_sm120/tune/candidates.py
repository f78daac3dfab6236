"""The candidates of a cell: tiles that may be fast, each on the calls by which it is measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flash_attn_sm120 import _C, tuned_tiles
from flash_attn_sm120.interface import flash_attn_varlen_func
from flash_attn_sm120.plan import Plan, explain, explain_backward
from flash_attn_sm120.quantized import explain_quantized, kernel, quantized_attention
from flash_attn_sm120.quantized.device import TUNED
from flash_attn_sm120.tune.grid import BUCKETS, Cell
from flash_attn_sm120.tuned_tiles import ANY, BACKWARD, FORWARD, RECIPE, Direction, Row

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

BACKWARD_CHOICES: Choices = {
    "warps": (4, 8, 16),
    "warp_n": (16, 32, 64),
    "tile_m": (32, 64, 128),
    "sub_m": (16, 32, 64),
    "stages": (1, 2),
}
QUICK_BACKWARD_CHOICES: Choices = {**BACKWARD_CHOICES, "warps": (4, 8), "warp_n": (16, 32)}

# Of the kernel of recipes.
RECIPE_CHOICES: Choices = {"warps": (4, 8), "stage_tiles": (1, 2)}

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
    if cell.direction == BACKWARD:
        for tile in backward_tiles(cell.head_dim, cell.head_dim_v, choices):
            yield fallback | cell.key(arch) | tile
        return
    if cell.direction == RECIPE:
        for values in itertools.product(*RECIPE_CHOICES.values()):
            yield cell.key(arch) | dict(zip(RECIPE_CHOICES, values, strict=True))
        return
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
    if "kernel" not in row:
        own = RECIPE if "stage_tiles" in row else BACKWARD
        return {name: row[name] for name in own.tile}
    feeds = [name for name, feed in FEEDS.items() if feed.items() <= row.items()]
    return {**{name: row[name] for name in CHOICES}, "feed": feeds[0]}


class Call(NamedTuple):
    """The inputs of a measured call."""

    q: Any
    k: Any
    v: Any
    causal: bool
    lengths: dict[str, Any]  # of packed sequences; empty where q, k and v have a batch
    saved: tuple[Any, ...] = ()  # dout, out and lse, of the backward; empty: of the forward
    recipe: str = ""  # of q, k and v that are quantised

    @property
    def shape(self) -> list[int]:
        """Of q."""
        return list(self.q.data.shape if self.recipe else self.q.shape)

    @property
    def direction(self) -> Direction:
        if self.recipe:
            return RECIPE
        return BACKWARD if self.saved else FORWARD

    def plan(self, rows: Sequence[tuple[int, ...]]) -> Plan:
        """How the call is carried out where ``rows`` come before csrc/tiles.c."""
        self.direction.use(rows)
        options: Any = {**self.lengths, "causal": self.causal}
        if self.recipe:
            options["num_splits"] = 1
            return explain_quantized(self.q, self.k, self.v, self.recipe, **options)
        if self.saved:
            return explain_backward(self.q, self.k, self.v, **options)
        return explain(self.q, self.k, self.v, **options, num_splits=1)

    def plan_with(self, row: tuple[int, ...]) -> Plan | None:
        """The plan with ``row``; None where the row does not serve the call, or does not fit."""
        try:
            plan = self.plan([row])
        except ValueError:  # a tile that no kernel has
            return None
        return plan if plan.reasons["tile"].startswith(("first row of use_", TUNED)) else None

    def run(self, *, return_lse: bool = False) -> tuple[Any, ...]:
        """(out, lse), lse None unless it is asked for; of the backward (dq, dk, dv)."""
        options: dict[str, Any] = {**self.lengths, "causal": self.causal}
        if self.saved:
            dout, out, lse = self.saved
            return _C.backward(dout, self.q, self.k, self.v, out, lse, None, **options)[:3]
        options |= {"num_splits": 1, "return_lse": return_lse}
        if self.recipe:
            return quantized_attention(self.q, self.k, self.v, self.recipe, **options)
        return flash_attn_varlen_func(self.q, self.k, self.v, **options)

    def with_gradients(self, dout: Any) -> Call:
        """The backward of the call."""
        return self._replace(saved=(dout, *self.run(return_lse=True)))


class Candidate(NamedTuple):
    """A tile on the calls of a cell. The fallback is one, too, which needs no row in the table."""

    row: Row
    rows: tuple[tuple[int, ...], ...]  # what comes before csrc/tiles.c: the row, or nothing
    calls: tuple[Call, ...]
    plans: tuple[Plan, ...]  # one for each call

    @classmethod
    def of_row(cls, row: Row, calls: tuple[Call, ...]) -> Candidate | None:
        """None where the row does not serve all the calls, or does not fit."""
        own = tuned_tiles.as_tuple(row, calls[0].direction)
        plans = tuple(plan for call in calls if (plan := call.plan_with(own)))
        return cls(row, (own,), calls, plans) if len(plans) == len(calls) else None

    @classmethod
    def fallback(cls, calls: tuple[Call, ...]) -> Candidate:
        """What csrc/tiles.c has for the first call: the first row that alone would serve it."""
        plans = tuple(call.plan(()) for call in calls)
        direction = calls[0].direction
        if direction == RECIPE:
            tile = kernel.TILE
            return cls({"warps": tile.warps, "stage_tiles": tile.stage_tiles}, (), calls, plans)
        table = _C.backward_tiles() if direction == BACKWARD else _C.tiles()
        own = next(row for row in table if calls[0].plan_with(row))
        return cls(dict(zip(direction.fields, own, strict=False)), (), calls, plans)

    @property
    def name(self) -> str:
        """The variant of its kernel."""
        return str(self.plans[0].variant)

    def run(self, i: int) -> Any:
        """What the call ``i`` gives when it is timed: out, or the gradients."""
        self._use(i)
        results = self.calls[i].run()
        return results if self.calls[i].saved else results[0]

    def results(self, i: int) -> tuple[Any, ...]:
        """All that is compared: out and lse, or the gradients."""
        own = self.run(i)
        if self.calls[i].saved:
            return tuple(own)
        return own, self.calls[i].run(return_lse=True)[1]

    def _use(self, i: int) -> None:
        self.calls[i].direction.use(self.rows)
