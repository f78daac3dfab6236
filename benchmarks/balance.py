"""What share of the mma.sync peak do our kernels reach at the balance of sm_120?

    python benchmarks/balance.py --output balance.jsonl

On an H100 or H200: with FA_SM120_TENSOR_REPEAT=4 the tensor cores are as slow beside the rest of a
multiprocessor as a GeForce card's, with 2 as those of an RTX PRO 6000 (docs/environment.md says
what that leaves out). One process for each; the limits are those of 12.x, and from 2 on the tile
rows are those of such a card, unless FA_SM120_LIMITS and FA_SM120_PLAN_AS say something else.
Results are compared with an fp32 reference before anything is timed. The peak is measured in turn
with each cell, so at the same clocks.

`--tiles` times every tile that may be fast in place of the plan's: which one is best, and what the
plan's own loses beside it. Variants are compiled first, over all cores. A tile that hangs or breaks
the GPU costs itself alone, as in `tune`. On the emulator (`--device emulator`) the same path runs
with small calls.

    python benchmarks/balance.py --backward --tiles --repeat 1 2 4 --output backward_tiles.jsonl
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import backward
import grid
import harness
import torch
from harness import OURS, Cell, Preset, Problem

from flash_attn_sm120 import (
    _C,
    _measure,
    explain,
    explain_backward,
    flash_attn_func,
    jit,
    tuned_tiles,
)
from flash_attn_sm120.mma_peak import MmaPeak
from flash_attn_sm120.plan import Plan
from flash_attn_sm120.tune import candidates as tune_tiles
from flash_attn_sm120.tune import grid as tune_grid
from flash_attn_sm120.tune import trial

PEAK, DETERMINISTIC = "mma.sync peak", "deterministic"
LIKE = {1: "as it is", 2: "PRO-like", 4: "GeForce-like"}
ROUNDS, SCREENING_ROUNDS = 15, 4
FED, BEST = 4, 5  # tiles of a call that the TMA feeds, too; that come to the last round
EMULATED_SEQLEN = 96
LIMIT_S = 90.0  # without a word from a process: the longest step is a kernel's compilation

# Where the environment says nothing else; and the rows of which cards, at each repeat.
ENVIRONMENT = {"FA_SM120_LIMITS": "120", "FA_SM120_TILES": ""}
PLAN_AS = {1: "", 2: "120-pro", 4: "120-geforce"}

# Published shares of real cards, each of its own peak; no such kernel can be measured here.
PUBLISHED = """\
Published at D 128, of each card's own peak:
  RTX 5090, of 209.5 TF: forward full, FlashAttention-2 0.89 to 0.91, cuDNN 0.97, gau-nernst v6 0.98
  RTX PRO 6000, of 466 TF, S 8192, full / causal: FROST forward 0.91 / 0.87, backward 0.76 / 0.72"""


# ------------------------------------------------------------------------------------------ cells


@dataclass(frozen=True)
class Call:
    """A call that is measured, and the shares that are asked of it, by repeat."""

    preset: Preset
    seqlen: int
    causal: bool
    is_backward: bool
    wanted: dict[int, float]
    batch: int = 1

    def __str__(self) -> str:
        p = self.preset
        dims = f"{p.head_dim}" if p.head_dim_v is None else f"{p.head_dim},{p.head_dim_v}"
        batch = f"B {self.batch}, " if self.batch > 1 else ""
        return (
            f"{'backward' if self.is_backward else 'forward'} D {dims}, {p.heads_q}/{p.heads_kv}, "
            f"{batch}S {self.seqlen} {'causal' if self.causal else 'full'}"
        )

    @property
    def cell(self) -> Cell:
        return Cell(self.preset, self.seqlen, self.causal, self.batch, torch.bfloat16)

    @property
    def head_dims(self) -> tuple[int, int]:
        return self.preset.head_dim, self.preset.head_dim_v or self.preset.head_dim

    @property
    def use_tiles(self) -> Callable[[Iterable], None]:
        """Has rows come before the plan's own."""
        return _C.use_backward_tiles if self.is_backward else _C.use_tiles

    def problem(self, device: str) -> Problem:
        """On the emulator a small one, which takes the same path."""
        if device != "emulator":
            return self.cell.problem(device)
        from emulator import EmulatedTensor

        preset = Preset(1, 1, *self.head_dims)
        small = Cell(preset, EMULATED_SEQLEN, self.causal, 1, torch.bfloat16).problem("cpu")
        q, k, v = (t.as_subclass(EmulatedTensor) for t in (small.q, small.k, small.v))
        return Problem(q, k, v, self.causal)


