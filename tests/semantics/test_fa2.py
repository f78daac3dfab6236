"""FlashAttention-2's functions: names, order, returns, against the functions that they stand on."""

import inspect
import math

import pytest
import torch

import flash_attn_sm120
from flash_attn_sm120 import fa2
from flash_attn_sm120.fa2 import bert_padding
from helpers.checks import assert_all_equal
from helpers.devices import CPU, CUDA
from helpers.reference import attention_reference
from helpers.varlen import on

pytestmark = pytest.mark.quick

TAIL = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
SIGNATURES = {
    "flash_attn_func": "q k v " + TAIL + " learnable_sink",
    "flash_attn_qkvpacked_func": "qkv " + TAIL,
    "flash_attn_kvpacked_func": "q kv " + TAIL,
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    + TAIL
    + " block_table learnable_sink",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen " + TAIL,
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    + TAIL,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(fa2, name)).parameters
    assert list(parameters) == SIGNATURES[name].split()
    by_keyword = [n for n, p in parameters.items() if p.kind.name == "KEYWORD_ONLY"]
    assert by_keyword in ([], ["learnable_sink"])  # what FlashAttention-2 has not got
    assert parameters["window_size"].default == (-1, -1)
    defaults = [parameters[option].default for option in TAIL.split()]
    assert defaults == [0.0, None, False, (-1, -1), 0.0, None, False, False]


def randn(device, *shape):
    return device.place(torch.randn(*shape).to(device.dtypes[0]))


def make(device, seqlen_q=9, seqlen_k=13, dim=16):
    return (
        randn(device, 2, seqlen_q, 4, dim),
        randn(device, 2, seqlen_k, 2, dim),
        randn(device, 2, seqlen_k, 2, dim),
    )


WINDOWS = {
    "none": ((-1, -1), (None, None)),
    "left": ((3, -1), (3, None)),
    "right": ((-1, 2), (None, 2)),
    "both": ((3, 0), (3, 0)),
}


@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
@pytest.mark.parametrize("window", WINDOWS)
def test_dense(device, window):
    q, k, v = make(device)
    theirs, ours = WINDOWS[window]
    out, lse, mask = fa2.flash_attn_func(
        q, k, v, 0.0, 0.3, False, theirs, 5.0, None, False, return_attn_probs=True
    )
    expected = flash_attn_sm120.flash_attn_func(
        q, k, v, softmax_scale=0.3, window_size=ours, softcap=5.0, return_lse=True
    )
    assert_all_equal((out, lse), expected)
    assert mask.shape == (0,) and mask.dtype == q.dtype  # as FlashAttention-2's without dropout
    alone = fa2.flash_attn_func(q, k, v, softmax_scale=0.3, window_size=theirs, softcap=5.0)
    assert_all_equal([alone], [out])


@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
def test_sink(device):
    q, k, v = make(device)
    sink = randn(device, 4)
    expected, _ = flash_attn_sm120.flash_attn_func(q, k, v, learnable_sink=sink)
    assert_all_equal([fa2.flash_attn_func(q, k, v, learnable_sink=sink)], [expected])
    ends_q, ends_k = on(device, [0, 9, 18]), on(device, [0, 13, 26])
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    packed = fa2.flash_attn_varlen_func(*rows, ends_q, ends_k, 9, 13, learnable_sink=sink)
    torch.testing.assert_close(packed.view_as(expected), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
def test_lse_of_queries_without_keys_is_plus_infinity(device):
    q, k, v = make(device, seqlen_q=13, seqlen_k=9)
    out, lse, _ = fa2.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    expected = flash_attn_sm120.flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert (lse[:, :, :4] == math.inf).all() and (expected[1][:, :, :4] == -math.inf).all()
    assert_all_equal((out, lse[:, :, 4:]), (expected[0], expected[1][:, :, 4:]))


@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
def test_packed_projections(device):
    """One tensor in, one gradient out."""
    qkv, kv = randn(device, 2, 9, 3, 4, 16), randn(device, 2, 13, 2, 2, 16)
    q, _, _ = make(device)
    total, rows = qkv.flatten(0, 1), kv.flatten(0, 1)
    ends_q, ends_k = on(device, [0, 9, 18]), on(device, [0, 13, 26])
    dense = {"causal": True}
    cases = [
        (fa2.flash_attn_qkvpacked_func, (qkv,), qkv.unbind(2), dense),
        (fa2.flash_attn_kvpacked_func, (q, kv), (q, *kv.unbind(2)), dense),
        (
            lambda x, **o: fa2.flash_attn_varlen_qkvpacked_func(x, ends_q, 9, **o),
            (total,),
            qkv.unbind(2),
            dense,
        ),
        (
            lambda q, x, **o: fa2.flash_attn_varlen_kvpacked_func(q, x, ends_q, ends_k, 9, 13, **o),
            (q.flatten(0, 1), rows),
            (q, *kv.unbind(2)),
            dense,
        ),
    ]
    for function, given, plain, options in cases:
        inputs = [x.detach().requires_grad_() for x in given]
        out = function(*inputs, **options)
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, inputs, dout)
        parts = [x.detach().requires_grad_() for x in plain]
        expected, _ = flash_attn_sm120.flash_attn_func(*parts, **options)
        expected_grads = torch.autograd.grad(expected, parts, dout.view_as(expected))
        assert_all_equal([out.view_as(expected)], [expected])
        packed = grads[-1].unbind(-3)
        found = [*grads[:-1], *packed]
        assert_all_equal(
            [x.reshape(y.shape) for x, y in zip(found, expected_grads, strict=True)],
            expected_grads,
        )


