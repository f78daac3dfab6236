"""How the backward is carried out, for any architecture: planned without a GPU."""

import functools
import itertools
import re

import pytest
import torch

from flash_attn_sm120 import _C, common_kernels, explain_backward
from helpers.shapes import EVERY_HEAD_DIM, SM120_SMEM, shapes

pytestmark = pytest.mark.quick


def plan(seqlen=1024, heads=(32, 8), head_dims=(128, 128), batch=1, arch=120, **options):
    call = shapes(*head_dims, seqlen_q=seqlen, heads=heads, batch=batch, tma=True)
    return explain_backward(*call, **options, arch=arch)


def names(planned):
    return [kernel.kernel for kernel in planned.kernels]


@pytest.mark.parametrize("arch", [80, 90, 120, 121])
def test_all_head_dims_fit(arch):
    for head_dims in itertools.product(EVERY_HEAD_DIM, EVERY_HEAD_DIM):
        assert plan(head_dims=head_dims, arch=arch).smem_bytes <= SM120_SMEM, head_dims


def test_steps():
    whole = plan(16384, heads=(32, 32))
    assert whole.q_splits == 1
    assert names(whole) == ["backward_preprocess", "backward", "backward_postprocess"]
    shared = plan(512, heads=(28, 4))
    assert shared.q_splits > 1 and shared.blocks % shared.q_splits == 0
    assert names(shared) == ["backward_preprocess", "backward"] + 3 * ["backward_postprocess"]
    assert names(plan(learnable_sink=torch.zeros(32)))[-1] == "backward_sink"


def test_blocks_share_keys_where_that_gains():
    """What they add to takes twice the memory of dK and dV: not for less than 5% of time."""
    for heads, arch in itertools.product((16, 32), (120, 121)):
        large = plan(4096, (heads, heads), head_dims=(64, 64), arch=arch)
        assert large.q_splits == 1 and len(names(large)) == 3
    assert plan(1024, (8, 8), head_dims=(64, 64), causal=True, arch=120).q_splits > 1


def test_pairs_run_in_equal_groups():
    """As many as share dQ, Q and dO in the L2."""
    heads = (32, 32)
    assert plan(4096, heads).group_heads == 32
    many = plan(4096, heads, batch=4)
    assert many.group_heads == 32, "four groups of up to 42"
    assert "side by side" in many.reasons["group_heads"]
    assert plan(4096, (55, 55)).group_heads == 28, "and a last one of 27"
    assert plan(4096, (32, 8), batch=4).group_heads == 32, "counted in KV heads"
    assert plan(4096, heads, (256, 256)).group_heads == 16, "tiles of 64 keys"
    assert plan(128, heads, batch=8).group_heads == 256, "all are in the L2"


def test_common_plans_have_every_step():
    """What is compiled ahead is all that later calls of these head dims launch, but for those whose
    keys are one tile: they are short."""
    for arch in (80, 90, 120, 121):
        ahead = {kernel for p in common_kernels.backward_plans(arch) for kernel in p.kernels}
        for head_dims, seqlen in itertools.product(
            common_kernels.COMMON_HEAD_DIMS, (150, 300, 16384)
        ):
            for causal in (False, True):
                later = plan(seqlen, (28, 4), head_dims, arch=arch, causal=causal and seqlen > 1)
                assert later.main in later.kernels and set(later.kernels) <= ahead


def test_blocks_of_many_registers_have_a_multiprocessor_each():
    for head_dims in common_kernels.COMMON_HEAD_DIMS:
        assert plan(head_dims=head_dims).blocks_per_sm == 1


def test_the_tma_needs_a_device_that_has_it_and_its_strides():
    assert plan().tma and plan(arch=90).tma and not plan(arch=80).tma
    q, k = (torch.empty(1, 256, heads, 128, dtype=torch.bfloat16) for heads in (32, 8))
    assert not explain_backward(q[:, :1].expand(-1, 256, -1, -1), k, k, arch=120).tma


