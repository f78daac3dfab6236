"""How fast is attention in 8 and 4 bits, beside our own bf16?

    FA_SM120_LIMITS=120 python benchmarks/lowp.py --output lowp.jsonl

Short and middle calls, where others' FP8 kernels are slower than their bf16 (0.93x, on a DGX
Spark): q, k and v in e4m3, and each recipe of quantised attention, from bf16 tensors and from what
was quantised before. What a device has no kernel for is absent, and the reason says so. Below 12.0
the e4m3 mma is emulated: what is right there is right, but its speed says nothing about 12.x.

Before anything is timed every result is compared with attention in fp32 of the same bf16 inputs:
by the relative L2 error that its recipe has with N(0, 1) inputs, with half as much again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterable

import harness
import torch
from harness import OURS, Cell, Contestant, Preset, Problem, WrongResult
from torch import Tensor

from flash_attn_sm120 import _measure, flash_attn_func
from flash_attn_sm120.quantized import RECIPES, quantize, quantized_attention

E4M3 = torch.float8_e4m3fn
BATCHES, SEQLENS, HEADS = (1, 4), (512, 1024, 2048), 16
EIGHT_BITS, NARROW = "e4m3 q, k, v", ", quantised before"
NAMES = (OURS, EIGHT_BITS, *itertools.chain(*((name, name + NARROW) for name in RECIPES)))
CHECKED_ROWS = 64

# Relative L2 against fp64 of N(0, 1); of e4m3 as it is, that of "fp8", whose scales of heads such
# numbers hardly need.
ERRORS = {OURS: 0.003, EIGHT_BITS: RECIPES["fp8"].error}
ERRORS |= {name: recipe.error for name, recipe in RECIPES.items()}


def cells(
    sizes: Iterable[tuple[int, int]] = tuple(itertools.product(BATCHES, SEQLENS)),
) -> list[Cell]:
    """Of (batch, seqlen), each with both head dims, full and causal."""
    return [
        Cell(
            Preset(HEADS, HEADS, head_dim),
            seqlen,
            causal,
            batch,
            torch.bfloat16,
            fields={"head_dim": head_dim, "batch": batch, "seqlen": seqlen, "causal": causal},
        )
        for head_dim, causal, (batch, seqlen) in itertools.product((64, 128), (False, True), sizes)
    ]


# ---- contestants ---------------------------------------------------------------------------------


def contestants(problem: Problem) -> list[Contestant]:
    bf16 = problem.q, problem.k, problem.v
    causal = problem.causal
    eight_bits = [x.to(E4M3) for x in bf16]

    def ours(tensors: Iterable[Tensor]) -> Tensor:
        return flash_attn_func(*tensors, causal=causal)[0]

    def by_recipe(recipe: str, operands: Callable[[], Iterable]) -> Tensor:
        try:
            return quantized_attention(*operands(), recipe, causal=causal)[0]
        except RuntimeError as error:
            if repr(recipe) in str(error):  # the device has no kernel for it
                raise NotImplementedError(str(error)) from error
            raise

    def quantised(recipe: str) -> list:
        return [quantize(x, recipe, name) for x, name in zip(bf16, "qkv", strict=True)]

    found = [
        Contestant(OURS, functools.partial(ours, bf16)),
        Contestant(EIGHT_BITS, functools.partial(ours, eight_bits)),
    ]
    for recipe in RECIPES:
        before = functools.cache(functools.partial(quantised, recipe))  # once, by the first call
        found.append(Contestant(recipe, functools.partial(by_recipe, recipe, lambda: bf16)))
        found.append(Contestant(recipe + NARROW, functools.partial(by_recipe, recipe, before)))
    return found


class Check:
    """Some rows of the first and the last head against attention in fp32."""

    def __init__(self, problem: Problem) -> None:
        seqlen, heads = problem.q.shape[1:3]
        rows = torch.randperm(seqlen, generator=torch.Generator().manual_seed(0))[:CHECKED_ROWS]
        self.rows = rows.to(problem.q.device)
        self.places = sorted({(0, 0), (len(problem.q) - 1, heads - 1)})
        visible = torch.ones(len(rows), seqlen, dtype=torch.bool, device=problem.q.device)
        if problem.causal:
            visible = torch.arange(seqlen, device=visible.device) <= self.rows[:, None]
        self.exact = [
            _measure.plain_attention(
                problem.q[b, self.rows, head].float(),
                problem.k[b, :, head].float(),
                problem.v[b, :, head].float(),
                visible,
            )
            for b, head in self.places
        ]

    def __call__(self, name: str, out: Tensor) -> None:
        allowed = 1.5 * ERRORS[name.removesuffix(NARROW)]
        for (b, head), exact in zip(self.places, self.exact, strict=True):
            error = (out[b, self.rows, head].float() - exact).norm() / exact.norm()
            if not error < allowed:
                raise WrongResult(
                    f"{name}: batch {b}, head {head}: relative error {error:.4f}, "
                    f"allowed {allowed:.4f}"
                )


def measure(problem: Problem, args: argparse.Namespace) -> dict[str, dict]:
    """What the records of a cell say of each contestant."""
    entrants, absent = harness.admit(
        contestants(problem), Check(problem), [problem.q.new_empty(problem.out_shape)]
    )
    timings, exhausted = harness.time_interleaved(entrants, args.device, args.rounds, args.graph)
    flops = harness.forward_flops(problem)
    fields = {name: harness.timing_fields(timing, flops) for name, timing in timings.items()}
    return fields | harness.absent_fields(absent | exhausted)


# ---- the table -----------------------------------------------------------------------------------


def table(found: list[dict[str, dict]]) -> str:
    """Microseconds of bf16, and the speed of the others over it; absent in all cells: no column."""
    names = [name for name in NAMES[1:] if any("ms" in cell[name] for cell in found)]

    def row(cell: dict[str, dict]) -> list[object]:
        plain = cell[OURS].get("ms")
        ratios = [cell[name].get("ms") for name in names]
        speeds = [f"{plain / ms:.2f}" if plain and ms else "absent" for ms in ratios]
        keys = ("head_dim", "batch", "seqlen")
        first = [*(cell[OURS][key] for key in keys), int(cell[OURS]["causal"])]
        return [*first, f"{plain * 1e3:.1f}" if plain else "absent", *speeds]

    def geomean(name: str) -> str:
        both = [(cell[OURS].get("ms"), cell[name].get("ms")) for cell in found]
        ratios = [plain / ms for plain, ms in both if plain and ms]
        return f"{statistics.geometric_mean(ratios):.2f}" if ratios else ""

    last = ["geomean", "", "", "", "", *map(geomean, names)]
    head = ("D", "B", "S", "causal", "bf16 us", *names)
    return harness.markdown(head, [*map(row, found), last])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="calls whose name has it")
    parser.add_argument("--seqlens", nargs="+", type=int, default=SEQLENS)
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
    harness.add_arguments(parser)
    return harness.parse(parser)


@torch.no_grad()
def main() -> None:
    args = parse_args()
    records = harness.Records(args.output, "lowp", args.device)
    sizes = tuple(itertools.product(BATCHES, args.seqlens))
    chosen = [cell for cell in cells(sizes) if harness.is_chosen(str(cell), args)]
    measured = functools.partial(measure, args=args)
    found = harness.measure_cells(chosen, measured, NAMES, records, args.device, copies=3)
    print("Speed over our own bf16, forward")
    print(harness.headline(records.header), table(found), harness.why_absent(found), sep="\n\n")
    if args.device == "cuda" and torch.cuda.get_device_capability()[0] < 12:
        print("\nBelow 12.0 the e4m3 mma is emulated: no speed here says anything about 12.x.")


if __name__ == "__main__":
    main()
