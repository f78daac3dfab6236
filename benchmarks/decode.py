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
from pathlib import Path

import forward
import harness
import torch
from harness import OURS, Contestant, Problem
from tqdm import tqdm

import flash_attn_sm120

UNSPLIT = "unsplit"
NAMES = (OURS, UNSPLIT, forward.FLASH, forward.CUDNN)
PRESETS = ("llama3-8b", "qwen2.5-7b")


def contestants(problem: Problem) -> list[Contestant]:
    """Those of forward.py, and ours unsplit."""

    def unsplit() -> torch.Tensor:
        return flash_attn_sm120.flash_attn_func(problem.q, problem.k, problem.v, num_splits=1)[0]

    ours, *others = forward.contestants(problem)
    return [ours, Contestant(UNSPLIT, unsplit), *others]


def measure(args: argparse.Namespace, records: harness.Records) -> list[tuple[object, ...]]:
    """Fills the records; the rows of the table."""
    rows = []
    grid = list(itertools.product(args.presets, args.batches, args.seqlens))
    for name, batch, seqlen in tqdm(grid, unit="cell", disable=None):
        preset = harness.PRESETS[name]
        # Not causal: the last query sees every key.
        problem = harness.make_problem(
            preset, seqlen, False, batch, torch.bfloat16, args.device, args.queries
        )
        check = functools.partial(harness.check_forward, problem)
        out = problem.q.new_empty(problem.out_shape)
        entrants, absent = harness.admit(contestants(problem), check, [out])
        timings = harness.time_interleaved(
            entrants, args.device, args.rounds, graph=args.device == "cuda"
        )
        parts = flash_attn_sm120.explain(problem.q, problem.k, problem.v).num_splits
        cell = {"preset": name, "batch": batch, "seqlen_q": args.queries, "seqlen_k": seqlen}
        gigabytes = (problem.k.nbytes + problem.v.nbytes) / 1e9
        for contestant, timing in timings.items():
            fields = harness.timing_fields(timing, harness.forward_flops(problem))
            rate = gigabytes / timing.ms * 1e3
            records.add(**cell, contestant=contestant, num_splits=parts, gb_per_s=rate, **fields)
        for contestant, reason in absent.items():
            records.add(**cell, contestant=contestant, absent=reason)
        us = [f"{timings[n].ms * 1e3:.1f}" if n in timings else "absent" for n in NAMES]
        others = [timings[n].ms for n in NAMES[2:] if n in timings]
        best = f"{min(others) / timings[OURS].ms:.2f}" if others else ""
        rate = f"{gigabytes / timings[OURS].ms * 1e3:.0f}"
        rows.append((name, batch, seqlen, parts, *us, best, rate))
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=harness.PRESETS, default=PRESETS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 16, 64))
    parser.add_argument("--seqlens", nargs="+", type=int, default=(4096, 8192, 16384, 32768))
    parser.add_argument("--queries", type=int, default=1, help="of each call (default: 1)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, help="default: as many as fit 0.6 s, 10 to 60")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = parse_args()
    harness.require_device(args.device)
    records = harness.Records(args.output, "decode", args.device)
    rows = measure(args, records)
    print(f"Decoding, bf16, {args.queries} queries, microseconds per call")
    print(harness.headline(records.header))
    head = ("preset", "batch", "keys", "parts", *NAMES, "ours/best peer", "ours GB/s")
    print(harness.markdown(head, rows))


if __name__ == "__main__":
    main()