@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (28, 4), (6, 1)])
def test_turns_are_taken_by_whole_heads(heads):
    """Else a block of keys waits for what another one comes to at its end. Not all as many."""
    for seqlen, causal in itertools.product((128, 512, 1024, 4096), (False, True)):
        planned = plan(seqlen, heads, causal=causal, deterministic=True)
        assert planned.q_splits <= heads[0] // heads[1]
        assert "-DDETERMINISTIC=1" in planned.main.options


def test_the_workspace_depends_on_no_multiprocessors():
    """Those of an RTX 5090 and of a DGX Spark: 170 and 48."""
    sizes = {
        plan(4096, (32, 32), arch=arch, deterministic=True).workspace_bytes for arch in (120, 121)
    }
    queries = 32 * 4096
    turns = 4 * (queries // 64 + 4)
    assert sizes == {4 * queries * (128 + 2) + turns}


def test_few_heads_have_two_sums_of_dq():
    """Blocks of the same head would wait for each other."""
    for heads, sums in ((32, 1), (16, 2), (4, 2)):
        planned = plan(4096, (heads, heads), deterministic=True)
        assert f"-DDQ_BUFFERS={sums}" in planned.main.options
        queries = heads * 4096
        turns = 4 * (sums * queries // 64 + 4)
        assert planned.workspace_bytes == 4 * queries * (sums * 128 + 2) + turns
        assert "-DDQ_BUFFERS=1" in plan(4096, (heads, heads)).main.options


def test_one_tile_of_keys_needs_no_accumulator():
    """Nothing adds to dQ: short sequences take hardly more memory than their lse and delta."""
    for batch, seqlen, heads in ((8192, 16, 8), (70000, 128, 1)):
        q = torch.empty(64).bfloat16().expand(batch, seqlen, heads, 64)
        planned = explain_backward(q, q, q, arch=120)
        assert planned.workspace_bytes <= 1.25 * q.numel() * 2
        assert names(planned) == ["backward_preprocess", "backward"]
        assert "tile holds all keys" in planned.reasons["dq_accum"]


@pytest.mark.parametrize(
    "seqlens, options, direct",
    [
        ((100, 128), {}, True),
        ((100, 129), {}, False),
        ((128, 100), {}, True),
        ((100, 100), {"causal": True}, True),
        ((101, 100), {"causal": True}, False),  # query 0 sees no key: no block would write its dQ
        ((100, 100), {"window_size": (None, -1)}, False),
        ((100, 100), {"window_size": (-1, None)}, False),
        ((100, 100), {"window_size": (0, 0)}, True),
        ((100, 50), {"window_size": (10, 60)}, True),
        ((100, 50), {"window_size": (10, 40)}, False),
    ],
    ids=str,
)
def test_dq_is_stored_where_each_query_sees_keys_of_one_tile(seqlens, options, direct):
    q, k = (torch.empty(1, n, 4, 64).bfloat16() for n in seqlens)
    assert f"-DDQ_DIRECT={direct:d}" in explain_backward(q, k, k, **options, arch=120).options


def test_nothing_is_launched_for_nothing():
    assert plan(0).kernels == ()
    q = torch.empty(1, 16, 2, 64)
    assert explain_backward(q, q, q).kernels == ()  # the CPU
    assert explain_backward(q, q, q).main is None


def test_what_cannot_be_is_refused():
    q = torch.empty(1, 16, 2, 64)
    with pytest.raises(NotImplementedError, match="float32"):
        explain_backward(q, q, q, arch=120)
    q = q.bfloat16()
    with pytest.raises(NotImplementedError, match=r"before compute capability 8\.0"):
        explain_backward(q, q, q, arch=75)
    with pytest.raises(ValueError, match="heads"):
        explain_backward(q, q[:, :, :1].expand(-1, -1, 3, -1), q, arch=120)
    many = q[:1, :1].expand(2**20, 2**20, -1, -1)
    with pytest.raises(ValueError, match="thread blocks"):
        explain_backward(many, many, many, arch=120)


def test_arguments_are_counted():
    from flash_attn_sm120 import _C

    with pytest.raises(
        TypeError, match=r"explain_backward\(\) takes 3 to \d+ positional arguments, got 1"
    ):
        _C.explain_backward(1)


# ---- rows ----------------------------------------------------------------------------------------


@pytest.fixture
def use_tiles():
    yield _C.use_backward_tiles
    _C.use_backward_tiles(())


TILE = {"warps": 8, "warp_n": 16, "tile_m": 64, "sub_m": 16, "stages": 2}


def row(*above, **fields):
    of_all = dict.fromkeys(_C.backward_tile_fields(), -1) | {"head_dim": 256} | TILE
    return (*(of_all | fields).values(), *above)


def is_taken(seqlen=4096, heads=(8, 8), dims=(64, 64), **options):
    planned = plan(seqlen, heads, dims, **options)
    taken = "use_backward_tiles" in planned.reasons["tile"]
    assert taken == ("m64x16_w8x16_s2" in planned.variant)
    return taken


def test_rows_of_the_caller_come_first(use_tiles):
    """A row serves calls up to its bounds that are above others."""
    assert not is_taken()
    use_tiles([row(arch=120)])
    assert is_taken(arch=121) and not is_taken(arch=90)
    use_tiles([row(kind=2)])  # PRO-like
    assert is_taken(arch=121) and not is_taken(arch=120) and not is_taken(arch=90)
    use_tiles([row(head_dim=64)])
    assert is_taken(dims=(64, 32)) and not is_taken(dims=(32, 72))
    use_tiles([row(56, 0, head_dim=64)])
    assert is_taken(dims=(32, 64)) and not is_taken(dims=(56, 56))
    use_tiles([row(mask_right=1, mask_left=0)])
    assert is_taken(causal=True) and not is_taken() and not is_taken(window_size=(9, 0))
    use_tiles([row(0, 64, keys_per_sm=256)])
    keys = [is_taken(keys * 170, (7, 1), arch=120) for keys in (64, 65, 256, 257)]
    assert keys == [False, True, True, False]


def test_a_row_that_does_not_fit_is_passed_over(use_tiles):
    use_tiles([row(tile_m=128, warp_n=32)])
    assert "csrc/tiles.c" in plan(4096, (8, 8), (256, 256)).reasons["tile"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"head_dim": -1}, "head_dim must be"),
        ({"warps": 6}, "warps must be"),
        ({"sub_m": 64}, "sub_m must be"),
        ({"stages": 3}, "stages must be"),
    ],
)
def test_rows_that_cannot_be(use_tiles, fields, message):
    use_tiles([row()])
    with pytest.raises(ValueError, match=message):
        use_tiles([row(**fields)])
    with pytest.raises(TypeError, match="tuple of 12 ints"):
        use_tiles([row()[1:]])
    assert is_taken(), "the rows before are still there"


