"""out= and lse=: written in place, all of it and nothing else, or refused before anything is written."""

import numpy as np
import pytest
import torch

from flash_attn_sm120 import flash_attn_func
from helpers.capsules import READ_ONLY, Capsule, Producer
from helpers.devices import CPU, EMULATOR, params_of, writable

GUARD = -7.0  # around results, and still there afterwards
SHAPE = (2, 33, 4, 40)  # of out; head_dim is 64, two KV heads


@pytest.fixture(params=params_of(CPU, EMULATOR))
def device(request):
    return request.param


@pytest.fixture
def qkv(device):
    dtype = device.dtypes[0]

    def make(*shape):
        return device.place(torch.randn(*shape).to(dtype))

    return make(2, 33, 4, 64), make(2, 70, 2, 64), make(2, 70, 2, 40)


@pytest.fixture(autouse=True)
def next_good_call_works(request):
    """Whatever a test did, a good call into memory of the caller is right afterwards."""
    if "qkv" not in request.fixturenames:
        yield
        return
    device, (q, k, v) = (request.getfixturevalue(name) for name in ("device", "qkv"))
    yield
    out = result_like(device, q, torch.full(SHAPE, torch.nan))
    flash_attn_func(q, k, v, out=out)
    torch.testing.assert_close(out, flash_attn_func(q, k, v)[0], rtol=0, atol=0)


def result_like(device, q, x):
    """`x` in the dtype of q on the device, for a call to write to."""
    x = device.place(x.to(q.dtype))
    return writable(x)


def _contiguous(x):
    return x


def _padded_rows(x):
    return x.new_full((*SHAPE[:3], 64), GUARD)[..., 8:48]


def _heads_first(x):
    return x.new_full((2, 4, 33, 40), GUARD).transpose(1, 2)


def _sequence_first(x):
    return x.new_full((35, 2, 4, 40), GUARD).transpose(0, 1)[:, 1:34]


def _every_other_head(x):
    return x.new_full((2, 33, 8, 40), GUARD)[:, :, ::2]


LAYOUTS = [_contiguous, _padded_rows, _heads_first, _sequence_first, _every_other_head]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("lse_given", [False, True], ids=["", "lse"])
def test_every_layout_is_written_in_place(device, qkv, layout, num_splits, lse_given):
    """Poisoned before; what lies between its rows is untouched."""
    q, k, v = qkv
    expected, expected_lse = flash_attn_func(
        q, k, v, causal=True, num_splits=num_splits, return_lse=True
    )
    out = layout(result_like(device, q, torch.empty(SHAPE)))
    store = out if out._base is None else out._base
    plain = store.as_subclass(torch.Tensor)
    plain.fill_(GUARD)
    out.as_subclass(torch.Tensor).fill_(torch.nan)
    lse = None
    if lse_given:
        guarded = torch.full((2 * 4 * 33 + 2,), GUARD)
        guarded[1:-1] = torch.nan
        lse = writable(device.place(guarded)[1:-1].view(2, 4, 33))
    result, result_lse = flash_attn_func(
        q, k, v, causal=True, num_splits=num_splits, out=writable(out), lse=lse
    )
    assert result is out and result_lse is lse
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.as_subclass(torch.Tensor).fill_(GUARD)
    assert (plain == GUARD).all()
    if lse_given:
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)
        assert guarded[0] == guarded[-1] == GUARD


def test_results_interleaved_with_inputs(device, qkv):
    """Disjoint rows of one buffer, as of a packed projection."""
    q, k, v = qkv
    packed = device.place(torch.full((2, 33, 4, 64 + 40), GUARD).to(q.dtype))
    packed[..., :64] = q
    inside, out = packed[..., :64], packed[..., 64:]
    expected, _ = flash_attn_func(q, k, v)
    flash_attn_func(inside, k, v, out=writable(out))
    assert torch.equal(out, expected) and torch.equal(packed[..., :64], q)


OVERLAPS = {
    "q itself": lambda q, k, v: q,
    "q expanded from inside": lambda q, k, v: q._base[:, :, 2:6],
    "one head later": lambda q, k, v: q._base[:, :, 1:5],
    "one row of 16 bytes": lambda q, k, v: q._base.view(-1)[8 : 8 + q.numel()].view(q.shape),
    "k": lambda q, k, v: k.view(-1)[: q.numel()].view(q.shape),
    "v's last element": lambda q, k, v: v._base.view(-1)[-q.numel() :].view(q.shape),
}  # fmt: skip


