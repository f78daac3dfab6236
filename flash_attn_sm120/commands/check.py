"""Test results and gradients here against plain PyTorch. Its output belongs in a bug report."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from flash_attn_sm120 import _measure, flash_attn_func
from flash_attn_sm120.commands import info, inputs

HEAD_DIMS = (64, 96, 128, 256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    info.print_machine()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.float16, torch.bfloat16) + ((torch.float32,) if device == "cpu" else ())
    failures = 0
    print(f"\n{'check':44} {'error':>9} {'allowed':>9}")
    for dtype, head_dim, causal in itertools.product(dtypes, HEAD_DIMS, (False, True)):
        for seqlen in (1, 127, 512):
            failures += not check_forward(device, dtype, head_dim, seqlen, causal)
        failures += not check_gradients(device, dtype, head_dim, 129, causal)
    print(f"\n{failures} failed" if failures else "\nall passed")
    return 1 if failures else 0


def check_forward(
    device: str, dtype: torch.dtype, head_dim: int, seqlen: int, causal: bool
) -> bool:
    """Whether out keeps to the tolerance rule."""
    q, k, v = inputs.normal(device, dtype, seqlen, (8, 2, 2), head_dim)
    reference = inputs.plain(*_doubles(q, k, v), causal=causal)
    plain = inputs.plain(q, k, v, causal=causal)
    out, _ = flash_attn_func(q, k, v, causal=causal)
    return _is_close(_case("out", q, causal), out, reference, plain)


def check_gradients(
    device: str, dtype: torch.dtype, head_dim: int, seqlen: int, causal: bool
) -> bool:
    """Whether dq, dk and dv do, by autograd."""
    *qkv, dout = inputs.normal(device, dtype, seqlen, (8, 2, 2, 8), head_dim)

    def gradients(attend: Callable[..., Any], tensors: list[torch.Tensor]) -> Any:
        leaves = [x.requires_grad_() for x in tensors]
        out = attend(*leaves)
        return torch.autograd.grad(out, leaves, dout.to(out.dtype))

    plainly = partial(inputs.plain, causal=causal)
    ours = gradients(lambda q, k, v: flash_attn_func(q, k, v, causal=causal)[0], qkv)
    reference, plain = gradients(plainly, _doubles(*qkv)), gradients(plainly, qkv)
    passed = [
        _is_close(_case(name, qkv[0], causal), *each)
        for name, *each in zip(("dq", "dk", "dv"), ours, reference, plain, strict=True)
    ]
    return all(passed)


def _doubles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().double() for x in tensors]


def _case(name: str, q: torch.Tensor, causal: bool) -> str:
    _, seqlen, _, head_dim = q.shape
    causal_or_not = " causal" if causal else ""
    return f"{name} {str(q.dtype)[6:]} head_dim {head_dim} seqlen {seqlen}{causal_or_not}"


def _is_close(
    name: str, result: torch.Tensor, reference: torch.Tensor, plain: torch.Tensor
) -> bool:
    """Whether a result keeps to the tolerance rule, and a row of the table."""
    error = _measure.max_error(result, reference).item()
    allowed = _measure.allowed_error(reference, plain).item()
    passed = error <= allowed  # NaN is not
    print(f"{name:44} {error:9.2e} {allowed:9.2e} {'' if passed else 'FAILED'}")
    return passed