def _pairs(
    preset: Preset, seqlens: Iterable[int], is_backward: bool, full: dict, causal: dict
) -> Iterator[Call]:
    for seqlen in seqlens:
        yield Call(preset, seqlen, False, is_backward, full)
        yield Call(preset, seqlen, True, is_backward, causal)


GQA, D64 = Preset(32, 8, 128), Preset(32, 8, 64)
MHA, MHA64 = Preset(32, 32, 128), Preset(16, 16, 64)
CALLS = (
    *_pairs(GQA, (4096, 8192), False, {4: 0.95, 2: 0.87}, {4: 0.92, 2: 0.81}),
    *_pairs(D64, (8192,), False, {4: 0.93, 2: 0.84}, {4: 0.92, 2: 0.82}),
    *_pairs(GQA, (1024,), False, {4: 0.87, 2: 0.78}, {4: 0.76, 2: 0.63}),
    *_pairs(MHA, (4096, 8192), True, {4: 0.90, 2: 0.78}, {4: 0.87, 2: 0.75}),
    *_pairs(MHA64, (8192,), True, {4: 0.90, 2: 0.79}, {4: 0.88, 2: 0.78}),
    *_pairs(MHA, (1024,), True, {4: 0.80, 2: 0.68}, {4: 0.68, 2: 0.54}),
    *_pairs(Preset(16, 4, 256), (4096,), True, {4: 0.86, 2: 0.72}, {4: 0.83, 2: 0.70}),
    *_pairs(Preset(16, 4, 192), (4096,), True, {4: 0.86, 2: 0.72}, {4: 0.83, 2: 0.70}),
)


def calls_of_grid(name: str) -> Iterator[Call]:
    """Those of a grid of forward.py and backward.py, in both directions; no share is asked."""
    cells = [cell for part in grid.GRIDS[name] for cell in part.cells()]
    for is_backward, cell in itertools.product((False, True), cells):
        yield Call(cell.preset, cell.seqlen, cell.causal, is_backward, {}, cell.batch)


# ----------------------------------------------------------------------------------------- plans


def plan_of(
    call: Call, problem: Problem, deterministic: bool = False, arch: int | None = None
) -> Plan:
    """On the device of the problem, or on one of compute capability `arch`."""
    qkv = problem.q, problem.k, problem.v
    options: dict[str, Any] = {"causal": call.causal, "arch": arch}
    if call.is_backward:
        return explain_backward(*qkv, **options, deterministic=deterministic)
    return explain(*qkv, **options)


def compile_all(plans: Iterable[Plan], say: Callable[[str], None]) -> dict[str, str]:
    """Compiles over all cores; why a variant does not compile, by its name."""
    kernels = dict.fromkeys(kernel for plan in plans for kernel in plan.kernels)
    if not kernels:  # a dry run
        return {}
    version, devices = _C.devices()

    def attempt(kernel) -> str:
        try:
            ptx = bool(os.environ.get("FA_SM120_DRIVER"))
            jit.compile(*kernel, devices[0]["arch"], version, ptx)
        except RuntimeError as error:
            return str(error)
        finally:
            say("")
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(attempt, kernels)
        return {k.variant: why for k, why in zip(kernels, reasons, strict=True) if why}


# ------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Bench:
    """A call with its inputs: what is timed, and whether it is right."""

    call: Call
    problem: Problem

    @functools.cached_property
    def dout(self) -> torch.Tensor:
        return torch.randn_like(self.problem.q.new_empty(self.problem.out_shape))

    @functools.cached_property
    def saved(self) -> tuple:
        p = self.problem
        return flash_attn_func(p.q, p.k, p.v, causal=p.causal, return_lse=True)

    def run(self, deterministic: bool = False):
        p = self.problem
        if not self.call.is_backward:
            return flash_attn_func(p.q, p.k, p.v, causal=p.causal)[0]
        options = {"causal": p.causal, "deterministic": deterministic}
        return _C.backward(self.dout, p.q, p.k, p.v, *self.saved, None, **options)[:3]

    @functools.cached_property
    def check(self):
        if self.call.is_backward:
            return backward.Check(self.problem, self.dout)
        return functools.partial(harness.check_forward, self.problem)

    @property
    def flops(self) -> float:
        factor = backward.FLOPS_OF_FORWARD if self.call.is_backward else 1.0
        return factor * harness.forward_flops(self.problem)

    def timed(self, name: str, rows=(), deterministic: bool = False) -> _measure.Timed:
        def run():
            self.call.use_tiles(rows)
            return self.run(deterministic)

        return _measure.Timed(name, run)


