"""What ptxas makes of every common kernel: the gates that a kernel must pass to land. No GPU needed."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flash_attn_sm120 import explain, jit, variants

pytest.importorskip("cuda.bindings.nvrtc")

SM120_SMEM = 99 * 1024
REGISTERS_PER_SM = 64 * 1024


def build_all(plans, arch):
    """[(plan, what ptxas says, a line for the report), ...]"""

    def built(plan):
        build = jit.build(plan.kernel, plan.variant, plan.options, arch)
        line = (
            f"{plan.variant:56} {build.registers:4} registers {build.spill_bytes:5} B spilled "
            f"{plan.smem_bytes:6} B shared {build.seconds:5.2f} s"
        )
        return plan, build, line

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(built, plans))
    print(arch, *(line for *_, line in results), sep="\n")
    return results


@pytest.mark.parametrize("compute_capability", [120, 90, 80])
def test_common_forward_variants(compute_capability):
    """No spills up to head_dim 128, within 99 KB, and the registers allow the blocks that are planned."""
    plans = list(variants.common_plans(compute_capability))
    assert len(plans) >= 2 * 2 * len(variants.COMMON_HEAD_DIMS)
    for plan, build, line in build_all(plans, jit.architecture(compute_capability)):
        head_dims = [int(n) for n in re.findall(r"_dv?(\d+)", plan.variant)]
        assert build.spill_bytes <= (0 if max(head_dims) <= 128 else 64), line
        assert build.shared_bytes + plan.smem_bytes <= SM120_SMEM, line
        assert build.registers * plan.warps * 32 <= REGISTERS_PER_SM, line


@pytest.mark.parametrize("compute_capability", [120, 90, 80])
def test_crowded_forward_variants(compute_capability):
    """The head dims and masks that come closest to spilling do not."""
    plans = []
    for dim, dim_v in ((104, 120), (104, 128), (112, 112), (120, 120), (120, 128), (128, 128)):
        q = torch.empty(dim, dtype=torch.bfloat16).expand(1, 256, 1, dim)
        v = torch.empty(dim_v, dtype=torch.bfloat16).expand(1, 256, 1, dim_v)
        for window_size in ((None, None), (None, 0), (50, 0), (50, None)):
            plans.append(explain(q, q, v, window_size=window_size, arch=compute_capability))
    for _, build, line in build_all(plans, jit.architecture(compute_capability)):
        assert build.spill_bytes == 0, line
