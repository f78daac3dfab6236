"""The forward that the TMA feeds: equal to the other one to the bit, and which calls go to it."""

import math

import numpy as np
import pytest
import torch

from flash_attn_sm120 import explain, flash_attn_func
from helpers import cases
from helpers.cases import MASKS, WIDE_MASKS
from helpers.checks import assert_all_equal, attend, check_forward
from helpers.devices import CPU, DEVICES, params_of
from helpers.shapes import shapes
from helpers.tiles import PRODUCERS, tile_row, use_tiles


@pytest.fixture(params=params_of(*(device for device in DEVICES if device is not CPU)))
def device(request):
    with use_tiles(*request.param.tiles):
        yield request.param


def check_both(q, k, v, *, producer="thread", **options):
    """A call by both kernels, with the same tile: right, and equal to the bit. Returns the plan."""
    plan = explain(q, k, v, **options)
    with use_tiles(tile_row(plan, kernel="forward")):
        assert explain(q, k, v, **options).kernel == "forward"
        expected = attend(q, k, v, **options)
    with use_tiles(tile_row(plan, kernel="forward_tma", producer=producer)):
        plan = explain(q, k, v, **options)
        assert plan.kernel == "forward_tma", plan.reasons
        results = check_forward(q, k, v, **options)
    assert_all_equal(results, expected, equal_nan=True)
    return plan


# ---- right ---------------------------------------------------------------------------------------

HEAD_DIMS = [(d, d) for d in (24, 64, 96, 128, 192, 256)] + [(40, 72), (192, 128), (8, 136)]


@cases.mask(WIDE_MASKS)
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=lambda d: f"{d[0]}x{d[1]}")
def test_every_tile_edge(device, make_qkv, head_dims, mask):
    if not device.takes(HEAD_DIMS.index(head_dims) + list(WIDE_MASKS.values()).index(mask)):
        pytest.skip("with tiles of the other size")
    plan = explain(*make_qkv(1, 1, 1, 1, 1, *head_dims), **mask)
    for seqlen_k in (1, plan.tile_n - 1, plan.tile_n, plan.tile_n + 1, 5 * plan.tile_n + 9):
        for seqlen_q in (1, plan.tile_m + 1):
            check_both(*make_qkv(1, seqlen_q, seqlen_k, 2, 1, *head_dims), **mask)


