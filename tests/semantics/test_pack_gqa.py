"""pack_gqa: the query heads of one KV head share the rows of a block, and nothing else changes."""

import itertools

import pytest
import torch

from flash_attn_sm120 import explain
from helpers import cases
from helpers.checks import assert_all_equal, attend, check_forward
from helpers.children import run_python
from helpers.shapes import shapes
from helpers.tiles import KERNELS, tile_row, use_tiles

RATIOS = [(4, 2), (6, 2), (4, 1), (14, 2), (8, 1), (13, 1)]
MASKS = {**cases.MASKS, "causal": {"causal": True, "softcap": 15.0}}


def check_packed(device, q, k, v, **options):
    """A call, packed and unpacked: right, and equal to the bit."""
    unpacked = attend(q, k, v, pack_gqa=False, **options)
    packed = check_forward(q, k, v, pack_gqa=True, **options)
    assert_all_equal(packed, unpacked, equal_nan=True)
    if device.name != "cpu":
        packed, unpacked = (explain(q, k, v, pack_gqa=p, **options) for p in (True, False))
        assert packed.pack_gqa and not unpacked.pack_gqa
        assert packed.variant == unpacked.variant + "_pack"


# ---- right ---------------------------------------------------------------------------------------


@pytest.mark.quick("*-fp32-14to2-*", "*-bf16-14to2-causal")
@cases.mask(MASKS)
@pytest.mark.parametrize("heads", RATIOS, ids=lambda heads: f"{heads[0]}to{heads[1]}")
def test_ratios(device, dtype, make_qkv, heads, mask):
    check_packed(device, *make_qkv(1, 47, 83, *heads, 64, 40, dtype=dtype), **mask)


@cases.mask(MASKS)
def test_tile_edges(device, make_qkv, mask):
    """Of queries, of packed rows, and of keys: 64 (128) rows per tile, 32 or 64 keys."""
    for seqlen_q, ratio in ((1, 7), (9, 7), (16, 4), (21, 3), (32, 2), (65, 2)):
        for seqlen_k in (1, 64, 65, 129):
            check_packed(device, *make_qkv(1, seqlen_q, seqlen_k, 2 * ratio, 2), **mask)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_dims", [(128, 128), (72, 40)], ids=str)
def test_both_kernels(device, make_qkv, head_dims, kernel):
    if device.name == "cpu":
        pytest.skip("the CPU has one implementation")
    q, k, v = make_qkv(1, 40, 150, 14, 2, *head_dims)
    with use_tiles(tile_row(explain(q, k, v), kernel=kernel, producer="thread")):
        assert explain(q, k, v).kernel == kernel
        for mask in ({"causal": True}, {"window_size": (30, 5)}):
            check_packed(device, q, k, v, **mask)


@cases.layout
def test_layouts(device, make_qkv, layout):
    check_packed(device, *make_qkv(3, 45, 77, 6, 2, layout=layout), causal=True)


def test_packed_qkv(device, make_qkv):
    check_packed(device, *make_qkv(3, 45, 77, 6 + 2 + 2)[0].split([6, 2, 2], dim=2), causal=True)


def test_spikes_in_one_head(device, dtype, make_qkv):
    """Rows of the same query, one of which is computed a second time."""
    q, k, v = make_qkv(1, 40, 300, 8, 2, dtype=dtype)
    q[..., 0], k[..., 0] = 0, 0
    q[:, 11, 2, 0], k[:, 5, :, 0] = 8, 300
    for causal in (False, True):
        check_packed(device, q, k, v, causal=causal)


def test_nan_stays_in_its_group(device, make_qkv):
    q, k, v = make_qkv(1, 20, 50, 8, 2)
    k[:, 30, 1], v[:, 30, 1] = torch.nan, torch.nan
    check_packed(device, q, k, v, causal=True)


def test_nothing_to_do(device, make_qkv):
    for sizes in ((0, 5, 7), (2, 0, 7), (2, 5, 0)):
        q, k, v = make_qkv(*sizes, 8, 2)
        check_forward(q, k, v, pack_gqa=True)


