"""How calls of packed sequences are carried out, for any architecture: planned without a GPU."""

import itertools

import pytest
import torch

from flash_attn_sm120 import explain, explain_backward
from helpers.tiles import constants, tile_row, use_tiles

pytestmark = pytest.mark.quick

BY_TMA = tile_row(
    kernel="forward_tma", producer="warp", tile_n=64, sub_n=32, warps=4, warp_m=16, stages=2
)


def call(total_q=1000, total_k=1000, batch=4, heads=(8, 2), dims=(128, 128), packed=(True, True)):
    """q, k, v and lengths, whose contents no plan reads."""

    def make(is_packed, rows, heads, dim):
        shape = (rows, heads, dim) if is_packed else (batch, rows, heads, dim)
        return torch.empty(shape, dtype=torch.bfloat16)

    lengths = {
        f"cu_seqlens_{name}": torch.full((batch + 1,), -7, dtype=torch.int32)
        for name, is_packed in zip("qk", packed, strict=True)
        if is_packed
    }
    q = make(packed[0], total_q, heads[0], dims[0])
    k, v = (make(packed[1], total_k, heads[1], dim) for dim in dims)
    return (q, k, v), lengths


def plan(direction=explain, arch=120, options=None, **shape):
    tensors, lengths = call(**shape)
    return direction(*tensors, **lengths, **(options or {}), arch=arch)


def names(planned):
    return [kernel.kernel for kernel in planned.kernels]


@pytest.mark.parametrize("arch", [80, 90, 120, 121])
def test_steps(arch):
    main = "forward_tma" if arch >= 120 else "forward"
    assert names(plan(arch=arch)) == ["varlen_fill", main]
    assert names(plan(arch=arch, options={"num_splits": 3})) == [main, "combine", "varlen_fill"]
    sink = {"learnable_sink": torch.zeros(8)}
    backward = plan(explain_backward, arch=arch, options=sink)
    assert names(backward) == [
        "backward_preprocess",
        "backward",
        "backward_postprocess",
        "backward_sink",
    ]
    assert all(s.variant.endswith("_varlen") for s in backward.steps)
    assert backward.tma == (arch >= 90) and plan(arch=arch).tma == (arch >= 120)


@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (64, 128)], ids=str)
@pytest.mark.parametrize("packed", list(itertools.product((True, False), repeat=2)), ids=str)
def test_the_tma_brings_keys_of_any_lengths(packed, dims):
    """Packed ones, and those of a batch, of which seqused says how many there are."""
    (q, k, v), lengths = call(packed=packed, dims=dims)
    lengths["seqused_k"] = torch.full((4,), -7, dtype=torch.int32)
    with use_tiles(BY_TMA):
        planned = explain(q, k, v, **lengths, arch=120)
        assert planned.kernel == "forward_tma" and "not forward_tma" not in planned.reasons
        assert constants(planned)["VARLEN"] == 1
        before = explain(q, k, v, **lengths, arch=89)
        assert before.kernel == "forward" and "9.0" in before.reasons["not forward_tma"]
        k = k[..., :1, :].expand_as(k)
        expanded = explain(q, k, v, **lengths, arch=120)
        assert expanded.kernel == "forward"
        assert "neither expanded nor flipped" in expanded.reasons["not forward_tma"]


def test_no_keys_are_no_tensor_map():
    with use_tiles(BY_TMA):
        for batch, total_k in ((4, 0), (0, 0)):
            planned = plan(batch=batch, total_k=total_k, options={"max_seqlen_k": 64})
            assert planned.kernel == "forward"
            assert "without keys" in planned.reasons["not forward_tma"]


def test_reasons():
    forward, backward = plan(arch=90), plan(explain_backward, arch=90)
    assert "were the lengths their bounds" in forward.reasons["num_splits"]
    assert "any lengths" in backward.reasons["splits"]
    dense = torch.empty(1, 1000, 8, 128, dtype=torch.bfloat16)
    assert "varlen" not in explain(dense, dense, dense, arch=120).variant