@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
def test_varlen(device):
    q, k, v = (x.flatten(0, 1) for x in make(device))
    ends_q, ends_k = on(device, [0, 5, 18]), on(device, [0, 13, 26])
    expected = flash_attn_sm120.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, window_size=(4, 2), return_lse=True
    )
    for bounds in ((13, 13), (torch.tensor(13), torch.tensor(13)), (None, None)):
        out, lse, _ = fa2.flash_attn_varlen_func(
            q, k, v, ends_q, ends_k, *bounds, window_size=(4, 2), return_attn_probs=True
        )
        assert_all_equal((out, lse), expected)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
def test_varlen_of_pages(device):
    """The lengths of keys are those of cu_seqlens_k, as in FlashAttention-2."""
    q, k, v = make(device, seqlen_k=16)
    q, pages = q.flatten(0, 1), [x.reshape(8, 4, 2, 16) for x in (k, v)]
    table = on(device, [[0, 1, 2, 3], [4, 5, 6, 7]])
    ends_q, ends_k = on(device, [0, 5, 18]), on(device, [0, 13, 20])
    out = fa2.flash_attn_varlen_func(
        q, *pages, ends_q, ends_k, 13, 13, causal=True, block_table=table
    )
    packed = [torch.cat([x[0, :13], x[1, :7]]) for x in (k, v)]
    expected = fa2.flash_attn_varlen_func(q, *packed, ends_q, ends_k, 13, 13, causal=True)
    assert_all_equal([out], [expected])


@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
@pytest.mark.parametrize("dim", [5, 59])
def test_any_head_dim(device, dim):
    q, k, v = (x.requires_grad_() for x in make(device, dim=dim))
    out, lse, _ = fa2.flash_attn_func(q, k, v, return_attn_probs=True)
    ref, ref_lse = attention_reference(q, k, v)
    tolerance = 1e-5 if q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.to(ref.dtype), ref, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.to(ref_lse.dtype), ref_lse, atol=tolerance, rtol=0)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    expected = torch.autograd.grad(ref, (q, k, v), dout.to(ref.dtype))
    for grad, x in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, x.to(grad.dtype), atol=4 * tolerance, rtol=0)


def test_gradients_flow_through_lse():
    q, k, v = (x.requires_grad_() for x in make(CPU, seqlen_q=13, seqlen_k=9))
    _, lse, _ = fa2.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    _, ref = attention_reference(q, k, v, causal=True)
    weights = torch.randn_like(lse[:, :, 4:])
    (found,) = torch.autograd.grad((lse[:, :, 4:] * weights).sum(), q)
    (expected,) = torch.autograd.grad((ref[:, :, 4:] * weights).sum(), q)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


BAD = {
    "dropout": (lambda q, k, v: fa2.flash_attn_func(q, k, v, 0.1), NotImplementedError, r"fa2.flash_attn_func does not support dropout_p yet"),
    "alibi": (lambda q, k, v: fa2.flash_attn_func(q, k, v, alibi_slopes=q[0, 0, :, 0]), NotImplementedError, "does not support alibi_slopes yet"),
    "qkv": (lambda q, k, v: fa2.flash_attn_qkvpacked_func(q), ValueError, r"qkv must have 5 dimensions, \(batch, seqlen, 3, heads, head_dim\), got \(2, 9, 4, 16\)"),
    "kv": (lambda q, k, v: fa2.flash_attn_varlen_kvpacked_func(q, k, None, None, 1, 1), ValueError, r"kv must have 4 dimensions, \(total, 2, heads, head_dim\), got \(2, 13, 2, 16\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_calls(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(*make(CPU))


# ---- bert_padding --------------------------------------------------------------------------------


def test_bert_padding_there_and_back():
    hidden = torch.randn(3, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    unused = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(hidden, mask)
    assert cu_seqlens.tolist() == [0, 2, 2, 6] and cu_seqlens.dtype == torch.int32
    assert (longest, used.tolist(), indices.tolist()) == (4, [2, 0, 4], [0, 1, 10, 11, 12, 13])
    back = bert_padding.pad_input(rows, indices, 3, 5)
    assert torch.equal(back, hidden * mask[:, :, None, None])
    (grad,) = torch.autograd.grad(back.sum(), hidden)
    assert torch.equal(grad, mask[:, :, None, None].expand_as(hidden).double())
    rows, _, cu_seqlens, longest, used = bert_padding.unpad_input(hidden, mask, unused)
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 3, 8], 5, [2, 0, 4])
    assert len(rows) == 8


def test_bert_padding_gradients():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([2, 0])
    assert torch.autograd.gradcheck(lambda x: bert_padding.index_first_axis(x, indices), x)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bert_padding.index_put_first_axis(x, indices, 4), x)
