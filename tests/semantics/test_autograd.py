"""flash_attn_func in torch's autograd: what it records, what it keeps, and what it hands back."""

import gc
import itertools
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flash_attn_sm120 import _C, autograd, flash_attn_func, ops
from helpers import cases
from helpers.checks import assert_all_equal
from helpers.devices import CPU, CUDA, params_of
from helpers.models import Transformer
from helpers.reference import assert_close_to, gradient_reference


@pytest.fixture(params=params_of(CPU, CUDA))
def device(request):
    """Those whose tensors stay what they are in autograd's hands; test_backward.py has the others."""
    return request.param


@pytest.fixture
def dtype(device):
    return device.dtypes[0]


@pytest.fixture
def leaves(device, dtype):
    """leaves() -> q, k, v that want gradients."""

    def make(seqlen_q=20, seqlen_k=30, heads=4, heads_kv=2, head_dim=32, dtype=dtype):
        shapes = [(2, seqlen_q, heads, head_dim), *[(2, seqlen_k, heads_kv, head_dim)] * 2]
        return [
            torch.randn(shape).to(device.torch_device, dtype).requires_grad_() for shape in shapes
        ]

    return make


def sinks(device, dtype=torch.float32):
    """One per head."""
    return torch.randn(4).to(device.torch_device, dtype).requires_grad_()


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.quick
def test_gradients_are_those_of_the_reference(device, leaves):
    q, k, v = leaves()
    sink = sinks(device)
    out, lse = flash_attn_func(q, k, v, causal=True, learnable_sink=sink, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    gradients = torch.autograd.grad((out, lse), (q, k, v, sink), (dout, dlse))
    arguments = {"dlse": dlse, "causal": True, "learnable_sink": sink}
    refs = gradient_reference(q, k, v, dout, **arguments)
    pts = gradient_reference(q, k, v, dout, upcast=False, **arguments)
    for gradient, *expected in zip(gradients, refs, pts, strict=True):
        assert_close_to(gradient, *expected, factor=3)


@pytest.mark.quick
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"softcap": 2.0}, {"window_size": (4, 3)}]
)
def test_gradients_are_slopes(options):
    """Along a direction, the function itself changes as its gradient says."""
    inputs = [torch.randn(1, n, h, 16) for n, h in ((12, 2), (15, 1), (15, 1))] + [torch.randn(2)]
    weights, lse_weights = torch.randn(1, 12, 2, 16), torch.randn(1, 2, 12)

    def f(q, k, v, sink):
        out, lse = flash_attn_func(q, k, v, learnable_sink=sink, return_lse=True, **options)
        return (out.double() * weights).sum() + (lse.double() * lse_weights).sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(f(*leaves), leaves)
    for i, gradient in enumerate(gradients):
        step = 1e-2 * torch.randn_like(inputs[i])
        there, back = ([*inputs[:i], inputs[i] + s, *inputs[i + 1 :]] for s in (step, -step))
        slope = (f(*there) - f(*back)) / 2
        torch.testing.assert_close((gradient * step).sum().double(), slope, rtol=5e-3, atol=1e-4)


def test_every_subset_of_inputs(device, leaves):
    """Who wants no gradient gets none, and that changes nothing for the others."""
    tensors = [x.detach() for x in (*leaves(), sinks(device))]
    everything = None
    subsets = list(itertools.product([True, False], repeat=len(tensors)))
    for wanted in subsets[:-1]:  # the last is none
        inputs = [x.clone().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
        out, _ = flash_attn_func(*inputs[:3], learnable_sink=inputs[3], deterministic=True)
        out.square().sum().backward()
        gradients = [x.grad for x in inputs]
        everything = everything or gradients
        for gradient, other, w in zip(gradients, everything, wanted, strict=True):
            assert torch.equal(gradient, other) if w else gradient is None


def test_one_tensor_in_all_places(device, leaves):
    x = leaves(20, 20, 4, 4)[0]
    flash_attn_func(x, x, x, causal=True, deterministic=True)[0].sum().backward()
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    flash_attn_func(*parts, causal=True, deterministic=True)[0].sum().backward()
    total = sum(part.grad.float() for part in parts)
    torch.testing.assert_close(x.grad.float(), total, rtol=2e-2, atol=2e-2)


@cases.sink_dtype
def test_sink_gets_a_gradient_of_its_dtype(device, leaves, sink_dtype):
    sink = sinks(device, sink_dtype)
    flash_attn_func(*leaves(), learnable_sink=sink)[0].sum().backward()
    assert sink.grad.dtype == sink_dtype and sink.grad.shape == (4,)
    assert sink.grad.abs().min() > 0


@pytest.mark.parametrize(
    "use",
    [
        lambda out: out.sum(),  # its gradient is one number, expanded
        lambda out: out.mean(1).square().sum(),
        lambda out: out.transpose(1, 2).reshape(2, 4, -1).square().sum(),
        lambda out: (out[..., ::2] ** 2).sum(),
        lambda out: out[0, 3, 1, 5],
        lambda out: out.permute(3, 2, 1, 0).contiguous().square().sum(),
    ],
    ids=["sum", "mean", "transposed", "every second", "one element", "reversed"],
)
def test_gradients_in_any_layout(device, leaves, use):
    inputs = leaves()
    out, _ = flash_attn_func(*inputs, deterministic=True)
    gradients = torch.autograd.grad(use(out), inputs, retain_graph=True)
    dout = torch.autograd.grad(use(leaf := out.detach().requires_grad_()), leaf)[0].contiguous()
    assert_all_equal(gradients, torch.autograd.grad(out, inputs, dout))


# ---- lse -----------------------------------------------------------------------------------------


def test_lse_is_for_who_asks(leaves):
    out, lse = flash_attn_func(*leaves())
    assert lse is None and out.requires_grad
    out, lse = flash_attn_func(*leaves(), return_lse=True)
    assert lse.requires_grad and lse.dtype == torch.float32


def test_lse_alone(leaves):
    q, k, v = leaves()
    _, lse = flash_attn_func(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, dim=2)).double() / 32**0.5
    expected = torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k))
    for gradient, other in zip((dq, dk), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=2e-2, atol=2e-2)
    assert (dv == 0).all()


