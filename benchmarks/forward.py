"""How fast is the forward pass, beside PyTorch's own kernels?

    FA_SM120_LIMITS=120 python benchmarks/forward.py --output forward.jsonl

Ours, SDPA's FlashAttention-2 (the same class of instructions as ours) and SDPA's cuDNN (on
Hopper: wgmma, another class), over model shapes, sequence lengths and causal or not.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from harness import OURS, Contestant, Problem
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import flash_attn_sm120

FLASH, CUDNN = "sdpa-flash", "sdpa-cudnn"
NAMES = (OURS, FLASH, CUDNN)
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)


def contestants(problem: Problem) -> list[Contestant]:
    """Everyone, bound to one problem."""
    q, k, v, causal = problem.q, problem.k, problem.v, problem.causal
    # SDPA's layout is (B, H, S, D): transposed views, nobody pays for a copy. Its causal is
    # aligned to the top left, which is ours wherever Sq == Sk, as everywhere in this grid.
    qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))

    def ours() -> torch.Tensor:
        return flash_attn_sm120.flash_attn_func(q, k, v, causal=causal)[0]

    def sdpa() -> torch.Tensor:
        out = F.scaled_dot_product_attention(qt, kt, vt, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    def backend(name: str, choice: SDPBackend) -> Contestant:
        # A backend that cannot run a call is a RuntimeError, its reasons are warnings.
        return Contestant(name, sdpa, functools.partial(sdpa_kernel, choice), (RuntimeError,))

    return [
        Contestant(OURS, ours),
        backend(FLASH, SDPBackend.FLASH_ATTENTION),
        backend(CUDNN, SDPBackend.CUDNN_ATTENTION),
    ]


def measure(args: argparse.Namespace, records: harness.Records) -> None:
    """Fills the records, one cell after the other."""
    shapes = harness.distinct(args.presets).items()
    grid = list(itertools.product(shapes, args.seqlens, args.causal))
    # disable=None: no bar where the output is a log
    with tqdm(grid, unit="cell", disable=None) as bar:
        for (preset, names), seqlen, causal in bar:
            bar.set_postfix_str(f"{names[0]} S {seqlen} causal {causal}")
            problem = harness.make_problem(
                preset, seqlen, causal, args.batch, harness.DTYPES[args.dtype], args.device
            )
            entrants, absent = harness.admit(contestants(problem), problem)
            timings = harness.time_interleaved(entrants, args.device, args.rounds, args.graph)
            cell = {
                "presets": names,
                "heads_q": preset.heads_q,
                "heads_kv": preset.heads_kv,
                "head_dim": preset.head_dim,
                "batch": args.batch,
                "seqlen": seqlen,
                "causal": bool(causal),
                "dtype": args.dtype,
            }
            flops = harness.forward_flops(problem)
            for name, timing in timings.items():
                records.add(**cell, contestant=name, **harness.timing_fields(timing, flops))
            for name, reason in absent.items():
                records.add(**cell, contestant=name, absent=reason)


def by_cell(records: list[dict]) -> list[dict[str, dict]]:
    """The records of each cell by contestant, in the order in which they were measured."""
    cells: dict[tuple, dict[str, dict]] = {}
    for record in records:
        key = (*record["presets"], record["seqlen"], record["causal"])
        cells.setdefault(key, {})[record["contestant"]] = record
    return list(cells.values())


def ratio(cell: dict[str, dict]) -> float | None:
    """Our speed over FlashAttention-2's; None where one of them is absent."""
    ours, flash = cell[OURS], cell[FLASH]
    return flash["ms"] / ours["ms"] if "ms" in ours and "ms" in flash else None


def spread(cell: dict[str, dict]) -> float:
    """The larger spread of the two whose ratio is taken."""
    return max(cell[name].get("spread", 0.0) for name in (OURS, FLASH))


def label(cell: dict[str, dict]) -> tuple[str, int, int]:
    record = cell[OURS]
    return ", ".join(record["presets"]), record["seqlen"], int(record["causal"])


def table(cells: list[dict[str, dict]]) -> str:
    """TFLOPS of each contestant, one row per cell."""

    def row(cell: dict[str, dict]) -> list[object]:
        tflops = [f"{cell[n]['tflops']:.1f}" if "ms" in cell[n] else "absent" for n in NAMES]
        value = ratio(cell)
        last = [f"{value:.3f}", f"{spread(cell):.1%}"] if value else ["", ""]
        return [*label(cell), *tflops, *last]

    head = ("preset", "S", "causal", *NAMES, "ours/flash", "spread")
    return harness.markdown(head, map(row, cells))


def summary(cells: list[dict[str, dict]]) -> str:
    """Geomean, worst cell, spread, and who was absent why."""
    lines = []
    ratios = [(value, cell) for cell in cells if (value := ratio(cell))]
    if ratios:
        worst, where = min(ratios, key=lambda pair: pair[0])
        spreads = [spread(cell) for _, cell in ratios]
        preset, seqlen, causal = label(where)
        lines += [
            f"{len(ratios)} of {len(cells)} cells (a shape counts once, whatever its names)",
            f"geomean ours/flash {statistics.geometric_mean(v for v, _ in ratios):.3f}",
            f"minimum {worst:.3f} ({preset}, S {seqlen}, causal {causal})",
            f"spread (IQR / median of ours or flash): median {statistics.median(spreads):.1%}, "
            f"largest {max(spreads):.1%}",
        ]
    reasons: dict[tuple[str, str], int] = {}
    for cell in cells:
        for name, record in cell.items():
            if "absent" in record:
                key = (name, record["absent"])
                reasons[key] = reasons.get(key, 0) + 1
    lines += [f"absent in {n} cells: {name}: {why}" for (name, why), n in reasons.items()]
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=harness.PRESETS,
        metavar="PRESET",
        default=list(harness.PRESETS),
        help=f"of {', '.join(harness.PRESETS)}",
    )
    parser.add_argument("--seqlens", nargs="+", type=int, default=SEQLENS)
    parser.add_argument("--causal", nargs="+", type=int, choices=(0, 1), default=(0, 1))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=harness.DTYPES, default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, help="default: as many as fit 0.6 s, 10 to 60")
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
    parser.add_argument(
        "--quick", action="store_true", help="llama3-8b and hd64, S 1024 and 4096, 10 rounds"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl")
    args = parser.parse_args()
    if args.quick:
        args.presets, args.seqlens, args.rounds = ["llama3-8b", "hd64"], (1024, 4096), 10
    if args.rounds is not None and args.rounds < 2:
        parser.error("--rounds: a spread needs at least 2")
    if args.graph and args.device == "cpu":
        parser.error("--graph needs a CUDA device")
    return args


@torch.no_grad()
def main() -> None:
    args = parse_args()
    harness.require_device(args.device)
    records = harness.Records(args.output, "forward", args.device)
    measure(args, records)
    cells = by_cell(records.cells)
    kind = "CUDA graphs" if args.graph else "single calls"
    print(f"Forward, {args.dtype}, batch {args.batch}, TFLOPS, {kind}")
    print(harness.headline(records.header))
    print(table(cells))
    print(summary(cells))


if __name__ == "__main__":
    main()
