"""How calls of packed sequences are carried out, for any architecture: planned without a GPU."""

import pytest
import torch

from flash_attn_sm120 import explain, explain_backward
from helpers.tiles import constants

pytestmark = pytest.mark.quick


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
    assert names(plan(arch=arch)) == ["forward", "varlen_fill"]
    assert names(plan(arch=arch, options={"num_splits": 3})) == [
        "forward",
        "combine",
        "varlen_fill",
    ]
    sink = {"learnable_sink": torch.zeros(8)}
    backward = plan(explain_backward, arch=arch, options=sink)
    assert names(backward) == [
        "backward_preprocess",
        "backward",
        "backward_postprocess",
        "backward_sink",
    ]
    assert all(s.variant.endswith("_varlen") for s in backward.steps)
    assert not backward.tma and not plan(arch=arch).tma


def test_reasons():
    forward, backward = plan(arch=90), plan(explain_backward, arch=90)
    assert "not at the sequence" in backward.reasons["not the TMA"]
    assert "were the lengths their bounds" in forward.reasons["num_splits"]
    assert "any lengths" in backward.reasons["splits"]
    dense = torch.empty(1, 1000, 8, 128, dtype=torch.bfloat16)
    assert "varlen" not in explain(dense, dense, dense, arch=120).variant


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
    assert forward.steps[1].blocks == -(-1000 // 256)
    few = plan(options={**options, "max_seqlen_q": 10**9}, total_q=20, batch=7)
    assert few.blocks == 7 * 8 * -(-20 // few.tile_m)
    backward = plan(explain_backward, options=options, batch=7)
    assert backward.blocks == 7 * 2 * -(-130 // backward.tile_n)
    tiles = -(-1000 // backward.tile_m) + 7  # every sequence begins with a tile
    assert backward.steps[0].blocks == 8 * tiles
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
    assert names(calls[1]) == ["forward", "combine", "varlen_fill"]
    for batch in (1, 2, 4):
        assert 66 <= calls[batch].blocks <= 132 * calls[batch].blocks_per_sm
        size = parts[(1, 2, 4).index(batch)] * batch * 32 * 129 * 4
        assert calls[batch].workspace_bytes == size
    assert calls[64].num_splits == 1 and names(calls[64]) == ["forward", "varlen_fill"]
    few = plan(options={"max_seqlen_q": 1, "max_seqlen_k": 200}, batch=1, total_q=1, heads=heads)
    assert few.num_splits == 1 and "their bounds" in few.reasons["num_splits"]
    once = plan(options={**bounds, "num_splits": 1}, batch=1, total_q=1, heads=heads)
    assert once.num_splits == 1 and once.reasons["num_splits"].endswith("as asked")


def test_long_sequences_start_first():
    """The backward's workspace has room for their order, where there is one."""
    options = {"max_seqlen_q": 500, "max_seqlen_k": 500}

    def bytes_for_order(batch, **bounds):
        planned = plan(explain_backward, options={**options, **bounds}, batch=batch)
        few = plan(explain_backward, options={**options, "max_seqlen_k": 1}, batch=batch)
        return planned.workspace_bytes - few.workspace_bytes

    assert bytes_for_order(6) == 4 * 8
    assert bytes_for_order(1) == 0
    assert bytes_for_order(5000) == 0, "its search takes the square of their number"
    assert plan(explain_backward, options=options, batch=100).group_heads < 200


def test_empty_calls():
    assert plan(total_q=0).blocks == 0
    rows_of_none = plan(batch=0)
    assert rows_of_none.blocks == 0 and rows_of_none.steps[1].blocks > 0
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
