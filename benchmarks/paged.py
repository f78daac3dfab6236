"""What do pages of K and V cost, beside K and V in one piece?

    FA_SM120_LIMITS=120 python benchmarks/paged.py --output paged.jsonl

The same K and V in pages of several sizes, in random order, in one piece ("contiguous", our dense
call), and in one piece with lengths on the device ("seqused"). Prefill, and decoding, each call
behind a write of the L2. Beside them PyTorch's FlashAttention-2: of K and V in one piece by SDPA,
and in the pages of 256 that varlen_attn takes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from typing import Any

import forward
import harness
import torch
from harness import FLASH, Cell, Contestant, Preset, Problem, WrongResult
from torch import Tensor

from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func

PAGE_SIZES = (1, 16, 64, 128, 256)
CONTIGUOUS, SEQUSED = "contiguous", "seqused"
TORCH_PAGE_SIZE = 256  # the only one that torch's FlashAttention-2 has
TORCH_PAGES = f"varlen_attn, {TORCH_PAGE_SIZE}"


def pages_of(size: int) -> str:
    return f"pages of {size}"


NAMES = (CONTIGUOUS, SEQUSED, *map(pages_of, PAGE_SIZES), FLASH, TORCH_PAGES)

# Heads, batch, keys, and queries if they are fewer; full and causal, but one query sees every key.
CELLS: dict[str, list[tuple[Preset, int, int, int | None]]] = {
    "prefill": [(Preset(8, 8, 128), 4, 2048, None), (Preset(32, 8, 128), 4, 2048, None)],
    "decoding": [(Preset(32, 8, 128), batch, 8192, 1) for batch in (1, 16)],
}


def cells(args: argparse.Namespace) -> list[Cell]:
    found = []
    for kind in args.kinds:
        masks = args.causal if kind == "prefill" else (0,)
        for causal, (preset, batch, seqlen, queries) in itertools.product(masks, CELLS[kind]):
            fields = {
                "kind": kind,
                "heads_q": preset.heads_q,
                "heads_kv": preset.heads_kv,
                "head_dim": preset.head_dim,
                "batch": batch,
                "seqlen_q": queries or seqlen,
                "seqlen_k": seqlen,
                "causal": bool(causal),
            }
            found.append(Cell(preset, seqlen, bool(causal), batch, torch.bfloat16, queries, fields))
    return found


# ----------------------------------------------------------------------------------- contestants


def in_pages(problem: Problem, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """K and V (pages, size, Hkv, D) in random order, and the table (B, pages of a sequence)."""
    batch, seqlen = problem.k.shape[:2]
    per_sequence = -(-seqlen // size)
    generator = torch.Generator().manual_seed(size)
    order = torch.randperm(batch * per_sequence, generator=generator).to(problem.k.device)
    caches = []
    for x in (problem.k, problem.v):
        cache = x.new_zeros(batch * per_sequence, size, *x.shape[2:])
        room = x.new_zeros(batch, per_sequence * size, *x.shape[2:])
        room[:, :seqlen] = x
        cache[order] = room.view_as(cache)
        caches.append(cache)
    return *caches, order.view(batch, per_sequence).to(torch.int32)


def with_pages(problem: Problem, size: int, lengths: dict[str, Tensor]) -> Contestant:
    k, v, table = in_pages(problem, size)

    def call() -> Tensor:
        options = {"page_table": table, "max_seqlen_k": problem.k.shape[1], **lengths}
        return flash_attn_varlen_func(problem.q, k, v, causal=problem.causal, **options)[0]

    return Contestant(pages_of(size), call)


def torch_pages(problem: Problem, used: Tensor) -> Contestant:
    """varlen_attn of PyTorch 2.12 and newer."""
    k, v, table = in_pages(problem, TORCH_PAGE_SIZE)
    (batch, seqlen_q), seqlen_k = problem.q.shape[:2], problem.k.shape[1]
    window = (-1, 0) if problem.causal else (-1, -1)
    ends_q, ends_k = (
        torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=used.device)
        for n in (seqlen_q, seqlen_k)
    )
    options: dict[str, Any] = {"window_size": window, "seqused_k": used, "block_table": table}
    if problem.q.shape[2] != k.shape[2]:
        options["enable_gqa"] = True

    def call() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        q = problem.q.flatten(0, 1)
        out = varlen_attn(q, k, v, ends_q, ends_k, seqlen_q, seqlen_k, **options)
        return out.unflatten(0, (batch, -1))

    # A keyword that an older PyTorch does not have is a TypeError.
    return Contestant(
        TORCH_PAGES, call, cannot=(RuntimeError, ImportError, TypeError, ValueError, WrongResult)
    )


def contestants(problem: Problem, page_sizes: tuple[int, ...]) -> list[Contestant]:
    q, k, v, causal = problem.q, problem.k, problem.v, problem.causal
    used = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)
    lengths = {"seqused_k": used}

    def contiguous() -> Tensor:
        return flash_attn_func(q, k, v, causal=causal)[0]

    def seqused() -> Tensor:
        return flash_attn_varlen_func(q, k, v, causal=causal, **lengths)[0]

    by_sdpa = [c for c in forward.contestants(problem) if c.name == FLASH]
    return [
        Contestant(CONTIGUOUS, contiguous),
        Contestant(SEQUSED, seqused),
        *(with_pages(problem, size, lengths) for size in page_sizes),
        *by_sdpa,
        torch_pages(problem, used),
    ]


# ----------------------------------------------------------------------------------------- main


def measure(problem: Problem, args: argparse.Namespace) -> dict[str, dict]:
    """What the records of a cell say of each contestant."""
    check = functools.partial(harness.check_forward, problem)
    out = problem.q.new_empty(problem.out_shape)
    entrants, absent = harness.admit(contestants(problem, args.page_sizes), check, [out])
    timings, exhausted = harness.time_interleaved(entrants, args.device, args.rounds)
    flops = harness.forward_flops(problem)
    gigabytes = (problem.k.nbytes + problem.v.nbytes) / 1e9
    contiguous = timings.get(CONTIGUOUS)
    fields = {
        name: {
            "gb_per_s": gigabytes / timing.ms * 1e3,
            "beside_contiguous": contiguous.ms / timing.ms if contiguous else None,
            **harness.timing_fields(timing, flops),
        }
        for name, timing in timings.items()
    }
    return fields | harness.absent_fields(absent | exhausted)


def table(measured: list[dict[str, dict]]) -> str:
    """Microseconds of the call in one piece, and the speed of the others beside it."""

    def beside(record: dict | None) -> str:
        if record is None or "ms" not in record:
            return "" if record is None else "absent"
        value = record["beside_contiguous"]
        return f"{value:.3f}" if value else ""

    def row(cell: dict[str, dict]) -> list[object]:
        first = cell[CONTIGUOUS]
        speed, spread = "", ""
        if "ms" in first:
            decoding = first["kind"] == "decoding"
            speed = f"{first['gb_per_s']:.0f} GB/s" if decoding else f"{first['tflops']:.1f} TF"
            spread = f"{max(r['spread'] for r in cell.values() if 'ms' in r):.1%}"
        return [
            first["kind"],
            f"{first['heads_q']}/{first['heads_kv']}",
            first["batch"],
            first["seqlen_k"],
            int(first["causal"]),
            f"{first['ms'] * 1e3:.1f}" if "ms" in first else "absent",
            speed,
            *(beside(cell.get(name)) for name in NAMES[1:]),
            spread,
        ]

    head = ("kind", "heads", "B", "keys", "causal", "contiguous us", "", *NAMES[1:], "spread")
    return harness.markdown(head, map(row, measured))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--page-sizes", nargs="+", type=int, choices=PAGE_SIZES, default=PAGE_SIZES)
    parser.add_argument("--causal", nargs="+", type=int, choices=(0, 1), default=(0, 1))
    harness.add_arguments(parser)
    return harness.parse(parser)


@torch.no_grad()
def main() -> None:
    args = parse_args()
    records = harness.Records(args.output, "paged", args.device)
    measured = functools.partial(measure, args=args)
    copies = 2 + len(args.page_sizes)  # of K and V: each contestant has its own
    found = harness.measure_cells(cells(args), measured, NAMES, records, args.device, copies)
    print("K and V in pages, bf16, speed beside K and V in one piece, single calls")
    print(harness.headline(records.header))
    print(table(found), harness.why_absent(found), sep="\n\n")


if __name__ == "__main__":
    main()
