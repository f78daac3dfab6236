"""How fast is the forward pass, beside PyTorch's own kernels?

    FA_SM120_LIMITS=120 python benchmarks/forward.py --output forward.jsonl

Ours, SDPA's FlashAttention-2 (the same class of instructions as ours) and SDPA's cuDNN (on
Hopper: wgmma, another class), over model shapes, sequence lengths and causal or not.
"""

from __future__ import annotations

import functools

import grid
import harness
import torch
import torch.nn.functional as F
from grid import CUDNN, FLASH
from harness import OURS, Contestant, Problem
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_sm120

NAMES = (OURS, FLASH, CUDNN)


def contestants(problem: Problem) -> list[Contestant]:
    """Everyone, bound to one problem."""
    q, k, v, causal = problem.q, problem.k, problem.v, problem.causal
    # SDPA's layout is (B, H, S, D): transposed views, nobody pays for a copy. Its causal is
    # aligned to the top left, which is ours wherever Sq == Sk, as everywhere in this grid.
    qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))

    def ours() -> torch.Tensor:
        return flash_attn_sm120.flash_attn_func(q, k, v, causal=causal)[0]

    def sdpa() -> torch.Tensor:
        out = F.scaled_dot_product_attention(qt, kt, vt, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    def backend(name: str, choice: SDPBackend) -> Contestant:
        # A backend that cannot run a call is a RuntimeError, its reasons are warnings.
        return Contestant(name, sdpa, functools.partial(sdpa_kernel, choice), (RuntimeError,))

    return [
        Contestant(OURS, ours),
        backend(FLASH, SDPBackend.FLASH_ATTENTION),
        backend(CUDNN, SDPBackend.CUDNN_ATTENTION),
    ]


def beside_d128(measured: list[dict[str, dict]]) -> str:
    """Our TFLOPS over those of head_dim 128 in the same call: what another head dim costs."""
    tflops = {grid.label(cell): cell[OURS]["tflops"] for cell in measured if "ms" in cell[OURS]}

    def row(label: tuple[str, int, int]) -> list[object] | None:
        yardstick = tflops.get(("d128", *label[1:]))
        return [*label, f"{tflops[label] / yardstick:.3f}"] if yardstick else None

    rows = [found for label in tflops if (found := row(label))]
    return harness.markdown(("preset", "S", "causal", "ours/ours at d128"), rows) if rows else ""


@torch.no_grad()
def main() -> None:
    args = grid.parse(grid.make_parser(__doc__, "shapes"))
    harness.require_device(args.device)
    records = harness.Records(args.output, "forward", args.device)
    for problem, cell in grid.cells(args):
        check = functools.partial(harness.check_forward, problem)
        out = problem.q.new_empty(problem.out_shape)
        entrants, absent = harness.admit(contestants(problem), check, [out])
        timings = harness.time_interleaved(entrants, args.device, args.rounds, args.graph)
        flops = harness.forward_flops(problem)
        for name, timing in timings.items():
            records.add(**cell, contestant=name, **harness.timing_fields(timing, flops))
        for name, reason in absent.items():
            records.add(**cell, contestant=name, absent=reason)
    grid.report("Forward", args, records, NAMES)
    if beside := beside_d128(grid.by_cell(records.cells)):
        print("", beside, sep="\n")


if __name__ == "__main__":
    main()