def test_lse_unused(leaves):
    """Nothing flows into it: the backward is told so, not handed zeros."""
    inputs = leaves()
    with_lse, _ = flash_attn_func(*inputs, return_lse=True, deterministic=True)
    without, _ = flash_attn_func(*inputs, deterministic=True)
    assert_all_equal(*(torch.autograd.grad(out.sum(), inputs) for out in (with_lse, without)))


# ---- what is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_without_grad(leaves, monkeypatch, mode):
    monkeypatch.setattr(autograd, "attend", None)
    with mode():
        out, lse = flash_attn_func(*leaves(), return_lse=True)
    assert not out.requires_grad and not lse.requires_grad


def test_nothing_is_recorded_for_constants(leaves, monkeypatch):
    monkeypatch.setattr(autograd, "attend", None)
    out, _ = flash_attn_func(*(x.detach() for x in leaves()))
    assert not out.requires_grad


def test_recording_changes_no_bit(leaves):
    inputs = leaves()
    recorded = flash_attn_func(*inputs, causal=True, return_lse=True)
    with torch.no_grad():
        assert_all_equal(recorded, flash_attn_func(*inputs, causal=True, return_lse=True))


@pytest.mark.quick
@pytest.mark.parametrize("deterministic", [False, True])
def test_options_reach_the_backward(device, leaves, monkeypatch, deterministic):
    calls = []

    def backward(*args, **options):
        calls.append(options)
        return _C.backward(*args, **options)

    monkeypatch.setattr(ops, "_C", SimpleNamespace(forward=_C.forward, backward=backward))
    out, _ = flash_attn_func(
        *leaves(),
        softmax_scale=0.3,
        window_size=(7, 2),
        deterministic=deterministic,
    )
    out.sum().backward()
    (options,) = calls
    asked = {"softmax_scale": 0.3, "window_size": (7, 2), "deterministic": deterministic}
    assert asked.items() <= options.items() and options["learnable_sink"] is None


def test_a_graph_is_used_twice(leaves):
    inputs = leaves()
    out, _ = flash_attn_func(*inputs, deterministic=True)
    out.sum().backward(retain_graph=True)
    once = [x.grad.clone() for x in inputs]
    out.sum().backward()
    assert_all_equal([x.grad for x in inputs], [2 * x for x in once])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()


def test_changed_inputs_are_noticed(leaves):
    q, k, v = leaves()
    out, _ = flash_attn_func(q * 1, k, other := v * 1)
    other.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_other_frameworks_have_no_gradients():
    q = torch.randn(1, 4, 2, 16, requires_grad=True)
    k = np.zeros((1, 4, 2, 16), np.float32)
    with pytest.raises(TypeError, match=r"k must be a torch\.Tensor .* wanted, got ndarray"):
        flash_attn_func(q, k, k)


def test_empty_calls(leaves):
    for seqlens in ((0, 7), (5, 0)):
        inputs = leaves(*seqlens)
        flash_attn_func(*inputs)[0].sum().backward()
        assert all(x.grad.shape == x.shape and (x.grad == 0).all() for x in inputs)


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("return_lse", [False, True])
def test_what_is_kept(device, leaves, return_lse):
    """q, k, v, out and lse (and the sink), each of them once."""
    inputs, sink = leaves(), sinks(device)
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out, _ = flash_attn_func(*inputs, learnable_sink=sink, return_lse=return_lse)
    expected = [*inputs, out, sink]
    lse_bytes = 4 * 2 * 4 * 20
    assert len({x.data_ptr() for x in kept}) == len(kept) == len(expected) + 1
    assert {x.data_ptr() for x in expected} <= {x.data_ptr() for x in kept}
    assert sum(x.nbytes for x in kept) == sum(x.nbytes for x in expected) + lse_bytes


