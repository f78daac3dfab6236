"""How fast are packed sequences, beside PyTorch's varlen_attn and a call per sequence?

    FA_SM120_LIMITS=120 python benchmarks/varlen.py --output varlen.jsonl
    FA_SM120_LIMITS=120 python benchmarks/varlen.py --backward --output varlen_backward.jsonl

Mixes of lengths: 16 sequences of 256 to 4096; lognormal ones, as instruction data has them; 256 of
64; one long and many short. Equal lengths stand beside our dense call, which is what packing costs.
The backward is timed alone, by autograd. TFLOPS count each sequence as harness.py counts a call.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import harness
import torch
import torch.nn.functional as F
from backward import DETERMINISTIC, FLOPS_OF_FORWARD, Check, Gradients, check_deterministic, trainer
from harness import FLASH, OURS, Contestant, Preset, Problem, WrongResult, by_backend
from torch import Tensor

from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func

DENSE, VARLEN_ATTN, LOOP = "ours-dense", "varlen_attn", "sdpa-loop"
NAMES = (OURS, DETERMINISTIC, DENSE, VARLEN_ATTN, LOOP)
PRESETS = ("llama2-7b", "llama3-8b", "hd64")  # 32 heads of 128; 8 KV heads for them; 16 of 64


# --------------------------------------------------------------------------------------- lengths


def uniform(count: int, least: int, most: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randint(least, most) for _ in range(count)]


def lognormal(total: int, median: float = 350.0, sigma: float = 1.0) -> list[int]:
    """Lengths of 16 to 8192 that add up to `total`, most of them short, as instruction data has."""
    draw, lengths = random.Random(0), []
    while (left := total - sum(lengths)) > 0:
        length = min(max(round(draw.lognormvariate(math.log(median), sigma)), 16), 8192)
        lengths.append(length if left - length >= 16 else left)
    return lengths


MIXES = {
    "16 of 256-4096": uniform(16, 256, 4096),
    "lognormal, 16k": lognormal(16 << 10),
    "lognormal, 128k": lognormal(128 << 10),
    "256 of 64": [64] * 256,
    "8192, 64 of 128": [8192] + [128] * 64,
    "8 of 2048": [2048] * 8,
}


# ----------------------------------------------------------------------------------------- cells


@dataclass(frozen=True)
class Packed:
    """One call's inputs. q (total, Hq, D), k and v (total, Hkv, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    lengths: Sequence[int]
    cu_seqlens: Tensor

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def are_equal(self) -> bool:
        return min(self.lengths) == self.longest

    def rows(self, i: int) -> slice:
        """Of sequence `i`."""
        begin = sum(self.lengths[:i])
        return slice(begin, begin + self.lengths[i])

    def sequence(self, i: int) -> Problem:
        """Sequence `i` as a call of one."""
        rows = self.rows(i)
        return Problem(self.q[None, rows], self.k[None, rows], self.v[None, rows], self.causal)

    def with_batch(self, x: Tensor) -> Tensor:
        """(B, S, H, D) of equal lengths."""
        return x.unflatten(0, (len(self.lengths), -1))

    def checked(self) -> list[int]:
        """The sequences that a reference is computed of: the shortest, the longest, the last."""
        by_length = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        return sorted({by_length[0], by_length[-1], len(self.lengths) - 1})

    def flops(self) -> float:
        counts = (harness.forward_flops(self.sequence(i)) for i in range(len(self.lengths)))
        return math.fsum(counts)


@dataclass(frozen=True)
class PackedCell:
    """One call that is measured; `fields` is what its records say of it."""

    preset: Preset
    mix: str
    causal: bool
    fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        heads = f"{self.preset.heads_q}/{self.preset.heads_kv}"
        return f"{heads} heads, {self.mix}{' causal' if self.causal else ''}"

    def shapes(self) -> list[tuple[int, int, int]]:
        """Of q, k, v and out."""
        preset, total = self.preset, sum(MIXES[self.mix])
        of_q, of_k = ((total, h, preset.head_dim) for h in (preset.heads_q, preset.heads_kv))
        return [of_q, of_k, of_k, of_q]

    def bytes(self) -> int:
        return 2 * sum(math.prod(shape) for shape in self.shapes())

    def problem(self, device: str) -> Packed:
        generator = torch.Generator(device).manual_seed(int(self.causal))
        lengths = MIXES[self.mix]
        q, k, v = (
            torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)
            for shape in self.shapes()[:3]
        )
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        return Packed(q, k, v, self.causal, lengths, ends)


