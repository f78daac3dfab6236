"""Test results and gradients here against plain PyTorch. Its output belongs in a bug report."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from flash_attn_sm120 import (
    _measure,
    flash_attn_func,
    flash_attn_varlen_func,
    probe_8bit,
    report,
)
from flash_attn_sm120.commands import info, inputs

HEAD_DIMS = (64, 96, 128, 256)
PAGE_SIZE = 16
LENGTHS = [1, 127, 0, 200, 64]  # of the packed sequences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--without-recipes", action="store_true", help="leave out quantised attention"
    )


def run(arguments: argparse.Namespace) -> int:
    info.print_machine()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.float16, torch.bfloat16) + ((torch.float32,) if device == "cpu" else ())
    print(f"\n{'check':44} {'error':>9} {'allowed':>9}")
    # Most of the time goes to the compiler, which threads use together: rows come as they are done.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = pool.map(lambda check: check(), _checks(device, dtypes))
        failures = sum(not each for each in passed)
    failures += not check_8bit(device)
    failures += not (arguments.without_recipes or check_recipes(device))
    print(f"\n{failures} failed" if failures else "\nall passed")
    return 1 if failures else 0


def _checks(device: str, dtypes: tuple[torch.dtype, ...]) -> Iterator[Callable[[], bool]]:
    for dtype, head_dim, causal in itertools.product(dtypes, HEAD_DIMS, (False, True)):
        for seqlen in (1, 127, 512):
            yield partial(check_forward, device, dtype, head_dim, seqlen, causal)
        yield partial(check_gradients, device, dtype, head_dim, 129, causal)
        yield partial(check_packed, device, dtype, head_dim, causal)
        yield partial(check_pages, device, dtype, head_dim, causal)


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
    call, plainly = partial(flash_attn_func, causal=causal), partial(inputs.plain, causal=causal)
    results = _with_gradients(lambda *qkv: call(*qkv)[0], plainly, qkv, dout)
    passed = [_is_close(_case(name, qkv[0], causal), *each) for name, *each in results[1:]]
    return all(passed)


def check_packed(device: str, dtype: torch.dtype, head_dim: int, causal: bool) -> bool:
    """Whether both do of packed sequences, each of which plain PyTorch computes alone."""
    *qkv, dout = inputs.normal(device, dtype, sum(LENGTHS), (8, 2, 2, 8), head_dim)
    ends = torch.tensor(LENGTHS).cumsum(0)
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).to(device, torch.int32)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = flash_attn_varlen_func(
            q[0], k[0], v[0], cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=causal
        )[0]
        return out[None]

    def plainly(*qkv: torch.Tensor) -> torch.Tensor:
        sequences = zip(*(torch.split(x, LENGTHS, dim=1) for x in qkv), strict=True)
        alone = [inputs.plain(*own, causal=causal) for own in sequences if own[0].numel()]
        return torch.cat(alone, dim=1)

    results = _with_gradients(call, plainly, qkv, dout)
    passed = [_is_close(_case(name, qkv[0], causal, "packed"), *each) for name, *each in results]
    return all(passed)


def check_pages(device: str, dtype: torch.dtype, head_dim: int, causal: bool) -> bool:
    """Whether out does where K and V lie in pages, in an order of their own."""
    seqlen = 300
    q, k, v = inputs.normal(device, dtype, seqlen, (8, 2, 2), head_dim)
    table = torch.randperm(-(-seqlen // PAGE_SIZE)).to(device, torch.int32)
    k_pages, v_pages = (inputs.in_pages(x, table, PAGE_SIZE) for x in (k, v))
    out, _ = flash_attn_func(
        q, k_pages, v_pages, page_table=table[None], max_seqlen_k=seqlen, causal=causal
    )
    reference = inputs.plain(*_doubles(q, k, v), causal=causal)
    plain = inputs.plain(q, k, v, causal=causal)
    return _is_close(_case("out", q, causal, "pages"), out, reference, plain)


def check_8bit(device: str) -> bool:
    """Whether matrix instructions of 8 and 4 bits do what kernels count on, to the bit."""
    major = torch.cuda.get_device_capability()[0] if device == "cuda" else 0
    if major != probe_8bit.MAJOR:
        print(f"8- and 4-bit instructions: left out, only {probe_8bit.MAJOR}.x has all of them")
        return True
    try:
        found = list(probe_8bit.run())
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        print(f"8- and 4-bit instructions  {reason} FAILED")
        return False
    for name, wrong in found:
        print(f"{name:44} {wrong:9} {0:9} {'FAILED' if wrong else ''}")
    return not any(wrong for _, wrong in found)


def check_recipes(device: str) -> bool:
    """Whether quantised attention does, each recipe in a child process within a time limit."""
    if device != "cuda":
        print("recipes of quantised attention: left out, the CPU is what they are compared with")
        return True
    found = report.run_recipes(report.LIMITS_S["recipes"])
    for record in found:
        word = {True: "", False: "FAILED", None: "left out"}[record["passed"]]
        print(f"{record['check']:44} {record['said']} {word}".rstrip())
    return all(record["passed"] is not False for record in found)


def _with_gradients(
    call: Callable[..., torch.Tensor],
    plainly: Callable[..., torch.Tensor],
    qkv: list[torch.Tensor],
    dout: torch.Tensor,
) -> list[tuple[Any, ...]]:
    """(name, ours, in fp64, plain) of out, dq, dk and dv."""
    columns = []
    for attend, tensors in ((call, qkv), (plainly, _doubles(*qkv)), (plainly, qkv)):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attend(*leaves)
        columns.append([out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    return list(zip(("out", "dq", "dk", "dv"), *columns, strict=True))


def _doubles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().double() for x in tensors]


def _case(name: str, q: torch.Tensor, causal: bool, kind: str = "") -> str:
    _, seqlen, _, head_dim = q.shape
    causal_or_not = " causal" if causal else ""
    lengths = kind or f"seqlen {seqlen}"
    return f"{name} {str(q.dtype)[6:]} head_dim {head_dim} {lengths}{causal_or_not}"


def _is_close(
    name: str, result: torch.Tensor, reference: torch.Tensor, plain: torch.Tensor
) -> bool:
    """Whether a result keeps to the tolerance rule, and a row of the table."""
    error = _measure.max_error(result, reference).item()
    allowed = _measure.allowed_error(reference, plain).item()
    passed = error <= allowed  # NaN is not
    print(f"{name:44} {error:9.2e} {allowed:9.2e} {'' if passed else 'FAILED'}")
    return passed
