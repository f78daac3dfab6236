"""Packed sequences: each as a call of its own, whatever lies between and behind them."""

import random

import pytest
import torch

from flash_attn_sm120 import (
    _C,
    explain,
    explain_backward,
    flash_attn_func,
    flash_attn_varlen_func,
)
from helpers.checks import assert_all_equal
from helpers.devices import CPU, CUDA, EMULATOR, writable
from helpers.tiles import tile_row, use_tiles
from helpers.varlen import (
    attend,
    check,
    check_forward,
    flat,
    flat_lse,
    gradients_of,
    make_batch,
    on,
    sequences,
)

# Lengths of queries and of keys, sequence by sequence, and heads.
LENGTHS = {
    "mixed": ([70, 1, 0, 33, 130], [70, 40, 9, 0, 150], (4, 2)),
    "fewer queries than sequences": ([0, 1, 0, 1], [0, 3, 0, 5], (9, 3)),
    "no queries": ([0, 0], [17, 3], (2, 1)),
    "no keys": ([17, 3], [0, 0], (2, 1)),
    "one": ([65], [129], (2, 2)),
    "none": ([], [], (2, 1)),
}
lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)

OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "all": {"window_size": (30, 3), "softcap": 5.0, "learnable_sink": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def with_sink(device, options, heads):
    """Options with a sink for each head in place of True."""
    if not options.get("learnable_sink"):
        return options
    return {**options, "learnable_sink": device.place(torch.linspace(-1, 2, heads))}


def dtype_of(device):
    return device.dtypes[0]


# ---- forward and backward ------------------------------------------------------------------------


@pytest.mark.quick("cpu-*", "emulator-large-causal-mixed")
@lengths
@options
def test_each_sequence_is_a_call_of_its_own(device, options, lengths):
    """What no sequence has is NaN: outputs and gradients there are 0."""
    turn = list(LENGTHS.values()).index(lengths) + list(OPTIONS.values()).index(options)
    if not device.takes(turn):
        pytest.skip("the other size of tiles has this case")
    batch = make_batch(device, *lengths, dtype=dtype_of(device))
    check(batch, **with_sink(device, options, batch.q.shape[-2]))


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("packed", [(True, False), (False, True), (False, False)], ids=str)
def test_a_side_may_have_a_batch(device, packed):
    lengths = ([70, 1, 0, 33], [70, 40, 9, 0])
    batch = make_batch(device, *lengths, packed=packed, dtype=dtype_of(device))
    check(batch, causal=True)
    lengths = ([33, 33], [70, 70])  # all rows of a batch, which needs no seqused
    check(make_batch(device, *lengths, packed=packed, dtype=dtype_of(device)), causal=True)


def test_rows_beyond_seqused(device):
    lengths, used = ([70, 8, 20, 33], [70, 40, 9, 40]), ([50, 8, 0, 20], [64, 0, 9, 30])
    check(make_batch(device, *lengths, used=used, dtype=dtype_of(device)), causal=True)
    batch = make_batch(device, *lengths, used=(None, used[1]), dtype=dtype_of(device))
    check(batch, causal=True)


@pytest.mark.parametrize("dims", [(64, 32), (128, 128), (40, 72), (256, 256)], ids=str)
def test_head_dims(device, dims):
    if not device.takes(dims[0] == 64 or dims[0] == 256):
        pytest.skip("the other size of tiles has this case")
    lengths = ([30, 0, 100], [50, 3, 80])
    check(
        make_batch(device, *lengths, heads=(4, 1), dims=dims, dtype=dtype_of(device)), causal=True
    )


def test_sums_over_heads_at_any_offset(device):
    """Offsets that are no multiple of a tile, from the second sequence on."""
    lengths = ([13, 100, 29, 71], [61, 100, 7, 90])
    check(make_batch(device, *lengths, heads=(6, 2), dtype=dtype_of(device)), causal=True)


def test_lengths_random(device):
    draw = random.Random(14)
    for _ in range(3 if device == EMULATOR else 12):
        count = draw.randint(1, 7)
        some = [[draw.choice([0, 1, 16, draw.randint(2, 90)]) for _ in range(count)] for _ in "qk"]
        slack = draw.choice([0, 1, 40])
        check(make_batch(device, *some, slack=slack, dtype=dtype_of(device)), causal=True)


@pytest.mark.quick("cpu")
def test_leading_rows_belong_to_no_sequence(device):
    batch = make_batch(device, [7, 20, 30], [9, 20, 40], dtype=dtype_of(device))
    for side, name in zip(batch.sides, "qk", strict=True):
        cu = batch.lengths[f"cu_seqlens_{name}"]
        batch.lengths[f"cu_seqlens_{name}"] = cu[1:]
        del side.begins[0], side.lengths[0]
    check(batch, causal=True)


# ---- equal to the bit ----------------------------------------------------------------------------


def test_equal_to_dense_calls_to_the_bit(device):
    """Of the same tile, or of the CPU."""
    dtype = dtype_of(device)
    batch = make_batch(device, [70, 33, 130], [70, 64, 150], dtype=dtype)
    options = {"causal": True, "num_splits": 1, "pack_gqa": False}
    plan = explain(*batch.inputs, **batch.lengths, **options)
    rows = [tile_row(plan)] if plan.steps else []
    with use_tiles(*rows):
        out, lse = attend(batch, **options)
        for q, k, v, _dout, _dlse, part, _keys in sequences(batch):
            alone = _C.forward(q, k, v, return_lse=True, **options)
            assert_all_equal(alone, (flat(out)[None, part], flat_lse(lse)[None, :, part]))


def test_deterministic_runs_are_equal_to_the_bit(device):
    batch = make_batch(device, [70, 0, 150, 33], [100, 9, 150, 64], (2, 1), dtype=dtype_of(device))
    options = with_sink(device, OPTIONS["all"] | {"deterministic": True}, 2)
    out, lse, gradients, dsink = check(batch, **options)
    for _ in range(1 if device == EMULATOR else 10):
        assert_all_equal([out, lse], attend(batch, **options))
        assert_all_equal([*gradients, dsink], gradients_of(batch, out, lse, **options))


def test_gradients_with_and_without_that_of_lse(device):
    batch = make_batch(device, [70, 1, 33], [70, 40, 50], dtype=dtype_of(device))
    check(batch, with_dlse=False, causal=True)


# ---- plans ---------------------------------------------------------------------------------------


def test_splits(device):
    batch = make_batch(device, [1, 0, 3, 2], [300, 64, 0, 150], dtype=dtype_of(device))
    batch.lengths["max_seqlen_q"] = 3
    for options in ({}, OPTIONS["all"]):
        check_forward(batch, num_splits=3, **with_sink(device, options, 4))


def test_splits_of_bounds(device):
    """As many parts as the bounds ask for, of sequences of any lengths up to them."""
    batch = make_batch(
        device, [1, 0, 2], [1500, 64, 3], heads=(4, 1), dims=(64, 64), dtype=dtype_of(device)
    )
    batch.lengths |= {"max_seqlen_q": 2, "max_seqlen_k": 4096}
    plan = explain(*batch.inputs, **batch.lengths)
    assert not plan.steps or plan.num_splits > 2
    check_forward(batch, causal=True)


def test_decoding_of_any_batch_makes_few_plans(device):
    """Batches of any size and lengths: two plans for each power of two of a bound at most."""
    if device == CPU:
        pytest.skip("the CPU has no plans")
    draw = random.Random(16)
    before = _C.counts()["plans"]
    for _ in range(1000 if device == CUDA else 100):
        lengths = [draw.randint(0, 40) for _ in range(draw.randint(1, 8))]
        batch = make_batch(device, [1] * len(lengths), lengths, heads=(1, 1), dims=(8, 8))
        attend(batch, max_seqlen_q=1, max_seqlen_k=draw.choice([512, 2048]))
    assert _C.counts()["plans"] - before <= 4


def test_pack_gqa(device):
    batch = make_batch(device, [5, 0, 70], [64, 9, 100], heads=(6, 2), dtype=dtype_of(device))
    packed = check_forward(batch, pack_gqa=True, causal=True)
    assert_all_equal(packed, check_forward(batch, pack_gqa=False, causal=True))


def test_bounds_change_nothing_but_grids(device):
    """Under one power of two, which chooses the tile; a smaller one has the same results but for
    rounding."""
    batch = make_batch(device, [20, 64, 3], [64, 30, 5], dtype=dtype_of(device))
    first = check_forward(batch, causal=True, pack_gqa=False)
    for bound in (65, 128, 64):
        bounds = {"max_seqlen_q": bound, "max_seqlen_k": bound}
        second = attend(batch, causal=True, pack_gqa=False, **bounds)
        if bound > 64:
            assert_all_equal(first, second)
        for x, y in zip(first, second, strict=True):
            torch.testing.assert_close(x.cpu(), y.cpu(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("heads, packed", [(45, (True, True)), (22, (True, False))], ids=str)
def test_pairs_in_groups(device, heads, packed):
    """A bound far above the lengths makes groups small: the last is smaller than the others. With a
    list of tiles they are of heads, and the longest sequence comes first; else one has a part of
    the heads of a sequence."""
    lengths = ([3, 20, 0, 70], [9, 40, 150, 140])
    batch = make_batch(device, *lengths, 2 * (heads,), (16, 16), dtype_of(device), packed=packed)
    options = {"causal": True, "max_seqlen_q": 1 << 20}
    planned = explain_backward(*batch.inputs, **batch.lengths, **options)
    assert planned.group_heads is None or planned.group_heads == {45: 23, 22: 30}[heads]
    for deterministic in (False, True):
        out, lse, gradients, _ = check(batch, deterministic=deterministic, causal=True)
        grouped = gradients_of(batch, out, lse, deterministic=deterministic, **options)[:3]
        if deterministic:
            assert_all_equal(gradients, grouped)
        for x, y in zip(gradients, grouped, strict=True):
            torch.testing.assert_close(x.cpu(), y.cpu())


@options
@pytest.mark.parametrize("dims", [(64, 64), (128, 72)], ids=str)
def test_one_tile_of_keys(device, dims, options):
    """Which stores dq: also of queries that see no key, because there are none or by a mask."""
    if not device.takes(dims[0] == 64):
        pytest.skip("the other size of tiles has this case")
    lengths = ([170, 3, 33, 0, 64], [40, 64, 0, 7, 64])
    batch = make_batch(device, *lengths, heads=(4, 2), dims=dims, dtype=dtype_of(device))
    options = with_sink(device, options, 4)
    for bound in (64, 128):
        bounds = {"max_seqlen_q": 170, "max_seqlen_k": bound}
        planned = explain_backward(*batch.inputs, **batch.lengths, **bounds, **options)
        assert planned.variant is None or "_dqd" in planned.variant
        check(batch, bounds=bounds, **options)


def test_bounds_without_keys(device):
    batch = make_batch(device, [17, 3], [0, 0], dtype=dtype_of(device))
    check(batch, bounds={"max_seqlen_k": 64})


def test_other_lengths_need_no_other_plan(device):
    """Nor another kernel, and bounds are all that a plan knows of lengths."""
    if device == CPU:
        pytest.skip("the CPU has no plans")
    draw = random.Random(15)
    bounds = {"max_seqlen_q": 16, "max_seqlen_k": 16}
    counts = []
    for i in range(200):
        count = draw.randint(1, 5)
        some = [[draw.randint(0, 16) for _ in range(count)] for _ in "qk"]
        batch = make_batch(device, *some, heads=(1, 1), dtype=dtype_of(device))
        out, lse = attend(batch, causal=True, **bounds)
        if i % 20 == 0:
            gradients_of(batch, out, lse, causal=True, **bounds)
        counts.append(_C.counts())
    assert counts[0] == counts[-1]


# ---- out=, lse= and autograd ---------------------------------------------------------------------


def test_results_are_written_in_place(device):
    batch = make_batch(device, [7, 0, 30], [9, 4, 40], dtype=dtype_of(device))
    expected = attend(batch, causal=True)
    room = device.place(torch.full((*batch.q.shape[:2], 128), torch.nan, dtype=batch.q.dtype))
    out = writable(room[..., 64:])
    lse = writable(device.place(torch.full_like(expected[1], torch.nan)))
    results = flash_attn_varlen_func(*batch.inputs, **batch.lengths, causal=True, out=out, lse=lse)
    assert results[0] is out and results[1] is lse
    assert_all_equal(results, expected)
    assert room[..., :64].isnan().all()


@pytest.mark.quick
@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
def test_autograd(device):
    batch = make_batch(device, [70, 0, 33], [70, 9, 40], dtype=device.dtypes[0], slack=0)
    sink = device.place(torch.linspace(-1, 2, 4))
    options = {"causal": True, "deterministic": True}
    out, lse = attend(batch, learnable_sink=sink, **options)
    expected = gradients_of(batch, out, lse, learnable_sink=sink, **options)
    inputs = [x.requires_grad_() for x in (*batch.inputs, sink)]
    results = flash_attn_varlen_func(
        *inputs[:3], **batch.lengths, learnable_sink=sink, return_lse=True, **options
    )
    assert_all_equal(results, (out, lse))
    grads = torch.autograd.grad(results, inputs, (batch.dout, batch.dlse))
    assert_all_equal(grads, expected)
    out, lse = flash_attn_varlen_func(*inputs[:3], **batch.lengths)
    assert lse is None
    batch.lengths["cu_seqlens_k"].add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_captured_graphs_replay_with_other_lengths(cuda):
    batch = make_batch(CUDA, [70, 0, 33], [70, 9, 40], slack=60)
    other = make_batch(CUDA, [20, 60, 80], [50, 90, 36], slack=3)  # in tensors of the same shapes
    options = {"causal": True, "deterministic": True}

    def run(batch):
        out, lse = attend(batch, **options)
        return out, lse, *gradients_of(batch, out, lse, **options)[:3]

    expected = [run(batch), run(other)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(batch)
    graph.replay()
    assert_all_equal(results, expected[0])
    for name in ("q", "k", "v", "dout", "dlse"):
        getattr(batch, name).copy_(getattr(other, name))
    for name, x in batch.lengths.items():
        x.copy_(other.lengths[name])
    graph.replay()
    assert_all_equal(results, expected[1])


# ---- bad input -----------------------------------------------------------------------------------

BAD = {
    "int64": ({"cu_seqlens_q": lambda x: x.long()}, TypeError, "cu_seqlens_q must be int32, got int64"),
    "float": ({"seqused_k": lambda x: torch.ones(3)}, TypeError, "seqused_k must be int32, got float32"),
    "list": ({"cu_seqlens_q": lambda x: [0, 7]}, TypeError, "cu_seqlens_q must be a tensor"),
    "rank": ({"cu_seqlens_k": lambda x: x[None]}, ValueError, "cu_seqlens_k must have 1 dimension, got 2"),
    "strided": ({"cu_seqlens_k": lambda x: x.repeat_interleave(2)[::2]}, ValueError, "cu_seqlens_k must be contiguous, got stride 2"),
    "batch": ({"cu_seqlens_k": lambda x: x[:3]}, ValueError, r"cu_seqlens_k must have batch \+ 1 = 4 in dimension 0, got 3"),
    "no batch": ({"cu_seqlens_q": lambda x: x[:0]}, ValueError, r"cu_seqlens_q must have batch \+ 1 elements, got 0"),
    "used": ({"seqused_q": lambda x: torch.ones(4).int()}, ValueError, "seqused_q must have q's batch 3 in dimension 0, got 4"),
    "not packed": ({"cu_seqlens_k": lambda x: None}, ValueError, "k must have 4 dimensions, got 3"),
    "bound": ({"max_seqlen_q": lambda x: -1}, ValueError, "max_seqlen_q must be 0 or larger, got -1"),
    "bound of floats": ({"max_seqlen_k": lambda x: 1.5}, TypeError, "max_seqlen_k must be an integer or None, got 1.5"),
    "out": ({"out": lambda x: torch.zeros(3, 4, 64)}, ValueError, "out must have q's total 42 in dimension 0, got 3"),
    "lse": ({"lse": lambda x: torch.zeros(1, 4, 42)}, ValueError, "lse must have 2 dimensions, got 3"),
    "heads of lse": ({"lse": lambda x: torch.zeros(3, 42)}, ValueError, "lse must have q's heads 4 in dimension 0, got 3"),
    "positional": ({"cu_seqlens_k": lambda x: 7}, TypeError, "parameters after q, k, v come in another order"),
    "scheduler": ({"scheduler_metadata": lambda x: 7}, NotImplementedError, "flash_attn_varlen_func does not support scheduler_metadata yet"),
    "score_mod_bwd": ({"score_mod_bwd": lambda x: max}, NotImplementedError, "flash_attn_varlen_func does not support score_mod_bwd yet"),
    "unknown": ({"cu_seqlens": lambda x: None}, TypeError, r"flash_attn_varlen_func\(\) got an unexpected keyword argument 'cu_seqlens'"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("case", BAD)
def test_bad_lengths(device, case):
    changes, error, message = BAD[case]
    batch = make_batch(device, [7, 0, 30], [9, 4, 40], dtype=dtype_of(device))
    changed = dict(batch.lengths)
    for name, change in changes.items():
        x = change(changed.get(name))
        if isinstance(x, torch.Tensor):
            x = device.place(x.to(dtype_of(device)) if name == "out" else x)
        changed[name] = x
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(*batch.inputs, **changed)
    if device == CPU:
        check_forward(batch)


def test_lengths_must_be_on_the_device(device):
    if device == CPU:
        pytest.skip("the CPU is one device")
    batch = make_batch(device, [7], [9], dtype=dtype_of(device))
    for name in batch.lengths:
        changed = batch.lengths | {name: batch.lengths[name].cpu().as_subclass(torch.Tensor)}
        with pytest.raises(ValueError, match=f"{name} must be on q's device, cuda:0, got cpu:0"):
            attend_with(batch, changed)


def attend_with(batch, lengths):
    return _C.forward(*batch.inputs, return_lse=True, **lengths)


WRONG = {
    "falling": ("cu_seqlens_q", [0, 20, 10, 37], "sequence 1 begins at 20 and ends at 10"),
    "negative": ("cu_seqlens_k", [-5, 9, 13, 53], "sequence 0 begins at -5 and ends at 9"),
    "beyond": ("cu_seqlens_k", [0, 9, 13, 500], "sequence 2 ends at 500, the total is 58"),
    "all beyond": ("cu_seqlens_q", [2**31 - 1] * 4, "sequence 0 ends at 2147483647, the total is"),
    "least": ("cu_seqlens_q", [0, -(2**31), 2**31 - 1, 5], "sequence 0 begins at 0 and ends at -2147"),
    "used": ("seqused_k", [9, 5, 40], "sequence 1 has 4, got 5"),
    "used negative": ("seqused_q", [-(2**31), 0, 3], "sequence 0 has 7, got -2147483648"),
    "used beyond": ("seqused_q", [7, 2**31 - 1, 3], "sequence 1 has 0, got 2147483647"),
}  # fmt: skip


@pytest.mark.quick("cpu-*")
@pytest.mark.parametrize("case", WRONG)
def test_wrong_lengths(device, case):
    """The CPU names the sequence. Kernels keep within the tensors, which the emulator watches, and
    the next call is right."""
    name, numbers, message = WRONG[case]
    batch = make_batch(device, [7, 0, 30], [9, 4, 40], dtype=dtype_of(device))
    out, lse = check_forward(batch, causal=True)
    wrong = batch.lengths | {name: on(device, numbers)}
    backward = (batch.dout, *batch.inputs, out, lse, None)
    if device == CPU:
        with pytest.raises(ValueError, match=f"{name} must .*: {message}"):
            attend_with(batch, wrong)
        with pytest.raises(ValueError, match=message):
            _C.backward(*backward, **wrong)
    else:
        attend_with(batch, wrong)
        _C.forward(*batch.inputs, num_splits=2, causal=True, **wrong)
        _C.backward(*backward, causal=True, **wrong)
    check_forward(batch, causal=True)


@pytest.mark.quick("cpu")
def test_bounds_that_are_too_small(device):
    batch = make_batch(device, [7, 0, 30], [9, 4, 40], dtype=dtype_of(device))
    if device == CPU:
        with pytest.raises(
            ValueError, match=r"max_seqlen_q must not be below .*: sequence 2 has 30, got 10"
        ):
            attend(batch, max_seqlen_q=10)
    else:
        cut = attend(batch, max_seqlen_q=10, causal=True)
        batch.lengths["seqused_q"] = on(device, [7, 0, 10])
        assert_all_equal(cut, attend(batch, causal=True))
        del batch.lengths["seqused_q"]
    check_forward(batch, causal=True)


@pytest.mark.quick
def test_without_lengths_it_is_a_dense_call():
    q, k, v = (torch.randn(2, 9, 4, 16) for _ in "qkv")
    assert_all_equal(
        flash_attn_varlen_func(q, k, v, causal=True, return_lse=True),
        flash_attn_func(q, k, v, causal=True, return_lse=True),
    )
