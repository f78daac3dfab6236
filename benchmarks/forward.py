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
from harness import CUDNN, FLASH, OURS, Contestant, Problem, by_backend

from flash_attn_sm120 import flash_attn_func

NAMES = (OURS, FLASH, CUDNN)


def contestants(problem: Problem) -> list[Contestant]:
    """All implementations, bound to one problem."""
    q, k, v, causal = problem.q, problem.k, problem.v, problem.causal

    def ours() -> torch.Tensor:
        return flash_attn_func(q, k, v, causal=causal)[0]

    def peer(name: str) -> Contestant:
        # SDPA's layout is (B, H, S, D): transposed views, no copy is timed. Its causal is aligned
        # to the top left, which is ours wherever Sq == Sk, as everywhere in this grid.
        values = harness.with_padded_v(problem).v if name == FLASH else v
        heads_first = [t.transpose(1, 2) for t in (q, k, values)]

        def sdpa() -> torch.Tensor:
            out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
            return out[..., : v.shape[3]].transpose(1, 2)

        return Contestant(name, sdpa, **by_backend(name))

    return [Contestant(OURS, ours), peer(FLASH), peer(CUDNN)]


def beside_d128(measured: list[dict[str, dict]]) -> str:
    """Our TFLOPS over those of head_dim 128 in the same call: what another head dim costs."""
    tflops = {grid.label(cell): cell[OURS]["tflops"] for cell in measured if "ms" in cell[OURS]}

    def row(label: tuple[str, int, int, int]) -> list[object] | None:
        yardstick = tflops.get(("d128", *label[1:]))
        return [*label, f"{tflops[label] / yardstick:.3f}"] if yardstick else None

    rows = [found for label in tflops if (found := row(label))]
    return harness.markdown((*grid.LABEL, "ours/ours at d128"), rows) if rows else ""


def measure(
    problem: Problem, device: str, rounds: int | None, graph: bool = False, wall: bool = False
) -> dict[str, dict]:
    """What the records of a cell say of each contestant."""
    check = functools.partial(harness.check_forward, problem)
    out = problem.q.new_empty(problem.out_shape)
    entrants, absent = harness.admit(contestants(problem), check, [out])
    timings, exhausted = harness.time_interleaved(entrants, device, rounds, graph)
    flops = harness.forward_flops(problem)
    fields = {name: harness.timing_fields(timing, flops) for name, timing in timings.items()}
    if wall:
        harness.add_wall_times(fields, entrants, device, rounds)
    return fields | harness.absent_fields(absent | exhausted)


@torch.no_grad()
def main() -> None:
    args = grid.parse(grid.make_parser(__doc__, "shapes"))
    records = harness.Records(args.output, "forward", args.device)
    measured = functools.partial(
        measure, device=args.device, rounds=args.rounds, graph=args.graph, wall=args.wall
    )
    found = harness.measure_cells(args.cells, measured, NAMES, records, args.device)
    grid.report("Forward", args, records.header, found, NAMES)
    if beside := beside_d128(found):
        print("", beside, sep="\n")


if __name__ == "__main__":
    main()
