"""The grid of cells: which calls are tuned, and by which calls each cell is measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from flash_attn_sm120.quantized import RECIPES
from flash_attn_sm120.quantized.formats import FORMATS
from flash_attn_sm120.quantized.layout import step_of_head_dims
from flash_attn_sm120.tuned_tiles import ANY, BACKWARD, FORWARD, RECIPE, Direction, Row


class Bucket(NamedTuple):
    """Calls with `above` < query rows per multiprocessor <= `upto`; of the backward keys.

    Of packed sequences, whose number no plan knows: with as many rows in the longest.
    """

    above: int
    upto: int
    seqlens: tuple[int, ...]  # of the calls that are measured
    longest: int = 0  # of the packed sequences that are measured, too; 0: none

    def heads(self, seqlen: int, sms: int) -> tuple[int, int]:
        """(seqlen, heads) of a call in the bucket: as many heads as there is room for."""
        rows = (UNBOUNDED_ROWS_PER_SM if self.upto == ANY else self.upto) * sms
        seqlen = min(seqlen, rows)
        return seqlen, rows // seqlen

    def packed(self, sms: int) -> tuple[list[int], int]:
        """(lengths, heads) of packed sequences: of the longest to a quarter of it, as many as
        there is room for."""
        heads = 8
        rows = UNBOUNDED_ROWS_PER_SM * sms // heads
        quarters = itertools.cycle((4, 2, 3, 1))
        lengths: list[int] = []
        while sum(lengths) < rows:
            lengths.append(max(1, self.longest * next(quarters) // 4))
        return lengths, heads


BUCKETS = (
    Bucket(0, 64, (512, 2048), 64),
    Bucket(64, 128, (512, 2048), 128),
    Bucket(128, 256, (1024, 4096), 256),
    Bucket(256, ANY, (4096, 8192), 2048),
)
UNBOUNDED_ROWS_PER_SM = 1024


class Cell(NamedTuple):
    """Calls that one row of the table serves."""

    head_dim: int
    head_dim_v: int
    causal: bool
    bucket: Bucket
    direction: Direction = FORWARD
    recipe: str = ""  # of quantised attention

    def __str__(self) -> str:
        dims = f"{self.head_dim}" + f",{self.head_dim_v}" * (self.head_dim != self.head_dim_v)
        rows = f"> {self.bucket.above}" if self.bucket.upto == ANY else f"<= {self.bucket.upto}"
        mask = "causal" if self.causal else "full"
        if self.direction == BACKWARD:
            return f"backward head_dim {dims} {mask} keys/SM {rows}"
        return f"{self.recipe} head_dim {dims} {mask} rows/SM {rows}".lstrip()

    def key(self, arch: int) -> Row:
        """The fields of a row that say which calls it serves; ANY is no bound."""
        bounds = {
            "arch": arch,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "rows_per_sm": self.bucket.upto,
            "keys_per_sm": self.bucket.upto,
            "mask_right": int(self.causal),
            "mask_left": 0,
        }
        if self.recipe:
            own = RECIPES[self.recipe]
            bounds |= {"qk_format": FORMATS[own.qk], "pv_format": FORMATS[own.pv]}
        return {field: bounds.get(field, ANY) for field in self.direction.key}

    def above(self) -> Row:
        """The largest calls below those of the cell, in each direction."""
        bounds = {
            "head_dim": self.head_dim - 8,
            "head_dim_v": self.head_dim_v - 8,
            "rows_per_sm": self.bucket.above,
            "keys_per_sm": self.bucket.above,
        }
        own = self.direction.bounds
        return {bound: value for bound, value in bounds.items() if value and bound in own}


def cells(
    head_dims: Iterable[tuple[int, int]],
    directions: Iterable[Direction] = (FORWARD,),
    recipes: Sequence[str] = (),
) -> list[Cell]:
    """Rows of the backward serve calls by the larger head dim: equal ones are measured, as those
    of recipes are, recipe by recipe."""
    every = itertools.product(directions, head_dims, (False, True), BUCKETS)
    return [
        Cell(dims[0], dims[1], causal, bucket, direction, recipe)
        for direction, dims, causal, bucket in every
        if direction == FORWARD or dims[0] == dims[1]
        for recipe in (recipes if direction == RECIPE else ("",))
        if not recipe or dims[0] % step_of_head_dims(RECIPES[recipe].qk) == 0
    ]