def peak_of(device: str) -> tuple[_measure.Timed, float]:
    """The peak as a call beside others, and its FLOPs."""
    if device != "cpu":
        peak = MmaPeak()
        return peak.timed(), peak.flops
    a = torch.randn(64, 64)
    return _measure.Timed("a product", lambda: a @ a), 2.0 * 64**3


def contest(bench: Bench, entrants: list[_measure.Timed], rounds: int, repeat: int) -> list[dict]:
    """Time, tensor TF and share of the peak of each, measured in turn with the peak."""
    device = bench.problem.q.device.type
    peak, peak_flops = peak_of(device)
    timed = [peak, *entrants]
    _measure.soak(timed, device, harness.SOAK_S)
    samples = _measure.round_robin(timed, device, rounds, harness.flush_buffer(device))
    peak_ms, *others = samples
    found = []
    for entrant, own in zip(entrants, others, strict=True):
        # FLOP per ms of both in the same round, so at one clock.
        shares = [
            repeat * bench.flops / ms / (peak_flops / base)
            for ms, base in zip(own, peak_ms, strict=True)
        ]
        ms = statistics.median(own)
        found.append(
            {
                "contestant": entrant.name,
                "ms": ms,
                "tensor_tflops": repeat * bench.flops / ms * 1e-9,
                "peak_tflops": peak_flops / statistics.median(peak_ms) * 1e-9,
                "share": statistics.median(shares),
            }
        )
    return found


def measure(call: Call, job: Job) -> list[dict]:
    """What the plan takes, and for gradients the same with deterministic=True."""
    bench = Bench(call, call.problem(job.args.device))
    entrants = [bench.timed(OURS)]
    if call.is_backward:
        entrants.append(bench.timed(DETERMINISTIC, deterministic=True))
    for entrant in entrants:
        bench.check(entrant.name, entrant.call())
    variant = plan_of(call, bench.problem).variant
    return [
        {"variant": variant, **found}
        for found in contest(bench, entrants, job.args.rounds, job.repeat)
    ]


# ----------------------------------------------------------------------------------------- tiles


class Tile(NamedTuple):
    """A tile in place of the plan's."""

    label: str
    row: tuple[int, ...]
    plan: Plan


def tiles_of(
    call: Call, problem: Problem, rows: Iterable[tuple[str, tuple]], arch: int | None = None
) -> dict[str, Tile]:
    """Those that serve the call and fit, by the variant that it gets from each."""
    found: dict[str, Tile] = {}
    for label, row in rows:
        try:
            call.use_tiles([row])
            plan = plan_of(call, problem, arch=arch)
        except ValueError:  # a tile that no kernel has
            continue
        finally:
            call.use_tiles(())
        if "use_" in plan.reasons.get("tile", ""):
            found.setdefault(str(plan.variant), Tile(label, row, plan))
    return found


def first_tiles(call: Call, problem: Problem, arch: int | None = None) -> dict[str, Tile]:
    """What is tried first: every tile of the backward; of the forward those fed by cp.async."""
    rows = (backward_rows if call.is_backward else forward_rows)(call)
    return tiles_of(call, problem, rows, arch)


def fed_otherwise(
    call: Call, problem: Problem, tiles: Iterable[Tile], arch: int | None = None
) -> dict[str, Tile]:
    """Tiles of the forward with K and V brought by the TMA, in every way."""
    rows = []
    for label, row, _ in tiles:
        fields = dict(zip(_C.tile_fields(), row, strict=True))
        for name, feed in tune_tiles.FEEDS.items():
            fed = tuned_tiles.as_tuple(fields | feed)
            rows.append((f"{label.split()[0]} {name}", fed))
    return tiles_of(call, problem, rows, arch)


