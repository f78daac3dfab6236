"""What does a call cost besides the GPU's work?

    python benchmarks/overhead.py --output overhead.jsonl

Host microseconds per call, of forward and backward, seconds of a variant's first call (compiled;
from the disk cache), and the import time of the package beyond torch's. What needs a GPU is left
out without one, and said.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
import varlen
from backward import by_autograd, by_operator
from harness import FLASH, OURS, Contestant, Problem, by_backend

import flash_attn_sm120
from flash_attn_sm120 import sdpa
from flash_attn_sm120._measure import synchronize
from flash_attn_sm120.fa2 import flash_attn_with_kvcache

# The GPU finishes a call of this shape about as fast as the host enqueues it, and a launch queue
# holds some 1000 kernels: CALLS of them, three to a backward, never make the host wait. On a CPU
# the call *is* the work, so the work is made as small as it gets.
SHAPE = {"cuda": (1, 128, 4, 64), "cpu": (1, 1, 1, 8)}
CALLS = 200

HOOKED = "ours, by sdpa.activate()"

# A subprocess: a variant that this process has loaded cannot be met for the first time again.
FIRST_CALL = """
import json, time
import torch
import flash_attn_sm120
q, k, v = (torch.randn(1, 256, 4, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3))
torch.cuda.synchronize()
seconds = []
for _ in range(2):
    begin = time.perf_counter()
    flash_attn_sm120.flash_attn_func(q, k, v, causal=True)
    torch.cuda.synchronize()
    seconds.append(time.perf_counter() - begin)
print(json.dumps(seconds))
"""

IMPORT = """
import json, time
import torch
begin = time.perf_counter()
import flash_attn_sm120
print(json.dumps([time.perf_counter() - begin]))
"""


# ------------------------------------------------------------------------------------- per call


def forwards(device: str) -> list[Contestant]:
    """Calls on one tiny problem. torch.empty_like is the yardstick: the least that an op costs."""
    q = torch.randn(SHAPE[device], dtype=torch.bfloat16, device=device)
    qt = q.transpose(1, 2)
    ours, packed = flash_attn_sm120.flash_attn_func, flash_attn_sm120.flash_attn_varlen_func
    rows = q.flatten(0, 1)
    ends = torch.arange(0, len(rows) + 1, q.shape[1], dtype=torch.int32, device=device)
    bounds = {"max_seqlen_q": q.shape[1], "max_seqlen_k": q.shape[1]}
    row, caches, step = q[:, :1], (q.clone(), q.clone()), flash_attn_with_kvcache
    held = torch.full((len(q),), q.shape[1] - 1, dtype=torch.int32, device=device)
    calls = [
        Contestant("torch.empty_like", lambda: torch.empty_like(q)),
        Contestant(OURS, lambda: ours(q, q, q)),
        Contestant("ours, return_lse", lambda: ours(q, q, q, return_lse=True)),
        Contestant(
            "ours, packed",
            lambda: packed(rows, rows, rows, cu_seqlens_q=ends, cu_seqlens_k=ends, **bounds),
        ),
        Contestant("ours, of caches", lambda: step(row, *caches, cache_seqlens=held)),
        Contestant(
            "ours, of caches, append", lambda: step(row, *caches, row, row, cache_seqlens=held)
        ),
        Contestant(FLASH, lambda: F.scaled_dot_product_attention(qt, qt, qt), **by_backend(FLASH)),
    ]
    if device == "cuda":
        hooked = {"context": by_hook, "cannot": (RuntimeError,)}
        calls.append(
            Contestant(HOOKED, lambda: F.scaled_dot_product_attention(qt, qt, qt), **hooked)
        )
        op = torch.ops.aten._scaled_dot_product_flash_attention
        calls.append(Contestant("aten flash op", lambda: op(qt, qt, qt)))
        problem = varlen.Packed(rows, rows, rows, False, [q.shape[1]] * len(q), ends)
        calls.append(
            Contestant("varlen_attn", lambda: varlen.varlen_attn(problem, rows, rows, rows))
        )
    return calls


@contextmanager
def by_hook() -> Iterator[None]:
    """SDPA's FlashAttention is ours."""
    handle = sdpa.activate()
    try:
        with by_backend(FLASH)["context"]():
            yield
    finally:
        handle.remove()


