"""The cells that forward.py and backward.py measure, and the tables that they end with."""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import harness
from harness import FLASH, OURS, Cell, Preset


@dataclass(frozen=True)
class Grid:
    """Presets, sequence lengths, batches and masks, in all combinations."""

    presets: tuple[str, ...]
    seqlens: tuple[int, ...]
    shared: bool  # presets of one shape are measured once; else each on its own
    batches: tuple[int, ...] = (1,)
    masks: tuple[bool, ...] = (False, True)  # causal

    def shapes(self) -> list[tuple[Preset, list[str]]]:
        if self.shared:
            return list(harness.distinct(self.presets).items())
        return [(harness.PRESETS[name], [name]) for name in self.presets]

    def cells(self, dtype: str = "bf16") -> list[Cell]:
        return [
            Cell(
                preset,
                seqlen,
                causal,
                batch,
                harness.DTYPES[dtype],
                fields={
                    "presets": names,
                    "heads_q": preset.heads_q,
                    "heads_kv": preset.heads_kv,
                    "head_dim": preset.head_dim,
                    "head_dim_v": preset.head_dim_v or preset.head_dim,
                    "batch": batch,
                    "seqlen": seqlen,
                    "causal": causal,
                    "dtype": dtype,
                },
            )
            for (preset, names), batch, seqlen, causal in itertools.product(
                self.shapes(), self.batches, self.seqlens, self.masks
            )
        ]


MODELS = ("llama3-8b", "mistral-7b", "qwen2.5-7b", "llama2-7b", "mixtral-8x7b")
SHAPES = (*MODELS, "hd64", "hd64-gqa")
HEAD_DIMS = ("d64", "d80", "d96", "d128", "d192", "d256", "d64-128", "d128-64", "d192-128")
QWEN3 = functools.partial(Grid, ("qwen3-0.6b",), shared=True, masks=(True,))
GRIDS = {
    # Every shape once, from short to long.
    "shapes": (Grid(SHAPES, (512, 1024, 2048, 4096, 8192, 16384), True),),
    # The 40 cells on which FlashAttention-2 was compared with FlashAttention-4 on an RTX 5090
    # (thad0ctor/flash-attention, pull request 1): a shape counts as often as a model has it.
    "fa2": (Grid(MODELS, (1024, 2048, 4096, 8192), False),),
    # The same, and head_dim 64.
    "training": (Grid(SHAPES, (1024, 2048, 4096, 8192), False),),
    # Each head dim beside 128, in calls long enough that nothing but the kernel's loop counts.
    "head-dims": (Grid(HEAD_DIMS, (8192,), False),),
    # Head dims that FlashAttention-4 takes on 12.x, and FlashAttention-2 does not.
    "fa4-only": (
        Grid(("mha-d128-64",), (4096,), False, batches=(2,)),
        Grid(("mha-d192-128", "mha-d256-128"), (2048,), False, batches=(2,)),
    ),
    # Prompts of a small model, one by one and in batches: calls so short that the host counts.
    "qwen3": (
        QWEN3(seqlens=(128, 256, 512, 1024, 2048, 4096)),
        QWEN3(seqlens=(512,), batches=(2,)),
        QWEN3(seqlens=(256,), batches=(4, 8)),
    ),
}
WITH_WALL = ("qwen3",)  # grids whose calls are timed with the host's part, too


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
    parser.add_argument(
        "--causal", nargs="+", type=int, choices=(0, 1), help="in place of the grid's"
    )
    parser.add_argument("--batch", nargs="+", type=int, help="in place of the grid's")
    parser.add_argument("--dtype", choices=harness.DTYPES, default="bf16")
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
    parser.add_argument(
        "--wall",
        action="store_true",
        help=f"wall time of calls, too, as always with --grid {', '.join(WITH_WALL)}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="llama3-8b and hd64, S 1024 and 4096, 10 rounds"
    )
    harness.add_arguments(parser)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; `cells` are those that they ask for."""
    args = harness.parse(parser)
    if args.quick:
        args.presets, args.seqlens, args.rounds = ["llama3-8b", "hd64"], (1024, 4096), 10
    if args.graph and args.device == "cpu":
        parser.error("--graph needs a CUDA device")
    args.wall = args.wall or args.grid in WITH_WALL
    parts = dict.fromkeys(in_place(part, args) for part in GRIDS[args.grid])
    args.cells = [cell for part in parts for cell in part.cells(args.dtype)]
    return args


def in_place(part: Grid, args: argparse.Namespace) -> Grid:
    """A part of a grid, with what the arguments put in place of its own."""
    return Grid(
        tuple(args.presets or part.presets),
        tuple(args.seqlens or part.seqlens),
        part.shared,
        tuple(args.batch or part.batches),
        tuple(map(bool, args.causal)) if args.causal else part.masks,
    )


# ---------------------------------------------------------------------------------------- tables


def ratio(cell: dict[str, dict], name: str = OURS) -> float | None:
    """Our speed over FlashAttention-2's; None where one of them is absent."""
    ours, flash = cell[name], cell[FLASH]
    return flash["ms"] / ours["ms"] if "ms" in ours and "ms" in flash else None


def spread(cell: dict[str, dict]) -> float:
    """The larger spread of the two whose ratio is taken."""
    return max(cell[name].get("spread", 0.0) for name in (OURS, FLASH))


LABEL = ("preset", "B", "S", "causal")


def label(cell: dict[str, dict]) -> tuple[str, int, int, int]:
    """What stands in the columns of LABEL."""
    record = cell[OURS]
    names = ", ".join(record["presets"])
    return names, record["batch"], record["seqlen"], int(record["causal"])


def table(measured: list[dict[str, dict]], names: Sequence[str]) -> str:
    """TFLOPS of each contestant, one row per cell."""

    def row(cell: dict[str, dict]) -> list[object]:
        tflops = [f"{cell[n]['tflops']:.1f}" if "ms" in cell[n] else "absent" for n in names]
        value = ratio(cell)
        last = [f"{value:.3f}", f"{spread(cell):.1%}"] if value else ["", ""]
        return [*label(cell), *tflops, *last]

    head = (*LABEL, *names, "ours/flash", "spread")
    return harness.markdown(head, map(row, measured))


def wall_table(measured: list[dict[str, dict]], names: Sequence[str]) -> str:
    """Microseconds from the call to the end of its work, one row per cell."""

    def row(cell: dict[str, dict]) -> list[object]:
        ms = {name: cell[name].get("wall_ms") for name in names}
        times = [f"{ms[name] * 1e3:.1f}" if ms[name] else "absent" for name in names]
        both = ms[OURS] and ms[FLASH]
        return [*label(cell), *times, f"{ms[FLASH] / ms[OURS]:.3f}" if both else ""]

    return harness.markdown((*LABEL, *names, "ours/flash"), map(row, measured))


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
        preset, batch, seqlen, causal = label(where)
        lines += [
            f"{len(ratios)} of {len(measured)} cells, "
            f"geomean ours/flash {statistics.geometric_mean(v for v, _ in ratios):.3f}",
            f"minimum {worst:.3f} ({preset}, B {batch}, S {seqlen}, causal {causal})",
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
    print(f"{what}, {args.dtype}, TFLOPS, {kind}")
    print(harness.headline(header))
    print(table(measured, names), by_preset(measured), summary(measured), sep="\n\n")
    if args.wall:
        print("\nWall time of a call, us, with the host's part:\n")
        print(wall_table(measured, names))
