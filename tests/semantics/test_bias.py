"""An additive bias: right in both directions, with everything that a call may have beside it."""

import math

import pytest
import torch

from flash_attn_sm120 import (
    _C,
    explain,
    explain_backward,
    flash_attn_func,
    flash_attn_varlen_func,
    ops,
)
from helpers.checks import (
    assert_all_equal,
    attend,
    check_forward,
    check_gradients,
    dout_for,
    gradients_of,
)
from helpers.devices import CPU, CUDA, EMULATOR, params_of
from helpers.dropout import factors
from helpers.reference import assert_gradients_close

MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (40, 9)},
    "far": {"window_size": (None, -20)},  # the last queries see fewer keys than there are
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)

# Sizes of the batch, the heads and the queries of a bias: all, or one for all.
SHAPES = {
    "each": (2, 4, None),
    "heads": (1, 4, None),
    "batch": (2, 1, None),
    "rows": (1, 1, None),
    "keys": (1, 1, 1),
    "keys of each": (2, 4, 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def bias_of(device, shape, q, k, dtype=None, factor=3.0):
    """Random numbers, some of them -inf, in rows that have NaN before and behind them."""
    rows = shape[2] or q.shape[1]
    bias = torch.full((*shape[:2], rows + 2, k.shape[1] + 4), math.nan)
    inner = bias[:, :, 1:-1, 2:-2]
    inner.copy_(factor * torch.randn(inner.shape))
    inner[torch.rand(inner.shape) < 0.1] = -math.inf
    return device.place(bias.to(q.dtype if dtype is None else dtype))[:, :, 1:-1, 2:-2]


# ---- the forward ---------------------------------------------------------------------------------


@pytest.mark.quick("cpu-*", "emulator-bf16-causal", "emulator-large-fp16-full")
@masks
def test_forward(device, dtype, make_qkv, mask):
    """Keys in pairs, and an odd number of them."""
    for seqlens in ((150, 150), (70, 191), (190, 70)):
        q, k, v = make_qkv(2, *seqlens, 4, 2, 64, dtype=dtype)
        check_forward(q, k, v, attn_bias=bias_of(device, (2, 4, None), q, k), **mask)
    bias = bias_of(device, (2, 4, None), q, k, torch.float32)
    check_forward(q, k, v, attn_bias=bias, **mask)


@shapes
def test_broadcast(device, make_qkv, shape):
    q, k, v = make_qkv(2, 40, 130, 4, 2, 64, dtype=device.dtypes[0])
    bias = bias_of(device, shape, q, k)
    out = check_forward(q, k, v, attn_bias=bias)
    expanded = bias.expand(2, 4, 40, 130)  # strides are 0
    assert_all_equal(attend(q, k, v, attn_bias=expanded), out)
    assert_all_equal(attend(q, k, v, attn_bias=bias.clone()), out)  # of other strides
    flipped = bias.flip(2).clone()
    assert_all_equal(attend(q.flip(1), k, v, attn_bias=flipped)[0].flip(1)[None], out[0][None])


@pytest.mark.quick("cpu*", "emulator")
def test_hidden_keys(device, make_qkv):
    """-inf and the lowest numbers hide keys: at either end, all but one, and all of a query."""
    q, k, v = make_qkv(1, 40, 200, 4, 4, 64, dtype=device.dtypes[0])
    bias = torch.zeros(1, 4, 40, 200)
    bias[:, 0, :, 77:] = -math.inf
    bias[:, 1, :, :150] = torch.finfo(torch.bfloat16).min
    bias[:, 2] = -math.inf
    bias[:, 2, :, 33] = 0
    bias[:, 3, ::2] = -math.inf
    out, lse = check_forward(q, k, v, attn_bias=device.place(bias))
    assert (out[:, ::2, 3] == 0).all() and (lse[:, 3, ::2] == -math.inf).all()
    lowest = torch.full((1, 1, 1, 200), torch.finfo(torch.bfloat16).min)
    out, lse = attend(q, k, v, attn_bias=device.place(lowest))
    assert (out == 0).all() and (lse == -math.inf).all()


def test_sizes(device, make_qkv):
    """Scores that grow anywhere, by as much as float32 holds."""
    q, k, v = make_qkv(1, 40, 300, 2, 2, 64, dtype=device.dtypes[0])
    for factor in (100.0, 1e4, 1e30):
        bias = device.place(factor * torch.randn(1, 2, 40, 300))
        check_forward(q, k, v, attn_bias=bias)
    rising = device.place(torch.linspace(-4e4, 0, 300).flip(0).view(1, 1, 1, 300))
    check_forward(q, k, v, attn_bias=rising, causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30])
def test_softmax_scale(device, dtype, make_qkv, scale):
    """A bias is not scaled."""
    q, k, v = make_qkv(1, 33, 65, 2, 2, 64, dtype=dtype)
    bias = bias_of(device, (1, 2, None), q, k)
    check_forward(q, k, v, attn_bias=bias, softmax_scale=scale, causal=True)


@pytest.mark.parametrize("head_dims", [(128, 128), (72, 40), (64, 128), (256, 256)], ids=str)
def test_everything_at_once(device, make_qkv, head_dims):
    """After the cap and ALiBi, before the mask; with a sink, packed heads, and parts of the keys."""
    q, k, v = make_qkv(2, 5, 300, 6, 2, *head_dims, dtype=device.dtypes[0])
    options = {
        "alibi_slopes": device.place(torch.linspace(-0.1, 0.2, 6)),
        "softcap": 3.0,
        "learnable_sink": device.place(torch.linspace(-2, 2, 6)),
        "window_size": (200, 2),
        "attn_bias": bias_of(device, (2, 6, None), q, k),
    }
    for pack_gqa, num_splits in ((False, 1), (True, 1), (True, 3)):
        check_forward(q, k, v, pack_gqa=pack_gqa, num_splits=num_splits, **options)


def test_parts_without_keys(device, make_qkv):
    """Parts of which every key is hidden."""
    q, k, v = make_qkv(1, 3, 600, 2, 2, 64, dtype=device.dtypes[0])
    bias = torch.zeros(1, 1, 3, 600)
    bias[..., 100:] = -math.inf
    check_forward(q, k, v, attn_bias=device.place(bias), num_splits=3)


def test_no_key_and_no_query(device, make_qkv):
    for rows, keys in ((40, 0), (0, 40)):
        q, k, v = make_qkv(1, rows, keys, 2, 2, 64, dtype=device.dtypes[0])
        check_forward(q, k, v, attn_bias=device.place(torch.zeros(1, 2, rows, keys)))


# ---- the backward --------------------------------------------------------------------------------


on_each_device = pytest.mark.parametrize("device", params_of(CPU, EMULATOR, CUDA))


def make(device, *sizes, dtype=None):
    dtype = device.dtypes[0] if dtype is None else dtype
    return [device.place(torch.randn(x).to(dtype)) for x in sizes]


@pytest.mark.quick("*cpu*", "*causal-emulator")
@on_each_device
@masks
def test_backward(device, mask):
    q, k, v = make(device, (2, 70, 4, 64), (2, 151, 2, 64), (2, 151, 2, 40))
    bias = bias_of(device, (2, 4, None), q, k)
    check_gradients(q, k, v, dout_for(device, q, v), attn_bias=bias, **mask)


@pytest.mark.quick("*cpu")
@on_each_device
@shapes
def test_shared_gradients(device, shape):
    """The gradient of an element that several scores share is the sum of theirs."""
    q, k, v = make(device, (2, 40, 4, 64), (2, 130, 2, 64), (2, 130, 2, 64))
    bias = bias_of(device, shape, q, k, torch.float32)
    check_gradients(q, k, v, dout_for(device, q, v), attn_bias=bias)


@on_each_device
def test_backward_with_dropout_and_a_sink(device):
    seed, p = (2**62 + 5, 17), 0.3
    q, k, v = make(device, (1, 40, 2, 64), (1, 100, 2, 64), (1, 100, 2, 64))
    options = {
        "attn_bias": bias_of(device, (1, 2, None), q, k),
        "learnable_sink": device.place(torch.tensor([0.5, -0.5])),
        "alibi_slopes": device.place(torch.tensor([0.3, -0.1])),
    }
    dout = dout_for(device, q, v)
    given = {"dropout_p": p, "dropout_seed": device.place(torch.tensor(seed))}
    gradients = gradients_of(q, k, v, dout, **options, **given)
    weights = device.place(factors(seed, p, range(1), 2, 40, 100))
    assert_gradients_close(gradients, q, k, v, dout, **options, dropout=weights)


@on_each_device
def test_backward_without_the_gradient(device):
    """The others are the same, to the bit."""
    q, k, v = make(device, (1, 40, 2, 64), (1, 100, 2, 64), (1, 100, 2, 64))
    bias, dout = bias_of(device, (1, 1, None), q, k), dout_for(device, q, v)
    options = {"attn_bias": bias, "softcap": 2.0}
    out, lse = _C.forward(q, k, v, return_lse=True, **options)
    alone = _C.backward(dout, q, k, v, out, lse, None, deterministic=True, **options)
    assert len(alone) == 4
    if device is CPU:
        assert_all_equal(check_gradients(q, k, v, dout, **options)[:3], alone[:3])


@on_each_device
def test_hidden_queries_have_no_gradient(device):
    """Where -inf hides all keys of a query; and where a large number does, no gradient is NaN."""
    q, k, v = make(device, (1, 40, 2, 64), (1, 100, 2, 64), (1, 100, 2, 64))
    bias = torch.randn(1, 2, 40, 100)
    bias[:, :, 7:20] = -math.inf
    gradients = check_gradients(q, k, v, dout_for(device, q, v), attn_bias=device.place(bias))
    assert (gradients[0][:, 7:20] == 0).all() and (gradients[3][:, :, 7:20] == 0).all()
    for number in (-1e9, -1e30, torch.finfo(torch.float32).min):
        bias[:, :, 7:20] = number
        for x in gradients_of(q, k, v, dout_for(device, q, v), attn_bias=device.place(bias)):
            assert x.isfinite().all(), number


@on_each_device
def test_deterministic(device):
    q, k, v = make(device, (1, 140, 2, 64), (1, 150, 2, 64), (1, 150, 2, 64))
    bias, dout = bias_of(device, (1, 2, None), q, k), dout_for(device, q, v)
    options = {"attn_bias": bias, "deterministic": True}
    assert_all_equal(
        check_gradients(q, k, v, dout, **options), gradients_of(q, k, v, dout, **options)
    )


@pytest.mark.quick("*cpu", "*emulator")
@on_each_device
@pytest.mark.parametrize("by_switch", [False, True])
def test_deterministic_sums(device, by_switch):
    """Of a bias that scores share: its gradient is that of all scores, summed up in order."""
    q, k, v = make(device, (2, 40, 2, 64), (2, 60, 2, 64), (2, 60, 2, 64))
    bias = device.place(torch.randn(1, 2, 1, 60, dtype=q.dtype))
    inputs = [x.requires_grad_() for x in (q, k, v, bias)]
    dout = dout_for(device, q, v)
    out = flash_attn_func(*inputs[:3], attn_bias=bias, deterministic=not by_switch)[0]
    torch.use_deterministic_algorithms(by_switch)
    try:
        results = [torch.autograd.grad(out, inputs, dout, retain_graph=True) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert_all_equal(*results)
    assert results[0][3].dtype == bias.dtype and results[0][3].shape == bias.shape
    results = [x.float() if x is results[0][3] else x for x in results[0]]
    options = {"attn_bias": bias.detach()}
    assert_gradients_close(results, *(x.detach() for x in (q, k, v)), dout, **options)


@pytest.mark.quick
@pytest.mark.parametrize("device", params_of(EMULATOR, CUDA))
def test_gradients_that_kernels_do_not_have(device):
    q = device.place(torch.randn(2, 16, 2, 64).bfloat16())
    bias = device.place(torch.zeros(2, 1, 16, 16))
    for options, name in (
        ({"deterministic": True}, "deterministic"),
        ({"softcap": 2.0}, "softcap"),
    ):
        with pytest.raises(NotImplementedError, match=f"gradient of .*attn_bias.*{name}"):
            gradients_of(q, q, q, q, attn_bias=bias, **options)
    gradients_of(q, q, q, q, attn_bias=bias)


# ---- torch ---------------------------------------------------------------------------------------


@pytest.fixture
def compiled_anew():
    """Leaves no compiled functions to other tests: of one torch compiles no more than eight."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def randn(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.quick
@pytest.mark.parametrize("compiled", [False, True])
def test_autograd(compiled, compiled_anew):
    q, k, v = randn(2, 9, 4, 16), randn(2, 13, 2, 16), randn(2, 13, 2, 16)
    function = flash_attn_func
    if compiled:
        function = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        bias = torch.randn(1, 4, 9, 13, dtype=dtype, requires_grad=True)
        out = function(*inputs, attn_bias=bias)[0]
        gradients = torch.autograd.grad(out.float().square().sum(), [*inputs, bias])
        assert gradients[3].dtype == dtype and gradients[3].shape == bias.shape
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.double().transpose(1, 2) for x in inputs), attn_mask=bias.double(), enable_gqa=True
        )
        expected = torch.autograd.grad(expected.square().sum(), [*inputs, bias])
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(gradients, expected, rtol=tolerance, atol=tolerance)
        assert function(*inputs, attn_bias=bias.detach())[0].requires_grad
    assert function(q.detach(), k.detach(), v.detach(), attn_bias=bias.float())[0].requires_grad


@pytest.mark.quick
def test_operators():
    q, bias = randn(2, 9, 4, 16), randn(1, 4, 9, 9)
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
    )
    inputs = q, q, q, None, None, None
    torch.library.opcheck(ops.FORWARD, (*inputs, bias), {"causal": True}, test_utils=checks)
    with torch.no_grad():
        out, lse = ops.FORWARD(*inputs, bias)
        arguments = torch.ones_like(out), None, q, q, q, None, out, lse, None, None, bias
    results = ops.BIAS_BACKWARD(*arguments)
    assert len(results) == 5 and results[4].shape == bias.shape
    torch.library.opcheck(
        ops.BIAS_BACKWARD,
        tuple(x if x is None else x.detach() for x in arguments),
        test_utils=checks[:3],
    )


@pytest.mark.quick
def test_autocast(compiled_anew):
    q, bias = randn(2, 9, 4, 16), randn(1, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (bias, bias.half()):
            assert flash_attn_func(q, q, q, attn_bias=given)[0].dtype == torch.bfloat16
            compiled = torch.compile(flash_attn_func, backend="aot_eager")
            assert compiled(q, q, q, attn_bias=given)[0].dtype == torch.bfloat16


@pytest.mark.quick
def test_vmap():
    q, bias = torch.randn(3, 2, 9, 4, 16), torch.randn(3, 1, 4, 9, 9)
    with pytest.raises(NotImplementedError, match="vmap with attn_bias"):
        torch.vmap(lambda q, bias: flash_attn_func(q, q, q, attn_bias=bias)[0])(q, bias)


# ---- plans ---------------------------------------------------------------------------------------


@pytest.mark.quick
def test_variants():
    """A constant of the main kernels alone; pairs where they are aligned, in the forward."""
    q = torch.empty(1, 256, 4, 64).bfloat16()
    bias = torch.empty(1, 4, 256, 256)
    plain = explain(q, q, q, causal=True, arch=120)
    for given, code in (
        (bias, "_bias32x2"),
        (bias.bfloat16(), "_biasx2"),
        (torch.empty(1, 4, 256, 257)[..., 1:], "_bias32"),
        (torch.empty(1, 4, 256, 258).bfloat16()[..., 1:-1], "_bias"),
    ):
        plan = explain(q, q, q, causal=True, attn_bias=given, arch=120)
        assert plan.variant == plain.variant.replace("_right", f"_right{code}")
    plan = explain_backward(q, q, q, attn_bias=bias, arch=120)
    assert plan.variant.endswith("_bias32") and "attn_bias" not in plan.reasons
    plan = explain_backward(q, q, q, attn_bias=bias, bias_gradient=True, arch=120)
    assert plan.variant.endswith("_bias32_dbias") and "is one block's" in plan.reasons["attn_bias"]
    plan = explain_backward(q, q, q, attn_bias=bias[:, :1], bias_gradient=True, arch=120)
    assert "any order" in plan.reasons["attn_bias"]


# ---- errors --------------------------------------------------------------------------------------

WRONG = {
    "batch": (torch.empty(3, 4, 5, 5), ValueError, "size 1 or q's batch 2 in dimension 0, got 3"),
    "heads": (torch.empty(2, 2, 5, 5), ValueError, "size 1 or q's heads 4 in dimension 1, got 2"),
    "rows": (torch.empty(2, 4, 4, 5), ValueError, "size 1 or q's seqlen 5 in dimension 2, got 4"),
    "keys": (torch.empty(2, 4, 5, 1), ValueError, "k's seqlen 5 in dimension 3, got 1"),
    "two dimensions": (torch.empty(5, 5), ValueError, "attn_bias must have 4 dimensions, got 2"),
    "half": (torch.empty(1, 1, 5, 5).half(), TypeError, "must be float32.* got float16"),
    "int64": (torch.ones(1, 1, 5, 5).long(), TypeError, "attn_bias must be .* got int64"),
    "bool": (torch.ones(1, 1, 5, 5).bool(), TypeError, "attn_bias must be|attn_bias cannot be"),
    "transposed": (
        torch.empty(1, 1, 5, 5).mT,
        ValueError,
        "contiguous in its last .* got stride 5",
    ),
    "float": (0.5, TypeError, "attn_bias cannot be read|attn_bias must be"),
}


@pytest.mark.quick
@pytest.mark.parametrize("bias, error, message", WRONG.values(), ids=WRONG)
def test_wrong_bias(bias, error, message):
    q = torch.randn(2, 5, 4, 16)
    with pytest.raises(error, match=message):
        flash_attn_func(q, q, q, attn_bias=bias)
    flash_attn_func(q, q, q, attn_bias=torch.zeros(1, 1, 1, 5))


@pytest.mark.quick
def test_wrong_device():
    q = torch.randn(2, 5, 4, 16)
    with pytest.raises((ValueError, RuntimeError), match="attn_bias must be on q's device"):
        flash_attn_func(q, q, q, attn_bias=torch.empty(1, 1, 5, 5, device="meta"))


@pytest.mark.quick
def test_lengths():
    q, bias = torch.randn(2, 5, 4, 16), torch.zeros(1, 1, 5, 5)
    lengths = torch.tensor([5, 3], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="attn_bias"):
        flash_attn_func(q, q, q, seqused_k=lengths, attn_bias=bias)
    with pytest.raises(NotImplementedError, match="attn_bias"):
        flash_attn_varlen_func(q, q, q, seqused_k=lengths, attn_bias=bias)
    with pytest.raises(NotImplementedError, match="attn_bias is not supported with lengths"):
        explain(q, q, q, seqused_k=lengths, attn_bias=bias)
