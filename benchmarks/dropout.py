"""What does dropout cost, beside the same calls without, and beside SDPA's FlashAttention-2?

    FA_SM120_LIMITS=120 python benchmarks/dropout.py --output dropout.jsonl

Forward, and the gradients of a forward that ran before, at S 4096: ours and SDPA's
FlashAttention-2, each with a dropout_p of 0 and of P. The table has microseconds, and how many
times as long as without dropout each takes. A forward draws its seed, which is part of its time.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

import harness
import torch
import torch.nn.functional as F
from harness import FLASH, OURS, Cell, Contestant, Preset, Problem, WrongResult, by_backend
from torch import Tensor

from flash_attn_sm120 import flash_attn_func

P = 0.1
PRESETS = (Preset(16, 16, 64), Preset(16, 16, 128))
SEQLEN = {"cuda": 4096, "cpu": 128}
NAMES = tuple(f"{who}, p {p:g}" for who in (OURS, FLASH) for p in (0.0, P))


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, p: float = 0.0) -> Tensor:
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads_first, dropout_p=p, is_causal=causal)
    return out.transpose(1, 2)


def contestants(problem: Problem, dout: Tensor, direction: str) -> list[Contestant]:
    inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    causal = problem.causal

    def ours(p: float) -> Tensor:
        return flash_attn_func(*inputs, causal=causal, dropout_p=p)[0]

    call_of = functools.partial(harness.call_of, direction=direction, inputs=inputs, dout=dout)
    attends = [functools.partial(ours, p) for p in (0.0, P)]
    attends += [functools.partial(sdpa, *inputs, causal, p) for p in (0.0, P)]
    of_peers = by_backend(FLASH)
    return [
        Contestant(name, call_of(attend), **({} if name.startswith(OURS) else of_peers))
        for name, attend in zip(NAMES, attends, strict=True)
    ]


class Check:
    """What is dropped differs, but not in the mean: the share of the exact result is 1.

    Whether the very weights are dropped that should be is the matter of tests.
    """

    def __init__(self, problem: Problem, dout: Tensor, direction: str) -> None:
        inputs = [x.float().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        out = sdpa(*inputs, problem.causal)
        self.exact = [out.detach()]
        if direction == "backward":
            self.exact = list(torch.autograd.grad(out, inputs, dout.float()))

    def __call__(self, name: str, results: Sequence[Tensor]) -> None:
        for got, exact in zip(results, self.exact, strict=True):
            share = ((got.float() * exact).sum() / exact.square().sum()).item()
            if not abs(share - 1) < (0.02 if name.endswith("p 0") else 0.2):
                raise WrongResult(f"{name}: {share:.3f} of the exact result")


def measure(problem: Problem, direction: str, args: argparse.Namespace) -> dict[str, dict]:
    """What the records of a cell say of each contestant."""
    dout = torch.randn_like(problem.q)
    found = contestants(problem, dout, direction)
    found, left_out = harness.without_peers(found, NAMES[2:], args)
    entrants, absent = harness.admit(found, Check(problem, dout, direction), (dout,))
    timings, without = harness.time_interleaved(entrants, args.device, args.rounds)
    flops = harness.FLOPS[direction] * harness.forward_flops(problem)
    fields = {name: harness.timing_fields(x, flops) for name, x in timings.items()}
    return fields | harness.absent_fields(absent | left_out | without)


def cells(direction: str, device: str) -> list[Cell]:
    return [
        Cell(preset, SEQLEN[device], causal, 1, torch.bfloat16, fields=fields)
        for preset in PRESETS
        for causal in (False, True)
        for fields in [
            {"direction": direction, "head_dim": preset.head_dim, "causal": causal, "p": P}
        ]
    ]


def row(cell: dict[str, dict]) -> list[object]:
    """Microseconds, and those of P over those of 0."""
    ms = {name: record.get("ms") for name, record in cell.items()}
    times = [f"{ms[name] * 1e3:.1f}" if ms[name] else "absent" for name in NAMES]
    pairs = (NAMES[:2], NAMES[2:])
    ratios = [f"{ms[b] / ms[a]:.2f}" if ms[a] and ms[b] else "" for a, b in pairs]
    first = cell[NAMES[0]]
    return [first["direction"], first["head_dim"], int(first["causal"]), *times, *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_choices(parser, "calls", "flash")
    harness.add_arguments(parser)
    args = harness.parse(parser)
    records = harness.Records(args.output, "dropout", args.device)
    found = []
    for direction in harness.FLOPS:
        measured = functools.partial(measure, direction=direction, args=args)
        of_one = [
            cell
            for cell in cells(direction, args.device)
            if harness.is_chosen(f"{direction}, {cell}", args)
        ]
        found += harness.measure_cells(of_one, measured, NAMES, records, args.device, copies=4)
    head = (
        "direction",
        "D",
        "causal",
        *NAMES,
        *(f"{who}, p {P:g} over 0" for who in (OURS, FLASH)),
    )
    print(harness.headline(records.header), harness.markdown(head, map(row, found)), sep="\n")
    print(harness.why_absent(found))


if __name__ == "__main__":
    main()