def forward_rows(call: Call) -> Iterator[tuple[str, tuple[int, ...]]]:
    """As `tune` tries them."""
    cell = tune_grid.Cell(*call.head_dims, True, tune_grid.BUCKETS[-1])
    anything = dict.fromkeys(_C.tile_fields(), tuned_tiles.ANY) | tune_tiles.CP_ASYNC
    of_all = dict.fromkeys(("arch", "mask_right", "mask_left"), tuned_tiles.ANY)
    for row in tune_tiles.candidate_rows(cell, anything, 120, tune_tiles.CHOICES):
        label = ",".join(str(row[name]) for name in tune_tiles.CHOICES)
        yield f"{label} CP_ASYNC", tuned_tiles.as_tuple(row | of_all)


def backward_rows(call: Call) -> Iterator[tuple[str, tuple[int, ...]]]:
    of_all = dict.fromkeys(_C.backward_tile_fields(), tuned_tiles.ANY) | {"head_dim": 256}
    for tile in tune_tiles.backward_tiles(*call.head_dims, tune_tiles.BACKWARD_CHOICES):
        yield ",".join(map(str, tile.values())), tuple((of_all | tile).values())


class Sweep:
    """All tiles of a call beside the plan's own; those that are wrong or do not run say so."""

    def __init__(self, call: Call, job: Job) -> None:
        self.call, self.job = call, job
        call.use_tiles(())  # not the last one of the call before
        self.bench = Bench(call, call.problem(job.args.device))
        self.own = plan_of(call, self.bench.problem).variant
        self.labels = {self.own: self.own}  # by variant
        self.entrants = [self.bench.timed(OURS)]
        self.failed: list[dict] = []

    def run(self) -> list[dict]:
        """Best first. Few rounds of all, then many of the best."""
        tiles = first_tiles(self.call, self.bench.problem)
        if not self.call.is_backward:
            every = fed_otherwise(self.call, self.bench.problem, tiles.values())
            self.labels |= {name: every[name].label for name in self.labels if name in every}
        self.admit(tiles)
        screened = self.screen()
        if not self.call.is_backward:
            best = [
                tiles[found["contestant"]] for found in screened if found["contestant"] in tiles
            ]
            fed = fed_otherwise(self.call, self.bench.problem, best[:FED])
            self.admit({name: tile for name, tile in fed.items() if name not in self.labels})
            screened = self.screen()
        best = [found["contestant"] for found in screened[:BEST]]
        left = [entrant for entrant in self.entrants if entrant.name in {OURS, *best}]
        final = contest(self.bench, left, self.job.args.rounds, self.job.repeat)
        decided = {found["contestant"] for found in final}
        others = [found for found in screened if found["contestant"] not in decided]
        records = sorted(final, key=lambda found: found["ms"]) + others + self.failed
        for record in records:
            name = record["contestant"]
            record["variant"] = self.own if name == OURS else name
            record["tile"] = self.labels[record["variant"]]
        return records

    def screen(self) -> list[dict]:
        found = contest(self.bench, self.entrants, SCREENING_ROUNDS, self.job.repeat)
        return sorted(found, key=lambda each: each["ms"])

    def admit(self, tiles: dict[str, Tile]) -> None:
        """Those that compile, run and are right."""
        why_not = compile_all([tile.plan for tile in tiles.values()], self.job.say)
        for variant, tile in tiles.items():
            self.labels[variant] = tile.label
            why = why_not.get(variant) or self.job.stopped.get(f"{self.call}: {variant}")
            if variant != self.own:
                entrant = self.bench.timed(variant, [tile.row])
                why = why or self.why_not(entrant)
                if why:
                    why = why.splitlines()[0]
                    self.failed.append({"contestant": variant, "absent": why})
                else:
                    self.entrants.append(entrant)
        self.job.begin(str(self.call))

    def why_not(self, entrant: _measure.Timed) -> str:
        """Why a tile does not run, or is wrong; raises where the GPU does nothing any more."""
        self.job.begin(f"{self.call}: {entrant.name}")
        device = self.bench.problem.q.device.type
        try:
            self.bench.check(entrant.name, entrant.call())
        except (RuntimeError, harness.WrongResult) as error:
            _measure.synchronize(device)
            return str(error) or repr(error)
        return ""