def cells(args: argparse.Namespace) -> list[PackedCell]:
    return [
        PackedCell(
            harness.PRESETS[name],
            mix,
            bool(causal),
            {
                "preset": name,
                "mix": mix,
                "causal": bool(causal),
                "sequences": len(MIXES[mix]),
                "total": sum(MIXES[mix]),
                "direction": "backward" if args.backward else "forward",
            },
        )
        for name, mix, causal in itertools.product(args.presets, args.mixes, args.causal)
    ]


# ----------------------------------------------------------------------------------- contestants


def varlen_attn(problem: Packed, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's, as 2.10 and newer have it: FlashAttention-2."""
    from torch.nn.attention.varlen import varlen_attn as call

    parameters = inspect.signature(call).parameters
    options: dict[str, Any] = {}
    if "is_causal" in parameters:
        options["is_causal"] = problem.causal
    elif problem.causal:
        options["window_size"] = (-1, 0)
    if "enable_gqa" in parameters:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    ends, longest = problem.cu_seqlens, problem.longest
    return call(q, k, v, ends, ends, longest, longest, **options)


def attentions(problem: Packed) -> dict[str, Any]:
    """By name: q, k, v -> out, all packed."""
    causal, ends = problem.causal, problem.cu_seqlens
    lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    bounds = {"max_seqlen_q": problem.longest, "max_seqlen_k": problem.longest}

    def ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return flash_attn_varlen_func(q, k, v, **lengths, **bounds, causal=causal, **options)[0]

    def dense(*qkv: Tensor) -> Tensor:
        return flash_attn_func(*map(problem.with_batch, qkv), causal=causal)[0].flatten(0, 1)

    def loop(*qkv: Tensor) -> Tensor:
        parts = zip(*(x.transpose(0, 1)[None].split(problem.lengths, 2) for x in qkv), strict=True)
        outs = [
            F.scaled_dot_product_attention(*x, is_causal=causal, enable_gqa=True) for x in parts
        ]
        return torch.cat(outs, 2)[0].transpose(0, 1)

    calls = {
        OURS: ours,
        DETERMINISTIC: functools.partial(ours, deterministic=True),
        DENSE: dense,
        VARLEN_ATTN: functools.partial(varlen_attn, problem),
        LOOP: loop,
    }
    return calls if problem.are_equal else {n: f for n, f in calls.items() if n != DENSE}


# A peer that cannot run a call says so by these, or is found wrong, which its row tells, too.
CANNOT: dict[str, Any] = {
    OURS: {},
    DETERMINISTIC: {},
    DENSE: {},
    VARLEN_ATTN: {"cannot": (RuntimeError, ImportError, WrongResult)},
    LOOP: by_backend(FLASH),
}


def forwards(problem: Packed) -> list[Contestant]:
    inputs = (problem.q, problem.k, problem.v)
    return [
        Contestant(name, functools.partial(call, *inputs), **CANNOT[name])
        for name, call in attentions(problem).items()
        if name != DETERMINISTIC  # every forward is
    ]


def backwards(problem: Packed, dout: Tensor) -> list[Contestant]:
    inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]

    def backward(out: Tensor) -> Gradients:
        return torch.autograd.grad(out, inputs, dout, retain_graph=True)

    return [
        trainer(name, functools.partial(call, *inputs), backward, **CANNOT[name])
        for name, call in attentions(problem).items()
    ]


# ----------------------------------------------------------------------------------- correctness


def check_out(problem: Packed, name: str, out: Tensor) -> None:
    """Compares sequences of `out` with an fp32 reference; raises WrongResult."""
    if out.shape != problem.q.shape:
        raise WrongResult(f"{name}: expected {tuple(problem.q.shape)}, got {tuple(out.shape)}")
    for i in problem.checked():
        harness.check_forward(problem.sequence(i), name, out[None, problem.rows(i)])


class CheckGradients:
    """The same of gradients; the references are computed once."""

    def __init__(self, problem: Packed, dout: Tensor) -> None:
        self.checks = []
        for i in problem.checked():
            rows = problem.rows(i)
            self.checks.append((rows, Check(problem.sequence(i), dout[None, rows])))

    def __call__(self, name: str, gradients: Gradients) -> None:
        for rows, check in self.checks:
            check(name, [gradient[None, rows] for gradient in gradients])


