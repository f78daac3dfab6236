"""What do score_mod and mask_mod cost, beside no mod and our own built-in features?

    FA_SM120_LIMITS=120 python benchmarks/mods.py --output mods.jsonl

Causal calls, forward and the gradients of a forward that ran before, with a mod that says the same
as a built-in option (causal with its BlockMask, softcap, a window, ALiBi), or what only a mod says:
twenty that people write.
Beside the call without a mod, and compiled flex_attention with the same callables and BlockMask
(flex.py).
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import flex
import harness
import torch
from harness import OURS, Cell, Contestant, Preset, Problem, WrongResult
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flash_attn_sm120 import block_mask, flash_attn_func

BLOCK = 128
PRESETS = (Preset(16, 16, 64), Preset(16, 16, 128))
SEQLEN = {"cuda": 8192, "cpu": 200}
NO_MOD, BUILT_IN = "no mod", "built in"
NAMES = (OURS, NO_MOD, BUILT_IN, flex.NAME)
CAP, WINDOW = 30.0, 1024


@dataclass(frozen=True)
class Mod:
    """A callable, and the options that say the same; `blocks`: also as a BlockMask."""

    name: str
    score: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    built_in: dict[str, Any] = field(default_factory=dict)
    blocks: bool = False


def mods(device: str, heads: int, seqlen: int) -> list[Mod]:
    return [*score_mods(device, heads, seqlen), *mask_mods(device, seqlen)]


def score_mods(device: str, heads: int, seqlen: int) -> list[Mod]:
    """All of them causal."""
    slopes = (2.0 ** -torch.linspace(1, 8, heads)).to(device)
    table, of_keys = torch.randn(heads, 64, device=device), torch.randn(seqlen, device=device)
    like_causal = {"causal": True}
    cap, alibi = {**like_causal, "softcap": CAP}, {**like_causal, "alibi_slopes": slopes}
    return [
        Mod("softcap", lambda s, b, h, q, k: CAP * torch.tanh(s / CAP), built_in=cap),
        Mod("ALiBi", lambda s, b, h, q, k: s + slopes[h] * (k - q), built_in=alibi),
        Mod("relative table", lambda s, b, h, q, k: s + table[h, torch.clamp(q - k, 0, 63)]),
        Mod("T5 buckets", lambda s, b, h, q, k: s + table[h, bucket(q - k)]),
        Mod("Kerple", lambda s, b, h, q, k: s - slopes[h] * torch.log1p(0.5 * (q - k).abs())),
        Mod("bias of keys", lambda s, b, h, q, k: s + of_keys[k]),
        Mod("temperature of heads", lambda s, b, h, q, k: s * slopes[h]),
        Mod("ten operations", ten_operations),
    ]


def mask_mods(device: str, seqlen: int) -> list[Mod]:
    at = torch.arange(seqlen, device=device)
    document = (at // (seqlen // 16 + 1)).int()
    image = torch.where(at % 1024 < 256, at // 1024, -1 - at).int()  # tokens of text differ
    keep = at % 7 != 3
    side = 1 << (seqlen.bit_length() // 2)

    def window(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (q - k <= WINDOW)

    def near(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ((q // side - k // side).abs() <= 6) & ((q % side - k % side).abs() <= 6)

    in_blocks = {
        "window": window,
        "documents": lambda b, h, q, k: (document[q] == document[k]) & (q >= k),
        "prefix": lambda b, h, q, k: (k < WINDOW) | (q >= k),
        "chunks": lambda b, h, q, k: (q // WINDOW == k // WINDOW) & (q >= k),
        "window and first tokens": lambda b, h, q, k: window(b, h, q, k) | ((k < 4) & (q >= k)),
        "window and global tokens": lambda b, h, q, k: (
            ((q - k).abs() <= WINDOW) | (k < 64) | (q < 64)
        ),
        "images in text": lambda b, h, q, k: (image[q] == image[k]) | (q >= k),
        "neighbourhood": near,
    }
    built_in = {"window": {"window_size": (WINDOW, 0)}}
    return [
        Mod("causal, BlockMask", mask=causal, built_in={"causal": True}, blocks=True),
        Mod("causal, no blocks", mask=causal, built_in={"causal": True}),
        Mod("padding, no blocks", mask=lambda b, h, q, k: keep[k]),
        Mod("dilated, no blocks", mask=lambda b, h, q, k: ((q - k) % 3 == 0) & (q >= k)),
        *(
            Mod(f"{name}, BlockMask", mask=mask, built_in=built_in.get(name, {}), blocks=True)
            for name, mask in in_blocks.items()
        ),
    ]


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def bucket(distance: Any) -> Any:
    """T5's: 8 distances alone, then logarithmic to 15."""
    distance = torch.clamp(distance, min=0)
    far = 8 + (torch.log(distance.float() / 8 + 1e-6) / math.log(16) * 8).to(torch.int32)
    return torch.where(distance < 8, distance, torch.clamp(far, 0, 15))


