"""The cells that forward.py and backward.py measure, and the tables that they end with."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import harness
from harness import FLASH, OURS, Cell, Preset


@dataclass(frozen=True)
class Grid:
    """Presets and sequence lengths, each of them full and causal."""

    presets: tuple[str, ...]
    seqlens: tuple[int, ...]
    shared: bool  # presets of one shape are measured once; else each on its own

    def shapes(self) -> list[tuple[Preset, list[str]]]:
        if self.shared:
            return list(harness.distinct(self.presets).items())
        return [(harness.PRESETS[name], [name]) for name in self.presets]


MODELS = ("llama3-8b", "mistral-7b", "qwen2.5-7b", "llama2-7b", "mixtral-8x7b")
SHAPES = (*MODELS, "hd64", "hd64-gqa")
HEAD_DIMS = ("d64", "d80", "d96", "d128", "d192", "d256", "d64-128", "d128-64", "d192-128")
GRIDS = {
    # Every shape once, from short to long.
    "shapes": Grid(SHAPES, (512, 1024, 2048, 4096, 8192, 16384), True),
    # The 40 cells on which FlashAttention-2 was compared with FlashAttention-4 on an RTX 5090
    # (thad0ctor/flash-attention, pull request 1): a shape counts as often as a model has it.
    "fa2": Grid(MODELS, (1024, 2048, 4096, 8192), False),
    # The same, and head_dim 64.
    "training": Grid(SHAPES, (1024, 2048, 4096, 8192), False),
    # Each head dim beside 128, in calls long enough that nothing but the kernel's loop counts.
    "head-dims": Grid(HEAD_DIMS, (8192,), False),
}


# ------------------------------------------------------------------------------------- arguments


def make_parser(description: str, grid: str) -> argparse.ArgumentParser:
    """The arguments that the benchmarks of a grid share."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--grid", choices=GRIDS, default=grid, help=f"default: {grid}")
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=harness.PRESETS,
        metavar="PRESET",
        help=f"in place of the grid's, of {', '.join(harness.PRESETS)}",
    )
    parser.add_argument("--seqlens", nargs="+", type=int, help="in place of the grid's")
    parser.add_argument("--causal", nargs="+", type=int, choices=(0, 1), default=(0, 1))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=harness.DTYPES, default="bf16")
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
    parser.add_argument(
        "--quick", action="store_true", help="llama3-8b and hd64, S 1024 and 4096, 10 rounds"
    )
    harness.add_arguments(parser)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; `grid` is the Grid that they ask for."""
    args = harness.parse(parser)
    if args.quick:
        args.presets, args.seqlens, args.rounds = ["llama3-8b", "hd64"], (1024, 4096), 10
    if args.graph and args.device == "cpu":
        parser.error("--graph needs a CUDA device")
    named = GRIDS[args.grid]
    args.grid = Grid(
        tuple(args.presets or named.presets), tuple(args.seqlens or named.seqlens), named.shared
    )
    return args


# ----------------------------------------------------------------------------------------- cells


def cells(args: argparse.Namespace) -> list[Cell]:
    """The cells that the arguments ask for."""
    return [
        Cell(
            preset,
            seqlen,
            bool(causal),
            args.batch,
            harness.DTYPES[args.dtype],
            fields={
                "presets": names,
                "heads_q": preset.heads_q,
                "heads_kv": preset.heads_kv,
                "head_dim": preset.head_dim,
                "head_dim_v": preset.head_dim_v or preset.head_dim,
                "batch": args.batch,
                "seqlen": seqlen,
                "causal": bool(causal),
                "dtype": args.dtype,
            },
        )
        for (preset, names), seqlen, causal in itertools.product(
            args.grid.shapes(), args.grid.seqlens, args.causal
        )
    ]


def ratio(cell: dict[str, dict], name: str = OURS) -> float | None:
    """Our speed over FlashAttention-2's; None where one of them is absent."""
    ours, flash = cell[name], cell[FLASH]
    return flash["ms"] / ours["ms"] if "ms" in ours and "ms" in flash else None


