"""How does attention of one long sequence scale over the GPUs of a machine?

    FA_SM120_LIMITS=120 python benchmarks/parallel.py --output parallel.jsonl   # all GPUs, and one

Ring attention (flash_attn_sm120.parallel) of 64k tokens, forward and backward, over 1, 2, ... GPUs
by NCCL, a process for each. The dealt-out rows are compared with one GPU's before they are timed.
Parts are dealt out so that all ranks have as much to do (zigzag), and in order.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import PRESETS, Cell, Problem, Timing, WrongResult

from flash_attn_sm120 import _measure, flash_attn_func, parallel

PRESET = "llama3-8b"
SEQLENS = {"cuda": 65536, "cpu": 64}
ROUNDS = 10
SOAKING = 3  # calls before the timed ones
ERROR = 0.02  # relative L2, of results that are both rounded to 16 bits


class Rows:
    """The rows of one rank, and what it computes of them."""

    def __init__(self, problem: Problem, dout: torch.Tensor, rank: int, size: int, zigzag: bool):
        self.take = lambda x: parallel.shard(x, rank, size, zigzag=zigzag)
        self.inputs = [self.take(x).requires_grad_() for x in (problem.q, problem.k, problem.v)]
        self.dout, self.zigzag = self.take(dout), zigzag

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        return self.attend()

    def both(self) -> tuple[torch.Tensor, ...]:
        """out, dq, dk and dv"""
        out = self.attend()
        return out.detach(), *torch.autograd.grad(out, self.inputs, self.dout)

    def attend(self) -> torch.Tensor:
        out, _ = parallel.ring_flash_attn_func(*self.inputs, causal=True, zigzag=self.zigzag)
        return out


def whole(problem: Problem, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What one GPU computes, out, dq, dk and dv: a part of it has been found right."""
    inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out, _ = flash_attn_func(*inputs, causal=True)
    harness.check_forward(problem, "one GPU", out.detach())
    return out.detach(), *torch.autograd.grad(out, inputs, dout)


def check(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for name, x, y in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        error = ((x.float() - y.float()).norm() / y.float().norm()).item()
        if not error <= ERROR:
            raise WrongResult(f"{name}: relative error {error:.3g}, allowed {ERROR}")


def timed(call: Callable[[], Any], device: str, rounds: int) -> Timing:
    """Of calls that all ranks begin together; a call takes as long as its slowest rank."""
    samples = []
    for i in range(SOAKING + rounds):
        begin, end = _measure.event(device), _measure.event(device)
        dist.all_reduce(torch.zeros((), device=device))
        _measure.synchronize(device)
        begin.record()
        call()
        end.record()
        _measure.synchronize(device)
        ms = torch.tensor(begin.elapsed_time(end), device=device)
        dist.all_reduce(ms, dist.ReduceOp.MAX)
        samples += [ms.item()] if i >= SOAKING else []
    return Timing.of(samples)


# ---- processes -----------------------------------------------------------------------------------


def rank_of(rank: int, size: int, args: argparse.Namespace, store: str, answer: Any) -> None:
    """One of the processes; the first answers with the records of all."""
    device = args.device
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    cell = Cell(PRESETS[PRESET], args.seqlen, True, 1, torch.bfloat16)
    problem = cell.problem(device)  # the same on every rank
    dout = problem.q.flip(1)  # random, too
    expected = whole(problem, dout)
    flops = harness.forward_flops(problem)
    records = []
    for zigzag in (True, False)[: 1 if size == 1 else 2]:
        rows = Rows(problem, dout, rank, size, zigzag)
        check(rows.both(), tuple(map(rows.take, expected)))
        for what, call, work in (
            ("forward", rows.forward, flops),
            ("forward and backward", rows.both, 3.5 * flops),
        ):
            timing = harness.timing_fields(timed(call, device, args.rounds), work)
            common = {"gpus": size, "zigzag": zigzag, "what": what, "seqlen": args.seqlen}
            records.append({**common, **timing})
    if rank == 0:
        answer.put(records)
    dist.destroy_process_group()


def over(size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of a number of GPUs."""
    answer = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        mp.spawn(rank_of, (size, args, store, answer), nprocs=size)
    return answer.get()


# ---- figures -------------------------------------------------------------------------------------


def table(records: list[dict[str, Any]]) -> str:
    """Milliseconds, TFLOPS of all GPUs, and the speed-up over one."""
    alone = {x["what"]: x["ms"] for x in records if x["gpus"] == 1}

    def row(x: dict[str, Any]) -> list[object]:
        rows = "zigzag" if x["zigzag"] else "in order"
        figures = [f"{x['ms']:.2f}", f"{x['tflops']:.0f}"]
        speedup = f"{alone[x['what']] / x['ms']:.2f}" if x["what"] in alone else ""
        return [x["gpus"], rows, x["what"], *figures, speedup, f"{x['spread']:.1%}"]

    head = ("GPUs", "rows", "what", "ms", "TFLOPS", "over one", "spread")
    return harness.markdown(head, map(row, records))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", help="default: 1, 2, 4, ... of those here")
    parser.add_argument("--seqlen", type=int)
    harness.add_arguments(parser, ROUNDS)
    args = harness.parse(parser)
    here = torch.cuda.device_count() if args.device == "cuda" else 2
    args.gpus = args.gpus or [2**i for i in range(here.bit_length())]
    args.seqlen = args.seqlen or SEQLENS[args.device]
    if max(args.gpus) > here:
        parser.error(f"--gpus: there are {here}")
    return args


def main() -> None:
    args = parse_args()
    records = harness.Records(args.output, "parallel", args.device)
    print(harness.headline(records.header))
    print(f"{PRESET}, causal, {args.seqlen} tokens, bf16, {args.rounds} calls", flush=True)
    found = [records.add(**record) for size in args.gpus for record in over(size, args)]
    print("", table(found), sep="\n")


if __name__ == "__main__":
    main()