# ------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Job:
    """What a process measures, what broke those before it, and whom it tells."""

    args: argparse.Namespace
    repeat: int
    done: frozenset[str]  # calls
    stopped: dict[str, str]  # why, by what had begun: a call, or one of its tiles
    send: Callable[[tuple[str, Any]], None]

    def begin(self, name: str) -> None:
        self.send(("begin", name))

    def say(self, text: str) -> None:
        self.send(("progress", text))

    def run(self) -> None:
        """Measures at the repeat of this process's environment."""
        calls = [call for call in self.args.calls if str(call) not in self.done]
        plans = [plan for call in calls for plan in self.first_plans(call)]
        kernels = {kernel.variant for plan in plans for kernel in plan.kernels}
        self.say(f"x{self.repeat}: {len(calls)} calls, {len(kernels)} variants to compile")
        begin = time.perf_counter()
        compile_all(plans, self.say)
        self.say(f"x{self.repeat}: compiled in {time.perf_counter() - begin:.0f} s")
        for call in calls:
            begin = time.perf_counter()
            if str(call) in self.stopped:
                found = [{"contestant": OURS, "absent": self.stopped[str(call)]}]
            else:
                self.begin(str(call))
                found = Sweep(call, self).run() if self.args.tiles else measure(call, self)
            common = {"call": str(call), "repeat": self.repeat}
            self.send(
                ("found", [{**common, "wanted": call.wanted.get(self.repeat), **f} for f in found])
            )
            self.say(f"x{self.repeat}: {call}: {time.perf_counter() - begin:.0f} s")
            self.begin("")
            harness.release_memory()

    def first_plans(self, call: Call) -> list[Plan]:
        """What is compiled before anything is measured."""
        problem = call.problem(self.args.device)
        plans = [plan_of(call, problem)]
        if self.args.tiles:
            plans += [tile.plan for tile in first_tiles(call, problem).values()]
        elif call.is_backward:
            plans.append(plan_of(call, problem, deterministic=True))
        if call.is_backward:  # of the forward before it
            plans.append(explain(problem.q, problem.k, problem.v, causal=call.causal))
        return plans


def child(theirs: Connection, *job: Any) -> None:
    """A job in a process of its own, as trial.watch runs it."""
    try:
        Job(*job, theirs.send).run()
        theirs.send(("record", {}))
    except Exception as error:
        theirs.send(("error", f"{type(error).__name__}: {error}"))


def measured_at(repeat: int, args: argparse.Namespace, add: Callable[..., dict]) -> None:
    """Adds the records of processes of their own: the environment is read once, and a tile that
    hangs or breaks the GPU ends its process alone."""
    os.environ["FA_SM120_PLAN_AS"] = args.plan_as or PLAN_AS[repeat]
    os.environ["FA_SM120_TENSOR_REPEAT"] = str(repeat)
    done: set[str] = set()
    stopped: dict[str, str] = {}

    def hear(message: str | list[dict]) -> None:
        if isinstance(message, str):
            if message:
                print(message, file=sys.stderr, flush=True)
            return
        done.add(message[0]["call"])
        for record in message:
            add(**record)

    while True:
        job = (args, repeat, frozenset(done), stopped)
        outcome, begun = trial.watch(child, job, hear, LIMIT_S)
        if isinstance(outcome, dict):
            return
        hear(f"x{repeat}: {begun}: {outcome}")
        if not begun or begun in stopped:
            raise SystemExit(f"x{repeat}: {outcome}")
        stopped[begun] = outcome


# ---------------------------------------------------------------------------------------- tables


