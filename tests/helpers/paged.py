"""Calls whose keys lie in pages, each made of a call with packed keys."""

import random
from dataclasses import dataclass

import torch

from helpers.varlen import Batch, make_batch, on

GARBAGE = (-1, 2**31 - 1, -(2**31), 10**6)  # in entries of the table that no sequence reaches

# How a cache lies in memory: (make, pages, rows, heads, dims) -> K and V [pages, rows, heads, dim],
# where make(*shape) is new memory.
LAYOUTS = {
    "apart": lambda make, *sizes, dims: [make(*sizes, dim) for dim in dims],
    "heads first": lambda make, pages, rows, heads, dims: [
        make(pages, heads, rows, dim).transpose(1, 2) for dim in dims
    ],
    "one after the other": lambda make, *sizes, dims: make(2, *sizes, dims[0]).unbind(0),
    "pairs": lambda make, pages, *sizes, dims: make(pages, 2, *sizes, dims[0]).unbind(1),
    "one row": lambda make, *sizes, dims: make(*sizes, sum(dims)).split(dims, dim=-1),
}


@dataclass
class PagedBatch(Batch):
    """Its k and v are packed, for the reference; those of the call are pages."""

    pages: tuple

    @property
    def inputs(self):
        return self.q, *self.pages


def make_paged(
    device,
    lengths_q,
    lengths_k,
    page_size,
    *,
    packed_q=True,
    layout="apart",
    shared=0,
    dtype=torch.bfloat16,
    **options,
):
    """Pages in random order; NaN in those that no sequence has, and in rows beyond a length.

    The first `shared` pages are the same ones in all sequences that have them in full.
    """
    batch = make_batch(
        device, lengths_q, lengths_k, packed=(packed_q, True), dtype=dtype, **options
    )
    heads, dims = batch.k.shape[1], [batch.k.shape[2], batch.v.shape[2]]
    counts = [-(-length // page_size) for length in lengths_k]
    draw = random.Random(page_size)
    free = draw.sample(range(sum(counts) + shared + 3), sum(counts) + shared + 3)
    table = [draw.choices(GARBAGE, k=max(counts, default=0) + 1) for _ in counts]

    def make(*shape):
        return device.place(torch.full(shape, torch.nan, dtype=dtype))

    pages = tuple(LAYOUTS[layout](make, len(free), page_size, heads, dims=dims))
    prefix = [free.pop() for _ in range(shared)]
    for own, part in zip(table, batch.sides[1].slices(), strict=True):
        for i, begin in enumerate(range(part.start, part.stop, page_size)):
            rows = slice(begin, min(begin + page_size, part.stop))
            count = rows.stop - rows.start
            is_shared = i < shared and count == page_size
            own[i] = prefix[i] if is_shared else free.pop()
            for x, page in zip((batch.k, batch.v), (x[own[i]] for x in pages), strict=True):
                if is_shared and not page.isnan().any():
                    x[rows] = page
                page[:count] = x[rows]
    lengths = {name: x for name, x in batch.lengths.items() if not name.endswith("_k")}
    lengths |= {"seqused_k": on(device, lengths_k), "page_table": on(device, table)}
    return PagedBatch(**vars(batch) | {"lengths": lengths}, pages=pages)
