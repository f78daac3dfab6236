"""What ptxas makes of every common kernel: the gates that a kernel must pass to land. No GPU needed."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from flash_attn_sm120 import jit, variants

pytest.importorskip("cuda.bindings.nvrtc")

SM120_SMEM = 99 * 1024
REGISTERS_PER_SM = 64 * 1024


@pytest.mark.parametrize("compute_capability", [120, 90, 80])
def test_common_forward_variants(compute_capability):
    """No spills up to head_dim 128, within 99 KB, and the registers allow the blocks that are planned."""
    arch = jit.architecture(compute_capability)

    def built(plan):
        return plan, jit.build(plan.kernel, plan.variant, plan.options, arch)

    plans = list(variants.common_plans(compute_capability))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(built, plans))
    assert len(results) == 2 * 2 * len(variants.COMMON_HEAD_DIMS)
    report = [
        f"{plan.variant:56} {build.registers:4} registers {build.spill_bytes:5} B spilled "
        f"{plan.smem_bytes:6} B shared {build.seconds:5.2f} s"
        for plan, build in results
    ]
    print(arch, *report, sep="\n")
    for (plan, build), line in zip(results, report, strict=True):
        head_dims = [int(n) for n in re.findall(r"_dv?(\d+)", plan.variant)]
        assert build.spill_bytes <= (0 if max(head_dims) <= 128 else 64), line
        assert build.shared_bytes + plan.smem_bytes <= SM120_SMEM, line
        assert build.registers * plan.warps * 32 <= REGISTERS_PER_SM, line
