"""How fast does the emulated driver run the kernels? In million warp instructions per second.

    python benchmarks/emulator_speed.py

Runs on the CPU. A 256 x 256 head is what tests run hundreds of times.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import emulator  # noqa: E402

os.environ["FA_SM120_DRIVER"] = str(emulator.library())

from flash_attn_sm120 import flash_attn_func  # noqa: E402

HEAD_DIMS = (64, 96, 128, 256)
CALLS = 9


def main():
    print(f"{'head_dim':>8} {'':7} {'ms per head':>12} {'instructions':>13} {'million/s':>10}")
    for head_dim in HEAD_DIMS:
        for causal in (False, True):
            q, k, v = (
                torch.randn(1, 256, 1, head_dim).bfloat16().as_subclass(emulator.EmulatedTensor)
                for _ in range(3)
            )
            seconds = []
            with emulator.emulator().settings(threads=1):
                for _ in range(CALLS):
                    start = time.perf_counter()
                    flash_attn_func(q, k, v, causal=causal)
                    seconds.append(time.perf_counter() - start)
            median = statistics.median(seconds[1:])  # the first one compiles
            executed = sum(emulator.emulator().counters().instructions.values())
            print(
                f"{head_dim:8} {'causal' if causal else 'full':7} {1e3 * median:12.1f} "
                f"{executed:13} {executed / median / 1e6:10.1f}"
            )


if __name__ == "__main__":
    main()
