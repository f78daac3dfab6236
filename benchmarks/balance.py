"""What share of the mma.sync peak do our kernels reach at the balance of sm_120?

    python benchmarks/balance.py --output balance.jsonl

On an H100 or H200: with FA_SM120_TENSOR_REPEAT=4 the tensor cores are as slow beside the rest of a
multiprocessor as a GeForce card's, with 2 as those of an RTX PRO 6000 (docs/environment.md says
what that leaves out). One process for each; the limits and the tile rows are those of 12.x unless
FA_SM120_LIMITS and FA_SM120_PLAN_AS say something else. Results are compared with an fp32 reference
before anything is timed. The peak is measured in turn with each cell, so at the same clocks.

`--tiles` times every tile that may be fast in place of the plan's: which one is best, and what the
plan's own loses beside it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import backward
import harness
import torch
from harness import OURS, Cell, Preset, Problem

from flash_attn_sm120 import _C, _measure, explain, explain_backward, flash_attn_func, jit
from flash_attn_sm120.mma_peak import MmaPeak
from flash_attn_sm120.plan import Plan

PEAK, DETERMINISTIC = "mma.sync peak", "deterministic"
LIKE = {1: "as it is", 2: "PRO-like", 4: "GeForce-like"}
ROUNDS, SCREENING_ROUNDS = 15, 4

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

    def __str__(self) -> str:
        p = self.preset
        dims = f"{p.head_dim}" if p.head_dim_v is None else f"{p.head_dim},{p.head_dim_v}"
        return (
            f"{'backward' if self.is_backward else 'forward'} D {dims}, {p.heads_q}/{p.heads_kv}, "
            f"S {self.seqlen} {'causal' if self.causal else 'full'}"
        )

    def problem(self, device: str) -> Problem:
        return Cell(self.preset, self.seqlen, self.causal, 1, torch.bfloat16).problem(device)


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


# ----------------------------------------------------------------------------------------- plans


def plan_of(call: Call, problem: Problem, deterministic: bool = False) -> Plan:
    qkv = problem.q, problem.k, problem.v
    if call.is_backward:
        return explain_backward(*qkv, causal=call.causal, deterministic=deterministic)
    return explain(*qkv, causal=call.causal)


def compile_all(plans: Iterable[Plan]) -> dict[str, str]:
    """Compiles over all cores; why a variant does not compile, by its name."""
    kernels = dict.fromkeys(kernel for plan in plans for kernel in plan.kernels)
    if not kernels:  # a dry run
        return {}
    version, devices = _C.devices()

    def attempt(kernel) -> str:
        try:
            jit.compile(*kernel, devices[0]["arch"], version)
        except RuntimeError as error:
            return str(error)
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
        use = _C.use_backward_tiles if self.call.is_backward else _C.use_tiles

        def run():
            use(rows)
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


def measure(call: Call, args: argparse.Namespace) -> list[dict]:
    """What the plan takes, and for gradients the same with deterministic=True."""
    bench = Bench(call, call.problem(args.device))
    entrants = [bench.timed(OURS)]
    if call.is_backward:
        entrants.append(bench.timed(DETERMINISTIC, deterministic=True))
    for entrant in entrants:
        bench.check(entrant.name, entrant.call())
    variant = plan_of(call, bench.problem).variant
    return [
        {"variant": variant, **found}
        for found in contest(bench, entrants, args.rounds, args.repeat)
    ]


# ----------------------------------------------------------------------------------------- tiles


def candidates(call: Call, problem: Problem) -> dict[str, tuple[int, ...]]:
    """Rows to try, by the variant that the call gets from each."""
    found: dict[str, tuple[int, ...]] = {}
    use = _C.use_backward_tiles if call.is_backward else _C.use_tiles
    for row in (backward_rows if call.is_backward else forward_rows)(call.preset):
        try:
            use([row])
            plan = plan_of(call, problem)
        except (ValueError, NotImplementedError):  # a tile that no kernel has
            continue
        finally:
            use(())
        if "use_" in plan.reasons["tile"]:
            found.setdefault(str(plan.variant), row)
    return found


def forward_rows(preset: Preset) -> Iterator[tuple[int, ...]]:
    """As `tune` tries them, with every way in which K and V come to the ring."""
    from flash_attn_sm120 import tuned_tiles
    from flash_attn_sm120.tune import candidates as tuned
    from flash_attn_sm120.tune.grid import BUCKETS
    from flash_attn_sm120.tune.grid import Cell as Cells

    dim_v = preset.head_dim_v or preset.head_dim
    cell = Cells(preset.head_dim, dim_v, True, BUCKETS[-1])
    anything = dict.fromkeys(_C.tile_fields(), tuned_tiles.ANY) | {"kernel": 0, "producer": 0}
    for row in tuned.candidate_rows(cell, anything, 120, tuned.CHOICES):
        for feed in tuned.FEEDS.values():
            of_all = dict.fromkeys(("arch", "mask_right", "mask_left"), tuned_tiles.ANY)
            yield tuned_tiles.as_tuple(row | feed | of_all)


def backward_rows(preset: Preset) -> Iterator[tuple[int, ...]]:
    """(head_dim, varlen_k, warps, warp_n, tile_m, sub_m, stages)"""
    for warps in (4, 8, 16):
        for warp_n in (16, 32):
            for tile_m in (32, 64, 128):
                for sub_m in (16, 32, 64):
                    for stages in (1, 2):
                        if sub_m <= tile_m // 2:
                            yield 256, -1, warps, warp_n, tile_m, sub_m, stages


def sweep(call: Call, args: argparse.Namespace) -> list[dict]:
    """Every tile beside the plan's own, best first; those that are wrong or do not run say so."""
    bench = Bench(call, call.problem(args.device))
    rows = candidates(call, bench.problem)
    own = plan_of(call, bench.problem).variant
    use = _C.use_backward_tiles if call.is_backward else _C.use_tiles
    plans = []
    for row in rows.values():
        use([row])
        plans.append(plan_of(call, bench.problem))
    use(())
    why_not = compile_all(plans)
    entrants, failed = [bench.timed(OURS)], []
    for variant, row in rows.items():
        if variant == own:
            continue
        entrant = bench.timed(variant, [row])
        try:
            if variant in why_not:
                raise RuntimeError(why_not[variant])
            bench.check(variant, entrant.call())
            entrants.append(entrant)
        except (RuntimeError, harness.WrongResult) as error:
            failed.append({"contestant": variant, "absent": str(error).splitlines()[0]})
    screened = contest(bench, entrants, SCREENING_ROUNDS, args.repeat)
    best = sorted(screened[1:], key=lambda found: found["ms"])[:6]
    left = [e for e in entrants if e.name in {OURS, *(found["contestant"] for found in best)}]
    found = contest(bench, left, args.rounds, args.repeat)
    found[0]["variant"] = own
    return sorted(found, key=lambda each: each["ms"]) + failed


