"""Keys that are split among blocks, and the parts put together: as right as in one piece."""

import itertools
import math

import pytest
import torch

from emulator import EmulatedTensor
from flash_attn_sm120 import explain, flash_attn_func
from helpers import cases
from helpers.cases import WIDE_MASKS
from helpers.checks import assert_all_equal, attend, check_forward
from helpers.devices import reordered
from helpers.shapes import shapes
from helpers.tiles import tile_row, use_tiles

SPLITS = (0, 1, 2, 3, 7, 100)


def check_split(device, q, k, v, num_splits, **options):
    """One call, held against the reference, with NaN where its workspace will be."""
    plan = explain(q, k, v, num_splits=num_splits, **options)
    torch.full((16 + (plan.workspace_bytes or 0) // 4,), math.nan, device=device.torch_device)
    return check_forward(q, k, v, num_splits=num_splits, **options)


def tile_of(q, k, v, **options):
    """(tile_m, tile_n) of a call; any, on the CPU."""
    plan = explain(q, k, v, **options)
    return plan.tile_m or 64, plan.tile_n or 64


# ---- right ---------------------------------------------------------------------------------------


@cases.mask(WIDE_MASKS)
@pytest.mark.parametrize("seqlen_q", [1, 5, 64, 65, 130])
def test_lengths(device, make_qkv, seqlen_q, mask):
    """Parts of many tiles, of one, of the last one's few keys, and of none."""
    _, tile_n = tile_of(*make_qkv(1, seqlen_q, 1000, 2, 1), **mask)
    for seqlen_k in (0, 1, tile_n - 1, tile_n, tile_n + 1, 2 * tile_n, 7 * tile_n + 9):
        q, k, v = make_qkv(1, seqlen_q, seqlen_k, 2, 1)
        for num_splits in (2, 3, 100):
            check_split(device, q, k, v, num_splits, **mask)


@pytest.mark.parametrize("num_splits", SPLITS)
@cases.mask(WIDE_MASKS)
def test_many_keys(device, make_qkv, mask, num_splits):
    for seqlen_q in (1, 65):
        q, k, v = make_qkv(1, seqlen_q, 2000, 4, 2, mean=0.25)
        check_split(device, q, k, v, num_splits, **mask)


@pytest.mark.parametrize("num_splits", [2, 13])
@pytest.mark.parametrize(
    "head_dims", [(8, 8), (40, 72), (128, 128), (192, 128), (8, 248), (256, 256)], ids=str
)
def test_head_dims(device, make_qkv, head_dims, num_splits):
    """Rows of 2 to 64 threads of combine, which may not divide its block."""
    check_split(device, *make_qkv(2, 37, 900, 2, 1, *head_dims), num_splits, causal=True)


@pytest.mark.quick("*-4to2", "*-14to2")
@cases.heads
def test_heads(device, make_qkv, heads):
    check_split(device, *make_qkv(3, 70, 300, *heads), 3, causal=True)


@cases.layout
def test_layouts(device, make_qkv, layout):
    q, k, v = make_qkv(3, 45, 300, 4, 2, 72, 40, layout=layout)
    results = check_split(device, q, k, v, 3, causal=True)
    plain = [x.contiguous() for x in (q, k, v)]
    assert_all_equal(results, attend(*plain, num_splits=3, causal=True))


@cases.mask(WIDE_MASKS)
def test_both_kernels_agree_to_the_bit(device, make_qkv, mask):
    if device.name == "cpu":
        pytest.skip("the CPU has one kernel")
    q, k, v = make_qkv(2, 70, 500, 4, 2)
    results = []
    tile = explain(q, k, v, **mask)
    rows = [tile_row(tile, kernel="forward")]
    rows += [tile_row(tile, kernel="forward_tma", producer=p) for p in ("barrier", "warp")]
    for row, scale in itertools.product(rows, (1, 50)):  # 50: all is computed a second time
        with use_tiles(row):
            results.append(check_split(device, q * scale, k, v, 3, **mask))
    for i, result in enumerate(results):
        assert_all_equal(result, results[i % 2])


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [1, 257, 499], ids=["early", "middle", "late"])
@cases.score_of_spike
def test_spikes(device, dtype, make_qkv, key, score):
    """One part whose scores are far from all others'."""
    q, k, v = make_qkv(1, 100, 500, 2, dtype=dtype)
    cases.add_spike(q, k, key, score)
    for options in ({}, {"causal": True}):
        check_split(device, q, k, v, 4, **options)


def test_output_at_the_end_of_the_range(device, dtype, make_qkv):
    q, k, v = make_qkv(1, 33, 400, 2, dtype=dtype)
    check_split(device, q, k, torch.full_like(v, torch.finfo(dtype).max), 5, softmax_scale=0.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("window_size", [(None, 0), (150, 0), (None, -5)], ids=str)
def test_what_is_masked_stays_out(device, dtype, make_qkv, window_size, poison):
    q, k, v = make_qkv(1, 400, 400, 2, 1, 64, 40, dtype=dtype)
    options = {"window_size": window_size, "num_splits": 4}
    clean, clean_lse = attend(q, k, v, **options)
    bad, visible = cases.bad_keys(window_size, 400, q.device)
    for x in (k, v):
        x[:, bad] = poison
    out, lse = attend(q, k, v, **options)
    innocent = ~(visible & bad).any(dim=1)
    assert 150 < innocent.sum() < 400
    tolerance = 2 * torch.finfo(dtype).eps
    for got, expected in (
        (out[:, innocent], clean[:, innocent]),
        (lse[..., innocent], clean_lse[..., innocent]),
    ):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_visible_nan_reaches_who_sees_it(device, dtype, make_qkv, where):
    q, k, v = make_qkv(2, 100, 400, 4, 2, dtype=dtype)
    {"q": q, "k": k, "v": v}[where][1, 50, 1, 3] = torch.nan
    check_split(device, q, k, v, 3, window_size=(330, 5))


@cases.mask(WIDE_MASKS)
@cases.sink_dtype
def test_sink(device, make_qkv, sink_dtype, mask):
    """It counts once, whatever the number of parts; rows without keys have nothing else."""
    q, k, v = make_qkv(2, 70, 330, 6, 2)
    sinks = cases.sinks_of_every_kind(device, sink_dtype)
    check_split(device, q, k, v, 3, learnable_sink=sinks, **mask)
    check_split(device, q[:, :5], k[:, :0], v[:, :0], 3, learnable_sink=sinks, **mask)


# ---- reproducible --------------------------------------------------------------------------------


def test_runs_are_equal_to_the_bit(device, dtype, make_qkv):
    q, k, v = make_qkv(2, 70, 700, 4, 2, dtype=dtype)
    for num_splits in (0, 5):
        expected = attend(q, k, v, num_splits=num_splits)
        for seed in range(3):
            with reordered(device, seed):
                again = attend(q, k, v, num_splits=num_splits)
            assert_all_equal(again, expected)


def test_batch_entries_do_not_depend_on_each_other(device, make_qkv):
    q, k, v = make_qkv(5, 20, 330, 4, 2)
    out, lse = attend(q, k, v, num_splits=3)
    for entry in (slice(0, 1), slice(3, 5)):
        alone = attend(q[entry], k[entry], v[entry], num_splits=3)
        assert_all_equal(alone, (out[entry], lse[entry]))


def test_lse_only_on_request(device, make_qkv):
    q, k, v = make_qkv(2, 5, 300)
    out, lse = flash_attn_func(q, k, v, num_splits=3)
    assert lse is None
    assert torch.equal(out, flash_attn_func(q, k, v, num_splits=3, return_lse=True)[0])


# ---- the workspace -------------------------------------------------------------------------------


def test_no_memory_for_the_workspace(device, make_qkv, monkeypatch):
    if device.tensor_class is not EmulatedTensor:
        pytest.skip("the emulator's allocator can be told to fail")
    q, k, v = make_qkv(1, 40, 300)
    new_empty = EmulatedTensor.new_empty

    def fail(self, shape, **options):
        if len(shape) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return new_empty(self, shape, **options)

    with monkeypatch.context() as patch:
        patch.setattr(EmulatedTensor, "new_empty", fail)
        message = r"the call needs a workspace of \d+ bytes: CUDA out of memory"
        with pytest.raises(torch.OutOfMemoryError, match=message):
            flash_attn_func(q, k, v, num_splits=3)
        flash_attn_func(q, k, v, num_splits=1)
    check_split(device, q, k, v, 3)


def test_graph_capture_and_replay(cuda):
    q, k, v = (torch.randn(1, s, 4, 64, device="cuda").bfloat16() for s in (3, 2000, 2000))
    attend(q, k, v, num_splits=6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [attend(q, k, v, num_splits=6) for _ in range(3)]  # one workspace for all
    for _ in range(3):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        expected = attend(q, k, v, num_splits=6)
        for result in results:
            assert_all_equal(result, expected)


def test_the_workspace_is_the_streams(cuda):
    """It is given back before the kernels have run: whoever gets it next comes after them."""
    q, k, v = (torch.randn(1, s, 4, 64, device="cuda").bfloat16() for s in (3, 2000, 2000))
    expected, _ = flash_attn_func(q, k, v, num_splits=6)
    size = explain(q, k, v, num_splits=6).workspace_bytes // 4
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        out, _ = flash_attn_func(q, k, v, num_splits=6)
        poison = [torch.full((size,), torch.nan, device="cuda") for _ in range(4)]
    others = [torch.full((size,), torch.nan, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    assert torch.equal(out, expected) and len(poison + others) == 8


# ---- the plan ------------------------------------------------------------------------------------

DECODING = {"seqlen_q": 1, "seqlen_k": 8192, "heads": (32, 8)}


def plan_of(num_splits=0, arch=120, options=None, **shape):
    return explain(*shapes(**shape), num_splits=num_splits, arch=arch, **(options or {}))


def test_decoding_is_split_until_it_fills_the_machine():
    """Half of a GB10 asks for as much as its memory gives."""
    for arch, enough in ((120, 120), (90, 93), (121, 24)):
        plan = plan_of(arch=arch, **DECODING)
        assert plan.num_splits > 1 and "split.c" in plan.reasons["num_splits"]
        assert enough <= plan.blocks <= 4 * enough * plan.blocks_per_sm
    assert plan_of(**DECODING, batch=64).num_splits == 1, "2048 blocks are enough"


@pytest.mark.parametrize("seqlen", [512, 1024, 16384])
def test_calls_that_fill_the_machine_are_not_split(seqlen):
    for causal in (False, True):
        plan = plan_of(seqlen_q=seqlen, heads=(32, 8), options={"causal": causal})
        assert plan.num_splits == 1 and plan.workspace_bytes == 0 and len(plan.kernels) == 1
        assert plan.reasons["num_splits"]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_few_queries_share_one_tile(head_dim):
    """Whatever the batch: 16 queries read K and V once, as 1 does, where their rows fit a tile."""
    for heads, tile_m in (((32, 8), 64), ((28, 4), 128)):
        for queries, batch, options in itertools.product(
            (1, 4, 16), (1, 16, 256), ({}, {"causal": True}, {"window_size": (1023, 0)})
        ):
            shape = {"head_dim": head_dim, "heads": heads, "seqlen_k": 8192}
            plan = plan_of(1, seqlen_q=queries, batch=batch, options=options, **shape)
            rows = queries * heads[0] // heads[1]
            assert plan.pack_gqa and plan.blocks == batch * heads[1]
            assert plan.tile_m == (64 if rows <= 64 else tile_m)


def test_few_keys_are_not_split():
    for seqlen_k in (0, 1, 64, 128):
        assert plan_of(seqlen_q=1, seqlen_k=seqlen_k, heads=(2, 1)).num_splits == 1
    window = plan_of(**DECODING, options={"window_size": (100, 0)})
    assert window.num_splits == 1, "a window shows few of many keys"


def test_num_splits_is_kept_to():
    assert plan_of(1, **DECODING).num_splits == 1
    unsplit = plan_of(1, **DECODING)
    for asked in (2, 3, 7, 100):
        plan = plan_of(asked, **DECODING)
        assert plan.num_splits == asked and plan.reasons["num_splits"] == "as asked"
        assert plan.blocks == asked * unsplit.blocks
        assert plan.variant == unsplit.variant + "_split"
        assert plan.workspace_bytes == asked * 32 * (128 + 1) * 4
    assert plan_of(2**80, **DECODING).num_splits == 8192 // plan.tile_n
    window = plan_of(100, **DECODING, options={"window_size": (200, 0)})
    assert 4 <= window.num_splits <= 5 and "a tile of keys for each" in window.reasons["num_splits"]


def test_combine_is_a_kernel_of_its_own():
    plan = plan_of(3, **DECODING)
    first, second = plan.kernels
    assert first.variant == plan.variant and "-DSPLIT=1" in first.options
    assert (second.kernel, second.variant) == ("combine", "combine_bf16_of_fp32_dv128_w8")
    assert "combine_bf16_of_fp32_dv128_w8" in str(plan) and "workspace_bytes" in str(plan)
    others = [
        plan_of(7, seqlen_q=100, options={"causal": True}),
        plan_of(2, head_dim=64, head_dim_v=128),
    ]
    assert all(other.kernels[1] == second for other in others), "head_dim_v and dtype alone matter"


def test_masks_that_hide_nothing_are_none():
    """Causal decoding takes the kernel without a mask."""
    causal, full = (plan_of(options={"causal": c}, **DECODING) for c in (True, False))
    assert causal.variant == full.variant
    assert "_right" in plan_of(options={"causal": True}, seqlen_q=2, seqlen_k=64).variant
    for left, masked in ((63, False), (62, True), (None, False)):
        plan = plan_of(options={"window_size": (left, None)}, seqlen_q=9, seqlen_k=64)
        assert ("_left" in plan.variant) == masked


def test_more_rows_and_blocks_than_can_be_split():
    sizes = {"seqlen_q": 2**15, "heads": (2**8, 1), "batch": 2**9}
    assert plan_of(4, **sizes).num_splits == 1
    assert "2^31 - 1 rows" in plan_of(4, **sizes).reasons["num_splits"]
    sizes["batch"] = 2**7
    plan = plan_of(2**20, **sizes)
    assert plan.blocks <= 2**31 - 1 and "2^31 - 1 blocks" in plan.reasons["num_splits"]
    assert plan_of(4, seqlen_q=0).num_splits == plan_of(4, batch=0).num_splits == 1


def test_no_split_on_the_cpu():
    q, k, v = (torch.randn(1, s, 2, 8) for s in (3, 300, 300))
    plan = explain(q, k, v, num_splits=4)
    assert (
        plan.kernel == "cpu" and plan.kernels == () and "splits nothing" in plan.reasons["kernel"]
    )
    assert torch.equal(flash_attn_func(q, k, v, num_splits=4)[0], flash_attn_func(q, k, v)[0])


@pytest.mark.parametrize(
    "value, error, message",
    [
        (-1, ValueError, "num_splits must be 0 .* or larger, got -1"),
        (-(2**80), ValueError, "num_splits must be 0"),
        (1.5, TypeError, "num_splits must be an integer, got 1.5"),
        (None, TypeError, "num_splits must be an integer, got None"),
    ],
)
def test_bad_num_splits(device, make_qkv, value, error, message):
    q, k, v = make_qkv(1, 5, 40)
    for call in (flash_attn_func, explain):
        with pytest.raises(error, match=message):
            call(q, k, v, num_splits=value)
    check_split(device, q, k, v, 2)