def test_rows_of_the_table_serve_as_the_table_does(use_tiles):
    """Each call by its own row alone, `above` included."""
    for dims, keys, causal, arch in itertools.product(
        [(64, 64), (128, 128), (192, 128), (256, 256)], (100, 300), (False, True), (90, 120, 121)
    ):
        call = functools.partial(plan, keys * 170, (1, 1), dims, causal=causal, arch=arch)
        use_tiles(())
        planned = call()
        found = []
        for own in _C.backward_tiles():
            use_tiles([own])
            if "use_backward_tiles" in call().reasons["tile"]:
                found.append(call().variant)
        assert found[0] == planned.variant


def test_rows_of_a_class_of_cards():
    """From the balance of each, on an H100 that issues every mma several times."""

    def tile(dims, arch, keys=1000, **options):
        sms = {120: 170, 121: 48, 90: 132}[arch]
        name = plan(keys * sms, (1, 1), (dims, dims), arch=arch, **options).variant
        return re.search(r"_m(\d+x\d+)_w8x\d+_(s\d)", name).groups()

    assert tile(64, 90) == tile(64, 120) == ("128x32", "s1")
    assert tile(64, 121) == tile(64, 121, causal=True) == ("128x64", "s1")
    assert {tile(128, arch) for arch in (90, 120, 121)} == {("64x32", "s1")}