# ------------------------------------------------------------------------------------- processes


def run_child(args: argparse.Namespace) -> None:
    """Measures at the repeat of this process's environment, a JSON line for each figure."""
    records = harness.Records(args.output, "balance", args.device)
    calls = [call for call in CALLS if re.search(args.only, str(call))]
    if not args.tiles:
        shapes = [(call, call.problem(args.device)) for call in calls]
        plans = [plan_of(*shape) for shape in shapes]
        plans += [plan_of(call, p, deterministic=True) for call, p in shapes if call.is_backward]
        plans += [explain(p.q, p.k, p.v, causal=call.causal) for call, p in shapes]
        compile_all(plans)
        del shapes
    work = sweep if args.tiles else measure
    for call in harness.progress(calls):
        for found in work(call, args):
            wanted = call.wanted.get(args.repeat)
            records.add(call=str(call), repeat=args.repeat, wanted=wanted, **found)
        harness.release_memory()


def measured_at(repeat: int, args: argparse.Namespace, output: Path) -> list[dict]:
    """The records of a process of its own: the environment is read once."""
    defaults = {"FA_SM120_LIMITS": "120", "FA_SM120_PLAN_AS": "120", "FA_SM120_TILES": ""}
    environment = {**defaults, **os.environ, "FA_SM120_TENSOR_REPEAT": str(repeat)}
    command = [sys.executable, __file__, "--repeat", str(repeat), "--output", str(output)]
    command += [
        "--device",
        args.device,
        "--only",
        args.only,
        "--rounds",
        str(args.rounds),
        *["--tiles"] * args.tiles,
    ]
    subprocess.run(command, env=environment, check=True)
    return [record for record in harness.read_records(output)[1] if record["record"] == "cell"]


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


def tiles_table(records: list[dict]) -> str:
    """The best tiles of each call, and the plan's own."""
    rows = [
        [
            r["call"],
            r["repeat"],
            f"{r['share']:.3f}",
            r.get("variant") or r["contestant"],
            "plan" if r["contestant"] == OURS else "",
        ]
        for r in records
        if "ms" in r
    ]
    return harness.markdown(("call", "repeat", "share", "variant", ""), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", nargs="+", type=int, choices=LIKE, default=[4, 2])
    parser.add_argument("--only", default="", metavar="REGEX", help="calls whose name has it")
    parser.add_argument("--tiles", action="store_true", help="sweep all tiles of each call")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--repeat", type=int, help=argparse.SUPPRESS)  # of a child
    args = parser.parse_args()
    harness.require_device(args.device)
    if args.repeat:
        run_child(args)
        return
    records: list[dict] = []
    with tempfile.TemporaryDirectory() as directory:
        for repeat in args.repeats:
            records += measured_at(repeat, args, Path(directory) / f"{repeat}.jsonl")
            header = harness.read_records(Path(directory) / f"{repeat}.jsonl")[0]
    if args.output:
        args.output.write_text("".join(json.dumps(line) + "\n" for line in (header, *records)))
    print(harness.headline(header))
    print(", ".join(f"x{repeat}: {LIKE[repeat]}" for repeat in args.repeats), end="\n\n")
    print(tiles_table(records) if args.tiles else table(records, args.repeats))
    absent = sum("absent" in record for record in records)
    print(f"\n{absent} tiles did not run or were wrong" if absent else "", PUBLISHED, sep="\n")


if __name__ == "__main__":
    main()
