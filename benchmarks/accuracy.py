"""How exact is each recipe of quantised attention, on inputs that are easy and hard?

    python benchmarks/accuracy.py                       # 4096 tokens, head dim 128: some minutes
    python benchmarks/accuracy.py --seqlen 512 --only int8_fp8

Eight distributions of one head, against attention in float64 of the same bf16 inputs: relative L2,
cosine and the largest error of the bf16 output. It needs no GPU: recipes are computed on the CPU,
rounding by rounding as their kernels are to compute them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash_attn_sm120 import flash_attn_func
from flash_attn_sm120.quantized import RECIPES, quantized_attention

PLAIN = "bf16"
BLOCK = 512  # query rows of the reference

Inputs = tuple[Tensor, Tensor, Tensor]


# ---- distributions -------------------------------------------------------------------------------


def normal(shape: tuple[int, int]) -> Inputs:
    return torch.randn(shape), torch.randn(shape), torch.randn(shape)


def sharp(shape: tuple[int, int]) -> Inputs:
    """Few keys have most of the weight."""
    q, k, v = normal(shape)
    return 3 * q, k, v


def heavy(shape: tuple[int, int]) -> Inputs:
    """Student's t with 3 degrees of freedom, of variance 1."""
    student = torch.distributions.StudentT(3.0, scale=3**-0.5)
    return student.sample(shape), student.sample(shape), student.sample(shape)


def offsets(channels: int, head_dim: int, low: float, high: float) -> Tensor:
    """In so many channels, of random signs; 0 in the others."""
    chosen = torch.randperm(head_dim)[:channels]
    sizes = torch.empty(channels).uniform_(low, high) * (torch.randint(0, 2, (channels,)) * 2 - 1)
    return torch.zeros(head_dim).index_put((chosen,), sizes)


def k_offset(shape: tuple[int, int]) -> Inputs:
    q, k, v = normal(shape)
    return q, k + offsets(6, shape[1], 5, 10), v


def kq_offset(shape: tuple[int, int]) -> Inputs:
    """Offsets of Q and a mean of V, too."""
    q, k, v = k_offset(shape)
    return q + offsets(6, shape[1], 2, 5), k, v + torch.randn(shape[1])


def rope(shape: tuple[int, int]) -> Inputs:
    """Offsets before the rotation, which takes them round with the token; V's channels differ."""
    q, k, v = normal(shape)
    q, k = q + offsets(8, shape[1], 1, 2), k + offsets(8, shape[1], 5, 10)
    return 1.2 * rotated(q), rotated(k), v * torch.exp(0.5 * torch.randn(shape[1]))


def rotated(x: Tensor) -> Tensor:
    tokens, head_dim = x.shape
    frequency = 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    angle = torch.arange(tokens)[:, None] * frequency
    first, second = x.chunk(2, dim=1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=1)


@dataclass(frozen=True)
class Case:
    """What is computed."""

    make: Callable[[tuple[int, int]], Inputs]
    causal: bool = False


CASES = {
    "normal": Case(normal),
    "causal": Case(normal, causal=True),
    "rope": Case(rope),
    "rope causal": Case(rope, causal=True),
    "heavy": Case(heavy),
    "sharp": Case(sharp),
    "koff": Case(k_offset),
    "kqoff": Case(kq_offset),
}


# ---- errors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One recipe on one distribution."""

    recipe: str
    case: str
    seqlen: int
    head_dim: int
    relative_l2: float
    cosine: float
    max_error: float


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """In float64, of one head, block by block."""
    q, k, v = (x[0, :, 0].double() for x in (q, k, v))
    parts = []
    for first in range(0, len(q), BLOCK):
        s = q[first : first + BLOCK] @ k.T / math.sqrt(q.shape[1])
        if causal:
            s = s.masked_fill(torch.ones_like(s).triu(first + 1).bool(), -math.inf)
        parts.append(s.softmax(dim=1) @ v)
    return torch.cat(parts)[None, :, None]


def measure(recipe: str, name: str, inputs: Inputs, expected: Tensor) -> Row:
    causal = CASES[name].causal
    if recipe == PLAIN:
        out, _ = flash_attn_func(*inputs, causal=causal)
    else:
        out, _ = quantized_attention(*inputs, recipe, causal=causal)
    error = out.double() - expected
    return Row(
        recipe,
        name,
        inputs[0].shape[1],
        inputs[0].shape[3],
        float(error.norm() / expected.norm()),
        float(torch.cosine_similarity(out.double().flatten(), expected.flatten(), dim=0)),
        float(error.abs().max()),
    )


def measure_all(seqlen: int, head_dim: int, only: str, cases: str, seed: int) -> list[Row]:
    rows = []
    for name, case in CASES.items():
        if not re.search(cases, name):
            continue
        torch.manual_seed(seed)
        drawn = case.make((seqlen, head_dim))
        q, k, v = (x[None, :, None].bfloat16() for x in drawn)
        expected = reference(q, k, v, case.causal)
        for recipe in (PLAIN, *RECIPES):
            if re.search(only, recipe):
                rows.append(measure(recipe, name, (q, k, v), expected))
    return rows


def table(rows: list[Row]) -> str:
    """Markdown, a line for each recipe: L2, cosine, largest error."""
    cases = dict.fromkeys(row.case for row in rows)
    lines = [f"| recipe | {' | '.join(cases)} |", f"|---{'|---' * len(cases)}|"]
    for recipe in dict.fromkeys(row.recipe for row in rows):
        cells = [
            f"{row.relative_l2:.4f} {row.cosine:.5f} {row.max_error:.1e}"
            for row in rows
            if row.recipe == recipe
        ]
        lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--only", default="", metavar="REGEX", help="recipes whose name has it")
    parser.add_argument("--cases", default="", metavar="REGEX", help="the same for distributions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON lines")
    args = parser.parse_args(argv)
    rows = measure_all(args.seqlen, args.head_dim, args.only, args.cases, args.seed)
    print(table(rows))
    if args.output:
        lines = [json.dumps(asdict(row)) for row in rows]
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
