"""The grid of cells: which calls are tuned, and by which calls each cell is measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from flash_attn_sm120.tuned_tiles import ANY, Row


class Bucket(NamedTuple):
    """Calls with `above` < query rows per multiprocessor <= `upto`.

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

    def __str__(self) -> str:
        dims = f"{self.head_dim}" + f",{self.head_dim_v}" * (self.head_dim != self.head_dim_v)
        rows = f"> {self.bucket.above}" if self.bucket.upto == ANY else f"<= {self.bucket.upto}"
        return f"head_dim {dims} {'causal' if self.causal else 'full'} rows/SM {rows}"

    def key(self, arch: int) -> Row:
        """The fields of a row that say which calls it serves; ANY is no bound."""
        return {
            "arch": arch,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "heads_per_kv": ANY,
            "seqlen_q": ANY,
            "rows_per_sm": self.bucket.upto,
            "mask_right": int(self.causal),
            "mask_left": 0,
        }

    def above(self) -> Row:
        """The largest calls below those of the cell, in each direction."""
        bounds = {
            "head_dim": self.head_dim - 8,
            "head_dim_v": self.head_dim_v - 8,
            "rows_per_sm": self.bucket.above,
        }
        return {bound: value for bound, value in bounds.items() if value}


def cells(head_dims: Iterable[tuple[int, int]]) -> list[Cell]:
    return [Cell(*d, c, b) for d, c, b in itertools.product(head_dims, (False, True), BUCKETS)]