def test_nothing_is_kept_after_the_graph(leaves):
    gc.disable()
    try:
        inputs = [x * 1 for x in leaves()]
        references = [weakref.ref(x) for x in inputs]
        out, lse = flash_attn_func(*inputs, return_lse=True)
        (out.sum() + lse.sum()).backward()
        del inputs, out, lse
        assert not any(reference() is not None for reference in references)
    finally:
        gc.enable()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(leaves, use_reentrant):
    """Recomputing the forward gives the same gradients, to the bit."""

    def block(q, k, v):
        out, lse = flash_attn_func(q, k * 0.5, v, causal=True, deterministic=True, return_lse=True)
        return out * lse.transpose(1, 2)[..., None].to(out.dtype)

    inputs = leaves(20, 30)
    expected = torch.autograd.grad(block(*inputs).square().sum(), inputs)
    checkpoint(block, *inputs, use_reentrant=use_reentrant).square().sum().backward()
    assert_all_equal([x.grad for x in inputs], expected)


# ---- second derivatives --------------------------------------------------------------------------


def test_second_derivatives_are_refused(leaves):
    q, k, v = leaves()
    out, _ = flash_attn_func(q, k, v)
    dq, dk = torch.autograd.grad(out.square().sum(), (q, k), create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attn_sm120 has no second derivative"):
        torch.autograd.grad(dq.square().sum(), q, retain_graph=True)
    with pytest.raises(RuntimeError, match="flash_attn_sm120 has no second derivative"):
        (out.sum() + dk.square().sum()).backward()  # a penalty on the gradient


def test_create_graph_alone_is_no_error(leaves):
    """Other parts of a model may have second derivatives while this one is in the graph."""
    q, k, v = leaves()
    w = torch.randn_like(q, requires_grad=True)
    out, _ = flash_attn_func(q, k, v)
    (dw,) = torch.autograd.grad((out * w**2).sum(), w, create_graph=True)
    (ddw,) = torch.autograd.grad(dw.sum(), w)
    torch.testing.assert_close(ddw, 2 * out)


# ---- autocast ------------------------------------------------------------------------------------


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_sdpa(device, leaves, autocast_dtype):
    """fp32 becomes the dtype of autocast on the way in, and again fp32 on the way back."""
    inputs = leaves(30, 30, dtype=torch.float32)
    with torch.autocast(device.torch_device, dtype=autocast_dtype):
        out, _ = flash_attn_func(*inputs, causal=True)
        expected = sdpa(*inputs)
    assert out.dtype == expected.dtype == autocast_dtype
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, dout)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, inputs, dout), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, other, rtol=2e-2, atol=5e-2)


def test_autocast_reconciles_dtypes(device, leaves):
    """A rotary embedding or a norm in fp32 leaves q and k in fp32 and v in bf16."""
    q, k, _ = leaves(dtype=torch.float32)
    v = leaves(dtype=torch.bfloat16)[2]
    with pytest.raises(TypeError, match="v must be float32 like q, got bfloat16"):
        flash_attn_func(q, k, v)
    with torch.autocast(device.torch_device, dtype=torch.bfloat16):
        out, _ = flash_attn_func(q, k, v)
        with torch.no_grad():
            assert torch.equal(out, flash_attn_func(q, k, v)[0])
        out.sum().backward()  # in here, too
    assert out.dtype == v.grad.dtype == torch.bfloat16
    assert q.grad.dtype == k.grad.dtype == torch.float32


def test_autocast_leaves_alone_what_it_should():
    q, k, v = (torch.randn(1, 8, 2, 16) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert flash_attn_func(q, k, v)[0].dtype == torch.float32
        assert flash_attn_func(*(x.numpy() for x in (q, k, v)))[0].dtype == np.float32
        with pytest.raises(TypeError, match="got float64"):
            flash_attn_func(q.double(), k.double(), v.double())


# ---- training ------------------------------------------------------------------------------------


def losses(device, attention, steps=200):
    """Of learning to repeat a sequence of random tokens: nothing but attention can look it up."""
    torch.manual_seed(0)
    model = Transformer(attention).to(device.torch_device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curve = []
    for _ in range(steps):
        half = torch.randint(16, (16, 20))
        tokens = torch.cat([half, half], dim=1).to(device.torch_device)
        autocast = torch.autocast(device.torch_device, torch.bfloat16, device == CUDA)
        with autocast:
            predicted = model(tokens[:, :-1])[:, 20:]
        loss = F.cross_entropy(predicted.flatten(0, 1).float(), tokens[:, 21:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve)


def test_training_beside_sdpa(device):
    ours = losses(device, lambda q, k, v: flash_attn_func(q, k, v, causal=True)[0])
    theirs = losses(device, sdpa)
    assert ours[0] > 2.5 and ours[-20:].mean() < 0.5 * ours[0]
    near = 1e-3 if device == CPU else 0.2  # bf16 decides otherwise now and then
    torch.testing.assert_close(ours, theirs, rtol=near, atol=near)
