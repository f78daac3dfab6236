"""The dispatcher, for any architecture, on any machine."""

import itertools
import re

import pytest
import torch

from flash_attn_sm120 import _C, block_mask, explain, flash_attn_func
from helpers.children import run_python
from helpers.shapes import EVERY_HEAD_DIM, SM120_SMEM, shapes

pytestmark = pytest.mark.quick

ARCHITECTURES = (80, 86, 89, 90, 100, 120, 121)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_head_dim_has_a_tile_within_99_kb(arch):
    for head_dim, head_dim_v in itertools.product(EVERY_HEAD_DIM, EVERY_HEAD_DIM):
        plan = explain(*shapes(head_dim, head_dim_v), arch=arch)
        assert 0 < plan.smem_bytes <= SM120_SMEM, (head_dim, head_dim_v)
        assert (
            f"-DHEAD_DIM={head_dim}" in plan.options
            and f"-DHEAD_DIM_V={head_dim_v}" in plan.options
        )


def test_smem_is_the_ring_of_stages():
    plan = explain(*shapes(128, 128), arch=120)
    assert plan.smem_bytes == plan.stages * plan.tile_n * (128 + 128) * 2


@pytest.mark.parametrize("seqlen_q", [1, 63, 64, 65, 127, 128, 129, 16384])
def test_grid_covers_the_queries(seqlen_q):
    for pack_gqa, heads, rows in ((False, 8, seqlen_q), (True, 2, 4 * seqlen_q)):
        call = shapes(seqlen_q=seqlen_q, seqlen_k=64, heads=(8, 2), batch=3)
        plan = explain(*call, pack_gqa=pack_gqa, arch=120)
        assert plan.blocks == -(-rows // plan.tile_m) * heads * 3


@pytest.mark.parametrize("batch, seqlen_q", [(0, 64), (2, 0)])
def test_nothing_to_do_is_an_empty_grid(batch, seqlen_q):
    assert explain(*shapes(batch=batch, seqlen_q=seqlen_q), arch=120).blocks == 0


@pytest.mark.parametrize(
    "sizes",
    [(2**10, 2**10, 2**20), (2**20, 2**20, 2**15), (2**27, 2**27, 1), (1, 2**16, 2**24)],
    ids=str,
)
def test_more_blocks_than_a_grid_has(sizes):
    """Expanded tensors can be of any size; the answer is no, not a wrong grid."""
    batch, heads, seqlen = sizes
    with pytest.raises(ValueError, match="more than 2\\^31 - 1 thread blocks"):
        explain(*shapes(seqlen_q=seqlen, heads=(heads, 1), batch=batch), arch=120)


def test_masks_are_constants_of_the_variant():
    q, k, v = shapes()
    masks = {
        "": {},
        "_right": {"causal": True},
        "_left": {"window_size": (16, None)},
        "_right_left": {"window_size": (16, 16)},
    }
    names = {
        suffix: explain(q, k, v, **mask, num_splits=1, arch=120).variant
        for suffix, mask in masks.items()
    }
    for suffix, name in names.items():
        assert re.search(r"_s\d+(\w*)$", name)[1] == suffix


def test_features_are_constants_of_the_variant():
    q, k, v = shapes(seqlen_q=1, seqlen_k=512)
    features = {
        "_pack": {},
        "_cap": {"pack_gqa": False, "softcap": 30.0},
        "_cap_pack": {"softcap": 1},
    }
    for suffix, options in features.items():
        plan = explain(q, k, v, **options, num_splits=1, arch=120)
        assert re.search(r"_s\d+(_p\d)?(\w*)$", plan.variant)[2] == suffix
        assert f"-DSOFTCAP={int('_cap' in suffix)}" in plan.options


def test_variant_names_are_unique_to_their_constants():
    seen = {}
    for head_dim, head_dim_v, causal in itertools.product(
        EVERY_HEAD_DIM[::3], EVERY_HEAD_DIM[::3], (False, True)
    ):
        plan = explain(*shapes(head_dim, head_dim_v), causal=causal, arch=120)
        assert seen.setdefault(plan.variant, plan.options) == plan.options
    assert len(set(seen.values())) == len(seen)


def test_tiles_by_rows_per_sm():
    """Calls that fill the machine get large tiles, whatever they are made of; short ones do not.
    Of sequences of 64 queries no tile is larger than it has to be."""
    for batch, heads, seqlen in ((1, 8, 512), (8, 8, 64), (1, 1, 4096), (64, 1, 64)):
        small = explain(*shapes(seqlen_q=seqlen, heads=(heads, 1), batch=batch), arch=120)
        large = explain(*shapes(seqlen_q=seqlen, heads=(heads, 1), batch=16 * batch), arch=120)
        expected = 64, 256 if seqlen > 64 else 128
        assert (small.tile_m, large.tile_m) == expected, (batch, heads, seqlen)


def plan_of_rows(arch, sms, head_dim, rows_per_sm, **options):
    """The plan of a call of so many query rows per multiprocessor, whose strides a tensor map has."""
    q = torch.empty(1, rows_per_sm * sms // 2, 2, head_dim, dtype=torch.bfloat16)
    return explain(q, q, q, arch=arch, num_splits=1, **options)


SPLIT, WIDE = "64x64_w4x16_s2_p2", "64x64_w8x16_s2_p2"
TILES_OF_12_X = {  # head dim, causal: of 65, 256 and 300 rows per SM; GeForce-like, PRO-like
    (64, False): ((SPLIT, SPLIT, "64x32_w4x32_s3"), (SPLIT, SPLIT, "64x64_w4x32_s2_p0")),
    (64, True): (
        (SPLIT, "128x64_w8x16_s2_p2", "64x64_w4x32_s2"),
        (SPLIT, SPLIT, "64x64_w4x32_s2"),
    ),
    (80, False): ((SPLIT, SPLIT, WIDE),) * 2,
    (96, True): ((SPLIT, SPLIT, WIDE),) * 2,
    (112, False): (("32x32_w4x16_s3_p2", "64x32_w8x16_s2_p1", "64x32_w8x16_s2_p1"),) * 2,
    (128, False): (("32x32_w4x16_s3_p2", "64x16_w8x32_s3_p1", "64x64_w8x16_s3_p1"),) * 2,
    (128, True): (
        ("32x32_w4x16_s3_p2", "64x64_w8x16_s3_p1", "64x64_w8x16_s3_p1"),
        ("32x32_w4x16_s3_p2", "64x64_w8x16_s3_p0", "32x16_w4x32_s3"),
    ),
}


@pytest.mark.parametrize("arch, sms", [(120, 170), (121, 48)], ids=["GeForce-like", "PRO-like"])
@pytest.mark.parametrize("head_dim, causal", TILES_OF_12_X)
def test_rows_of_12_x(head_dim, causal, arch, sms):
    found = [
        plan_of_rows(arch, sms, head_dim, rows, causal=causal).variant for rows in (65, 256, 300)
    ]
    tiles = tuple(re.search(r"_n(\d+x\d+_w\d+x\d+_s\d(_p\d)?)", name)[1] for name in found)
    assert tiles == TILES_OF_12_X[head_dim, causal][arch == 121]


@pytest.mark.parametrize("arch, sms, slower", [(120, 170, 1.01), (121, 48, 1.04)])
def test_waves_of_12_x(arch, sms, slower):
    """Tiles of 256 rows, unless the grid's last wave is so empty that those of 128 take less."""
    found = set()
    for heads, seqlen in itertools.product((16, 28, 32), (2048, 3000, 4096, 8192)):

        def rows(tile_m, blocks_of_a_row=heads, seqlen=seqlen):
            return -(-(-(-seqlen // tile_m) * blocks_of_a_row) // sms) * tile_m

        plan = explain(*shapes(128, seqlen_q=seqlen, heads=(heads, 4), tma=True), arch=arch)
        assert plan.tile_m == (128 if rows(128) * slower < rows(256) else 256), (heads, seqlen)
        assert ("last wave" in plan.reasons["tile"]) == (plan.tile_m == 128)
        found.add(plan.tile_m)
    assert found == {128, 256}


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("rows_per_sm", [50, 200, 300])
def test_rows_of_12_x_are_for_nothing_else(head_dim, rows_per_sm):
    """All other calls get the tiles of other architectures: windows, small grids, head dims above 128."""

    def same(**options):
        machines = ((120, 170), (90, 132))
        plans = [plan_of_rows(*m, head_dim, rows_per_sm, **options) for m in machines]
        return plans[0].variant == plans[1].variant

    assert same(window_size=(99, 0)) and same(window_size=(99, None))
    others = head_dim > 128 or rows_per_sm == 50 or (head_dim, rows_per_sm) == (64, 300)
    assert same() == others
    assert same(causal=True) == (others or (head_dim, rows_per_sm) == (96, 200))


@pytest.mark.parametrize("arch", [120, 121, 90])
@pytest.mark.parametrize("head_dim, roomy", [(64, "64x32_w4x32_s3_p1"), (128, "64x64_w8x16_s3_p0")])
def test_tiles_that_leave_registers(arch, head_dim, roomy):
    """Large grids with dropout take them everywhere, with mods and lists on 12.x; small grids do not."""
    blocks = torch.empty(1, 1, 300).int(), torch.empty(1, 1, 300, 300).int()
    features = {
        "dropout": {"dropout_p": 0.1},
        "mask_mod": {"mask_mod": lambda b, h, q, k: q >= k},
        "lists": {"key_blocks": block_mask.BlockLists(128, 128, *blocks, *blocks)},
    }
    q = torch.empty(1, 300 * 128, 2, head_dim, dtype=torch.bfloat16)
    for name, options in features.items():
        plan = explain(q, q, q, arch=arch, **options)
        is_roomy = roomy in plan.variant
        assert is_roomy == (name == "dropout" or arch != 90), (name, plan.variant)
        assert ("leaves registers" in plan.reasons["tile"]) == is_roomy
    small = explain(q[:, :300], q, q, arch=arch, dropout_p=0.1)
    assert small.tile_m == 64 and "leaves registers" not in small.reasons["tile"]
    bias = torch.empty(1, 1, 1, q.shape[1], dtype=torch.bfloat16)
    assert explain(q, q, q, arch=120, attn_bias=bias).options.count("-DWARP_M=16") == 1


@pytest.fixture
def use_tiles():
    yield _C.use_tiles
    _C.use_tiles(())


def row(**fields):
    """A row for any call but for what is named."""
    tile = {"tile_n": 32, "sub_n": 16, "warps": 2, "warp_m": 16, "stages": 5}
    tile |= {"kernel": 0, "producer": 0}
    return tuple((tile | fields).get(name, -1) for name in _C.tile_fields())


def test_rows_of_the_caller_come_first(use_tiles):
    use_tiles([row(arch=120, head_dim=64, mask_right=1), row(head_dim=128, seqlen_q=256, stages=4)])

    def stages(arch=120, **shape):
        causal = shape.pop("causal", False)
        return explain(*shapes(**shape), causal=causal, arch=arch).stages

    assert stages(head_dim=64, causal=True) == 5
    assert stages(head_dim=64, causal=True, arch=121) == 5, "of the same major version"
    assert stages(head_dim=64, seqlen_q=256, causal=True, arch=90) == 4
    assert stages(head_dim=64, seqlen_q=256) == 4
    assert stages(head_dim=64, seqlen_q=257) == 3
    assert stages(head_dim=72, seqlen_q=256, causal=True) == 4
    assert "use_tiles" in explain(*shapes(seqlen_q=9), arch=120).reasons["tile"]
    use_tiles(())
    assert "csrc/tiles.c" in explain(*shapes(seqlen_q=9), arch=120).reasons["tile"]


def test_a_row_that_does_not_fit_is_passed_over(use_tiles):
    use_tiles([row(tile_n=256, stages=3), row(stages=7)])
    assert explain(*shapes(head_dim=8), arch=120).stages == 3
    assert explain(*shapes(head_dim=64), arch=120).stages == 7


@pytest.mark.parametrize(
    "rows, error, message",
    [
        (5, TypeError, "has no len"),
        ([5], TypeError, "tuple of 16 ints, got 5"),
        ([row()[1:]], TypeError, "tuple of 16 ints"),
        ([(*row()[1:], "x")], TypeError, "int"),
        ([(*row()[1:], 2**70)], ValueError, "is out of range"),
        ([row(arch=-2)], ValueError, "-2 is out of range"),
        ([row(warps=3)], ValueError, "warps must be"),
        ([row(warp_m=24)], ValueError, "warp_m must be"),
        ([row(sub_n=8)], ValueError, "sub_n must be"),
        ([row(tile_n=48)], ValueError, "tile_n must be"),
        ([row(sub_n=48)], ValueError, "tile_n must be"),
        ([row(stages=1)], ValueError, "stages must be"),
        ([row(), row(stages=17)], ValueError, "stages must be"),
        ([row(kernel=2)], ValueError, "kernel must be"),
        ([row(kernel=1, producer=3)], ValueError, "producer must be"),
        ([row(producer=1)], ValueError, "producer must be"),
    ],
)
def test_rows_that_cannot_be(use_tiles, rows, error, message):
    use_tiles([row(stages=6)])
    with pytest.raises(error, match=message):
        use_tiles(rows)
    assert explain(*shapes(), arch=120).stages == 6, "the rows before are still there"


def test_heads_share_the_l2_in_groups():
    """Short sequences run all heads together; long ones as many KV heads as half of the L2 holds."""
    short = explain(*shapes(seqlen_q=512, heads=(32, 8)), arch=90)
    assert short.group_heads == 32
    long = explain(*shapes(seqlen_q=8192, heads=(32, 8)), arch=90)
    assert (25 << 20) // (8192 * 256 * 2) == 6, "of 8 KV heads, 6 fit in half of 50 MB"
    assert long.group_heads == 4 * 4, "two equal groups, not 6 and 2"
    huge = explain(*shapes(seqlen_q=1 << 20, heads=(32, 8)), arch=90)
    assert huge.group_heads == 4, "never less than the heads that share one KV head"
    packed = explain(*shapes(seqlen_q=8192, heads=(32, 8)), pack_gqa=True, arch=90)
    assert packed.group_heads == 4, "the same groups, counted in KV heads"


def test_every_choice_has_a_reason():
    plan = explain(*shapes(), arch=120)
    assert {"kernel", "tile", "pack_gqa", "group_heads"} <= set(plan.reasons)
    assert all(plan.reasons.values())
    assert plan.variant in str(plan) and plan.reasons["tile"] in str(plan)


def test_cpu_calls_say_so():
    q = torch.zeros(1, 4, 1, 8)
    plan = explain(q, q, q)
    assert plan.kernel == "cpu" and plan.threads >= 1 and "reference" in plan.reasons["kernel"]


def test_explain_launches_and_changes_nothing():
    q = torch.randn(1, 4, 1, 8)
    before = q.clone()
    explain(q, q, q)
    assert torch.equal(q, before)


@pytest.mark.parametrize("arch, smem_per_sm", [(90, 228 << 10), (80, 164 << 10), (100, 228 << 10)])
def test_limits_pad_to_the_blocks_per_sm_of_sm120(arch, smem_per_sm, tmp_path):
    """FA_SM120_LIMITS=120: as many blocks fit as on sm_120, and not one more."""
    code = f"""
from helpers.children import run_python
from helpers.shapes import shapes
from helpers.tiles import tile_row, use_tiles
from flash_attn_sm120 import explain
for head_dim in (64, 96, 128, 192, 256):
    padded = explain(*shapes(head_dim, seqlen_q=16384), arch={arch})
    with use_tiles(tile_row(padded)):
        native = explain(*shapes(head_dim, seqlen_q=16384), arch=120)
    print(native.blocks_per_sm, padded.blocks_per_sm, padded.smem_bytes, padded.smem_request)
"""
    done = run_python(code, tmp_path, FA_SM120_LIMITS="120")
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(rows) == 5, done.stderr
    for native, padded, needed, request in rows:
        assert padded == native
        assert request >= needed
        assert padded * (request + 1024) <= smem_per_sm < (padded + 1) * (request + 1024)


def test_explain_raises_what_the_call_raises():
    q, k, v = shapes()
    for call in (explain, flash_attn_func):
        with pytest.raises(ValueError, match="multiple of the heads"):
            call(q[:, :, :3], k, v)