@pytest.mark.parametrize("case", OVERLAPS)
def test_results_that_overlap_inputs_are_refused(device, case):
    dtype = device.dtypes[0]
    q = device.place(torch.randn(2, 33, 6, 64).to(dtype))[:, :, :4]
    k = device.place(torch.randn(2, 140, 2, 64).to(dtype))
    v = device.place(torch.randn(2, 280, 2, 64).to(dtype))[:, 140:]
    before = [x.clone() for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"out overlaps [qkv]"):
        flash_attn_func(q, k, v, out=writable(device.place(OVERLAPS[case](q, k, v))))
    assert all(map(torch.equal, (q, k, v), before))


def test_results_that_overlap_each_other_are_refused(device, qkv):
    q, k, v = qkv
    store = torch.zeros(2 * 33 * 4 * 40 + 2 * 4 * 33)
    out = device.place(store)[: 2 * 33 * 4 * 40].view(torch.float32)
    if q.dtype != torch.float32:
        out = out.view(q.dtype)[: 2 * 33 * 4 * 40]
    lse = device.place(store)[100 : 100 + 2 * 4 * 33].view(2, 4, 33)
    with pytest.raises(ValueError, match="lse overlaps out"):
        flash_attn_func(q, k, v, out=writable(out.view(SHAPE)), lse=writable(lse))
    sink = device.place(torch.zeros(2 * 4 * 33))
    with pytest.raises(ValueError, match="lse overlaps learnable_sink"):
        flash_attn_func(q, k, v, learnable_sink=sink[:4], lse=writable(sink.view(2, 4, 33)))
    assert (store == 0).all()


BAD_OUT = {
    "shape": (lambda x: x[:, :32], "out must have q's seqlen 33 in dimension 1, got 32"),
    "rank": (lambda x: x[0], "out must have 4 dimensions, got 3"),
    "head_dim": (lambda x: x[..., :32], "out must have v's head_dim 40 in dimension 3, got 32"),
    "dtype": (lambda x: x.to(torch.float64), "out must be float16, bfloat16 or float32"),
    "other dtype": (lambda x: x.to(torch.float16), "out must be .*float.* like q, got float16"),
    "expanded": (lambda x: x[:1].expand(SHAPE), "out has elements that share memory"),
    "rows overlap": (lambda x: x.as_strided(SHAPE, (5280, 160, 8, 1)), "elements that share memory"),
    "misaligned": (lambda x: x.new_empty(x.numel() + 1)[1:].view(SHAPE), "contiguous rows at multiples of 16 bytes"),
    "misaligned rows": (lambda x: x.new_empty(*SHAPE[:3], 41)[..., :40], "contiguous rows at multiples of 16 bytes"),
    "strided rows": (lambda x: x.new_empty(*SHAPE[:3], 80)[..., ::2], "contiguous rows at multiples of 16 bytes"),
    "list": (lambda x: [1.0], "out must be a tensor"),
    "freed": (lambda x: freed(x), "out has no data: its storage was freed"),
}  # fmt: skip


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("case", BAD_OUT)
def test_bad_out(device, qkv, case):
    q, k, v = qkv
    change, message = BAD_OUT[case]
    out = change(result_like(device, q, torch.empty(SHAPE)))
    with pytest.raises((TypeError, ValueError), match=message):
        flash_attn_func(q, k, v, out=out)


