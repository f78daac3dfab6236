"""What does block sparsity gain, over the density of the blocks?

    FA_SM120_LIMITS=120 python benchmarks/sparse.py --output sparse.jsonl

Forward, and the gradients of a forward that ran before, with blocks of 128: random blocks of 5 to
100%, documents, a sliding window, a prefix, neighbourhoods of an image as NATTEN has them, and of a
video of 32k tokens. Beside the dense call of the same size, and compiled flex_attention with the
same BlockMask. The table has microseconds, and what our call takes over density times dense.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
DENSE = "ours, dense"
NAMES = (OURS, DENSE, flex.NAME)
SEQLEN = {
    "cuda": {8192: 8192, 16384: 16384, 32768: 32768},
    "cpu": dict.fromkeys((8192, 16384, 32768), 256),
}
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Case:
    """A mask, of so many tokens."""

    name: str
    seqlen: int
    density: float = 0.0  # of random blocks
    mask_mod: Callable[..., Any] | None = None


# ---- masks ---------------------------------------------------------------------------------------


def documents(seqlen: int, device: str, count: int = 16) -> Callable[..., Any]:
    """Of different lengths, each causal."""
    ends = torch.rand(count, generator=torch.Generator().manual_seed(0)).add(0.2).cumsum(0)
    starts = (ends[:-1] / ends[-1] * seqlen).long()
    document = torch.zeros(seqlen, dtype=torch.int32)
    document[starts] = 1
    document = document.cumsum(0).to(device, torch.int32)
    return lambda b, h, q, k: (document[q] == document[k]) & (q >= k)


def neighbourhood(shape: tuple[int, ...], reach: tuple[int, ...]) -> Callable[..., Any]:
    """Tokens in a grid, row by row, see those no further away than `reach` in each dimension."""

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen, step = q >= 0, 1
        for size, most in zip(reversed(shape), reversed(reach), strict=True):
            seen = seen & ((q // step % size - k // step % size).abs() <= most)
            step *= size
        return seen

    return mask_mod


def grid_of(seqlen: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, or on a small machine its first dimension cut."""
    rest = 1
    for size in shape[1:]:
        rest *= size
    return (max(1, seqlen // rest), *shape[1:])


def cases(device: str) -> list[Case]:
    small, middle, large = SEQLEN[device].values()
    found = [Case(f"random, {d:.0%}", middle, density=d) for d in DENSITIES]
    masks = (
        ("causal", middle, lambda b, h, q, k: q >= k),
        ("16 documents, causal", small, documents(small, device)),
        ("window of 1024, causal", middle, lambda b, h, q, k: (q >= k) & (q - k < 1024)),
        ("prefix of 1024", small, lambda b, h, q, k: (k < 1024) | (q >= k)),
        ("image, 128 x 128, 13 x 13", middle, neighbourhood(grid_of(middle, (128, 128)), (6, 6))),
        (
            "video, 32 x 32 x 32, 9 x 9 x 9",
            large,
            neighbourhood(grid_of(large, (32, 32, 32)), (4, 4, 4)),
        ),
    )
    return found + [Case(name, seqlen, mask_mod=mod) for name, seqlen, mod in masks]


def random_mask(case: Case, device: str) -> BlockMask:
    """Full blocks alone; every row has one."""
    blocks = -(-case.seqlen // BLOCK)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(1, 1, blocks, blocks, generator=generator)
    full = drawn <= drawn.flatten().kthvalue(max(1, round(case.density * blocks**2))).values
    full[..., torch.arange(blocks), torch.arange(blocks)] = True
    counts, indices = block_mask._lists_of(full.to(device))
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), indices, counts, indices,
        BLOCK_SIZE=BLOCK, seq_lengths=(case.seqlen, case.seqlen),
    )  # fmt: skip


def mask_of(case: Case, device: str) -> BlockMask:
    if case.mask_mod is None:
        return random_mask(case, device)
    return block_mask.create_block_mask(
        case.mask_mod, None, None, case.seqlen, case.seqlen, BLOCK, device
    )


def listed(mask: BlockMask) -> float:
    """The share of blocks that are listed."""
    counts = mask.kv_num_blocks + mask.full_kv_num_blocks
    return counts.sum().item() / (counts.numel() * mask.kv_indices.shape[-1])


# ---- contestants ---------------------------------------------------------------------------------


def contestants(
    problem: Problem, mask: BlockMask, dout: Tensor, direction: str, limit_s: float
) -> list[Contestant]:
    inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]

    def ours(**options: Any) -> Tensor:
        return flash_attn_func(*inputs, **options)[0]

    call_of = functools.partial(harness.call_of, direction=direction, inputs=inputs, dout=dout)
    return [
        Contestant(OURS, call_of(functools.partial(ours, block_sparse_tensors=mask))),
        Contestant(DENSE, call_of(ours)),
        flex.contestant(inputs, dout, direction, limit_s, mask),
    ]