def test_the_backward_uses_the_tma_for_packed_queries():
    """Whose rows are not so far apart that its maps would begin long before the tensor."""
    assert plan(explain_backward, packed=(True, False)).tma
    not_packed = plan(explain_backward, packed=(False, True))
    assert not not_packed.tma and "packed Q and dO" in not_packed.reasons["not the TMA"]
    (q, k, v), lengths = call(10)
    assert not explain_backward(q[:1].expand(10, -1, -1), k, v, **lengths, arch=120).tma
    for row, tma in ((1 << 19, True), ((1 << 19) + 8, False)):
        q = torch.empty(2 * row, dtype=torch.bfloat16).as_strided((2, 8, 128), (row, 128, 1))
        assert explain_backward(q, k, v, **lengths, arch=120).tma == tma


@pytest.mark.parametrize("direction", [explain, explain_backward])
def test_variants_hold_no_length(direction):
    """Nor a batch size or a total, under one bound: it alone chooses the tile. Whether keys are
    split is one bit of a variant, see test_splits_follow_the_bounds."""
    options = {"max_seqlen_q": 300, "max_seqlen_k": 500, "causal": True, "deterministic": True}
    options["num_splits"] = 1
    first = plan(direction, options=options)
    for shape in ({"total_q": 3}, {"total_q": 200_000, "total_k": 10}, {"batch": 100}):
        other = plan(direction, options=options, **shape)
        assert other.kernels == first.kernels
    options["max_seqlen_q"] = 400  # rounded up like 300
    assert plan(direction, options=options).kernels == first.kernels