@pytest.mark.quick("emulator-bf16-(64, 64)-warp-window", "cuda-bf16-(64, 64)-*-causal")
@cases.mask(WIDE_MASKS)
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("head_dims", [(64, 64), (192, 192)], ids=str)
def test_every_producer(device, dtype, make_qkv, head_dims, producer, mask):
    """Also where everything is computed a second time, and the ring goes on where it was."""
    turn = PRODUCERS.index(producer) + list(WIDE_MASKS.values()).index(mask)
    if not device.takes(turn + head_dims[0] // 192):
        pytest.skip("with tiles of the other size")
    q, k, v = make_qkv(2, 70, 330, 4, 2, *head_dims, dtype=dtype)
    plan = check_both(q, k, v, producer=producer, **mask)
    assert f"_p{PRODUCERS.index(producer)}" in plan.variant
    check_both(q * 200, k, v, producer=producer, **mask)


@cases.heads
def test_heads(device, make_qkv, heads):
    check_both(*make_qkv(3, 47, 83, *heads), causal=True)


@cases.mask({name: MASKS[name] for name in ("full", "window")})
def test_softcap(device, dtype, make_qkv, mask):
    check_both(*make_qkv(2, 47, 83, 4, 2, dtype=dtype, mean=0.5), softcap=20.0, **mask)


@cases.layout
@cases.head_dims_of_layouts
def test_layouts(device, make_qkv, layout, head_dims):
    check_both(*make_qkv(3, 45, 77, 4, 2, *head_dims, layout=layout), causal=True)


def test_packed(device, make_qkv):
    qkv = make_qkv(3, 45, 77, 4 + 2 + 2)[0]
    check_both(*qkv.split([4, 2, 2], dim=2), causal=True)


@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_what_is_masked_stays_out(device, make_qkv, poison, producer):
    """Every thread looks for bad numbers in its share of a tile that it has not copied."""
    q, k, v = make_qkv(1, 150, 150, 2, 1, 64, 40)
    k[:, :30], v[:, :30] = poison, poison
    k[:, -20:], v[:, -20:] = poison, poison
    check_both(q, k, v, producer=producer, window_size=(10, 0))


def test_values_in_the_padding_are_zeros(device, make_qkv):
    """Next to the last of 24 dims, and before the first key, lies NaN."""
    check_both(*make_qkv(2, 33, 20, 2, 1, 24, 24, layout="in_nan"))


# ---- routes --------------------------------------------------------------------------------------

ROW = {"tile_n": 64, "sub_n": 32, "warps": 4, "warp_m": 32, "stages": 3}


def tma_rows(**changes):
    """A TMA row for all head dims, and one of the other kernel behind it."""
    fallback = {**ROW, "tile_n": 32, "stages": 2}
    return (
        tile_row(**{**ROW, **changes}, kernel="forward_tma", producer="thread"),
        tile_row(**fallback),
    )


def kernel_of(q, k, v, *, arch=120, rows=None, **options):
    with use_tiles(*(rows or tma_rows())):
        plan = explain(q, k, v, arch=arch, **options)
    assert ("not forward_tma" in plan.reasons) == (plan.kernel == "forward")
    return plan.kernel, plan.reasons.get("not forward_tma", "")


@pytest.mark.quick
def test_takes_every_mask_and_head_dim():
    for head_dims in HEAD_DIMS:
        if sum(head_dims) <= 256:
            q, k, v = (torch.empty(2, 70, 4, d) for d in (head_dims[0], *head_dims))
            for mask in WIDE_MASKS.values():
                assert kernel_of(q.half(), k.half(), v.half(), **mask)[0] == "forward_tma"


@pytest.mark.parametrize("arch, kernel", [(80, "forward"), (89, "forward"), (90, "forward_tma")])
@pytest.mark.parametrize("newer", [0, 10, 30, 31])
def test_needs_compute_capability_9(arch, kernel, newer):
    q = torch.empty(1, 64, 2, 64).bfloat16()
    arch = arch + newer if kernel == "forward_tma" else arch
    assert kernel_of(q, q, q, arch=arch)[0] == kernel
    assert ("9.0" in kernel_of(q, q, q, arch=arch)[1]) == (kernel == "forward")


def strided(shape, strides):
    """An array with any strides (of elements), which no memory stands behind."""
    base = np.empty(1 << 16, np.float16)
    return np.lib.stride_tricks.as_strided(base[1 << 15 :], shape, [2 * s for s in strides])


PLAIN = (64 * 2 * 64, 2 * 64, 64, 1)


@pytest.mark.quick
@pytest.mark.parametrize(
    "strides, kernel",
    [
        (PLAIN, "forward_tma"),
        ((PLAIN[0], 64, 64 * 64, 1), "forward_tma"),  # heads first
        ((0, *PLAIN[1:]), "forward"),
        ((PLAIN[0], 0, *PLAIN[2:]), "forward"),
        ((*PLAIN[:2], 0, 1), "forward"),
        ((PLAIN[0], -128, *PLAIN[2:]), "forward"),
        ((PLAIN[0], 56, *PLAIN[2:]), "forward"),  # rows that overlap
        ((PLAIN[0], 136, 64, 1), "forward_tma"),
        (((1 << 39) - 8, *PLAIN[1:]), "forward_tma"),
        ((1 << 39, *PLAIN[1:]), "forward"),
    ],
    ids=str,
)
@pytest.mark.parametrize("which", ["k", "v"])
def test_strides_that_a_tensor_map_has(strides, kernel, which):
    plain = strided((2, 64, 2, 64), PLAIN)
    other = strided((2, 64, 2, 64), strides)
    k, v = (other, plain) if which == "k" else (plain, other)
    got, why = kernel_of(plain, k, v)
    assert got == kernel and ("strides" in why) == (kernel == "forward")


def test_nobody_steps_over_a_single_entry():
    x = strided((1, 64, 1, 64), (0, 64, -7, 1))
    assert kernel_of(x, x, x)[0] == "forward_tma"
    assert kernel_of(*shapes(batch=1, seqlen_q=1, heads=(1, 1)))[0] == "forward_tma"


def test_expanded_inputs_are_right_by_the_other_kernel(device, make_qkv):
    q, k, v = make_qkv(2, 45, 77, 4, 2)
    with use_tiles(*tma_rows()):
        for expanded in (k[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 77, -1, -1)):
            assert explain(q, expanded, v).kernel == "forward"
            check_forward(q, expanded, v)


def test_no_keys(device, make_qkv):
    q, k, v = make_qkv(2, 45, 0, 4, 2)
    kernel, why = kernel_of(q, k, v)
    assert kernel == "forward" and "without keys" in why
    with use_tiles(*tma_rows()):
        out, lse = attend(q, k, v)
        assert (out == 0).all() and (lse == -math.inf).all()
        assert flash_attn_func(q[:, :0], k, v)[0].shape == (2, 0, 4, 64)


def test_a_tile_that_is_no_box():
    q = torch.empty(1, 64, 2, 64).bfloat16()
    kernel, said = kernel_of(q, q, q, rows=tma_rows(tile_n=16, sub_n=16))
    assert kernel == "forward" and "box" in said


def test_mbarriers_count_as_shared_memory():
    """99 KB hold 9 stages of 11 KB, but not with two mbarriers each."""
    q, v = torch.empty(1, 64, 2, 64).half(), torch.empty(1, 64, 2, 112).half()
    fits = kernel_of(q, q, v, rows=tma_rows(tile_n=32, stages=8))
    full = kernel_of(q, q, v, rows=tma_rows(tile_n=32, stages=9))
    assert fits[0] == "forward_tma"
    assert full[0] == "forward" and "shared memory" in full[1]
    with use_tiles(tma_rows()[0]):
        assert explain(q, q, v, arch=120).smem_bytes == 3 * (64 * 176 * 2 + 16)


def test_a_producer_warp_counts_among_the_warps():
    """Of 48 that a multiprocessor of 12.0 has: 12 blocks of 4, but 9 of 5."""
    q = torch.empty(1, 64, 2, 8).half()
    tile, blocks = {**ROW, "tile_n": 32, "stages": 2}, []
    for producer in PRODUCERS:
        with use_tiles(tile_row(**tile, kernel="forward_tma", producer=producer)):
            blocks.append(explain(q, q, q, arch=120).blocks_per_sm)
    assert blocks == [12, 12, 9]