def backwards(device: str) -> list[Contestant]:
    """The gradients of such a call: by autograd, and by the operator alone that it calls."""
    q = torch.randn(SHAPE[device], dtype=torch.bfloat16, device=device)
    problem, dout = Problem(q, q, q, causal=False), torch.randn_like(q)
    by = {"operator": by_operator(problem, dout), "autograd": by_autograd(problem, dout)}
    if device == "cpu":  # flash has no such operator there
        by["operator"] = [c for c in by["operator"] if c.name == OURS]
    return [
        replace(contestant, name=f"backward by {how}, {contestant.name}")
        for how, contestants in by.items()
        for contestant in contestants
        if contestant.name in (OURS, FLASH)
    ]


def host_us(call: Callable[[], object], device: str) -> float:
    """Microseconds to enqueue one call, averaged over CALLS between two synchronisations."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    elapsed = time.perf_counter() - begin
    synchronize(device)
    return elapsed / CALLS * 1e6


def per_call(entrants: list[Contestant], device: str, repeats: int) -> dict[str, list[float]]:
    """Samples of each contestant, taken in turn; the first of each warms up and is dropped."""
    samples: dict[str, list[float]] = {}
    gc.disable()  # a collection would be charged to the call that is being timed
    for _ in range(repeats + 1):
        for contestant in entrants:
            with contestant.context():  # not part of a call
                samples.setdefault(contestant.name, []).append(host_us(contestant.call, device))
    gc.enable()
    return {name: values[1:] for name, values in samples.items()}


# ---------------------------------------------------------------------------------- per process


def in_subprocess(code: str, **environment: str) -> list[float]:
    """The numbers that a fresh Python prints as its last line."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        # -c looks in the working directory first: there it finds the package of this process
        cwd=Path(flash_attn_sm120.__file__).parents[1],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def first_calls(repeats: int) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds of first calls, and what could not be measured."""
    cold, warm, second = [], [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            fresh = {"FA_SM120_CACHE_DIR": cache}
            seconds, again = in_subprocess(FIRST_CALL, **fresh)
            if not any(path.is_file() for path in Path(cache).rglob("*")):
                return {"first call": [seconds]}, [
                    "compiled and from the disk cache: nothing was written to FA_SM120_CACHE_DIR "
                    "(the variant is prebuilt, or the cache is elsewhere)"
                ]
            cold.append(seconds)
            second.append(again)
            warm.append(in_subprocess(FIRST_CALL, **fresh)[0])
    return {
        "first call, compiled": cold,
        "first call, from the disk cache": warm,
        "second call (to its end on the GPU)": second,
    }, []


def import_seconds(repeats: int) -> list[float]:
    """Seconds of `import flash_attn_sm120` where torch is loaded; the first run reads the disk."""
    return [in_subprocess(IMPORT)[0] for _ in range(repeats + 1)][1:]


# ----------------------------------------------------------------------------------------- main


def report(records: harness.Records, unit: str, samples: dict[str, list[float]]) -> None:
    """Adds the records and prints the table of one kind of sample."""
    rows = []
    for name, values in samples.items():
        median, low, high = statistics.median(values), min(values), max(values)
        if len(values) >= 4:  # fewer have no quartiles
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        records.add(what=name, unit=unit, median=median, low=low, high=high, samples=len(values))
        rows.append((name, *(f"{x:.4g}" for x in (median, low, high)), len(values)))
    print(harness.markdown(("what", unit, "low", "high", "samples"), rows), end="\n\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--repeats", type=int, default=50, help=f"of {CALLS} calls each")
    parser.add_argument("--processes", type=int, default=3, help="of each kind; imports: twice")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    harness.require_device(args.device)
    records = harness.Records(args.output, "overhead", args.device)
    print(harness.headline(records.header))
    print(
        f"Calls on {SHAPE[args.device]}, those of the forward without autograd; low, high: "
        "quartiles, or the extremes of fewer than 4 samples\n"
    )
    with torch.no_grad():
        samples = per_call(forwards(args.device), args.device, args.repeats)
    samples |= per_call(backwards(args.device), args.device, args.repeats)
    report(records, "us per call", samples)
    seconds = {"import beyond torch's": import_seconds(2 * args.processes)}
    left_out = [
        "enqueueing on a GPU, the operators of flash, first calls: no CUDA device in this run"
    ]
    if args.device == "cuda":
        measured, left_out = first_calls(args.processes)
        seconds |= measured
    report(records, "seconds", seconds)
    for what in left_out:
        records.add(what=what, left_out=True)
        print(f"left out: {what}")


if __name__ == "__main__":
    main()
