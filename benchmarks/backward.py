"""How fast is the backward pass, beside PyTorch's own kernels?

    FA_SM120_LIMITS=120 python benchmarks/backward.py --output backward.jsonl

The gradients of q, k and v alone: the forward has run before. Ours, ours with deterministic=True,
SDPA's FlashAttention-2 (the same class of instructions as ours) and SDPA's cuDNN (on Hopper: wgmma,
another class), over model shapes, sequence lengths and causal or not. And the memory of a training
step: what forward and backward together take at their peak, their results included.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grid
import harness
import torch
import torch.nn.functional as F
from harness import CUDNN, FLASH, OURS, Contestant, Problem, WrongResult, by_backend
from torch import Tensor

from flash_attn_sm120 import _C, _measure, flash_attn_func

DETERMINISTIC = "ours-deterministic"
PEERS = (FLASH, CUDNN)
NAMES = (OURS, DETERMINISTIC, *PEERS)

# A backward has five matrix products where a forward has two: the count of FlashAttention's own
# benchmarks, whatever a kernel computes a second time.
FLOPS_OF_FORWARD = 2.5

Gradients = Sequence[Tensor]  # of q, k and v, in their shapes


# ----------------------------------------------------------------------------------- contestants


@dataclass(frozen=True)
class Trainer(Contestant):
    """`call` is the backward of a forward that ran before; `step` is both."""

    step: Callable[[], Gradients] = field(kw_only=True)


def trainer(
    name: str, forward: Callable[[], Any], backward: Callable[[Any], Gradients], **options: Any
) -> Trainer:
    """`backward` takes what `forward` returns, as often as it is called."""
    kept = functools.cache(forward)  # the first call, in the context that it needs
    return Trainer(name, lambda: backward(kept()), step=lambda: backward(forward()), **options)


def by_autograd(problem: Problem, dout: Tensor) -> list[Trainer]:
    """All implementations as users call them."""
    q, k, v = inputs = [t.detach().requires_grad_() for t in (problem.q, problem.k, problem.v)]
    causal = problem.causal

    def ours(deterministic: bool) -> Tensor:
        return flash_attn_func(q, k, v, causal=causal, deterministic=deterministic)[0]

    def sdpa() -> Tensor:
        # (B, H, S, D) are transposed views, of gradients, too: no copy is timed.
        heads_first = [t.transpose(1, 2) for t in inputs]
        out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    def backward(out: Tensor) -> Gradients:
        return torch.autograd.grad(out, inputs, dout, retain_graph=True)

    return [
        trainer(OURS, lambda: ours(False), backward),
        trainer(DETERMINISTIC, lambda: ours(True), backward),
        *(trainer(name, sdpa, backward, **by_backend(name)) for name in PEERS),
    ]


def by_operator(problem: Problem, dout: Tensor) -> list[Trainer]:
    """The same without autograd, whose threads and streams a capture does not follow."""
    q, k, v, causal = problem.q, problem.k, problem.v, problem.causal
    qt, kt, vt, doutt = (t.transpose(1, 2) for t in (q, k, v, dout))
    aten = torch.ops.aten

    def ours(deterministic: bool, saved: tuple) -> Gradients:
        dlse, options = None, {"causal": causal, "deterministic": deterministic}
        return _C.backward(dout, q, k, v, *saved, dlse, **options)[:3]

    def flash(saved: tuple) -> Gradients:
        out, lse, *sizes, seed, offset, _ = saved
        op = aten._scaled_dot_product_flash_attention_backward
        return heads_last(op(doutt, qt, kt, vt, out, lse, *sizes, 0.0, causal, seed, offset))

    def cudnn(saved: tuple) -> Gradients:
        out, lse, *sizes, seed, offset, _ = saved
        op = aten._scaled_dot_product_cudnn_attention_backward
        return heads_last(op(doutt, qt, kt, vt, out, lse, seed, offset, None, *sizes, 0.0, causal))

    def heads_last(gradients: Gradients) -> Gradients:
        return [gradient.transpose(1, 2) for gradient in gradients]

    forward = functools.partial(flash_attn_func, q, k, v, causal=causal, return_lse=True)
    of_flash = functools.partial(aten._scaled_dot_product_flash_attention, qt, kt, vt, 0.0, causal)
    of_cudnn = functools.partial(
        aten._scaled_dot_product_cudnn_attention, qt, kt, vt, None, True, 0.0, causal
    )
    return [
        trainer(OURS, forward, functools.partial(ours, False)),
        trainer(DETERMINISTIC, forward, functools.partial(ours, True)),
        trainer(FLASH, of_flash, flash, cannot=(RuntimeError,)),
        trainer(CUDNN, of_cudnn, cudnn, cannot=(RuntimeError,)),
    ]


def suited(problem: Problem, dout: Tensor) -> tuple[Problem, Tensor]:
    """A KV head for each query head and one head dim, for peers that know nothing of GQA or of
    head dims that differ; the copies are not timed."""
    group = problem.q.shape[2] // problem.k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2) for t in (problem.k, problem.v))
    other = harness.with_padded_v(Problem(problem.q, k, v, problem.causal))
    return other, F.pad(dout, (0, other.v.shape[3] - v.shape[3]))


def admit(
    problem: Problem, dout: Tensor, graph: bool
) -> tuple[list[Trainer], dict[str, str], set[str]]:
    """Those found right; why the others are absent; and who had copies of K and V made for it."""
    make = by_operator if graph else by_autograd
    check = Check(problem, dout)
    outputs = (dout, problem.q, problem.k, problem.v)  # out, of the forward before, and gradients
    entrants, absent = harness.admit(make(problem, dout), check, outputs)
    peers = [name for name in PEERS if name in absent]
    heads_q, head_dim = problem.q.shape[2:]
    if not peers or problem.v.shape[2:] == (heads_q, head_dim):
        return entrants, absent, set()
    again, still = harness.admit(
        [c for c in make(*suited(problem, dout)) if c.name in peers], check, outputs
    )
    others = {name: why for name, why in absent.items() if name not in peers}
    return entrants + again, others | {n: absent[n] for n in still}, {c.name for c in again}


# ----------------------------------------------------------------------------------- correctness


BLOCK_ROWS = 128  # consecutive rows of a gradient: a tolerance holds for a block
# Of plain PyTorch's error: 3 as in FlashAttention-2's own tests of gradients; more in dry runs,
# because SDPA's kernel for CPUs adds up dk and dv in the type of its inputs.
FACTOR = {"cuda": 3, "cpu": 8}


class Check:
    """Compares gradients with an fp32 reference: the tolerance rule with FACTOR, of each block.

    Of a few KV heads, each with all the query heads that share it; the reference is computed once.
    """

    def __init__(self, problem: Problem, dout: Tensor) -> None:
        self.problem, self.dout = problem, dout

    def __call__(self, name: str, gradients: Gradients) -> None:
        inputs = (self.problem.q, self.problem.k, self.problem.v)
        for what, got, like in zip(("dq", "dk", "dv"), gradients, inputs, strict=True):
            if got.dtype != like.dtype:
                raise WrongResult(f"{name}: {what} is {got.dtype}, expected {like.dtype}")
            if what != "dq" and got.shape != like.shape:  # of copies of K and V
                got = got[..., : like.shape[3]].unflatten(2, (like.shape[2], -1)).float().sum(3)
            if got.shape != like.shape:
                raise WrongResult(f"{name}: {what} {tuple(got.shape)}, not {tuple(like.shape)}")
            for (b, kv_head), of_head in self.references.items():
                heads = self.query_heads(kv_head) if what == "dq" else slice(kv_head, kv_head + 1)
                reference, allowed = of_head[what]
                error = by_block(_measure.max_error, got[b, :, heads], reference)
                if not (error <= allowed).all():  # NaN is wrong too
                    worst = (error - allowed).nan_to_num(torch.inf).argmax().item()
                    raise WrongResult(
                        f"{name}: {what} of batch {b}, KV head {kv_head}, rows from "
                        f"{worst * BLOCK_ROWS} on: largest error {error[worst]:.3g}, "
                        f"allowed {allowed[worst]:.3g} ({harness.describe(self.problem)})"
                    )

    def query_heads(self, kv_head: int) -> slice:
        group = self.problem.q.shape[2] // self.problem.k.shape[2]
        return slice(kv_head * group, (kv_head + 1) * group)

    @functools.cached_property
    def references(self) -> dict[tuple[int, int], dict[str, tuple[Tensor, Tensor]]]:
        """By batch and KV head: of each gradient the reference, and what each block allows."""
        batch, _, heads_kv, _ = self.problem.k.shape
        places = [(b, h) for b in sorted({0, batch - 1}) for h in sorted({0, heads_kv - 1})]
        found = {}
        for place in places:
            exact, plain = (self.gradients(*place, dtype) for dtype in (torch.float32, None))
            allowed = functools.partial(
                _measure.allowed_error, factor=FACTOR[self.dout.device.type]
            )
            found[place] = {
                what: (ref, by_block(allowed, ref, pt))
                for what, ref, pt in zip(("dq", "dk", "dv"), exact, plain, strict=True)
            }
        return found

    def gradients(self, b: int, kv_head: int, dtype: torch.dtype | None) -> Gradients:
        """(S, heads, D) each, by plain PyTorch in `dtype`, or that of the inputs."""
        problem, heads = self.problem, self.query_heads(kv_head)
        k, v = (
            t[b, :, kv_head].detach().to(dtype or t.dtype).requires_grad_()
            for t in (problem.k, problem.v)
        )
        visible = torch.ones(problem.q.shape[1], len(k), dtype=torch.bool, device=k.device)
        if problem.causal:
            visible = visible.tril(len(k) - problem.q.shape[1])
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for head in range(heads.start, heads.stop):
            q = problem.q[b, :, head].detach().to(k.dtype).requires_grad_()
            out = _measure.plain_attention(q, k, v, visible)
            of_q, of_k, of_v = torch.autograd.grad(out, (q, k, v), self.dout[b, :, head].to(out))
            dq.append(of_q)
            dk, dv = dk + of_k, dv + of_v
        return torch.stack(dq, 1), dk[:, None], dv[:, None]


def by_block(rule: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """(S, heads, D) each -> (blocks,): a rule, applied to blocks of rows."""
    pairs = zip(a.split(BLOCK_ROWS), b.split(BLOCK_ROWS), strict=True)
    return torch.stack([rule(*pair) for pair in pairs])


def check_deterministic(entrants: Sequence[Trainer]) -> None:
    """Twice the same bits, where that is promised."""
    for entrant in entrants:
        if entrant.name == DETERMINISTIC:
            pairs = zip(entrant.call(), entrant.call(), strict=True)
            if not all(torch.equal(first, second) for first, second in pairs):
                raise WrongResult(f"{entrant.name}: two calls differ")


# ---------------------------------------------------------------------------------------- memory


def step_peaks(
    entrants: Sequence[Trainer], device: str
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The peak of each one's training step; and why some are absent: a step takes more memory."""
    peaks, absent = {}, {}
    for entrant in entrants:
        peak, reason = harness.attempt(entrant, functools.partial(peak_mib, entrant, device))
        if reason:
            absent[entrant.name] = reason
        else:
            peaks[entrant.name] = peak
    return peaks, absent


