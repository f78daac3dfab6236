"""A row's result depends on that row alone: not on the rows that share its block, to the bit."""

import pytest

from flash_attn_sm120 import explain
from helpers.cases import WIDE_MASKS
from helpers.checks import assert_all_equal, attend
from helpers.reference import assert_close
from helpers.tiles import tile_row, use_tiles

KEYS = {"tile_n": 32, "sub_n": 16}  # what a row's result may depend on
TILES = {
    "2x16": {"warps": 2, "warp_m": 16, "stages": 3},
    "1x32": {"warps": 1, "warp_m": 32, "stages": 2},
    "4x32": {"warps": 4, "warp_m": 32, "stages": 2},
    "tma-8x16": {
        "warps": 8,
        "warp_m": 16,
        "stages": 4,
        "kernel": "forward_tma",
        "producer": "thread",
    },
    "tma-1x16": {
        "warps": 1,
        "warp_m": 16,
        "stages": 2,
        "kernel": "forward_tma",
        "producer": "warp",
    },
}


@pytest.fixture(params=WIDE_MASKS.values(), ids=WIDE_MASKS)
def mask(device, request):
    """On the emulator each with one data type, so that both see both sides masked, and not."""
    if device.name == "cuda-large":
        pytest.skip("the tests name the tiles")
    if not device.takes(request.param_index):
        pytest.skip("with the other data type")
    return request.param


def add_spikes(q, k, rows, key):
    """Some rows see one key, far from the first tiles, whose score leaves the range of the sums."""
    q[..., 0], k[..., 0] = 0, 0
    k[:, key, :, 0] = 300
    q[:, rows, :, 0] = 8


@pytest.mark.parametrize("spikes", [(), (75,), (20, 149)], ids=["plain", "spike", "spikes"])
def test_rows_do_not_depend_on_the_tile(device, dtype, make_qkv, mask, spikes):
    if device.name == "cpu":
        pytest.skip("the CPU has no tiles")
    q, k, v = make_qkv(1, 150, 250, 4, 2, 64, 40, dtype=dtype)
    add_spikes(q, k, list(spikes), 90)
    results = []
    for tile in TILES.values():
        with use_tiles(tile_row(**KEYS, **tile)):
            assert explain(q, k, v, **mask).tile_m == tile["warps"] * tile["warp_m"]
            results.append(attend(q, k, v, **mask))
    assert_close(*results[0], q, k, v, **mask)
    for other in results[1:]:
        assert_all_equal(other, results[0])


@pytest.mark.quick("emulator-bf16-left", "cuda-bf16-left")
def test_rows_do_not_depend_on_their_neighbours(device, dtype, make_qkv, mask):
    """The last queries alone: diagonals are aligned there. A neighbour that spikes changes none."""
    q, k, v = make_qkv(2, 150, 250, 4, 2, dtype=dtype)
    add_spikes(q, k, [], 90)
    with use_tiles(tile_row(**KEYS, **TILES["4x32"])):
        out, lse = attend(q, k, v, **mask)
        for rows in (1, 17, 100):
            assert_all_equal(
                attend(q[:, -rows:], k, v, **mask), (out[:, -rows:], lse[..., -rows:].contiguous())
            )
        add_spikes(q, k, [30, 75], 90)
        spiky_out, spiky_lse = attend(q, k, v, **mask)
    others = [row for row in range(150) if row not in (30, 75)]
    assert_all_equal(
        (spiky_out[:, others], spiky_lse[..., others]), (out[:, others], lse[..., others])
    )