def table(records: list[dict], repeats: list[int]) -> str:
    """One row for each call: share and what is asked, deterministic beside, tensor TF and peak."""
    found = {(r["call"], r["repeat"], r["contestant"]): r for r in records}

    def columns(call: str, repeat: int) -> list[str]:
        ours = found.get((call, repeat, OURS))
        if not ours:
            return [""] * 5
        other = found.get((call, repeat, DETERMINISTIC))
        wanted = f"{ours['wanted']:.2f}" if ours["wanted"] else ""
        share = f"{ours['share']:.3f}"
        ratio = f"{ours['ms'] / other['ms']:.2f}" if other else ""
        return [share, wanted, ratio, f"{ours['tensor_tflops']:.0f}", f"{ours['peak_tflops']:.0f}"]

    head = ["call"]
    for repeat in repeats:
        head += [f"share x{repeat}", "asked", "determ.", "tensor TF", "peak TF"]
    calls = dict.fromkeys(record["call"] for record in records)
    rows = [[call, *(c for r in repeats for c in columns(call, r))] for call in calls]
    return harness.markdown(head, rows)


def tiles_table(records: list[dict], repeats: list[int]) -> str:
    """For each direction and head dim: the share of each tile in each call. Bold: the best tile of
    a call; in brackets: what the plan takes."""
    tables = []
    kinds = dict.fromkeys(record["call"].split(", S ")[0] for record in records)
    for kind in kinds:
        own = [r for r in records if r["call"].startswith(f"{kind}, ") and "ms" in r]
        columns = [(c, n) for c in dict.fromkeys(r["call"] for r in own) for n in repeats]
        best = {column: max(_shares(own, column).values(), default=1.0) for column in columns}
        taken = {(r["call"], r["repeat"], r["tile"]) for r in own if r["contestant"] == OURS}

        def shown(tile: str, column: tuple, own=own, best=best, taken=taken) -> str:
            share = _shares(own, column).get(tile)
            if share is None:
                return ""
            text = f"{share:.3f}"
            text = f"**{text}**" if share == best[column] else text
            return f"[{text}]" if (*column, tile) in taken else text

        def of_best(tile: str, own=own, best=best, columns=columns) -> float:
            return statistics.fmean(_shares(own, c).get(tile, 0) / best[c] for c in columns)

        tiles = sorted(dict.fromkeys(r["tile"] for r in own), key=of_best, reverse=True)
        head = ["tile", "of the best", *(f"{c.split(', ')[-1]} x{n}" for c, n in columns)]
        rows = [[t, f"{of_best(t):.3f}", *(shown(t, c) for c in columns)] for t in tiles]
        tables.append(f"{kind}\n\n{harness.markdown(head, rows)}")
    return "\n\n".join(tables)


def _shares(records: list[dict], column: tuple[str, int]) -> dict[str, float]:
    """By tile."""
    return {r["tile"]: r["share"] for r in records if (r["call"], r["repeat"]) == column}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", nargs="+", type=int, choices=LIKE, default=[4, 2])
    parser.add_argument("--only", default="", metavar="REGEX", help="calls whose name has it")
    parser.add_argument("--grid", choices=grid.GRIDS, help="its calls, and not those of the table")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--forward", action="store_true", help="calls of the forward alone")
    direction.add_argument("--backward", action="store_true", help="of the backward alone")
    parser.add_argument("--tiles", action="store_true", help="sweep all tiles of each call")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=("cuda", "cpu", "emulator"), default="cuda")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl")
    args = parser.parse_args()
    args.plan_as = os.environ.get("FA_SM120_PLAN_AS")
    harness.require_device("cuda" if args.device == "cuda" else "cpu")
    args.calls = [
        call
        for call in (calls_of_grid(args.grid) if args.grid else CALLS)
        if re.search(args.only, str(call))
        and not (args.forward if call.is_backward else args.backward)
    ]
    return args


def main() -> None:
    args = parse()
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if args.device == "emulator":
        from emulator import library

        os.environ["FA_SM120_DRIVER"] = str(library())
    found: list[dict] = []
    records = harness.Records(args.output, "balance", "cuda" if args.device == "cuda" else "cpu")
    begin = time.perf_counter()
    for repeat in args.repeat:
        measured_at(repeat, args, lambda **record: found.append(records.add(**record)))
    print(harness.headline(records.header))
    print(", ".join(f"x{repeat}: {LIKE[repeat]}" for repeat in args.repeat), end="\n\n")
    print((tiles_table if args.tiles else table)(found, args.repeat))
    absent = {f"{r['call']}: {r['contestant']}: {r['absent']}" for r in found if "absent" in r}
    print("", *sorted(absent), f"took {time.perf_counter() - begin:.0f} s", PUBLISHED, sep="\n")


if __name__ == "__main__":
    main()
