"""Dropout: what is dropped is a function of seed, offset, batch, head, query and key alone."""

import itertools
import math

import numpy as np
import pytest
import torch

from flash_attn_sm120 import _C, explain, explain_backward, fa2, flash_attn_func, ops
from flash_attn_sm120 import flash_attn_varlen_func as varlen_func
from helpers.checks import assert_all_equal, dlse_for, dout_for
from helpers.devices import CPU
from helpers.dropout import factors, kept, philox2x32, philox4x32, threshold
from helpers.reference import assert_close, assert_gradients_close
from helpers.tiles import tile_row, use_tiles

SEED = (0x0123456789ABCDEF, (5 << 33) + 7)


def seed_on(device, seed=SEED):
    return device.place(torch.tensor(seed))


def test_philox_by_its_published_numbers():
    """From Random123's known answers: of ten rounds, and of Philox2x32 in our seven, too."""
    zeros = [int(x) for x in philox4x32((0, 0, 0, 0), (0, 0), rounds=10)]
    assert zeros == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = [int(x) for x in philox4x32([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, rounds=10)]
    assert ones == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert [int(x) for x in philox2x32((0, 0), 0)[0]] == [0x257A3673, 0xCD26BE2A]
    ones = [int(x) for x in philox2x32((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF)[0]]
    assert ones == [0xAB302C4D, 0x3DC9D239]


# ---- both directions, held against the reference with the very weights ---------------------------

# (batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v), options
CALLS = {
    "gqa": ((2, 70, 90, 4, 2, 64, 64), {}),
    "causal": ((1, 90, 70, 2, 2, 128, 128), {"causal": True}),
    "window": ((1, 70, 150, 2, 1, 64, 128), {"window_size": (40, 3)}),
    "softcap": ((1, 40, 90, 2, 1, 128, 64), {"softcap": 5.0}),
    "wide": ((1, 40, 50, 1, 1, 192, 256), {"causal": True}),
    "alibi": ((1, 70, 90, 2, 2, 64, 64), {"alibi_slopes": (0.3, 0.1), "causal": True}),
    "one block of keys": ((2, 90, 17, 2, 1, 32, 32), {"softmax_scale": 0.3}),
}


@pytest.mark.quick("cpu-gqa", "emulator-gqa")
@pytest.mark.parametrize("call", CALLS)
def test_both_directions(device, make_qkv, call):
    if not device.takes(list(CALLS).index(call)):
        pytest.skip("the other size of tiles has this case")
    shape, options = CALLS[call]
    if "alibi_slopes" in options:
        options = {**options, "alibi_slopes": device.place(torch.tensor(options["alibi_slopes"]))}
    q, k, v = make_qkv(*shape, dtype=device.dtypes[0])
    batch, queries, keys, heads = shape[:4]
    weights = factors(SEED, 0.3, range(batch), heads, queries, keys)
    meant = {**options, "dropout": device.place(weights)}
    options = {**options, "dropout_p": 0.3, "dropout_seed": seed_on(device)}
    dout, dlse = dout_for(device, q, v), dlse_for(device, q)
    out, lse = flash_attn_func(q, k, v, **options, return_lse=True)
    assert_close(out, lse, q, k, v, **meant)
    gradients = _C.backward(dout, q, k, v, out, lse, dlse, **options)[:3]
    assert_gradients_close(gradients, q, k, v, dout, dlse, **meant)
    assert torch.equal(flash_attn_func(q, k, v, **options)[0], out)


def test_sequences_drop_by_their_numbers(device, make_qkv):
    """Of packed sequences batch is the number, and query and key count from the first ones."""
    if not device.takes(0):
        pytest.skip("the other size of tiles has this case")
    q, k, v = make_qkv(1, 97, 97, 2, 1, 64, dtype=device.dtypes[0])
    dout = dout_for(device, q, v)
    ends = [0, 17, 64, 97]
    cu_seqlens = device.place(torch.tensor(ends, dtype=torch.int32))
    options = {"dropout_p": 0.2, "dropout_seed": seed_on(device), "causal": True}
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    out, lse = _C.forward(q[0], k[0], v[0], **lengths, **options, return_lse=True)
    gradients = _C.backward(dout[0], q[0], k[0], v[0], out, lse, None, **lengths, **options)[:3]
    for number, (begin, end) in enumerate(itertools.pairwise(ends)):
        rows, count = slice(begin, end), end - begin
        dropout = device.place(factors(SEED, 0.2, [number], 2, count, count))
        inputs, meant = [x[:, rows] for x in (q, k, v)], {"causal": True, "dropout": dropout}
        assert_close(out[None, rows], lse[None, :, rows], *inputs, **meant)
        found = [x[None, rows] for x in gradients]
        assert_gradients_close(found, *inputs, dout[:, rows], **meant)


def mask_of(q, k, device, **options):
    """What a call drops, seen through it: equal scores, and a v that tells keys apart, in fp16."""
    keys = k.shape[1]
    v = device.place(torch.eye(keys, dtype=q.dtype)[None, :, None].expand(1, -1, k.shape[2], -1))
    out = flash_attn_func(
        q, k, v.contiguous(), dropout_p=0.4, dropout_seed=seed_on(device), **options
    )[0]
    return (out != 0).transpose(1, 2).cpu()


TILES = {
    "sub_n 16": {"tile_n": 32, "sub_n": 16, "warps": 4, "warp_m": 16, "stages": 2},
    "sub_n 32": {"tile_n": 64, "sub_n": 32, "warps": 4, "warp_m": 32, "stages": 2},
    "sub_n 64": {"tile_n": 64, "sub_n": 64, "warps": 2, "warp_m": 16, "stages": 2},
}


@pytest.mark.parametrize("tile", TILES)
def test_tiles_drop_the_same(device, tile):
    if device.tiles or device is CPU:
        pytest.skip("the test names the tiles")
    q, k = (device.place(torch.zeros(1, n, 2, 64, dtype=device.dtypes[0])) for n in (70, 128))
    with use_tiles(tile_row(**TILES[tile], kernel="forward")):
        found = mask_of(q, k, device)
    assert torch.equal(found, kept(SEED, 0.4, [0], 2, 70, 128))


@pytest.mark.parametrize("num_splits", [2, 3])
def test_splits_drop_the_same(device, num_splits):
    if not device.takes(num_splits):
        pytest.skip("the other size of tiles has this case")
    q, k = (device.place(torch.zeros(1, n, 2, 64, dtype=device.dtypes[0])) for n in (20, 248))
    found = mask_of(q, k, device, num_splits=num_splits)
    assert torch.equal(found, kept(SEED, 0.4, [0], 2, 20, 248))


# ---- statistics ----------------------------------------------------------------------------------


def deviations(count, p, total):
    """How many standard deviations a number of dropped weights is from its mean."""
    return (count.double() - total * p) / (total * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.93])
def test_as_many_are_dropped_as_asked(dropout_p):
    """In all, in each head, row and column: as binomial numbers are."""
    dropped = ~kept(SEED, dropout_p, range(2), 4, 256, 512)
    exact = threshold(dropout_p) / 65536
    assert abs(exact - dropout_p) <= 2**-17
    for dims in ((0, 1, 2, 3), (0, 2, 3), (1, 2, 3), (0, 1, 3), (0, 1, 2), (2, 3)):
        count = dropped.sum(dims).flatten()
        z = deviations(count, exact, dropped.numel() // count.numel())
        assert z.abs().max() < 3 + count.numel() ** 0.15, dims
        if count.numel() > 100:
            assert 0.8 < z.std() < 1.2, dims


@pytest.mark.parametrize("axis", range(4), ids=["batch", "head", "query", "key"])
def test_neighbours_are_independent(axis):
    """Agreement of weights that are 1 to 32 apart: the bits of one draw, and those of others."""
    counts = kept(SEED, 0.5, *((range(64), 64, 32, 32) if axis < 2 else (range(4), 4, 256, 256)))
    for step in (1, 2, 4, 8, 16, 24):
        a = counts.narrow(axis, 0, counts.shape[axis] - step)
        b = counts.narrow(axis, step, counts.shape[axis] - step)
        assert abs(deviations((a == b).sum(), 0.5, a.numel())) < 4, step


@pytest.mark.parametrize("dropout_p", [0.1, 0.5019])
def test_weights_of_a_draw_are_independent(dropout_p):
    """All pairs and all counts of eight weights that share a draw, as those of binomial numbers."""
    exact = threshold(dropout_p) / 65536
    dropped = ~kept(SEED, dropout_p, range(4), 4, 256, 256)
    draws = dropped.view(4, 4, 16, 2, 8, 8, 4, 8).permute(0, 1, 2, 4, 5, 7, 3, 6).flatten(6)
    draws = draws.flatten(0, 5).double()
    total = len(draws)
    both = (draws.T @ draws)[torch.ones(8, 8).triu(1).bool()]
    assert deviations(both, exact**2, total).abs().max() < 4
    counts = torch.bincount(draws.sum(1).long(), minlength=9).double()
    chances = [math.comb(8, n) * exact**n * (1 - exact) ** (8 - n) for n in range(9)]
    meant = total * torch.tensor(chances, dtype=torch.float64)
    often = meant > 20
    assert ((counts - meant) ** 2 / meant)[often].sum() < 30


def test_adjacent_draws_are_independent():
    """Chi-square of pairs of 4 bits, of draws whose queries or keys differ in one bit."""
    sixteenths = [kept(SEED, n / 16, range(2), 4, 256, 256) for n in range(1, 16)]
    numbers = torch.stack(sixteenths).sum(0)  # the upper four bits of each weight's number
    for axis in (2, 3):
        size = numbers.shape[axis]
        for step in (1, 2, 4, 8, 16, 32, 64, 128):
            other = numbers.index_select(axis, torch.arange(size) ^ step)
            pairs = torch.bincount((16 * numbers + other).flatten(), minlength=256).double()
            # A pair counts twice, as itself and swapped: 136 cells are independent.
            pairs = pairs.view(16, 16).triu()
            meant = torch.full((16, 16), numbers.numel() / 256, dtype=torch.float64)
            parts = ((pairs - meant) ** 2 / meant).triu(1).sum()
            assert abs(parts - 240) < 5 * (2 * 4 * 120) ** 0.5, (axis, step)


def test_steps_are_independent():
    """Seeds and offsets that differ in one bit."""
    seeds = [SEED, *((SEED[0] ^ 1 << i, SEED[1]) for i in (0, 31, 32, 62))]
    seeds += [(SEED[0], SEED[1] ^ 1 << i) for i in (0, 31, 32, 62)]
    masks = [kept(seed, 0.5, range(2), 2, 128, 256) for seed in seeds]
    for a, b in itertools.combinations(masks, 2):
        assert abs(deviations((a == b).sum(), 0.5, a.numel())) < 4


# ---- options -------------------------------------------------------------------------------------


def tensors(requires_grad=False):
    return [torch.randn(2, 40, 4, 16, requires_grad=requires_grad) for _ in range(3)]


def test_nothing_dropped_is_the_variant_without():
    x = torch.empty(1, 128, 2, 64, dtype=torch.bfloat16)
    for plan in (explain, explain_backward):
        assert "-DDROPOUT=0" in plan(x, x, x, arch=120).options
        assert plan(x, x, x, arch=120, dropout_p=2**-18).main == plan(x, x, x, arch=120).main
        assert "_drop" in plan(x, x, x, arch=120, dropout_p=0.1).variant
    q, k, v = tensors()
    assert_all_equal(
        flash_attn_func(q, k, v, dropout_p=0.0, dropout_seed=torch.tensor(SEED))[:1],
        flash_attn_func(q, k, v)[:1],
    )


def test_packed_rows_are_refused_by_name():
    q, k = (torch.empty(1, 1, heads, 64, dtype=torch.bfloat16) for heads in (8, 2))
    assert explain(q, k, k, arch=120).pack_gqa
    plan = explain(q, k, k, arch=120, dropout_p=0.1, pack_gqa=True)
    assert not plan.pack_gqa and "random number" in plan.reasons["pack_gqa"]


WRONG = {
    "one": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1\.0"),
    "negative": ({"dropout_p": -0.1}, ValueError, r"must be in \[0, 1\)"),
    "nan": ({"dropout_p": float("nan")}, ValueError, "finite"),
    "text": ({"dropout_p": "0.1"}, TypeError, "must be a number"),
    "size": ({"dropout_seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "size 2"),
    "int32": ({"dropout_seed": torch.zeros(2, dtype=torch.int32)}, TypeError, "int64 or uint64"),
    "float": ({"dropout_seed": torch.zeros(2)}, TypeError, "int64 or uint64"),
    "steps": ({"dropout_seed": torch.zeros(4, dtype=torch.int64)[::2]}, ValueError, "contiguous"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_options(wrong):
    options, error, message = WRONG[wrong]
    q, k, v = tensors()
    with pytest.raises(error, match=message):
        flash_attn_func(q, k, v, **{"dropout_p": 0.1, **options})
    flash_attn_func(q, k, v, dropout_p=0.1)
    with pytest.raises(ValueError, match="needs a dropout_seed"):
        _C.forward(q, k, v, dropout_p=0.1)


def test_seeds_of_either_sign_and_of_numpy():
    q, k, v = tensors()
    seed = torch.tensor([-5, 3])
    options = {"dropout_p": 0.3}
    out = flash_attn_func(q, k, v, **options, dropout_seed=seed)[0]
    same = flash_attn_func(q, k, v, **options, dropout_seed=seed.view(torch.uint64))[0]
    numbers = [x.numpy() for x in (q, k, v)]
    of_numpy = flash_attn_func(*numbers, **options, dropout_seed=seed.numpy())[0]
    assert torch.equal(out, same) and np.array_equal(of_numpy, out.numpy())
    assert flash_attn_func(*numbers, **options)[0].shape == (2, 40, 4, 16)


def test_seeds_are_torchs():
    """Each call draws new ones; the same state of the generator gives the same."""
    q, k, v = tensors()

    def draw(count=2):
        torch.manual_seed(3)
        return [flash_attn_func(q, k, v, dropout_p=0.3)[0] for _ in range(count)]

    first, second = draw()
    assert not torch.equal(first, second)
    assert_all_equal(draw(), [first, second])
    torch.manual_seed(3)
    assert torch.equal(fa2.flash_attn_func(q, k, v, 0.3), first)


# ---- torch ---------------------------------------------------------------------------------------


def test_autograd_keeps_the_seed():
    """Forward, backward, a second backward and a recomputed forward drop the same."""
    inputs = tensors(True)
    weights = factors(SEED, 0.3, range(2), 4, 40, 40).float()
    q, k, v = (x.transpose(1, 2) for x in inputs)
    expected = ((q @ k.mT / 4).softmax(-1) * weights @ v).transpose(1, 2)
    options = {"dropout_p": 0.3, "dropout_seed": torch.tensor(SEED)}
    out = flash_attn_func(*inputs, **options)[0]
    torch.testing.assert_close(out, expected)
    for _ in range(2):
        found = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
        torch.testing.assert_close(
            found, torch.autograd.grad(expected.sum(), inputs, retain_graph=True)
        )

    def block(*inputs):
        return flash_attn_func(*inputs, dropout_p=0.3)[0]

    torch.manual_seed(0)
    plain = torch.autograd.grad(block(*inputs).sum(), inputs)
    torch.manual_seed(0)
    out = torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
    assert_all_equal(torch.autograd.grad(out.sum(), inputs), plain)


def test_operators():
    q, k, v = tensors(True)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    seed, options = torch.tensor(SEED), {"dropout_p": 0.3}
    torch.library.opcheck(ops.FORWARD, (q, k, v, None, None, seed), options, test_utils=checks)
    ends = torch.tensor([0, 30, 80], dtype=torch.int32)
    packed = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(
        ops.VARLEN_FORWARD,
        (*packed, None, ends, ends, None, None, None, None, seed),
        options,
        test_utils=checks,
    )
    with torch.no_grad():
        out, lse = ops.FORWARD(q, k, v, None, None, seed, **options)
    arguments = (torch.randn_like(out), None, q, k, v, None, out, lse, None, seed)
    torch.library.opcheck(ops.BACKWARD, arguments, options, test_utils=checks[:1])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_compiled(packed):
    inputs = tensors(True)
    ends = torch.tensor([0, 40, 80], dtype=torch.int32)

    def attend(q, k, v, seed):
        if not packed:
            return flash_attn_func(q, k, v, dropout_p=0.3, dropout_seed=seed)[0]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "dropout_p": 0.3}
        return varlen_func(q, k, v, **options, dropout_seed=seed)[0].view(2, 40, 4, 16)

    seed = torch.tensor(SEED)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    outs = [function(*inputs, seed) for function in (attend, compiled)]
    assert_all_equal(outs[:1], outs[1:])
    gradients = [torch.autograd.grad(out.sum(), inputs) for out in outs]
    assert_all_equal(*gradients)


def test_vmap_is_refused_by_name():
    q, k, v = (x[None] for x in tensors())
    seed = torch.tensor(SEED)
    with pytest.raises(NotImplementedError, match="vmap with dropout_p"):
        torch.vmap(lambda q: flash_attn_func(q, k[0], v[0], dropout_p=0.1, dropout_seed=seed)[0])(q)


def test_replays_of_a_graph_drop_anew(cuda):
    q, k, v = (
        torch.randn(1, 256, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )

    def step():
        out = flash_attn_func(q, k, v, dropout_p=0.2)[0]
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append([x.clone() for x in results])
    for one, other in itertools.combinations(replays, 2):
        assert not any(torch.equal(x, y) for x, y in zip(one, other, strict=True))