def spread(cell: dict[str, dict]) -> float:
    """The larger spread of the two whose ratio is taken."""
    return max(cell[name].get("spread", 0.0) for name in (OURS, FLASH))


def label(cell: dict[str, dict]) -> tuple[str, int, int]:
    record = cell[OURS]
    return ", ".join(record["presets"]), record["seqlen"], int(record["causal"])


# ---------------------------------------------------------------------------------------- tables


def table(measured: list[dict[str, dict]], names: Sequence[str]) -> str:
    """TFLOPS of each contestant, one row per cell."""

    def row(cell: dict[str, dict]) -> list[object]:
        tflops = [f"{cell[n]['tflops']:.1f}" if "ms" in cell[n] else "absent" for n in names]
        value = ratio(cell)
        last = [f"{value:.3f}", f"{spread(cell):.1%}"] if value else ["", ""]
        return [*label(cell), *tflops, *last]

    head = ("preset", "S", "causal", *names, "ours/flash", "spread")
    return harness.markdown(head, map(row, measured))


def peak(measured: list[dict[str, dict]], name: str) -> str:
    """The most TFLOPS that a contestant reached."""
    tflops = [cell[name]["tflops"] for cell in measured if "ms" in cell[name]]
    return f"{max(tflops):.1f}" if tflops else "absent"


def by_preset(measured: list[dict[str, dict]], name: str = OURS) -> str:
    """A contestant over FlashAttention-2, one row per preset and one for all."""
    groups: dict[str, list[dict[str, dict]]] = {}
    for cell in measured:
        groups.setdefault(label(cell)[0], []).append(cell)

    def row(preset: str, group: list[dict[str, dict]]) -> list[object]:
        ratios = [value for cell in group if (value := ratio(cell, name))]
        of_ratios = ["", "", ""]
        if ratios:
            wins = f"{sum(value >= 1 for value in ratios)} of {len(ratios)}"
            of_ratios = [f"{statistics.geometric_mean(ratios):.3f}", f"{min(ratios):.3f}", wins]
        return [preset, *of_ratios, peak(group, name), peak(group, FLASH)]

    head = (
        "preset",
        f"geomean {name}/flash",
        "minimum",
        "cells >= 1",
        f"peak {name}",
        "peak flash",
    )
    rows = [*(row(*item) for item in groups.items()), row("all", measured)]
    return harness.markdown(head, rows)


def summary(measured: list[dict[str, dict]]) -> str:
    """The worst cell, the spread, and who was absent why."""
    lines = []
    ratios = [(value, cell) for cell in measured if (value := ratio(cell))]
    if ratios:
        worst, where = min(ratios, key=lambda pair: pair[0])
        spreads = [spread(cell) for _, cell in ratios]
        preset, seqlen, causal = label(where)
        lines += [
            f"{len(ratios)} of {len(measured)} cells, "
            f"geomean ours/flash {statistics.geometric_mean(v for v, _ in ratios):.3f}",
            f"minimum {worst:.3f} ({preset}, S {seqlen}, causal {causal})",
            f"spread (IQR / median of ours or flash): median {statistics.median(spreads):.1%}, "
            f"largest {max(spreads):.1%}",
        ]
    return "\n".join([*lines, harness.why_absent(measured)])


def report(
    what: str,
    args: argparse.Namespace,
    header: dict,
    measured: list[dict[str, dict]],
    names: Sequence[str],
) -> None:
    """Prints what was measured: cell by cell, preset by preset, and in a few lines."""
    kind = "CUDA graphs" if args.graph else "single calls"
    print(f"{what}, {args.dtype}, batch {args.batch}, TFLOPS, {kind}")
    print(harness.headline(header))
    print(table(measured, names), by_preset(measured), summary(measured), sep="\n\n")