# ----------------------------------------------------------------------------------------- main


def measure(problem: Packed, args: argparse.Namespace) -> dict[str, dict]:
    """What the records of a cell say of each contestant."""
    flops = problem.flops()
    if args.backward:
        dout = torch.randn_like(problem.q)
        check, outputs = CheckGradients(problem, dout), (dout, problem.q, problem.k, problem.v)
        entrants, absent = harness.admit(backwards(problem, dout), check, outputs)
        check_deterministic(entrants)
        flops *= FLOPS_OF_FORWARD
    else:
        check = functools.partial(check_out, problem)
        entrants, absent = harness.admit(forwards(problem), check, [problem.q])
    timings, exhausted = harness.time_interleaved(entrants, args.device, args.rounds)
    fields = {name: harness.timing_fields(timing, flops) for name, timing in timings.items()}
    return fields | harness.absent_fields(absent | exhausted)


def ratio(cell: dict[str, dict], peer: str, name: str = OURS) -> float | None:
    """A contestant's speed over a peer's; None where one of them is absent."""
    times = [cell.get(n, {}).get("ms") for n in (peer, name)]
    return times[0] / times[1] if all(times) else None


def table(measured: list[dict[str, dict]], names: Sequence[str]) -> str:
    """TFLOPS of each contestant, a row per cell."""

    def tflops(record: dict | None) -> str:
        return "" if record is None else f"{record['tflops']:.1f}" if "ms" in record else "absent"

    def row(cell: dict[str, dict]) -> list[object]:
        key = cell[OURS]
        last = (ratio(cell, VARLEN_ATTN), ratio(cell, LOOP), ratio(cell, DENSE))
        return [
            key["preset"],
            key["mix"],
            int(key["causal"]),
            *(tflops(cell.get(name)) for name in names),
            *(f"{value:.3f}" if value else "" for value in last),
            f"{key['ms'] * 1e3:.1f}" if "ms" in key else "",
        ]

    over = [f"ours/{peer}" for peer in (VARLEN_ATTN, LOOP, "dense")]
    return harness.markdown(
        ("preset", "lengths", "causal", *names, *over, "ours us"), map(row, measured)
    )


def by_mix(measured: list[dict[str, dict]]) -> str:
    """Ours over varlen_attn, and deterministic over ours: geomean and minimum, a row per mix."""
    groups: dict[str, list[dict[str, dict]]] = {}
    for cell in measured:
        groups.setdefault(cell[OURS]["mix"], []).append(cell)

    def geomean(group: list[dict[str, dict]], peer: str, name: str) -> list[str]:
        ratios = [value for cell in group if (value := ratio(cell, peer, name))]
        if not ratios:
            return ["", ""]
        return [f"{statistics.geometric_mean(ratios):.3f}", f"{min(ratios):.3f}"]

    rows = [
        [mix, *geomean(group, VARLEN_ATTN, OURS), *geomean(group, OURS, DETERMINISTIC)]
        for mix, group in (*groups.items(), ("all", measured))
    ]
    head = ("lengths", f"ours/{VARLEN_ATTN}", "minimum", "deterministic/ours", "minimum")
    return harness.markdown(head, rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backward", action="store_true", help="the gradients alone")
    parser.add_argument("--presets", nargs="+", choices=harness.PRESETS, default=PRESETS)
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES), metavar="MIX")
    parser.add_argument("--causal", nargs="+", type=int, choices=(0, 1), default=(0, 1))
    harness.add_arguments(parser)
    return harness.parse(parser)


def main() -> None:
    args = parse_args()
    direction = "Backward" if args.backward else "Forward"
    names = [name for name in NAMES if args.backward or name != DETERMINISTIC]
    records = harness.Records(args.output, "varlen", args.device)
    measured = functools.partial(measure, args=args)
    copies = 4 if args.backward else 1  # the peers' results lie beside each other
    with torch.set_grad_enabled(args.backward):
        found = harness.measure_cells(cells(args), measured, names, records, args.device, copies)
    print(f"{direction} of packed sequences, bf16, TFLOPS, single calls")
    print(harness.headline(records.header))
    print(table(found, names), by_mix(found), harness.why_absent(found), sep="\n\n")


if __name__ == "__main__":
    main()
