"""How calls whose keys lie in pages are carried out, for any architecture: planned without a GPU."""

import pytest
import torch

from flash_attn_sm120 import explain
from helpers.tiles import constants, tile_row, use_tiles

pytestmark = pytest.mark.quick

BY_TMA = tile_row(
    kernel="forward_tma", producer="warp", tile_n=64, sub_n=32, warps=4, warp_m=16, stages=2
)
SMALL_PAGES = "has 8 rows at least: page sizes must be multiples of 8"


def call(page_size=64, pages=100, batch=4, seqlen_q=20, heads=(8, 2), dims=(128, 128), width=30):
    """q, k, v and lengths, whose contents no plan reads."""
    q = torch.empty(batch, seqlen_q, heads[0], dims[0], dtype=torch.bfloat16)
    k, v = (torch.empty(pages, page_size, heads[1], dim, dtype=torch.bfloat16) for dim in dims)
    lengths = {
        "seqused_k": torch.full((batch,), -7, dtype=torch.int32),
        "page_table": torch.full((batch, width), -7, dtype=torch.int32),
    }
    return (q, k, v), lengths


def plan(arch=120, options=None, **shape):
    tensors, lengths = call(**shape)
    return explain(*tensors, **lengths, **(options or {}), arch=arch)


# ---- routes: each call goes to a kernel that really handles it -----------------------------------


@pytest.mark.parametrize("page_size", [8, 16, 24, 64, 256, 1024])
def test_pages_of_whole_boxes_go_by_the_tma(page_size):
    with use_tiles(BY_TMA):
        planned = plan(page_size=page_size)
        assert planned.kernel == "forward_tma" and planned.tma
        assert "not forward_tma" not in planned.reasons
        assert "varlen_fill" in [step.kernel for step in planned.steps]
        of = constants(planned)
        assert of["VARLEN"] == of["PAGED"] == 1


@pytest.mark.parametrize("page_size", [1, 3, 4, 12, 100, 1023])
def test_small_pages_go_by_cp_async(page_size):
    with use_tiles(BY_TMA):
        planned = plan(page_size=page_size)
        assert planned.kernel == "forward" and not planned.tma
        assert SMALL_PAGES in planned.reasons["not forward_tma"]
        of = constants(planned)
        assert of["VARLEN"] == of["PAGED"] == 1


@pytest.mark.parametrize("arch", [90, 120])
def test_the_tma_is_preferred(arch):
    """Where a built-in row asks for cp.async, which takes an address for every row."""
    shape = {"seqlen_q": 4096, "dims": (64, 64), "width": 999}
    q = torch.empty(4, 4096, 8, 64, dtype=torch.bfloat16)
    assert explain(q, q, q, arch=arch).kernel == "forward"
    planned = plan(arch=arch, **shape)
    assert planned.kernel == "forward_tma" and "boxes of pages" in planned.reasons["kernel"]
    assert plan(arch=arch, page_size=100, **shape).kernel == "forward"
    assert plan(arch=80, **shape).kernel == "forward"
    with use_tiles(tile_row(plan(arch=80, **shape))):  # a row of the caller's own
        assert plan(arch=arch, **shape).kernel == "forward"


def test_pages_go_by_cp_async_before_the_tma():
    with use_tiles(BY_TMA):
        planned = plan(arch=89)
        assert planned.kernel == "forward" and constants(planned)["PAGED"] == 1
        assert "9.0" in planned.reasons["not forward_tma"]


@pytest.mark.parametrize("dims", [(192, 128), (128, 64), (256, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("page_size", [5, 64])
def test_any_head_dims(dims, page_size):
    """d > dv has the same two routes."""
    with use_tiles(tile_row(**tile(tile_n=32, sub_n=32))):
        planned = plan(page_size=page_size, dims=dims)
    assert planned.kernel == ("forward_tma" if page_size == 64 else "forward")
    of = constants(planned)
    assert (of["HEAD_DIM"], of["HEAD_DIM_V"], of["PAGED"]) == (*dims, 1)


def tile(**changes):
    return {
        "kernel": "forward_tma",
        "producer": "thread",
        "warps": 4,
        "warp_m": 16,
        "stages": 2,
    } | changes


def test_seqused_without_cu_seqlens():
    """Dense keys of which not all are used: a call with lengths, in no pages."""
    (q, _, _), lengths = call()
    k = torch.empty(4, 300, 2, 128, dtype=torch.bfloat16)
    with use_tiles(BY_TMA):
        planned = explain(q, k, k, seqused_k=lengths["seqused_k"], arch=120)
    assert planned.kernel == "forward_tma"
    of = constants(planned)
    assert (of["VARLEN"], of["PAGED"]) == (1, 0)


def test_a_cache_that_no_tensor_map_describes():
    """Expanded heads: read in place, by cp.async."""
    (q, k, v), lengths = call()
    k = k[:, :, :1].expand(-1, -1, 2, -1)
    with use_tiles(BY_TMA):
        planned = explain(q, k, v, **lengths, arch=120)
    assert planned.kernel == "forward" and constants(planned)["PAGED"] == 1
    assert "neither expanded nor flipped" in planned.reasons["not forward_tma"]


def test_views_of_a_cache_go_by_the_tma():
    (q, _, _), lengths = call()
    cache = torch.empty(100, 2, 64, 2, 128, dtype=torch.bfloat16)
    with use_tiles(BY_TMA):
        assert explain(q, *cache.unbind(1), **lengths, arch=120).kernel == "forward_tma"
        assert explain(q, *cache.transpose(0, 1), **lengths, arch=120).kernel == "forward_tma"


def test_no_keys():
    with use_tiles(BY_TMA):
        for shape in ({"pages": 0}, {"width": 0}):
            planned = plan(**shape, options={"max_seqlen_k": 64} if "pages" in shape else {})
            assert planned.kernel == "forward"
            assert "without keys" in planned.reasons["not forward_tma"]


# ---- what a plan depends on ----------------------------------------------------------------------


def test_variants_hold_no_page():
    """Nor how many there are, nor how large they are where the feed is the same."""
    options = {"max_seqlen_k": 500, "causal": True}
    first = plan(options=options)
    for shape in ({"page_size": 16}, {"page_size": 128}, {"pages": 1}, {"width": 400}):
        assert plan(options=options, **shape).kernels == first.kernels
    small = plan(options=options, page_size=1, width=999)
    assert plan(options=options, page_size=7, width=999).kernels == small.kernels


def test_grids_are_those_of_the_queries():
    options = {"pack_gqa": False, "num_splits": 1}
    first = plan(options=options)
    assert first.blocks == 4 * 8 * -(-20 // first.tile_m)
    assert plan(options=options, width=1).blocks == first.blocks


def test_pack_gqa_and_splits():
    planned = plan(seqlen_q=1, options={"num_splits": 4}, heads=(32, 4))
    assert planned.pack_gqa and planned.num_splits == 4
    of = constants(planned)
    assert of["PACK_GQA"] == of["SPLIT"] == of["PAGED"] == 1
