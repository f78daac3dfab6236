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
    assert names(plan(arch=arch)) == [main, "varlen_fill"]
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
    assert not backward.tma and plan(arch=arch).tma == (arch >= 120)


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
    assert "not at the sequence" in backward.reasons["not the TMA"]
    assert "lengths of sequences, which are on the device" in forward.reasons["num_splits"]
    assert "any lengths" in backward.reasons["splits"]
    dense = torch.empty(1, 1000, 8, 128, dtype=torch.bfloat16)
    assert "varlen" not in explain(dense, dense, dense, arch=120).variant


@pytest.mark.parametrize("direction", [explain, explain_backward])
def test_variants_hold_no_length(direction):
    """Nor a batch size or a total, under one bound: it alone chooses the tile."""
    options = {"max_seqlen_q": 300, "max_seqlen_k": 500, "causal": True, "deterministic": True}
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
