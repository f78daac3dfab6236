"""Block sparsity: what lists of blocks let queries see, in both directions."""

import math
import sys

import pytest
import torch
from torch.nn.attention import flex_attention as flex

import emulator
from flash_attn_sm120 import _C, block_mask, explain, explain_backward, flash_attn_func
from helpers.block_lists import as_bias, check, lists_of, options_of, random_map, seen_by
from helpers.checks import assert_all_equal, dout_for
from helpers.children import run_python
from helpers.devices import CPU, CUDA, EMULATOR, params_of, reordered
from helpers.mods import gradients
from helpers.reference import attention_reference
from helpers.tiles import tile_row, use_tiles

on_each_device = pytest.mark.parametrize("device", params_of(CPU, EMULATOR, CUDA))


def inputs(device, seqlens, heads=(2, 2), head_dims=(64, 64), batch=1):
    shapes = zip((seqlens[0], seqlens[1], seqlens[1]), (0, 1, 1), (0, 0, 1), strict=True)
    return [
        device.place(torch.randn(batch, n, heads[h], head_dims[d]).to(device.dtypes[0]))
        for n, h, d in shapes
    ]


def random_lists(device, seqlens, block, heads, batch=1, density=0.4):
    """(the lists, the pairs that are seen)"""
    rows, columns = (-(-n // b) for n, b in zip(seqlens, block, strict=True))
    maps = random_map(batch, heads, rows, columns, density)
    return lists_of(device, *maps, block), seen_by(*maps, block, *seqlens)


# ---- lists ---------------------------------------------------------------------------------------

CASES = {
    # queries and keys, block, heads of q and of k, heads of the lists, head dims
    "square": ((300, 300), (128, 128), (2, 2), 2, (64, 64)),
    "gqa": ((200, 333), (128, 128), (4, 2), 4, (64, 64)),
    "shared": ((333, 200), (64, 64), (4, 2), 1, (128, 128)),
    "blocks that differ": ((260, 300), (128, 64), (2, 1), 2, (128, 72)),
    "large": ((300, 520), (256, 256), (2, 2), 2, (64, 128)),
    "wide": ((150, 260), (64, 64), (2, 2), 1, (256, 256)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.quick("*cpu*", "emulator-square", "emulator-gqa")
@cases
@on_each_device
def test_lists(device, case):
    seqlens, block, heads, list_heads, head_dims = case
    q, k, v = inputs(device, seqlens, heads, head_dims)
    tensors, seen = random_lists(device, seqlens, block, list_heads)
    blocks = options_of(device, tensors, q, k)
    check(device, q, k, v, blocks, seen, dout_for(device, q, v))


MASKS = {
    "causal": {"causal": True},
    "window": {"window_size": (60, 20)},
    "softcap": {"softcap": 2.0},
    "sink": {"learnable_sink": torch.tensor([0.5, -1.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.5])},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([2**62 + 5, 17])},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@on_each_device
def test_with_other_options(device, options):
    """All that hides a pair holds at once; a list does not change what is added to scores."""
    seqlens, block = (300, 260), (64, 64)
    q, k, v = inputs(device, seqlens, batch=2)
    tensors, seen = random_lists(device, seqlens, block, 1, batch=2)
    options = {n: device.place(x) if torch.is_tensor(x) else x for n, x in options.items()}
    dout = None if "learnable_sink" in options else dout_for(device, q, v)
    check(device, q, k, v, options_of(device, tensors, q, k), seen, dout, **options)


@pytest.mark.parametrize("pack_gqa, num_splits", [(True, 1), (False, 3), (True, 3)])
def test_few_queries(device, pack_gqa, num_splits):
    """Packed heads share a list, and splits share it among themselves."""
    seqlens, block = (5, 600), (128, 64)
    q, k, v = inputs(device, seqlens, (4, 2))
    tensors, seen = random_lists(device, seqlens, block, 1)
    blocks = options_of(device, tensors, q, k)
    check(device, q, k, v, blocks, seen, pack_gqa=pack_gqa, num_splits=num_splits)


@pytest.mark.parametrize("device", params_of(EMULATOR, CUDA))
def test_every_tile(device):
    """By cp.async and by the TMA, tiles as large as a block and smaller ones."""
    seqlens, block = (300, 300), (128, 64)
    q, k, v = inputs(device, seqlens)
    tensors, seen = random_lists(device, seqlens, block, 2)
    blocks = options_of(device, tensors, q, k)
    plan = explain(q, k, v, arch=120)
    for row in (
        tile_row(plan, kernel="forward", tile_n=64, sub_n=32, warps=4, warp_m=32, stages=2),
        tile_row(plan, kernel="forward", tile_n=16, sub_n=16, warps=2, warp_m=16, stages=4),
        tile_row(plan, kernel="forward_tma", producer="barrier", tile_n=32, sub_n=32, stages=3),
    ):
        with use_tiles(row):
            check(device, q, k, v, blocks, seen)


# ---- tails ---------------------------------------------------------------------------------------


def maps_of(rows, partial=(), full=()):
    """Maps of one row of queries: which blocks of keys are partial, and which full."""
    maps = torch.zeros(2, 1, 1, *rows, dtype=torch.bool)
    for i, columns in enumerate((partial, full)):
        for n in columns:
            maps[i, :, :, :, n] = True
    return maps


TAILS = {
    "a full block at the tail": ((), (2,)),
    "full blocks alone": ((), (0, 1, 2)),
    "the tail first": ((2,), (0,)),
    "a partial tail": ((2,), ()),
    "none": ((), ()),
}


@pytest.mark.parametrize("listed", TAILS.values(), ids=TAILS)
@on_each_device
def test_tails(device, listed):
    """Keys behind the last one are hidden in every kind of block; NaN there is another call's."""
    seqlens, block = (100, 260), (128, 128)
    q, k, v = inputs(device, seqlens)
    maps = maps_of((1, 3), *listed)
    tensors = lists_of(device, *maps, block)
    seen = seen_by(*maps, block, *seqlens)
    check(device, q, k, v, options_of(device, tensors, q, k), seen, dout_for(device, q, v))


@on_each_device
def test_no_block_at_all(device):
    q, k, v = inputs(device, (70, 130))
    maps = torch.zeros(2, 1, 1, 1, 2, dtype=torch.bool)
    blocks = options_of(device, lists_of(device, *maps, (128, 128)), q, k)
    out, lse = _C.forward(q, k, v, return_lse=True, **blocks)
    assert (out == 0).all() and (lse == -math.inf).all()
    gradients = _C.backward(dout_for(device, q, v), q, k, v, out, lse, None, **blocks)
    assert all((x == 0).all() for x in gradients[:3])


@on_each_device
def test_hidden_blocks_are_not_read(device):
    """NaN in blocks that no list has reaches nothing."""
    seqlens, block = (200, 256), (64, 64)
    q, k, v = inputs(device, seqlens)
    maps = random_map(1, 1, 4, 4)
    maps[0][..., 1] = maps[1][..., 1] = False
    blocks = options_of(device, lists_of(device, *maps, block), q, k)
    dout = dout_for(device, q, v)
    expected = _C.forward(q, k, v, return_lse=True, **blocks)
    gradients = _C.backward(dout, q, k, v, *expected, None, **blocks)[:3]
    k[:, 64:128] = v[:, 64:128] = math.nan
    results = _C.forward(q, k, v, return_lse=True, **blocks)
    assert_all_equal(results, expected)
    poisoned = _C.backward(dout, q, k, v, *results, None, **blocks)[:3]
    for got, wanted in zip(poisoned, gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)  # sums have any order


@on_each_device
def test_scores_that_rise(device):
    """Rows whose maximum comes after many blocks, far above that of the first: the exact pass."""
    seqlens, block = (128, 512), (128, 64)
    q, k, v = inputs(device, seqlens)
    q[..., 0] = 8
    k[..., 0] = torch.where(torch.arange(512) >= 400, 400.0, 0.0)[None, :, None]
    maps = maps_of((1, 8), (0,), (1, 2, 6, 7))
    blocks = options_of(device, lists_of(device, *maps, block), q, k)
    check(device, q, k, v, blocks, seen_by(*maps, block, *seqlens))


# ---- in a fixed order ----------------------------------------------------------------------------

DETERMINISTIC = {
    # queries and keys, block, heads of q and of k, heads of the lists, density; several tiles of
    # keys in a block, lists of heads, and what the emulator runs first
    "sparse": ((300, 400), (128, 128), (2, 2), 2, 0.3),
    "dense": ((260, 520), (128, 64), (4, 2), 1, 1.0),
    "large": ((300, 600), (256, 256), (4, 1), 4, 0.6),
    "nothing": ((200, 300), (128, 128), (2, 1), 2, 0.0),
}


def gradients_in_order(dout, q, k, v, out, lse, blocks, **options):
    return _C.backward(dout, q, k, v, out, lse, None, **blocks, **options, deterministic=True)[:3]


@pytest.mark.quick("*cpu*", "emulator-large")
@pytest.mark.parametrize("case", DETERMINISTIC.values(), ids=DETERMINISTIC)
@on_each_device
def test_deterministic(device, case):
    """Right, and the same bits in every run; lists have an empty row and a full column."""
    seqlens, block, heads, list_heads, density = case
    q, k, v = inputs(device, seqlens, heads, batch=2)
    dout = dout_for(device, q, v)
    tensors, seen = random_lists(device, seqlens, block, list_heads, 2, density)
    blocks = options_of(device, tensors, q, k)
    check(device, q, k, v, blocks, seen, dout, deterministic=True)
    out, lse = _C.forward(q, k, v, return_lse=True, **blocks)
    first = gradients_in_order(dout, q, k, v, out, lse, blocks)
    for _ in range(10 if device is CUDA else 1):
        assert_all_equal(gradients_in_order(dout, q, k, v, out, lse, blocks), first)


@pytest.mark.parametrize("device", params_of(EMULATOR, CUDA))
def test_deterministic_whatever_lists_hold(device):
    """A row that lists a block twice, lists of both directions that disagree, indices of no block."""
    q, k, v = inputs(device, (260, 390))
    counts = device.place(torch.tensor([[[3, 99, 0, -1]]]).int())
    indices = torch.tensor([[1, 1, 0], [7, 2, 2**30], [0, 1, 2], [0, 0, 0]]).int()
    of_queries = block_mask.BlockLists(128, 128, counts, device.place(indices[None, None]))
    every = device.place(torch.arange(4).int().repeat(1, 1, 3, 1))
    all_counts = device.place(torch.full((1, 1, 3), 4).int())
    of_keys = block_mask.BlockLists(128, 128, all_counts, every)
    blocks = {"key_blocks": of_keys, "query_blocks": of_queries}
    out, lse = _C.forward(q, k, v, return_lse=True, **blocks)
    given = dout_for(device, q, v), q, k, v, out, lse, blocks
    first = gradients_in_order(*given)
    assert_all_equal(gradients_in_order(*given), first)
    default = _C.backward(*given[:-1], None, **blocks)[:3]
    for got, expected in zip(first, default, strict=True):
        assert_near(got, expected, 0.02)


def test_what_counts_the_blocks_before():
    q, k = (torch.empty(1, 1024, heads, 64).bfloat16() for heads in (8, 2))
    tensors, _ = random_lists(CPU, (1024, 1024), (128, 128), 1)
    plan = explain_backward(q, k, k, arch=120, deterministic=True, **options_of(CPU, tensors, q, k))
    assert "count" in plan.reasons["deterministic"]
    assert [step.kernel for step in plan.steps][:3] == [
        "backward_preprocess",
        "backward_order",
        "backward",
    ]


# ---- what callers pass ---------------------------------------------------------------------------


def test_gradients_of_the_function():
    """torch's autograd finds the lists of queries itself, with a BlockMask and without."""
    q, k, v = (torch.randn(2, 200, h, 32, requires_grad=True) for h in (4, 2, 2))
    mask = block_mask.create_block_mask(lambda b, h, q, k: q >= k, None, None, 200, 200, 64, "cpu")
    fields = block_mask.read(mask, None, 200, 200).of_keys
    names = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
    tensors = type("Fields", (), dict(zip(names, fields[2:], strict=True), block_size=(64, 64)))
    expected = flash_attn_func(q, k, v, causal=True, return_lse=True)
    got = flash_attn_func(q, k, v, causal=True, return_lse=True, block_sparse_tensors=tensors)
    assert_all_equal(got, expected)
    dout = torch.randn_like(q)
    assert_all_equal(
        torch.autograd.grad(got[0], (q, k, v), dout),
        torch.autograd.grad(expected[0], (q, k, v), dout),
    )


DEFINITIONS = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q >= k) & (q - k < 70),
    "prefix": lambda b, h, q, k: (k < 40) | (q >= k + h),
    "batch": lambda b, h, q, k: (q + b * 50) % 200 >= k,
}


@pytest.mark.parametrize("mask_mod", DEFINITIONS.values(), ids=DEFINITIONS)
@pytest.mark.parametrize("block", [64, (128, 32)], ids=str)
def test_create_block_mask(mask_mod, block, monkeypatch):
    """Equal to torch's, however few pairs are evaluated at a time."""
    theirs = flex.create_block_mask(mask_mod, 2, 3, 300, 260, device="cpu", BLOCK_SIZE=block)
    for pairs in (1 << 24, 1 << 13, 1):
        monkeypatch.setattr(block_mask, "CHUNK_PAIRS", pairs)
        ours = block_mask.create_block_mask(mask_mod, 2, 3, 300, 260, block, device="cpu")
        assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE and ours.seq_lengths == (300, 260)
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        assert torch.equal(ours.full_q_num_blocks, theirs.full_q_num_blocks)


def test_variants():
    """Lists are a constant of the main kernel alone, which explain tells."""
    q = torch.empty(1, 256, 4, 64).bfloat16()
    maps = random_map(1, 4, 2, 2)
    blocks = options_of(CPU, lists_of(CPU, *maps, (128, 128)), q, q)
    for explained in (explain, explain_backward):
        plain = explained(q, q, q, arch=120)
        plan = explained(q, q, q, arch=120, **blocks)
        assert plan.variant.endswith("_blocks") and "lists" in plan.reasons["blocks"]
        others = [s.variant for s in plan.steps if s.variant != plan.variant]
        assert {*others} <= {s.variant for s in plain.steps} | {"backward_postprocess_bf16_d64"}


# ---- errors --------------------------------------------------------------------------------------


def fields(**changes):
    maps = random_map(1, 2, 2, 3)
    tensors = lists_of(CPU, *maps, (128, 128))
    for name, x in changes.items():
        setattr(tensors, name, x)
    return tensors


WRONG = {
    "rows": ({"mask_block_cnt": torch.zeros(1, 2, 3).int()}, ValueError, "one row for each"),
    "heads": ({"mask_block_cnt": torch.zeros(1, 3, 2).int()}, ValueError, "q's heads 2, or 1,"),
    "batch": ({"full_block_idx": torch.zeros(3, 2, 2, 3).int()}, ValueError, "q's batch 1"),
    "most": ({"mask_block_idx": torch.zeros(1, 2, 2, 4).int()}, ValueError, "no more than the 3"),
    "int64": ({"mask_block_cnt": torch.zeros(1, 2, 2).long()}, TypeError, "int32"),
    "half": ({"full_block_idx": None}, ValueError, "got one of them"),
    "size": ({"block_size": (64, 128)}, ValueError, "one row for each"),
    "beyond": (
        {
            "mask_block_cnt": torch.ones(1, 2, 2).int(),
            "mask_block_idx": torch.full((1, 2, 2, 3), 3).int(),
        },
        ValueError,
        "from 0 to 2: row 0 has 3",
    ),
    "below": (
        {
            "mask_block_cnt": torch.ones(1, 2, 2).int(),
            "mask_block_idx": torch.full((1, 2, 2, 3), -1).int(),
        },
        ValueError,
        "from 0 to 2",
    ),
    "count": ({"mask_block_cnt": torch.full((1, 2, 2), 4).int()}, ValueError, "from 0 to 3"),
    "no fields": ({"mask_block_cnt": None}, TypeError, "must be a torch BlockMask"),
}


@pytest.mark.quick
@pytest.mark.parametrize("changes, error, message", WRONG.values(), ids=WRONG)
def test_wrong_lists(changes, error, message):
    q, k = torch.randn(1, 200, 2, 16), torch.randn(1, 300, 2, 16)
    with pytest.raises(error, match=message):
        flash_attn_func(q, k, k, block_sparse_tensors=fields(**changes))
    flash_attn_func(q, k, k, block_sparse_tensors=fields())


@pytest.mark.quick
def test_a_mask_of_another_shape():
    q = torch.randn(1, 200, 2, 16)
    mask = block_mask.create_block_mask(lambda b, h, q, k: q >= k, None, None, 300, 200, 64, "cpu")
    with pytest.raises(ValueError, match=r"of \(queries, keys\) \(300, 200\), the call has"):
        flash_attn_func(q, q, q, block_sparse_tensors=mask)


@pytest.mark.quick
def test_what_is_refused():
    q = torch.randn(1, 200, 2, 16)
    maps = random_map(1, 2, 2, 2)
    tensors = lists_of(CPU, *maps, (128, 128))
    with pytest.raises(NotImplementedError, match="block_sparse_tensors"):
        flash_attn_func(q, q, q, seqused_k=torch.tensor([100]).int(), block_sparse_tensors=tensors)
    half = q.bfloat16()
    for block, message in (((100, 128), "multiples of 16"), ((128, 24), "multiples of 16")):
        odd = options_of(
            CPU, lists_of(CPU, *random_map(1, 1, *(-(-200 // b) for b in block)), block), half, half
        )
        with pytest.raises(NotImplementedError, match=message):
            explain(half, half, half, arch=120, **odd)
    small = options_of(CPU, lists_of(CPU, *random_map(1, 1, 7, 7), (32, 32)), half, half)
    with pytest.raises(NotImplementedError, match="multiple of 64 keys"):
        explain_backward(half, half, half, arch=120, **small)


@pytest.mark.parametrize("device", params_of(EMULATOR, CUDA))
def test_indices_are_clamped(device):
    """Whatever lists hold, kernels stay within the tensors."""
    q, k, v = inputs(device, (130, 200))
    shape = (1, 1, 2, 2)
    tensors = {
        "mask_block_cnt": torch.tensor([[[99, -5]]]).int(),
        "mask_block_idx": torch.tensor([2**30, -7, 5, 1]).int().reshape(shape),
    }
    placed = {name: device.place(x) for name, x in tensors.items()}
    blocks = {
        name: block_mask.BlockLists(128, 128, *placed.values())
        for name in ("key_blocks", "query_blocks")
    }
    out, lse = _C.forward(q, k, v, return_lse=True, **blocks)
    assert not out.isnan().any() and (lse[:, :, 128:] == -math.inf).all()
    _C.backward(dout_for(device, q, v), q, k, v, out, lse, None, **blocks)


# ---- with callables ------------------------------------------------------------------------------


LISTS = [f"{full}{side}_{x}"
         for full in ("", "full_")
         for side in ("kv", "q")
         for x in ("num_blocks", "indices")]  # fmt: skip


@pytest.mark.parametrize("name", DEFINITIONS)
@on_each_device
def test_a_block_mask_with_its_callable(device, name):
    """torch's BlockMask as it is: its mask_mod hides pairs of partial blocks."""
    q, k, v = inputs(device, (200, 260), heads=(4, 2), batch=2)
    mask = block_mask.create_block_mask(DEFINITIONS[name], 2, 4, 200, 260, 128, "cpu")
    for field in LISTS:
        setattr(mask, field, device.place(getattr(mask, field)))
    got = flash_attn_func(q, k, v, block_sparse_tensors=mask, return_lse=True)
    expected = flash_attn_func(q, k, v, mask_mod=DEFINITIONS[name], return_lse=True)
    assert_close(device, got, expected)


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("device", params_of(CPU, CUDA))
def test_gradients_of_a_block_mask_with_its_callable(device, name):
    q, k, v = (x.requires_grad_() for x in inputs(device, (200, 260), heads=(4, 2), batch=2))
    where = device.torch_device
    mask = block_mask.create_block_mask(DEFINITIONS[name], 2, 4, 200, 260, 128, where)
    dout = torch.randn_like(q)
    gradients = [
        torch.autograd.grad(flash_attn_func(q, k, v, **options)[0], (q, k, v), dout)
        for options in ({"block_sparse_tensors": mask}, {"mask_mod": DEFINITIONS[name]})
    ]
    assert_close(device, *gradients)


LEARNED = {
    # queries and keys, block, heads of q and of k, heads of the lists, head dims, other options
    "gqa": ((200, 333), (128, 128), (4, 2), 4, (64, 64), {}),
    "shared": ((333, 200), (64, 64), (4, 2), 1, (128, 72), {"deterministic": True}),
    "large": ((300, 520), (256, 256), (2, 2), 2, (64, 128), {"window": (300, 40)}),
    "wide": ((150, 260), (64, 64), (2, 2), 1, (256, 256), {}),
}


@pytest.mark.quick("*-shared")
@pytest.mark.parametrize("case", LEARNED.values(), ids=LEARNED)
@on_each_device
def test_gradients_of_what_a_score_mod_captures(device, case):
    """A table by distance and head, and by the key alone; a mask_mod hides pairs of partial blocks."""
    seqlens, block, heads, list_heads, head_dims, options = case
    q, k, v = inputs(device, seqlens, heads, head_dims, batch=2)
    rows, columns = (-(-n // b) for n, b in zip(seqlens, block, strict=True))
    maps = random_map(2, list_heads, rows, columns)
    partial, full = (seen_by(x, x, block, *seqlens) for x in maps)
    drawn = torch.randn(heads[0], sum(seqlens)), torch.randn(seqlens[1])

    def mods_of(by_distance, by_key):
        return {
            "score_mod": lambda s, b, h, i, j: s + by_distance[h, j - i + seqlens[0]] * by_key[j],
            "mask_mod": lambda b, h, i, j: (i - j) % 3 != 0,
        }

    learned = [device.place(x).requires_grad_() for x in drawn]
    cpu_learned = [x.clone().requires_grad_() for x in drawn]
    leaves = [plain(x).requires_grad_() for x in (q, k, v)]
    dout = dout_for(device, q, v)
    mods, cpu_mods = mods_of(*learned), mods_of(*cpu_learned)
    grid = torch.meshgrid(*map(torch.arange, seqlens), indexing="ij")
    seen = full | partial & cpu_mods["mask_mod"](0, 0, *grid)
    del cpu_mods["mask_mod"]
    window = options.get("window")
    meant = {"attn_bias": as_bias(seen), "window_size": window or (None, None)}
    out, _ = attention_reference(*leaves, **cpu_mods, **meant)
    expected = torch.autograd.grad(out, [*leaves, *cpu_learned], plain(dout).float())
    called = {"window_size": window} if window else options
    tensors = lists_of(device, *maps, block)
    if device is CPU:
        out, _ = flash_attn_func(*leaves, block_sparse_tensors=tensors, **mods, **called)
        actual = torch.autograd.grad(out, [*leaves, *learned], dout)
    else:
        called = {**called, **options_of(device, tensors, q, k)}
        actual = gradients(q, k, v, dout, mods, learned, **called)
        if options.get("deterministic"):
            with reordered(device, 1):
                assert_all_equal(gradients(q, k, v, dout, mods, learned, **called), actual)
    for got, wanted in zip(actual, expected, strict=True):
        assert_near(got, wanted, 1e-4 if device is CPU else 0.03)


@on_each_device
def test_a_callable_is_not_asked_in_full_blocks(device):
    q, k, v = inputs(device, (200, 200))
    maps = maps_of((2, 2), full=(0, 1))
    lists = options_of(device, lists_of(device, *maps, (128, 128)), q, k)["key_blocks"]
    names = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
    fields = type("Fields", (), dict(zip(names, lists[2:], strict=True), block_size=(128, 128)))
    got = flash_attn_func(q, k, v, block_sparse_tensors=fields, mask_mod=lambda b, h, q, k: q < 0)
    expected = flash_attn_func(q, k, v, block_sparse_tensors=fields)
    assert_close(device, got[:1], expected[:1])


def plain(x):
    return x.detach().cpu().as_subclass(torch.Tensor)


def assert_near(got, expected, tolerance):
    got, expected = (plain(x).float() for x in (got, expected))
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def assert_close(device, got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu().float(), theirs.cpu().float(), atol=2e-2, rtol=2e-2)


CHECKED = """
import sys
sys.path[:0] = {path!r}
import torch
from flash_attn_sm120 import _C, block_mask
from helpers.devices import CUDA, EMULATOR

device = {device}
q = device.place(torch.randn(1, 130, 2, 8).bfloat16())
counts = device.place(torch.ones(1, 1, 2).int())
for index in (1, 2):
    indices = device.place(torch.full((1, 1, 2, 2), index).int())
    blocks = block_mask.BlockLists(128, 128, counts, indices)
    try:
        _C.forward(q, q, q, key_blocks=blocks)
        print("right")
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("device", [EMULATOR, CUDA], ids=lambda device: device.name)
def test_lists_are_checked_first(device, tmp_path):
    """FA_SM120_CHECK=1: as of CPU tensors."""
    driver = {"FA_SM120_DRIVER": str(emulator.library())} if device == EMULATOR else {}
    code = CHECKED.format(path=sys.path, device="EMULATOR" if device == EMULATOR else "CUDA")
    done = run_python(code, tmp_path, FA_SM120_CHECK="1", **driver)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "right" and "from 0 to 1: row 0 has 2" in lines[1]
