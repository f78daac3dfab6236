"""Whether a recipe of quantised attention is right here, of calls of every kind.

Results are held to those of the CPU, which replays every rounding; and one call that quantises on
the device to attention in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_sm120 import _C, _measure
from flash_attn_sm120.quantized import RECIPES, Quantized, quantize, quantized_attention
from flash_attn_sm120.quantized.device import why_not
from flash_attn_sm120.report.correctness import guarded

Place = Callable[[Tensor], Tensor]  # a tensor to the device
Attend = Callable[..., tuple[Tensor, Tensor | None]]
HEADS_Q, HEADS_KV = 4, 2
ALLOWED, ALLOWED_LSE = 2e-3, 1e-5  # relative L2 beside the CPU; absolute, and relative to the lse


class Case(NamedTuple):
    """Options of a call of (queries, keys, head_dim)."""

    name: str
    queries: int
    keys: int
    head_dim: int
    options: Mapping[str, Any]


CASES = (
    Case("causal, D 128", 200, 300, 128, {"causal": True}),
    Case("window, softcap, D 64", 130, 257, 64, {"window_size": (100, 7), "softcap": 20.0}),
    Case("one query, splits, sink, D 128", 1, 1000, 128, {"num_splits": 3}),
)


def run(
    recipe: str, place: Place, attend: Attend = quantized_attention
) -> Iterator[dict[str, Any]]:
    """A record for each check: its name, whether it passed, and what it found."""
    for case in CASES:
        yield guarded(f"{recipe}: {case.name}", partial(_beside_cpu, recipe, case, place, attend))
    yield guarded(f"{recipe}: quantised here", partial(_beside_fp32, recipe, place, attend))


def _tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (case.queries, HEADS_Q), (case.keys, HEADS_KV), (case.keys, HEADS_KV)
    q, k, v = (torch.randn(1, *x, case.head_dim, generator=generator).bfloat16() for x in shapes)
    return q, k, v


def _beside_cpu(recipe: str, case: Case, place: Place, attend: Attend) -> str:
    _check_device(recipe, place)
    q, k, v = (quantize(x, recipe, name) for name, x in zip("qkv", _tensors(case), strict=True))
    sink = torch.linspace(-1, 3, HEADS_Q) if "sink" in case.name else None
    how: dict[str, Any] = {
        "recipe": recipe,
        "return_lse": True,
        "out_dtype": torch.float32,
        **case.options,
    }
    expected, logs = quantized_attention(q, k, v, learnable_sink=sink, **how)
    there = [_placed(x, place) for x in (q, k, v)]
    out, lse = attend(*there, learnable_sink=None if sink is None else place(sink), **how)
    assert lse is not None and logs is not None
    error, off = _relative(out.cpu(), expected), (lse.cpu() - logs).abs()
    if not error <= ALLOWED:
        return f"relative error {error:.2g} beside the CPU, allowed {ALLOWED:.2g}"
    if not bool((off <= ALLOWED_LSE * (1 + logs.abs())).all()):
        return f"lse off by {off.max():.2g}"
    return ""


def _beside_fp32(recipe: str, place: Place, attend: Attend) -> str:
    _check_device(recipe, place)
    q, k, v = _tensors(Case("", 512, 512, 128, {}))
    out, _ = attend(*(place(x) for x in (q, k, v)), recipe=recipe)
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    k, v = (x.repeat_interleave(HEADS_Q // HEADS_KV, dim=2) for x in (k, v))
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    exact = _measure.plain_attention(q, k, v, visible)
    error, allowed = _relative(out.cpu(), exact.transpose(1, 2)), 1.5 * RECIPES[recipe].error
    return "" if error <= allowed else f"relative error {error:.2g}, allowed {allowed:.2g}"


def _check_device(recipe: str, place: Place) -> None:
    where = place(torch.empty(0)).device
    if where.type == "cuda":
        arch = _C.devices()[1][where.index or 0]["arch"]
        if reason := why_not(recipe, arch):
            raise NotImplementedError(reason)


def _placed(x: Quantized, place: Place) -> Quantized:
    return Quantized._make(place(y) if isinstance(y, Tensor) else y for y in x)


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
