"""What would bound the kernels on sm_120? Counts the instructions of their main loops in SASS.

    python benchmarks/sass_report.py               # the common kernels, forward and backward
    python benchmarks/sass_report.py 128 192,128   # these head dims (or head_dim,head_dim_v)

Static figures: nothing here has run on the card. sass.py says how the main loop is found, counted
and priced; it needs nvdisasm (`pip install nvidia-cuda-nvdisasm`). Left out are stalls (latencies,
barriers, bank conflicts) and what works outside the SM's pipes: the TMA's writes to shared memory,
and atomic additions in the L2. So the figures say which pipe a kernel cannot be faster than, not
how fast it is.

A bound is not a prediction: warps wait. `--shares` predicts the share of the mma.sync peak for the
calls of balance.py and for the common head dims, by the model of static_model.py: for both classes
of 12.x cards, and for an H100 at TENSOR_REPEAT 1, 2 and 4. Beside the latter stands what balance.py
measured (`--proxy FILE`, its output, or the table that static_model.py keeps) and how far off the
prediction is: that is the error bar of the figures for 12.x. A second table says what part of the
time each cause takes. `--tiles` does the same for every tile in place of the plan's, `--low` for
the kernels of 8 bits beside bf16.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import balance
import harness
import lowp
import static_model
import torch
from harness import Cell, Preset
from sass import CHIPS, PIPES, Figures, analyse, analyse_all, constants
from static_model import DEVICES, Device, Prediction

from flash_attn_sm120 import _C, common_kernels
from flash_attn_sm120.plan import Plan, explain, explain_backward
from flash_attn_sm120.quantized import RECIPES, explain_quantized

# ----------------------------------------------------------------------------------------- report


def count_rows(figures: list[Figures]) -> Iterator[tuple]:
    for f in figures:
        counts = f.counts()
        resources = (f.registers, f.spill_bytes, f.smem_bytes, f.blocks_per_sm)
        yield (f.variant, *(counts[pipe] for pipe in PIPES), f.issued, f.products, *resources)


def cycle_rows(figures: list[Figures], pipes: list[str]) -> Iterator[tuple]:
    for f in figures:
        chips = [f.cycles(chip) for chip in CHIPS]
        columns = [each_chip(f"{cycles.get(pipe, 0):g}" for cycles in chips) for pipe in pipes]
        bounds = each_chip(map(f.bound, CHIPS))
        shares = each_chip(f"{f.tensor_share(chip):.0%}" for chip in CHIPS)
        runners_up = [(list(cycles)[1], sorted(cycles.values())[-2:]) for cycles in chips]
        behind = each_chip(f"{pipe} {low / high:.0%}" for pipe, (low, high) in runners_up)
        yield (f.variant, *columns, bounds, shares, behind)


def each_chip(values: Iterable[str]) -> str:
    """One value for each chip, or the one that all share."""
    each = list(values)
    return each[0] if len(set(each)) == 1 else " / ".join(each)


UNITS = {1: "forward, per tile of keys and warp", 2: "backward, per tile of queries and two warps"}


def report(figures: list[Figures]) -> None:
    """Prints the tables, of each direction its own."""
    has_rates = figures[0].arch.startswith("sm_12")
    for warps, unit in UNITS.items():
        if of_unit := [f for f in figures if f.warps == warps]:
            report_counts(unit, of_unit)
            if has_rates:
                report_cycles(unit, of_unit)
    if not has_rates:
        print(f"\nNo cycles: the rates are those of 12.x, not of {figures[0].arch}.")


def report_counts(unit: str, figures: list[Figures]) -> None:
    resources = ("registers", "spilled B", "shared B", "blocks/SM")
    print(f"\nInstructions of the main loop by pipe, {unit}:\n")
    print(harness.markdown(("kernel", *PIPES, "all", "products", *resources), count_rows(figures)))
    print("\nproducts: the tensor instructions that the tile takes by its shape.")
    others: Counter[str] = Counter()
    for f in figures:
        others.update(f.others())
    print("other, all kernels:", ", ".join(f"{o} {n}" for o, n in others.most_common()) or "none")


def report_cycles(unit: str, figures: list[Figures]) -> None:
    pipes = ["issue", *(p for p in PIPES if any(p in f.cycles(CHIPS[0]) for f in figures))]
    print(f"\nCycles of an SM sub-partition, {unit}; where they differ, {' / '.join(CHIPS)}:\n")
    head = ("kernel", *pipes, "bound", "tensor share", "next, of the bound")
    print(harness.markdown(head, cycle_rows(figures, pipes)))


# ----------------------------------------------------------------------------------------- shares


def calls_of_shares(only: str) -> list[balance.Call]:
    """Those of balance.py, and of the common head dims at S 4096."""
    calls = {str(call): call for call in balance.CALLS}
    for head_dim, head_dim_v in common_kernels.COMMON_HEAD_DIMS:
        preset = Preset(16, 16, head_dim, None if head_dim == head_dim_v else head_dim_v)
        for is_backward, causal in itertools.product((False, True), repeat=2):
            call = balance.Call(preset, 4096, causal, is_backward, {})
            calls.setdefault(str(call), call)
    return [call for name, call in calls.items() if re.search(only, name)]


def plan_on(
    device: Device, cell: Cell, is_backward: bool = False, kv_dtype: torch.dtype | None = None
) -> Plan:
    """What a call gets there; the memory is never touched.

    A plan counts with the multiprocessors of one card of each kind. So it is asked for as many
    heads for each of these as the device has.
    """
    preset, sms = cell.preset, _C.device_of_arch(device.rows)["sms"]
    heads_kv = max(1, preset.heads_kv * sms // device.sms)
    heads_q = heads_kv * preset.heads_q // preset.heads_kv
    scaled = Preset(heads_q, heads_kv, preset.head_dim, preset.head_dim_v)
    shapes = dataclasses.replace(cell, preset=scaled).shapes()[:3]
    dtypes = (cell.dtype, kv_dtype or cell.dtype, kv_dtype or cell.dtype)
    q, k, v = (torch.empty(*x, dtype=dtype) for x, dtype in zip(shapes, dtypes, strict=True))
    if is_backward:
        return explain_backward(q, k, v, causal=cell.causal, arch=device.rows)
    return explain(q, k, v, causal=cell.causal, num_splits=1, arch=device.rows)


def predict(
    cell: Cell, plan: Plan, figures: Figures, chip: str, is_backward: bool = False
) -> Prediction:
    c, counts, device = constants(plan.main), figures.counts(), DEVICES[chip]
    assert plan.warps
    units = plan.warps * figures.blocks_per_sm / 4 / figures.warps  # of a sub-partition
    pipes = figures.cycles(chip if chip in CHIPS else "PRO")
    tensor = pipes.pop("tensor")
    if device.repeat:
        tensor = counts["tensor"] * static_model.H100_HMMA * device.repeat
    del pipes["issue"]
    loop = static_model.Loop(
        tensor=units * tensor,
        issue=units * (figures.issued - counts["tensor"] - counts["nop"]),
        slowest=units * max(pipes.values()),
        sub_tiles=c["TILE_M"] // c["SUB_M"] if is_backward else c["TILE_N"] // c["SUB_N"],
        is_backward=is_backward,
        blocks_per_sm=figures.blocks_per_sm,
    )
    grid = static_model.Grid(
        own=c["WARPS"] // 2 * c["WARP_N"] if is_backward else c["WARPS"] * c["WARP_M"],
        tile=c["TILE_M" if is_backward else "TILE_N"],
        seqlen=cell.seqlen,
        causal=cell.causal,
        heads=cell.batch * cell.preset.heads_q,
        head_dim=cell.preset.head_dim,
    )
    return static_model.predict(loop, grid, device)


Planned = dict[Any, tuple[Plan, str]]  # and the device, by name


def analyse_planned(planned: Planned) -> dict[Any, Figures]:
    """analyse() of each plan for its device, each kernel once."""
    kinds = {(plan.variant, DEVICES[chip].arch): plan for plan, chip in planned.values()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(analyse, kinds.values(), [arch for _, arch in kinds])
        figures = dict(zip(kinds, found, strict=True))
    return {key: figures[p.variant, DEVICES[chip].arch] for key, (p, chip) in planned.items()}


def predict_all(
    calls: list[balance.Call], chips: Iterable[str] = tuple(DEVICES)
) -> dict[tuple[str, str], Prediction]:
    """By call and device."""
    named = {str(call): call for call in calls}
    planned = {
        (name, chip): (plan_on(DEVICES[chip], call.cell, call.is_backward), chip)
        for name, call in named.items()
        for chip in chips
    }
    figures = analyse_planned(planned)
    return {
        (name, chip): predict(
            named[name].cell, plan, figures[name, chip], chip, named[name].is_backward
        )
        for (name, _), (plan, chip) in planned.items()
    }


def measured_shares(file: Path | None) -> dict[tuple[str, int], float]:
    """By call and repeat."""
    if file is None:
        return static_model.PROXY
    return {
        (line["call"], line["repeat"]): line["share"]
        for line in harness.read_records(file)[1]
        if line.get("contestant") == harness.OURS and "share" in line
    }


def report_shares(calls: list[balance.Call], file: Path | None, json: Path | None) -> None:
    """Prints both tables and the error bar, and adds a record for each call and device."""
    measured, predicted = measured_shares(file), predict_all(calls)
    errors: dict[str, float] = {}
    rows = []
    for call in map(str, calls):
        row = [call, *(f"{predicted[call, chip].share:.2f}" for chip in CLASSES)]
        for repeat in (4, 2, 1):
            share, found = predicted[call, f"H100 x{repeat}"].share, measured.get((call, repeat))
            row += [f"{share:.3f}", f"{found:.3f}" if found else ""]
            row.append(f"{share / found - 1:+.1%}" if found else "")
            if found:
                errors[f"{call} x{repeat}"] = share / found - 1
        rows.append(row)
    columns = [f"{what} x{repeat}" for repeat in (4, 2, 1) for what in ("H100", "measured", "off")]
    print("\nPredicted share of the mma.sync peak; the H100 stands in for both classes:\n")
    print(harness.markdown(["call", "GeForce", "PRO", *columns], rows))
    print("", error_bar(errors), "", "Part of the time, GeForce / PRO:", "", sep="\n")
    print(harness.markdown(["call", *PARTS], part_rows(calls, predicted)))
    records = harness.Records(json, "sass_report", "cpu")
    for (name, device), prediction in predicted.items():
        found = measured.get((name, int(device[-1]))) if device.startswith("H100") else None
        fields = {**asdict(prediction), "share_measured": found, "measured": False}
        records.add(call=name, device=device, **fields)


CLASSES = ("GeForce", "PRO")
BEST = 3  # tiles that are named
PARTS = ("tensor", "issue", "latency", "handover", "pipes", "ends", "idle", "others")


def part_rows(
    calls: list[balance.Call], predicted: dict[tuple[str, str], Prediction]
) -> Iterator[list[str]]:
    for call in map(str, calls):
        both = [predicted[call, chip].parts for chip in CLASSES]
        yield [call, *(each_chip(f"{parts[name]:.3f}" for parts in both) for name in PARTS)]


def report_tiles(calls: list[balance.Call]) -> None:
    """Prints what the model says of every tile that is fed by cp.async, beside the plan's own: by
    which way K and V come changes no more than a few issue slots. It tells how blocks fill a card;
    of tiles a few percent apart a measurement has to decide."""
    groups: dict[tuple, list[balance.Call]] = {}
    for call in calls:
        groups.setdefault((call.is_backward, call.preset, call.causal), []).append(call)
    rows = []
    for group in groups.values():
        q, k, v = (torch.empty(*x, dtype=torch.bfloat16) for x in group[0].cell.shapes()[:3])
        problem = harness.Problem(q, k, v, group[0].causal)
        tiles = balance.first_tiles(group[0], problem, arch=120)
        figures = analyse_planned({name: (tile.plan, "PRO") for name, tile in tiles.items()})
        for call, chip in itertools.product(group, CLASSES):
            own = plan_on(DEVICES[chip], call.cell, call.is_backward)
            shares = {
                tile.label.split()[0]: predict(
                    call.cell, tile.plan, figures[name], chip, call.is_backward
                ).share
                for name, tile in tiles.items()
                if figures[name].counts()["spills"] <= figures[name].issued // 100
            }
            of_own = predict(
                call.cell, own, analyse(own, DEVICES[chip].arch), chip, call.is_backward
            ).share
            best = sorted(shares, key=lambda name: -shares[name])[:BEST]
            named = "; ".join(f"{name}: {shares[name]:.3f}" for name in best)
            rows.append([str(call), chip, str(own.variant), f"{of_own:.3f}", named])
    head = ("call", "card", "the plan's", "share", "the best")
    print("\nPredicted share of the mma.sync peak by tile, fields as in csrc/tiles.h:\n")
    print(harness.markdown(head, rows))


def error_bar(errors: dict[str, float]) -> str:
    """What the predictions for 12.x may be off by, as those for the H100 are."""
    if not errors:
        return "Nothing measured to compare with."
    worst = max(errors, key=lambda name: abs(errors[name]))
    root = statistics.fmean(error**2 for error in errors.values()) ** 0.5
    return (
        f"Off by {root:.1%} (root mean square of {len(errors)} cells), at most by "
        f"{errors[worst]:+.1%} ({worst}). ENDS and HANDOVER of static_model.py are fitted to such "
        "cells; of others it says how far off they are. A card whose memory or barriers differ "
        "from an H100's may be further off."
    )


# ---------------------------------------------------------------------------------- 8 and 4 bits

E4M3 = torch.float8_e4m3fn
PLAIN = "bf16"


def of_dtypes(q: torch.dtype, kv: torch.dtype) -> Callable[[Device, Cell], Plan]:
    return lambda device, cell: plan_on(device, dataclasses.replace(cell, dtype=q), kv_dtype=kv)


def of_recipe(recipe: str) -> Callable[[Device, Cell], Plan]:
    def plan(device: Device, cell: Cell) -> Plan:
        q, k, v = (torch.empty(*x, dtype=cell.dtype, device="meta") for x in cell.shapes()[:3])
        arch, causal = device.rows, cell.causal
        return explain_quantized(q, k, v, recipe, arch=arch, causal=causal, num_splits=1)

    return plan


# What is multiplied, and the plan of a call.
KINDS = {
    PLAIN: of_dtypes(torch.bfloat16, torch.bfloat16),
    "e4m3 k, v": of_dtypes(torch.bfloat16, E4M3),
    "e4m3 q, k, v": of_dtypes(E4M3, E4M3),
} | {recipe: of_recipe(recipe) for recipe in RECIPES}
LONG = 16384


def low_cells() -> list[Cell]:
    """Those of lowp.py, and one that is long."""
    return [*lowp.cells(), *lowp.cells(((1, LONG),))]


def step_row(kind: str, chip: str, plan: Plan, figures: Figures) -> list[object]:
    """Per 16 queries and 64 keys of a warp."""
    c, counts, cycles = constants(plan.main), figures.counts(), figures.cycles(chip)
    steps = c["WARP_M"] / 16 * c["TILE_N"] / 64
    loads = sum(n for opcode, n in figures.instructions.items() if opcode.startswith("LDSM"))
    moves = sum(n for opcode, n in figures.instructions.items() if opcode.startswith("SHFL"))
    issued = figures.issued - counts["nop"]
    slowest = max(issued, *(n for pipe, n in cycles.items() if pipe != "issue"))
    per_step = (issued, cycles["tensor"], cycles["mufu"], cycles["shared"], loads, moves, slowest)
    resources = (figures.registers, figures.spill_bytes)
    return [kind, chip, *(f"{n / steps:g}" for n in per_step), *resources, figures.variant]


def report_low(json: Path | None) -> None:
    """Prints what a step of each kernel takes, and how fast calls are beside bf16."""
    planned = {
        (kind, str(cell), chip): (cell, plan_of_kind(DEVICES[chip], cell), chip)
        for kind, plan_of_kind in KINDS.items()
        for cell in low_cells()
        for chip in CLASSES
    }
    figures = analyse_planned({key: (plan, chip) for key, (_, plan, chip) in planned.items()})
    predicted = {
        key: predict(cell, plan, figures[key], chip) for key, (cell, plan, chip) in planned.items()
    }
    rows = {
        (kind, chip, plan.variant): step_row(kind, chip, plan, figures[kind, name, chip])
        for (kind, name, chip), (cell, plan, _) in planned.items()
        if cell.seqlen == LONG
    }
    head = ("operands", "card", "issued", "tensor", "MUFU", "shared", "LDSM", "SHFL", "slowest")
    print("\nPer 16 x 64 step of a warp, in long calls. Issued: all instructions but NOPs, without")
    print("the block behind a vote; pipes in cycles; LDSM and SHFL: instructions. Slowest: what a")
    print("step takes at least, if pipes and issue slots worked beside each other all the time.\n")
    print(harness.markdown((*head, "registers", "spilled B", "kernel"), rows.values()))
    narrow = [kind for kind in KINDS if kind != PLAIN]
    head = ("call", *(f"{kind}, {chip}" for kind in narrow for chip in CLASSES))
    print("\nPredicted speed over bf16, without quantisation:\n")
    print(harness.markdown(head, speed_rows(predicted, narrow)))
    records = harness.Records(json, "sass_report", "cpu")
    for (kind, name, chip), prediction in predicted.items():
        variant = figures[kind, name, chip].variant
        fields = {"operands": kind, "call": name, "device": chip, "variant": variant}
        records.add(**fields, **asdict(prediction), measured=False)


def speed_rows(
    predicted: dict[tuple[str, str, str], Prediction], narrow: list[str]
) -> Iterator[list[str]]:
    for call in dict.fromkeys(name for _, name, _ in predicted):
        plain = {chip: predicted[PLAIN, call, chip].seconds for chip in CLASSES}
        speeds = [
            plain[chip] / predicted[kind, call, chip].seconds for kind in narrow for chip in CLASSES
        ]
        yield [call, *(f"{speed:.2f}" for speed in speeds)]


def record(records: harness.Records, figures: Figures) -> None:
    """One record for each kernel; cycles where the rates are those of its architecture."""
    fields = asdict(figures)
    del fields["listing"]
    chips = {
        chip: {
            "cycles": figures.cycles(chip),
            "bound": figures.bound(chip),
            "tensor_share": figures.tensor_share(chip),
        }
        for chip in (CHIPS if figures.arch.startswith("sm_12") else ())
    }
    records.add(**fields, counts=figures.counts(), chips=chips, measured=False)


def head_dims(text: str) -> tuple[int, int]:
    """(head_dim, head_dim_v) of "128" or "192,128"."""
    dims = [int(n) for n in text.split(",")]
    return dims[0], dims[-1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("head_dims", nargs="*", type=head_dims, metavar="D[,DV]")
    parser.add_argument("--arch", default="sm_120f", help="as NVRTC names it (default: sm_120f)")
    parser.add_argument("--listing", action="store_true", help="print each main loop, too")
    parser.add_argument("--shares", action="store_true", help="predict shares of the peak alone")
    parser.add_argument("--proxy", type=Path, metavar="FILE", help="of balance.py, beside shares")
    parser.add_argument("--only", default="", metavar="REGEX", help="shares of calls that have it")
    parser.add_argument("--tiles", action="store_true", help="every tile's share in these calls")
    parser.add_argument("--low", action="store_true", help="kernels of 8 and 4 bits beside bf16")
    parser.add_argument("--json", type=Path, metavar="FILE.jsonl")
    args = parser.parse_args()
    if not re.fullmatch(r"sm_\d+[af]?", args.arch):
        parser.error(f"an architecture is named like sm_120f, got {args.arch}")
    return args


def main() -> None:
    args = parse_args()
    if args.shares or args.proxy:
        report_shares(calls_of_shares(args.only), args.proxy, args.json)
        return
    if args.tiles:
        report_tiles(calls_of_shares(args.only))
        return
    if args.low:
        report_low(args.json)
        return
    compute_capability = int(re.sub(r"\D", "", args.arch))
    dims = args.head_dims or common_kernels.COMMON_HEAD_DIMS
    plans = [
        *common_kernels.common_plans(compute_capability, dims),
        *common_kernels.backward_plans(compute_capability, dims),
    ]
    try:
        figures = analyse_all(plans, args.arch)
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
    print(f"Static figures for {args.arch}: nothing here has run on the card.")
    if args.listing:
        for f in figures:
            print(f"\n{f.variant}, runs per tile and instruction:\n{f.listing}")
    report(figures)
    records = harness.Records(args.json, "sass_report", "cpu")
    for f in figures:
        record(records, f)


if __name__ == "__main__":
    main()