class Check:
    """out, or dq, of some rows of a head against fp32. Of dk and dv the tests are the judge."""

    def __init__(self, problem: Problem, case: Case, mask: BlockMask, dout: Tensor) -> None:
        device = problem.q.device
        self.rows = torch.randint(
            case.seqlen, (CHECKED_ROWS,), generator=torch.Generator().manual_seed(0)
        ).to(device)
        keys = torch.arange(case.seqlen, device=device)
        zero = torch.zeros((), dtype=torch.long, device=device)
        if case.mask_mod is None:
            seen = mask.to_dense()[0, 0].bool()[self.rows // BLOCK].repeat_interleave(BLOCK, dim=1)
            seen = seen[:, : case.seqlen]
        else:
            seen = block_mask._over_indices(case.mask_mod)(zero, zero, self.rows, keys)
        q, dout = (x[0, self.rows, 0].float() for x in (problem.q, dout))
        k, v = (x[0, :, 0].float() for x in (problem.k, problem.v))
        scale = q.shape[-1] ** -0.5
        self.exact = {}
        for name, visible in (("sparse", seen), ("dense", torch.ones_like(seen))):
            p = (scale * q @ k.T).masked_fill(~visible, -torch.inf).softmax(-1)
            dp = dout @ v.T
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            self.exact[name] = {"forward": p @ v, "backward": scale * ds @ k}

    def __call__(self, direction: str, name: str, results: Sequence[Tensor]) -> None:
        exact = self.exact["dense" if name == DENSE else "sparse"][direction]
        error = (results[0][0, self.rows, 0].float() - exact).norm() / exact.norm()
        if not error < 0.02:
            raise WrongResult(f"{name}, {direction}: off by {error:.3f} of the norm")


def measure(
    problem: Problem, case: Case, mask: BlockMask, direction: str, args: argparse.Namespace
) -> dict[str, dict]:
    dout = torch.randn_like(problem.q)
    check = functools.partial(Check(problem, case, mask, dout), direction)
    found = contestants(problem, mask, dout, direction, args.peer_limit)
    found, left_out = harness.without_peers(found, [flex.NAME], args)
    entrants, absent = harness.admit(found, check, (dout,))
    timings, without = harness.time_interleaved(entrants, args.device, args.rounds)
    flops = harness.FLOPS[direction] * harness.forward_flops(problem)
    shares = dict.fromkeys(NAMES, listed(mask)) | {DENSE: 1.0}
    fields = {name: harness.timing_fields(x, flops * shares[name]) for name, x in timings.items()}
    return fields | harness.absent_fields(absent | left_out | without)


# ---- the table -----------------------------------------------------------------------------------


def row(cell: dict[str, dict]) -> list[object]:
    """Microseconds, ours over density times dense, and flex_attention's over ours."""
    ms = {name: record.get("ms") for name, record in cell.items()}
    times = [f"{ms[name] * 1e3:.1f}" if ms[name] else "absent" for name in NAMES]
    first = cell[OURS]
    share = first["density"]
    of_density = f"{ms[OURS] / (share * ms[DENSE]):.2f}" if ms[OURS] and ms[DENSE] else ""
    of_flex = f"{ms[flex.NAME] / ms[OURS]:.2f}" if ms[OURS] and ms[flex.NAME] else ""
    keys = ("direction", "head_dim", "mask", "seqlen")
    return [*(first[key] for key in keys), f"{share:.1%}", *times, of_density, of_flex]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flex.add_arguments(parser, "masks")
    harness.add_arguments(parser)
    args = harness.parse(parser)
    records = harness.Records(args.output, "sparse", args.device)
    found = []
    for case in cases(args.device):
        if not harness.is_chosen(case.name, args):
            continue
        mask = mask_of(case, args.device)
        for direction in harness.FLOPS:
            fields = {"direction": direction, "mask": case.name, "seqlen": case.seqlen}
            of_case = [
                Cell(preset, case.seqlen, False, 1, torch.bfloat16, fields={
                    **fields, "head_dim": preset.head_dim, "density": listed(mask),
                })
                for preset in PRESETS
            ]  # fmt: skip
            measured = functools.partial(
                measure, case=case, mask=mask, direction=direction, args=args
            )
            found += harness.measure_cells(of_case, measured, NAMES, records, args.device, copies=4)
    head = ("direction", "D", "mask", "S", "density", *NAMES)
    head += ("ours / (density x dense)", "flex / ours")
    print(harness.headline(records.header), harness.markdown(head, map(row, found)), sep="\n")
    print(harness.why_absent(found))


if __name__ == "__main__":
    main()