def test_grids_are_exact():
    """Of the bounds of this call, however its plan rounds them."""
    options = {"max_seqlen_q": 130, "max_seqlen_k": 130, "pack_gqa": False}
    forward = plan(options=options, batch=7)
    assert forward.blocks == 7 * 8 * -(-130 // forward.tile_m)
    assert forward.steps[0].blocks == -(-1000 // 256)
    few = plan(options={**options, "max_seqlen_q": 10**9}, total_q=20, batch=7)
    assert few.blocks == 7 * 8 * -(-20 // few.tile_m)
    backward = plan(explain_backward, options=options, batch=7)
    assert backward.blocks == 7 * 2 * -(-130 // backward.tile_n)
    assert backward.steps[0].blocks == 8 * 7 * -(-130 // backward.tile_m)
    long = plan(explain_backward, options={**options, "max_seqlen_q": 1000}, batch=7)
    tiles = -(-1000 // long.tile_m) + 7  # every sequence begins with a tile
    assert long.steps[0].blocks == 8 * tiles < 8 * 7 * -(-1000 // long.tile_m)
    dense = plan(explain_backward, total_q=130, batch=7, packed=(False, True))
    assert dense.steps[0].blocks == 8 * 7 * -(-130 // dense.tile_m)


def test_splits_follow_the_bounds():
    """The number of parts is the call's, the kernels are the plan's: with parts or without."""
    heads, bounds = (32, 8), {"max_seqlen_q": 1, "max_seqlen_k": 8192}
    calls = {
        batch: plan(options=bounds, batch=batch, total_q=batch, total_k=10**6, heads=heads, arch=90)
        for batch in (1, 2, 4, 64)
    }
    parts = [calls[batch].num_splits for batch in (1, 2, 4)]
    assert parts == sorted(parts, reverse=True) and parts[0] > parts[-1] > 1
    assert calls[1].kernels == calls[2].kernels == calls[4].kernels
    assert names(calls[1]) == ["forward_tma", "combine", "varlen_fill"]
    for batch in (1, 2, 4):
        assert 66 <= calls[batch].blocks <= 132 * calls[batch].blocks_per_sm
        size = parts[(1, 2, 4).index(batch)] * batch * 32 * 129 * 4
        assert calls[batch].workspace_bytes == size
    assert calls[64].num_splits == 1 and names(calls[64]) == ["varlen_fill", "forward_tma"]
    few = plan(options={"max_seqlen_q": 1, "max_seqlen_k": 100}, batch=1, total_q=1, heads=heads)
    assert few.num_splits == 1 and "their bounds" in few.reasons["num_splits"]
    once = plan(options={**bounds, "num_splits": 1}, batch=1, total_q=1, heads=heads)
    assert once.num_splits == 1 and once.reasons["num_splits"].endswith("as asked")


def test_a_list_of_tiles():
    """Where it has fewer places than a grid from the bound has blocks, of no more sequences than can
    be sorted."""
    options = {"max_seqlen_q": 1000, "max_seqlen_k": 1000}

    def blocks_and_bytes(batch, **shape):
        planned = plan(explain_backward, options=options, batch=batch, **shape)
        of_tiles = planned.steps[0].blocks * planned.tile_m * (2 + 128) * 4
        return planned.blocks, planned.workspace_bytes - of_tiles

    assert blocks_and_bytes(6) == (2 * (8 + 6), 4 * 2 * (8 + 6))
    assert blocks_and_bytes(6, packed=(True, False)) == (2 * 6 * 8, 0), "not packed"
    assert blocks_and_bytes(1) == (2 * 8, 0), "no fewer"
    assert blocks_and_bytes(5000) == (2 * 8 * 5000, 0), "too many"
    forward = plan(options={**options, "pack_gqa": False}, batch=6)
    assert forward.blocks == 8 * (-(-1000 // forward.tile_m) + 6)
    assert forward.workspace_bytes == 4 * 2 * forward.blocks // 8
    packed = plan(options={**options, "pack_gqa": True}, batch=6)
    assert packed.blocks == 2 * (-(-4000 // packed.tile_m) + 6)
    assert forward.steps[0].blocks == packed.steps[0].blocks == 6, "one lists each sequence"
    split = plan(options={**options, "num_splits": 3}, batch=6)
    assert split.blocks == 3 * 8 * 6 * -(-1000 // split.tile_m)
    many_heads = plan(explain_backward, options=options, batch=6, heads=(90, 90))
    assert many_heads.group_heads == 45, "half of them, of all sequences"


def test_rings_hold_no_more_than_the_longest_sequence():
    """So that more blocks share a multiprocessor."""

    def ring(bound, dims=(128, 128)):
        options = {"max_seqlen_q": 64, "max_seqlen_k": bound, "pack_gqa": False}
        short = plan(options=options, dims=dims, heads=(8, 8))
        return short.tile_n, short.stages, short.blocks_per_sm

    assert ring(4096) == (64, 2, 1)
    assert ring(64) == ring(10) == (32, 2, 3)
    assert ring(4096, (64, 64)) == ring(150, (64, 64)) == (64, 3, 2)
    assert ring(128, (64, 64)) == (64, 2, 3)
    dense = torch.empty(1, 64, 8, 128, dtype=torch.bfloat16)
    assert explain(dense, dense, dense, arch=120).tile_n == 64


def test_short_sequences_have_one_tile_of_keys():
    """Which stores dq: there is nothing to accumulate, and nothing comes after."""
    for bound, tile_n in ((1, 64), (64, 64), (65, 128), (128, 128)):
        for dims in ((64, 64), (128, 128)):
            options = {"max_seqlen_q": 500, "max_seqlen_k": bound, "causal": True}
            short = plan(explain_backward, options=options, dims=dims)
            assert short.tile_n == tile_n and "-DDQ_DIRECT=1" in short.options
            assert names(short) == ["backward_preprocess", "backward"]
            assert short.blocks == 4 * 2
            no_keys = plan(explain_backward, options=options, dims=dims, total_k=0)
            assert no_keys.blocks == 0 and "-DDQ_DIRECT=0" in no_keys.options
    assert plan(explain_backward, options={**options, "max_seqlen_k": 64}).blocks_per_sm == 2
    assert "-DDQ_DIRECT=0" in plan(explain_backward, options={"max_seqlen_k": 129}).options


def test_empty_calls():
    assert plan(total_q=0).blocks == 0
    rows_of_none = plan(batch=0)
    assert rows_of_none.blocks == 0 and rows_of_none.steps[0].blocks > 0
    assert plan(explain_backward, batch=0).steps == ()
    assert plan(explain_backward, total_k=0).steps[0].blocks > 0  # the sink's and lse's gradients


def test_few_queries_get_small_tiles_and_share_blocks():
    decoding = plan(options={"max_seqlen_q": 1}, heads=(32, 4))
    assert decoding.pack_gqa and decoding.tile_m <= 64
    assert plan(options={"max_seqlen_q": 4096}).tile_m >= 64


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (5, None)}])
def test_masks_are_those_of_the_window(options):
    """Even of one query, which sees all keys: the device may have other lengths."""
    of = constants(plan(options={"max_seqlen_q": 1, "max_seqlen_k": 1, **options}))
    assert of["MASK_RIGHT"] == bool(options.get("causal"))
    assert of["MASK_LEFT"] == ("window_size" in options)