def peak_mib(entrant: Trainer, device: str) -> float | None:
    """MiB that a training step has allocated at its peak, beyond q, k, v and dout."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    entrant.step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def memory_table(measured: list[dict[str, dict]]) -> str:
    """MiB of a training step, one row per cell."""

    def peak(record: dict) -> str:
        mib = record.get("step_peak_mib")
        return "absent" if "absent" in record else "" if mib is None else f"{mib:.0f}"

    def row(cell: dict[str, dict]) -> list[object]:
        return [*grid.label(cell), *(peak(cell[name]) for name in NAMES)]

    return harness.markdown((*grid.LABEL, *NAMES), map(row, measured))


# ----------------------------------------------------------------------------------------- main


def measure(problem: Problem, args: argparse.Namespace) -> dict[str, dict]:
    """What the records of a cell say of each contestant."""
    dout = torch.randn_like(problem.q.new_empty(problem.out_shape))
    entrants, absent, with_copies = admit(problem, dout, args.graph)
    check_deterministic(entrants)
    peaks, exhausted = step_peaks(entrants, args.device)
    entrants = [entrant for entrant in entrants if entrant.name in peaks]
    timings, without = harness.time_interleaved(entrants, args.device, args.rounds, args.graph)
    flops = FLOPS_OF_FORWARD * harness.forward_flops(problem)
    fields = {
        name: {
            "copied_kv": name in with_copies,
            **harness.timing_fields(timing, flops),
            "step_peak_mib": peaks[name],
        }
        for name, timing in timings.items()
    }
    if args.wall:
        harness.add_wall_times(fields, entrants, args.device, args.rounds)
    return fields | harness.absent_fields(absent | exhausted | without)


def main() -> None:
    args = grid.parse(grid.make_parser(__doc__, "training"))
    records = harness.Records(args.output, "backward", args.device)
    measured = functools.partial(measure, args=args)
    found = harness.measure_cells(args.cells, measured, NAMES, records, args.device, copies=2)
    grid.report("Backward", args, records.header, found, NAMES)
    print("\nWith deterministic=True:\n", grid.by_preset(found, DETERMINISTIC), sep="\n")
    print("\nPeak MiB of forward and backward, results included:\n", memory_table(found), sep="\n")
    for name in PEERS:
        cells = sum(cell[name].get("copied_kv", False) for cell in found)
        if cells:
            print(f"{name}: K and V expanded or padded before it in {cells} cells")


if __name__ == "__main__":
    main()