# ---- the plan ------------------------------------------------------------------------------------


def plan(seqlen_q=1, heads=(32, 8), arch=120, **options):
    return explain(*shapes(seqlen_q=seqlen_q, seqlen_k=4096, heads=heads), arch=arch, **options)


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("ratio", [2, 3, 4, 7, 8, 16])
def test_decoding_is_packed(arch, ratio):
    """All query heads of a KV head are rows of one block."""
    packed = plan(heads=(8 * ratio, 8), arch=arch)
    assert packed.pack_gqa and packed.blocks == 8 * packed.num_splits
    assert packed.group_heads == 8
    assert "PACK_GQA=1" in str(packed.options)
    unpacked = plan(heads=(8 * ratio, 8), arch=arch, pack_gqa=False)
    assert unpacked.blocks == 8 * ratio * unpacked.num_splits
    assert "as the call asks" in unpacked.reasons["pack_gqa"]


def test_packed_where_it_takes_noticeably_fewer_blocks():
    for seqlen_q, ratio in itertools.product((1, 8, 60, 64, 65, 100, 128, 1000, 4096), (2, 7, 8)):
        call = {"seqlen_q": seqlen_q, "heads": (8 * ratio, 8), "num_splits": 1}
        chosen = plan(**call)
        packed, unpacked = (plan(**call, pack_gqa=p).blocks for p in (True, False))
        assert chosen.pack_gqa == (packed < 0.9 * unpacked), call
        assert chosen.blocks == (packed if chosen.pack_gqa else unpacked)
    assert not plan(seqlen_q=4096).pack_gqa and not plan(seqlen_q=64).pack_gqa


def test_one_head_is_nothing_to_pack():
    for pack_gqa in (None, True, False):
        assert not plan(heads=(8, 8), pack_gqa=pack_gqa).pack_gqa
    assert "one query head" in plan(heads=(8, 8), pack_gqa=True).reasons["pack_gqa"]


def test_rows_are_counted_in_32_bits():
    limit = 2**28 // 128
    assert plan(seqlen_q=limit - 1, heads=(128, 1), pack_gqa=True).pack_gqa
    refused = plan(seqlen_q=limit, heads=(128, 1), pack_gqa=True)
    assert not refused.pack_gqa and "2^28" in refused.reasons["pack_gqa"]
    assert plan(seqlen_q=1, heads=(2**20, 1), pack_gqa=True).pack_gqa


def test_cpu_calls_do_not_care(make_qkv):
    q = torch.zeros(1, 4, 2, 8)
    assert "packs nothing" in explain(q, q, q, pack_gqa=True).reasons["kernel"]


DROPPED = """
import warnings
import torch
from helpers import devices
from flash_attn_sm120 import explain, flash_attn_func
warnings.simplefilter({action!r}, UserWarning)
q = devices.{device}.place(torch.randn(1, 4, 2, 8).half())
explain(q, q, q, pack_gqa=True)
flash_attn_func(q, q, q)
for _ in range(2):
    try:
        flash_attn_func(q, q, q, pack_gqa=True)
        print("done")
    except UserWarning as warning:
        print("raised", warning)
"""


@pytest.mark.parametrize("action", ["always", "error"])
def test_a_dropped_request_is_warned_of_once(device, action, tmp_path):
    """In a process of its own, by the first call that launches."""
    if device.name not in ("emulator", "cuda"):
        pytest.skip("one device is enough, and the CPU drops nothing")
    done = run_python(DROPPED.format(action=action, device=device.name.upper()), tmp_path)
    said = "pack_gqa was asked for and is dropped: not packed: each KV head has one query head"
    if action == "error":
        assert done.stdout.splitlines() == [f"raised {said}", "done"], done.stderr
    else:
        assert done.stdout.splitlines() == ["done", "done"], done.stderr
        assert done.stderr.count(f"UserWarning: {said}") == 1, done.stderr
