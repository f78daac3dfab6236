"""What ptxas makes of every common kernel: the gates that a kernel must pass to land. No GPU needed."""

import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flash_attn_sm120 import block_mask, common_kernels, explain, explain_backward, jit
from helpers import builds
from helpers.shapes import SM120_SMEM
from helpers.tiles import PRODUCERS, tile_row, use_tiles

pytest.importorskip("cuda.bindings.nvrtc")

SPILLED_BEYOND_128 = {120: 16, 90: 68, 80: 0}  # head_dim 256, outside the loops: see test_sass.py
REGISTERS_PER_SM = 64 * 1024


def build_all(plans, arch):
    """[(plan, what ptxas says, a line for the report), ...]"""

    def built(plan):
        kernel = plan.main
        build = builds.build(*kernel, arch)
        line = (
            f"{kernel.variant:56} {build.registers:4} registers {build.spill_bytes:5} B spilled "
            f"{plan.smem_bytes:6} B shared {build.seconds:5.2f} s"
        )
        return plan, build, line

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(built, plans))
    print(arch, *(line for *_, line in results), sep="\n")
    return results


@pytest.mark.parametrize("compute_capability", [120, 90, 80])
def test_common_forward_variants(compute_capability):
    """No spills up to head_dim 128, within 99 KB, and the registers allow the blocks that are planned.

    In fp16, whose kernels differ in a few constants and the names of the types, the most crowded ones:
    on 12.0 those of head_dim 128, too.
    """
    plans = list(common_kernels.common_plans(compute_capability))
    assert len(plans) >= 2 * 2 * len(common_kernels.COMMON_HEAD_DIMS)
    crowded = "_bf16_|_d128_dv128|_d256" if compute_capability == 120 else "_bf16_|_d256"
    plans = [p for p in plans if re.search(crowded, p.variant)]
    assert len(plans) >= 2 * (len(common_kernels.COMMON_HEAD_DIMS) + 1)
    for plan, build, line in build_all(plans, jit.architecture(compute_capability)):
        head_dims = [int(n) for n in re.findall(r"_dv?(\d+)", plan.variant)]
        allowed = 0 if max(head_dims) <= 128 else SPILLED_BEYOND_128[compute_capability]
        assert build.spill_bytes <= allowed, line
        assert build.shared_bytes + plan.smem_bytes <= SM120_SMEM, line
        assert build.registers * plan.warps * 32 <= REGISTERS_PER_SM, line


def test_decoding_variants():
    """The forward of parts needs no more than that of whole rows, and combine fits six times in an SM."""
    plans = [p for p in common_kernels.decoding_plans(120) if "-DDTYPE=2" in p.options]
    for _, build, line in build_all(plans, "sm_120f"):
        assert build.spill_bytes == 0, line
    combines = dict.fromkeys(plan.kernels[1] for plan in plans)
    for kernel in combines:
        build = builds.build(*kernel, "sm_120f")
        assert build.spill_bytes == 0 and build.registers * 256 * 6 <= REGISTERS_PER_SM, kernel
        assert 6 * (build.shared_bytes + 1024) <= SM120_SMEM, kernel


def crowded_calls(seqlen=256):
    """(q, k, v), options: the head dims and masks that come closest to spilling."""
    for dim, dim_v in ((104, 120), (104, 128), (112, 112), (120, 120), (120, 128), (128, 128)):
        q = torch.empty(1, seqlen, 1, dim, dtype=torch.bfloat16)
        v = torch.empty(1, seqlen, 1, dim_v, dtype=torch.bfloat16)
        for window_size in ((None, None), (None, 0), (50, 0), (50, None)):
            yield (q, q, v), {"window_size": window_size}