BAD_LSE = {
    "layout": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "lse must be contiguous"),
    "strided": (lambda x: x.new_empty(2, 4, 66)[..., ::2], "lse must be contiguous"),
    "expanded": (lambda x: x[:1].expand(2, 4, 33), "lse must be contiguous"),
    "shape": (lambda x: x.transpose(1, 2), "lse must have q's heads 4 in dimension 1, got 33"),
    "dtype": (lambda x: x.half(), "lse must be float32, got float16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LSE)
def test_bad_lse(device, qkv, case):
    change, message = BAD_LSE[case]
    lse = change(device.place(torch.full((2, 4, 33), GUARD)))
    out = result_like(device, qkv[0], torch.full(SHAPE, GUARD))
    with pytest.raises((TypeError, ValueError), match=message):
        flash_attn_func(*qkv, out=out, lse=lse)
    assert (out == GUARD).all()  # nothing is written before everything is checked


def test_results_on_another_device():
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    q = torch.randn(1, 4, 2, 16).bfloat16()
    on_device = EMULATOR.place(q)
    with pytest.raises(ValueError, match="out must be on q's device, cpu:0, got cuda:0"):
        flash_attn_func(q, q, q, out=EMULATOR.place(torch.empty_like(q)))
    with pytest.raises(ValueError, match="lse must be on q's device, cuda:0, got cpu:0"):
        flash_attn_func(on_device, on_device, on_device, lse=torch.empty(1, 2, 4))


# ---- frameworks ----------------------------------------------------------------------------------


def arrays():
    rng = np.random.default_rng(3)
    return [rng.standard_normal((2, 5, 4, 16)).astype(np.float32) for _ in range(3)]


@pytest.mark.parametrize(
    "of_result", [np.asarray, torch.from_numpy, lambda x: Producer(Capsule(x))]
)
@pytest.mark.parametrize("of_input", [np.asarray, torch.from_numpy, lambda x: Producer(Capsule(x))])
def test_results_of_one_framework_with_inputs_of_another(of_input, of_result):
    expected, expected_lse = flash_attn_func(*arrays(), return_lse=True)
    out, lse = np.full((2, 5, 4, 16), np.nan, np.float32), np.full((2, 4, 5), np.nan, np.float32)
    given = of_result(out), of_result(lse)
    results = flash_attn_func(*map(of_input, arrays()), out=given[0], lse=given[1])
    assert results[0] is given[0] and results[1] is given[1]
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


def test_read_only_results_are_refused():
    out = np.zeros((2, 5, 4, 16), np.float32)
    out.flags.writeable = False
    flagged = Producer(Capsule(np.zeros((2, 4, 5), np.float32), flags=READ_ONLY))
    with pytest.raises(ValueError, match="out is read-only"):
        flash_attn_func(*arrays(), out=out)
    with pytest.raises(ValueError, match="lse is read-only"):
        flash_attn_func(*arrays(), lse=flagged)
    assert not out.any() and flagged.made.deleted == 1


def test_masked_arrays_are_no_results():
    with pytest.raises(TypeError, match=r"out is a numpy.ma.MaskedArray"):
        flash_attn_func(*arrays(), out=np.ma.zeros((2, 5, 4, 16), np.float32))


# ---- what torch asks of functions that write in place --------------------------------------------


def tensors():
    return [torch.from_numpy(x) for x in arrays()]


def test_versions_are_counted():
    """So that autograd notices a saved tensor that was written to."""
    out, lse = torch.empty(2, 5, 4, 16), torch.empty(2, 4, 5)
    x = torch.ones(2, 5, 4, 16, requires_grad=True)
    product = x * out
    before = out._version, lse._version
    flash_attn_func(*tensors(), out=out, lse=lse)
    assert (out._version, lse._version) == (before[0] + 1, before[1] + 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_refused_call_counts_no_version():
    out = torch.zeros(2, 5, 4, 16)
    before = out._version
    with pytest.raises(ValueError):
        flash_attn_func(*tensors(), out=out, lse=torch.empty(1))
    assert out._version == before and not out.any()


@pytest.mark.parametrize("position", range(4))
def test_gradients_are_refused(position):
    inputs = [*tensors(), torch.zeros(4)]
    inputs[position].requires_grad_()
    q, k, v, sink = inputs
    out = torch.zeros(2, 5, 4, 16)
    with pytest.raises(RuntimeError, match="does not support automatic differentiation"):
        flash_attn_func(q, k, v, learnable_sink=sink, out=out)
    assert not out.any()
    with torch.no_grad():
        flash_attn_func(q, k, v, learnable_sink=sink, out=out)
    assert out.all()


def test_inference_mode():
    expected, _ = flash_attn_func(*tensors())
    with torch.inference_mode():
        out = torch.empty(2, 5, 4, 16)
        assert torch.equal(flash_attn_func(*tensors(), out=out)[0], expected)
    with torch.no_grad():  # and an inference tensor outside of it
        assert torch.equal(flash_attn_func(*tensors(), out=out)[0], expected)