def ten_operations(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    distance = (q - k) * 0.001
    return s * (1.0 + distance * distance * 0.25) - torch.abs(distance) * 0.5 + torch.minimum(s, -s)


# ---- contestants ---------------------------------------------------------------------------------


def contestants(
    problem: Problem, mod: Mod, mask: BlockMask, dout: Tensor, direction: str, limit_s: float
) -> list[Contestant]:
    inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    named = {"score_mod": mod.score, "mask_mod": mod.mask}
    if mod.blocks:
        named = {"block_sparse_tensors": mask}
    elif mod.mask is None:
        named["causal"] = True

    def ours(**options: Any) -> Tensor:
        return flash_attn_func(*inputs, **options)[0]

    call_of = functools.partial(harness.call_of, direction=direction, inputs=inputs, dout=dout)
    found = [
        Contestant(OURS, call_of(functools.partial(ours, **named))),
        Contestant(NO_MOD, call_of(functools.partial(ours, causal=True))),
        flex.contestant(inputs, dout, direction, limit_s, mask, mod.score),
    ]
    if mod.built_in:
        found.append(Contestant(BUILT_IN, call_of(functools.partial(ours, **mod.built_in))))
    return found


class Check:
    """All contestants with the mod give the same. The tests hold them against fp32."""

    def __init__(self) -> None:
        self.first: Sequence[Tensor] | None = None

    def __call__(self, name: str, results: Sequence[Tensor]) -> None:
        if name == NO_MOD:
            return
        if self.first is None:
            self.first = [x.detach().clone() for x in results]
        for x, like in zip(results, self.first, strict=True):
            error = (x.float() - like.float()).norm() / like.float().norm()
            if not error < 0.02:
                raise WrongResult(f"{name}: off by {error:.3f} of the norm")


def measure(
    problem: Problem, mod: Mod, mask: BlockMask, direction: str, args: argparse.Namespace
) -> dict[str, dict]:
    dout = torch.randn_like(problem.q)
    found = contestants(problem, mod, mask, dout, direction, args.peer_limit)
    found, left_out = harness.without_peers(found, [flex.NAME], args)
    entrants, absent = harness.admit(found, Check(), (dout,))
    timings, without = harness.time_interleaved(entrants, args.device, args.rounds)
    flops = harness.FLOPS[direction] * harness.forward_flops(problem)
    fields = {name: harness.timing_fields(x, flops) for name, x in timings.items()}
    if not mod.built_in:
        absent[BUILT_IN] = "there is none"
    return fields | harness.absent_fields(absent | left_out | without)


# ---- the table -----------------------------------------------------------------------------------


def row(cell: dict[str, dict]) -> list[object]:
    """Microseconds, and the speed of ours beside the others."""
    ms = {name: record.get("ms") for name, record in cell.items()}
    times = [f"{ms[name] * 1e3:.1f}" if ms.get(name) else "absent" for name in NAMES]
    beside = [f"{ms[x] / ms[OURS]:.2f}" if ms.get(x) and ms[OURS] else "" for x in NAMES[1:]]
    return [*(cell[OURS][key] for key in ("direction", "head_dim", "mod")), *times, *beside]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flex.add_arguments(parser, "mods")
    harness.add_arguments(parser)
    args = harness.parse(parser)
    records = harness.Records(args.output, "mods", args.device)
    seqlen, found = SEQLEN[args.device], []
    for mod in mods(args.device, PRESETS[0].heads_q, seqlen):
        if not harness.is_chosen(mod.name, args):
            continue
        mask = block_mask.create_block_mask(
            mod.mask or causal, None, None, seqlen, seqlen, BLOCK, args.device
        )
        for direction in harness.FLOPS:
            cells = [
                Cell(preset, seqlen, True, 1, torch.bfloat16, fields={
                    "direction": direction, "head_dim": preset.head_dim, "mod": mod.name,
                })
                for preset in PRESETS
            ]  # fmt: skip
            measured = functools.partial(
                measure, mod=mod, mask=mask, direction=direction, args=args
            )
            found += harness.measure_cells(cells, measured, NAMES, records, args.device, copies=4)
    head = ("direction", "D", "mod", *NAMES, *(f"{x} / ours" for x in NAMES[1:]))
    print(harness.headline(records.header), harness.markdown(head, map(row, found)), sep="\n")
    print(harness.why_absent(found))


if __name__ == "__main__":
    main()
