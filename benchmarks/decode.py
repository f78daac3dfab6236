"""How fast is decoding: one query against many keys, beside PyTorch's own kernels?

    FA_SM120_LIMITS=120 python benchmarks/decode.py --output decode.jsonl

Replays of CUDA graphs: in decoding a call takes less time than its launch. Such a call reads K and
V once and computes little, so the figure is the bandwidth at which it does. "unsplit" is ours with
num_splits=1: what splitting gains.
"""

from __future__ import annotations

import argparse
import functools
import itertools

import forward
import harness
import torch
from harness import CUDNN, FLASH, OURS, Cell, Contestant, Problem

from flash_attn_sm120 import explain, flash_attn_func

UNSPLIT = "unsplit"
NAMES = (OURS, UNSPLIT, FLASH, CUDNN)
PRESETS = ("llama3-8b", "qwen2.5-7b")


def contestants(problem: Problem) -> list[Contestant]:
    """Those of forward.py, and ours unsplit."""

    def unsplit() -> torch.Tensor:
        return flash_attn_func(problem.q, problem.k, problem.v, num_splits=1)[0]

    ours, *others = forward.contestants(problem)
    return [ours, Contestant(UNSPLIT, unsplit), *others]


def cells(args: argparse.Namespace) -> list[Cell]:
    return [
        Cell(
            harness.PRESETS[name],
            seqlen,
            False,  # the last query sees every key, causal or not
            batch,
            torch.bfloat16,
            args.queries,
            {"preset": name, "batch": batch, "seqlen_q": args.queries, "seqlen_k": seqlen},
        )
        for name, batch, seqlen in itertools.product(args.presets, args.batches, args.seqlens)
    ]


def measure(problem: Problem, device: str, rounds: int | None) -> dict[str, dict]:
    """What the records of a cell say of each contestant."""
    check = functools.partial(harness.check_forward, problem)
    out = problem.q.new_empty(problem.out_shape)
    entrants, absent = harness.admit(contestants(problem), check, [out])
    timings, exhausted = harness.time_interleaved(entrants, device, rounds, device == "cuda")
    parts = explain(problem.q, problem.k, problem.v).num_splits
    gigabytes = (problem.k.nbytes + problem.v.nbytes) / 1e9
    flops = harness.forward_flops(problem)
    fields = {
        name: {
            "num_splits": parts,
            "gb_per_s": gigabytes / timing.ms * 1e3,
            **harness.timing_fields(timing, flops),
        }
        for name, timing in timings.items()
    }
    return fields | harness.absent_fields(absent | exhausted)


def row(cell: dict[str, dict]) -> list[object]:
    """A cell's line of the table."""
    ours, peers = cell[OURS], [cell[name]["ms"] for name in (FLASH, CUDNN) if "ms" in cell[name]]
    us = [f"{cell[n]['ms'] * 1e3:.1f}" if "ms" in cell[n] else "absent" for n in NAMES]
    key = [ours["preset"], ours["batch"], ours["seqlen_k"], ours.get("num_splits") or ""]
    if "ms" not in ours:
        return [*key, *us, "", ""]
    ratio = f"{min(peers) / ours['ms']:.2f}" if peers else ""
    return [*key, *us, ratio, f"{ours['gb_per_s']:.0f}"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=harness.PRESETS, default=PRESETS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 16, 64))
    parser.add_argument("--seqlens", nargs="+", type=int, default=(4096, 8192, 16384, 32768))
    parser.add_argument("--queries", type=int, default=1, help="of each call (default: 1)")
    harness.add_arguments(parser)
    return harness.parse(parser)


@torch.no_grad()
def main() -> None:
    args = parse_args()
    records = harness.Records(args.output, "decode", args.device)
    measured = functools.partial(measure, device=args.device, rounds=args.rounds)
    found = harness.measure_cells(cells(args), measured, NAMES, records, args.device)
    print(f"Decoding, bf16, {args.queries} queries, microseconds per call")
    print(harness.headline(records.header))
    head = ("preset", "batch", "keys", "splits", *NAMES, "ours/best peer", "ours GB/s")
    print(harness.markdown(head, map(row, found)), harness.why_absent(found), sep="\n\n")


if __name__ == "__main__":
    main()
