"""Sequences of any lengths, packed or in pages, fed by cp.async and by the TMA: equal to the bit, and
blind to what lies behind the end of a sequence."""

import math

import pytest
import torch

from flash_attn_sm120 import explain
from helpers import cases
from helpers.cases import MASKS
from helpers.checks import assert_all_equal
from helpers.devices import CPU, DEVICES, params_of
from helpers.paged import make_paged
from helpers.tiles import PRODUCERS, tile_row, use_tiles
from helpers.varlen import attend, check_forward, flat, flat_lse, make_batch

LENGTHS = ([70, 1, 0, 33, 5], [150, 40, 9, 0, 64])
PAGE_SIZES = (8, 24, 64, 256)  # boxes smaller than a tile, that divide a page, and that a page has
KINDS = {
    "packed": {"packed": (True, True)},
    "batch": {"packed": (True, False)},
    **{f"pages of {size}": {"page_size": size} for size in PAGE_SIZES},
}


@pytest.fixture(params=params_of(*(device for device in DEVICES if device is not CPU)))
def device(request):
    with use_tiles(*request.param.tiles):
        yield request.param


def make(device, kind, lengths=LENGTHS, **options):
    options |= {"dtype": device.dtypes[0]} | KINDS[kind]
    if size := options.pop("page_size", None):
        return make_paged(device, *lengths, size, **options)
    return make_batch(device, *lengths, **options)


def rows_of_both(batch, producer="thread", **options):
    """The tile of a call, fed by cp.async and by the TMA."""
    plan = explain(*batch.inputs, **batch.lengths, **options)
    rows = tile_row(plan, kernel="forward"), tile_row(plan, kernel="forward_tma", producer=producer)
    for row, kernel in zip(rows, ("forward", "forward_tma"), strict=True):
        with use_tiles(row):
            planned = explain(*batch.inputs, **batch.lengths, **options)
            assert planned.kernel == kernel, planned.reasons
    return rows


def check_both(batch, *, producer="thread", **options):
    """A call by both kernels, with the same tile: right, and equal to the bit."""
    results = []
    for row in rows_of_both(batch, producer, **options):
        with use_tiles(row):
            results.append(check_forward(batch, **options))
    assert_all_equal(*results)


@pytest.mark.quick(
    "emulator-packed-warp-causal", "emulator-large-*64-thread-window", "cuda-*-warp-*"
)
@cases.mask(MASKS)
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_producer(device, kind, producer, mask):
    """Also where everything is computed a second time, and the ring goes on where it was."""
    turn = list(KINDS).index(kind) + PRODUCERS.index(producer) + list(MASKS.values()).index(mask)
    if not device.takes(turn):
        pytest.skip("with tiles of the other size")
    batch = make(device, kind)
    check_both(batch, producer=producer, **mask)
    batch.q *= 200
    check_both(batch, producer=producer, **mask)


@pytest.mark.parametrize("dims", [(192, 128), (64, 128), (40, 72), (256, 256), (64, 32)], ids=str)
def test_head_dims(device, dims):
    for number, kind in enumerate(("packed", "pages of 8")):
        if device.takes(number + dims[0] // 64):
            check_both(make(device, kind, dims=dims), causal=True)


@pytest.mark.parametrize("kind", ["packed", "pages of 24"])
def test_packed_heads_and_splits(device, kind):
    batch = make(device, kind, heads=(6, 2))
    check_both(batch, pack_gqa=True, num_splits=3, window_size=(90, 5), softcap=20.0)


# ---- what lies behind an end ---------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_the_next_sequence(device, producer, poison):
    """Whatever it holds, every other sequence is the same to the bit."""
    if not device.takes(PRODUCERS.index(producer) + math.isnan(poison)):
        pytest.skip("with tiles of the other size")
    for mask in ({}, {"causal": True}):
        batch = make(device, "packed", ([70, 30, 33, 9], [70, 41, 150, 3]))
        q, k = (side.slices() for side in batch.sides)
        rows = rows_of_both(batch, producer, **mask)
        expected = attend(batch, **mask)
        for x in (batch.k, batch.v):
            x[k[1]] = poison
            x[k[3]] = poison
        for row in rows:
            with use_tiles(row):
                results = attend(batch, **mask)
            for sequence in (q[0], q[2]):
                own = [
                    (flat(out)[sequence], flat_lse(lse)[:, sequence])
                    for out, lse in (expected, results)
                ]
                assert_all_equal(*own)


@pytest.mark.parametrize("kind", ["batch", "pages of 8", "pages of 64"])
def test_rows_that_are_not_used(device, kind):
    """NaN in them, in pages of nobody and behind the tensor is as good as zeros."""
    lengths = [70, 33, 20], [150, 141, 100]
    batch = make(device, kind, lengths)
    for row in rows_of_both(batch, "warp", causal=True):
        with use_tiles(row):
            results = attend(batch, causal=True)
            clean = make(device, kind, lengths)
            for x, y in zip((clean.q, *clean.inputs[1:]), batch.inputs, strict=True):
                x.copy_(y.nan_to_num(0.0))
            assert_all_equal(results, attend(clean, causal=True))


def test_behind_the_tensor(device):
    batch = make(device, "packed", ([70, 33], [70, 41]), slack=0)
    expected = attend(batch, causal=True)
    for name in ("k", "v"):
        x = getattr(batch, name)
        room = device.place(torch.full((300, *x.shape[1:]), torch.nan, dtype=x.dtype))
        room[: len(x)] = x
        setattr(batch, name, room[: len(x)])
    for row in rows_of_both(batch, "warp", causal=True):
        with use_tiles(row):
            assert_all_equal(expected, attend(batch, causal=True))


# ---- whatever the device holds -------------------------------------------------------------------

WORST = (-(2**31), -1, 0, 7, 10**6, 2**31 - 1)


@pytest.mark.parametrize("kind", ["packed", "batch", "pages of 8", "pages of 64"])
def test_kernels_keep_within_the_tensors(device, kind):
    """The emulator watches every byte that is read."""
    batch = make(device, kind, ([7, 30, 5], [40, 9, 70]))
    rows = rows_of_both(batch, "warp", causal=True)
    kept = {name: x.clone() for name, x in batch.lengths.items()}
    for turn in range(3):
        for number, x in enumerate(batch.lengths.values()):
            worst = [WORST[(i + number + 2 * turn) % len(WORST)] for i in range(x.numel())]
            x.copy_(torch.tensor(worst, dtype=torch.int32).reshape(x.shape))
        for row in rows:
            with use_tiles(row):
                attend(batch, causal=True)
                attend(batch, num_splits=2)
    for name, x in kept.items():
        batch.lengths[name].copy_(x)
    check_both(batch, causal=True)
