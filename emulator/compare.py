"""Holds the emulator against the GPU of this machine: the same kernels, inputs and seeds on both.

    python emulator/compare.py [--seeds N]

Each side runs in a separate process, since a process has one driver; the GPU plans as sm_120, as
the emulator is one. Both multiply the same 16-bit numbers exactly and add them up in fp32, in
different orders; the GPU's ex2 and lg2 are approximate. So lse agrees to some ulps of fp32; and
out, rounded to 16 bits in the end, is equal but where such a difference tips the rounding of an
element or of a probability.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from flash_attn_sm120 import common_kernels, explain, flash_attn_func  # noqa: E402
from helpers.tiles import LARGE_TILES, use_tiles  # noqa: E402

# batch, seqlen_q, seqlen_k, heads_q, heads_kv; and options
CALLS = [
    ((2, 130, 200, 4, 2), {}),
    ((1, 257, 257, 2, 2), {"causal": True}),
    ((1, 1, 333, 4, 1), {"causal": True}),
    ((1, 200, 90, 2, 1), {"causal": True}),  # the first queries see no key
    ((1, 190, 190, 2, 1), {"window_size": (50, 10)}),
]

HEAD_DIMS = [*common_kernels.COMMON_HEAD_DIMS, (40, 72), (8, 256)]

TILES = [(), LARGE_TILES]  # what the table chooses for such small calls, and the others

# Of lse: relative to its size, or to 1 where that is more.
LSE_TOLERANCE = 4e-6
# Of out: that many units in the last place, and this share of the largest value, which is where
# one probability that is rounded the other way shows in a small sum.
OUT_ULPS, OUT_OF_LARGEST = 1, 2**-10


def cases(seeds: int):
    """(title, q, k, v, options), the same wherever it runs."""
    for seed in range(seeds):
        for dtype in (torch.bfloat16, torch.float16):
            for head_dim, head_dim_v in HEAD_DIMS:
                for (batch, seqlen_q, seqlen_k, heads_q, heads_kv), options in CALLS:
                    torch.manual_seed(seed)
                    q = torch.randn(batch, seqlen_q, heads_q, head_dim) + 0.25
                    k = torch.randn(batch, seqlen_k, heads_kv, head_dim) + 0.25
                    v = torch.randn(batch, seqlen_k, heads_kv, head_dim_v) + 0.25
                    sizes = f"{batch} x {seqlen_q} x {seqlen_k}, {heads_q}/{heads_kv} heads"
                    yield f"{sizes}, seed {seed}", *(x.to(dtype) for x in (q, k, v)), options


def run(side: str, seeds: int, output: Path) -> None:
    """One side's process: [(title, variant, out, lse), ...] into a file."""
    if side == "emulator":
        import emulator

        def place(x):
            return x.as_subclass(emulator.EmulatedTensor)
    else:

        def place(x):
            return x.cuda()

    results = []
    for rows in TILES:
        for title, *qkv, options in cases(seeds):
            q, k, v = map(place, qkv)
            with use_tiles(*rows):
                out, lse = flash_attn_func(q, k, v, return_lse=True, **options)
                variant = explain(q, k, v, **options).variant
            plain = [x.cpu().as_subclass(torch.Tensor) for x in (out, lse)]
            results.append((title, variant, *plain))
    torch.save(results, output)


def start(side: str, seeds: int, output: Path) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FA_SM120_LIMITS")}
    environment.pop("FA_SM120_DRIVER", None)
    if side == "emulator":
        import emulator

        environment["FA_SM120_DRIVER"] = str(emulator.library())
    else:
        environment["FA_SM120_PLAN_AS"] = "120"
    command = [sys.executable, __file__, "--seeds", str(seeds), "--run", side, str(output)]
    return subprocess.Popen(command, env=environment)


def differences(emulated: torch.Tensor, real: torch.Tensor, relative: float, absolute: float):
    """(largest difference in units of what is tolerated, share of elements that differ at all)."""
    emulated, real = emulated.double(), real.double()
    same = (emulated == real) | (emulated.isnan() & real.isnan())
    error = torch.where(same, 0.0, (emulated - real).abs())
    tolerated = relative * real.abs() + absolute
    return (error / tolerated).max().item(), 1 - same.double().mean().item()


def compare(seeds: int) -> bool:
    """Runs both sides and prints a line for each variant's worst call; whether all agree."""
    with tempfile.TemporaryDirectory() as directory:
        files = {side: Path(directory) / side for side in ("emulator", "cuda")}
        processes = [start(side, seeds, file) for side, file in files.items()]
        if any([process.wait() for process in processes]):
            return False
        sides = [torch.load(file, weights_only=True) for file in files.values()]
    worst: dict[str, tuple[float, ...]] = {}
    for emulated, real in zip(*sides, strict=True):
        _, variant, out, lse = real
        assert emulated[:2] == real[:2], (emulated[:2], real[:2])
        eps = torch.finfo(out.dtype).eps
        largest = out.double().nan_to_num().abs().max().item()
        out_off, out_share = differences(
            emulated[2], out, OUT_ULPS * eps, OUT_OF_LARGEST * largest + 1e-30
        )
        lse_off, _ = differences(emulated[3], lse, LSE_TOLERANCE, LSE_TOLERANCE)
        before = worst.get(variant, (0.0, 0.0, 0.0))
        worst[variant] = tuple(map(max, before, (out_off, lse_off, out_share)))
    print(f"{'variant':52} {'out':>6} {'lse':>6} {'elements that differ':>20}")
    for variant, (out_off, lse_off, share) in worst.items():
        print(f"{variant:52} {out_off:6.3f} {lse_off:6.3f} {share:20.4%}")
    agree = all(max(figures[:2]) <= 1 for figures in worst.values())
    print(
        f"{len(sides[0])} calls of {len(worst)} common_kernels "
        f"{'agree' if agree else 'do NOT agree'}: the worst of each, where 1 is tolerated"
    )
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="of the inputs")
    parser.add_argument("--run", nargs=2, metavar=("SIDE", "FILE"), help="one side alone")
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run[0], arguments.seeds, Path(arguments.run[1]))
    else:
        sys.exit(0 if compare(arguments.seeds) else 1)


if __name__ == "__main__":
    main()