def every_second(calls, masks=4, first=0):
    """Of calls that come with so many masks for each head dim: both halves of the masks in turn."""
    return [call for i, call in enumerate(calls) if (i + i // masks + first) % 2 == 0]


@pytest.mark.parametrize("compute_capability", [120, 90, 80])
def test_crowded_forward_variants(compute_capability):
    """Of calls of few, of some and of many query rows per multiprocessor; elsewhere of many.

    On 8.0, where the tiles are those of 9.0, every second one.
    """
    sizes = (256, 16384, 65536) if compute_capability == 120 else (65536,)
    calls = [call for seqlen in sizes for call in crowded_calls(seqlen)]
    if compute_capability == 80:
        calls = every_second(calls)
    plans = [explain(*x, **options, arch=compute_capability) for x, options in calls]
    each_once = {plan.variant: plan for plan in plans}.values()
    for _, build, line in build_all(each_once, jit.architecture(compute_capability)):
        assert build.spill_bytes == 0, line


FEATURES = {
    "softcap": {"softcap": 30.0},
    "pack_gqa": {"pack_gqa": True},
    "alibi": {"alibi_slopes": torch.empty(32)},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_features_take_no_more(features, compute_capability=120):
    """As above: a cap, packed rows and ALiBi keep within the same registers."""
    plans = []
    for head_dim in (64, 128, 256):
        q, k = (torch.empty(1, 4096, heads, head_dim).bfloat16() for heads in (32, 8))
        plans += [
            explain(q, k, k, causal=causal, arch=compute_capability, **features)
            for causal in (False, True)
        ]
    for plan, build, line in build_all(plans, jit.architecture(compute_capability)):
        head_dim = int(re.search(r"_d(\d+)", plan.variant)[1])
        assert build.spill_bytes <= (0 if head_dim <= 128 else 64), line


SLOPES, DOCUMENT, TABLE = torch.empty(16), torch.empty(16384).long(), torch.empty(16, 32768)
CROWDED = {
    "dropout": {"dropout_p": 0.1},
    "score_mod": {"score_mod": lambda s, b, h, q, k: s + SLOPES[h] * (k - q)},
    "relative": {"score_mod": lambda s, b, h, q, k: s + TABLE[h, q - k + 16384]},
    "mask_mod": {"mask_mod": lambda b, h, q, k: (DOCUMENT[q] == DOCUMENT[k]) & (q >= k)},
    "lists": {},
    "bias": {},
    "lists, mask_mod": {"mask_mod": lambda b, h, q, k: q >= k},
    "lists, dropout": {"dropout_p": 0.1},
    "dropout, score_mod": {
        "dropout_p": 0.1,
        "score_mod": lambda s, b, h, q, k: s + SLOPES[h] * (k - q),
    },
}


# Rows per multiprocessor are few, some and many.
CROWDED_MASKS = [(256, {"causal": True})]
CROWDED_MASKS += [(n, {"causal": causal}) for n in (4096, 16384) for causal in (False, True)]
CROWDED_MASKS += [(4096, {"window_size": (50, 0)})]


def crowded_options(name, seqlen):
    """Of a call: with lists and a bias, of which nothing is read here."""
    options = dict(CROWDED[name])
    if "bias" in name:
        options["attn_bias"] = torch.empty(1, 1, seqlen, seqlen, dtype=torch.bfloat16)
    if "lists" in name:
        blocks = -(-seqlen // 128)
        lists = torch.empty(1, 1, blocks).int(), torch.empty(1, 1, blocks, blocks).int()
        for of in ("key_blocks", "query_blocks"):
            options[of] = block_mask.BlockLists(128, 128, *lists, *lists)
    return options


CROWDED_SPILLS = 128  # bytes that the backward may spill above head_dim 64


@pytest.mark.parametrize("name", CROWDED)
def test_crowded_variants(name, compute_capability=120):
    """Few, some and many rows per multiprocessor: up to head_dim 128 nothing spills in the forward.

    Nor in the backward up to 64; above, the tiles in which nothing spills are slower than those with
    some thirty words, so only more than these is too much. Each name has every second call, and its neighbours the others.
    """
    plans, spilled = [], []
    calls = [*itertools.product((64, 96, 128), CROWDED_MASKS)]
    first = [*CROWDED].index(name)
    for head_dim, (seqlen, options) in every_second(calls, len(CROWDED_MASKS), first):
        q = torch.empty(1, seqlen, 16, head_dim, dtype=torch.bfloat16)
        given = {**crowded_options(name, seqlen), **options, "arch": compute_capability}
        of_bias = {"bias_gradient": True} if name == "bias" else {}
        plans += [explain(q, q, q, **given), explain_backward(q, q, q, **given, **of_bias)]
    each_once = {plan.main.variant: plan for plan in plans}.values()
    for plan, build, line in build_all(each_once, jit.architecture(compute_capability)):
        is_wide = not re.search("_d64_", plan.main.variant)
        allowed = CROWDED_SPILLS if plan.main.kernel == "backward" and is_wide else 0
        spilled.extend([line] if build.spill_bytes > allowed else [])
        assert build.shared_bytes + plan.smem_bytes <= SM120_SMEM, line
        assert build.registers * plan.warps * 32 <= REGISTERS_PER_SM, line
    assert spilled == []


def tma_plan(x, options, compute_capability, **tile):
    """The plan of a call with its own tile, or with `tile`, where the TMA feeds it."""
    row = {} if "tile_n" in tile else {"plan": explain(*x, **options, arch=compute_capability)}
    with use_tiles(tile_row(**row, **tile, kernel="forward_tma")):
        plan = explain(*x, **options, arch=compute_capability)
    assert plan.kernel == "forward_tma"
    return plan


@pytest.mark.parametrize("compute_capability", [120, 90])
@pytest.mark.parametrize("producer", [p for p in PRODUCERS if p != "warp"])
def test_tma_forward_variants(compute_capability, producer):
    """As above, of the kernel that the TMA feeds: the same tiles, and next to no spills.

    Of the common head dims each producer has every second one.
    """
    calls = [*crowded_calls()] if producer == "thread" else []
    for head_dim, head_dim_v in common_kernels.COMMON_HEAD_DIMS[PRODUCERS.index(producer) :: 2]:
        q, v = (torch.empty(1, 256, 1, d).bfloat16() for d in (head_dim, head_dim_v))
        calls += [((q, q, v), {"causal": causal}) for causal in (False, True)]
    plans = [tma_plan(*call, compute_capability, producer=producer) for call in calls]
    for plan, build, line in build_all(plans, jit.architecture(compute_capability)):
        assert build.spill_bytes <= (60 if "_d256" in plan.variant else 0), line
        assert build.shared_bytes + plan.smem_bytes <= SM120_SMEM, line
        assert build.registers * plan.warps * 32 <= REGISTERS_PER_SM, line


@pytest.mark.parametrize("compute_capability", [120, 90])
@pytest.mark.parametrize("warps, head_dim", [(4, 64), (4, 128), (8, 64), (8, 128)])
def test_tma_forward_with_a_producer_warp(compute_capability, warps, head_dim):
    """A ninth warp leaves 168 registers to each: for 16 rows per warp enough up to D 64, and nearly beyond."""
    q = torch.empty(1, 256, 1, head_dim).bfloat16()
    tile = {"tile_n": 64, "sub_n": 32, "warps": warps, "warp_m": 16, "stages": 3}
    plans = [
        tma_plan((q, q, q), {"causal": causal}, compute_capability, **tile, producer="warp")
        for causal in (False, True)
    ]
    for _, build, line in build_all(plans, jit.architecture(compute_capability)):
        assert build.spill_bytes <= (104 if (warps, head_dim) == (8, 128) else 0), line


@pytest.mark.parametrize("compute_capability", [120, 90])
def test_backward_variants(compute_capability):
    """Within 99 KB and the registers of a multiprocessor; up to D 80 no spills, at D 128 some ten words."""
    plans = []
    for head_dim, head_dim_v in common_kernels.COMMON_HEAD_DIMS:
        q, v = (torch.empty(1, 4096, 8, d, dtype=torch.bfloat16) for d in (head_dim, head_dim_v))
        for options in ({}, {"causal": True, "deterministic": True}):
            plans.append(explain_backward(q, q, v, **options, arch=compute_capability))

    for plan, build, line in build_all(plans, jit.architecture(compute_capability)):
        head_dims = [int(n) for n in re.findall(r"_dv?(\d+)", plan.main.variant)]
        assert build.spill_bytes <= (0 if max(head_dims) <= 80 else 128), line
        assert build.shared_bytes + plan.smem_bytes <= SM120_SMEM, line
        assert build.registers * plan.warps * 32 <= REGISTERS_PER_SM, line


# Bytes that variants for lengths of each sequence's own may spill: forward and backward at head_dim
# 128, then at 256.
VARLEN_SPILLS = {120: ((0, 176), (104, 128)), 90: ((144, 176), (184, 128))}


@pytest.mark.parametrize("compute_capability", [120, 90])
def test_varlen_variants(compute_capability):
    """On 12.0 the forward spills nothing up to head_dim 128, and nothing does at 64.

    What the backward spills more than with equal lengths, it does outside the loop.
    """
    lengths = {f"cu_seqlens_{side}": torch.empty(17, dtype=torch.int32) for side in "qk"}
    bounds = {"max_seqlen_q": 2048, "max_seqlen_k": 2048}
    plans = []
    for head_dim in (64, 128, 256):
        q, k = (torch.empty(16384, heads, head_dim).bfloat16() for heads in (8, 2))
        for window_size in ((None, None), (None, 0), (50, 0)):
            options = {**lengths, **bounds, "window_size": window_size, "arch": compute_capability}
            plans += [explain(q, k, k, **options), explain_backward(q, k, k, **options)]
        plans.append(explain(q, k, k, **options, num_splits=4, pack_gqa=True))
    for plan, build, line in build_all(plans, jit.architecture(compute_capability)):
        assert plan.main.variant.endswith("_varlen"), line
        head_dim = int(re.search(r"_d(\d+)", plan.main.variant)[1])
        is_backward = plan.main.kernel == "backward"
        spills = ((0, 0), *VARLEN_SPILLS[compute_capability])[head_dim.bit_length() - 7]
        assert build.spill_bytes <= spills[is_backward], line
        assert build.shared_bytes + plan.smem_bytes <= SM120_SMEM, line
        assert build.registers * plan.warps * 32 <= REGISTERS_PER_SM, line
