"""ALiBi: right in both directions, with everything that a call may have beside it."""

import pytest
import torch

from flash_attn_sm120 import (
    explain,
    explain_backward,
    fa2,
    flash_attn_func,
    flash_attn_varlen_func,
    ops,
)
from helpers.checks import assert_all_equal, attend, check_forward, check_gradients, dout_for
from helpers.devices import CPU, CUDA, EMULATOR, params_of
from helpers.paged import make_paged
from helpers.reference import attention_reference
from helpers.varlen import check as check_varlen
from helpers.varlen import check_forward as check_varlen_forward
from helpers.varlen import make_batch

MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (40, 9)},
    "far": {"window_size": (None, -20)},  # no query sees the key on its diagonal
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def slopes_of(device, heads, batch=None, factor=1.0):
    """Those of the paper, 2^(-8 i / heads); with a batch some of each sequence's own, strided."""
    slopes = factor * 2 ** (-8 * (torch.arange(heads) + 1) / heads)
    if batch is not None:
        slopes = torch.stack([slopes * (1 + b) for b in range(batch)], dim=1).t()
    return device.place(slopes)


# ---- the forward ---------------------------------------------------------------------------------


@pytest.mark.quick("cpu-*", "emulator-bf16-causal", "emulator-large-fp16-full")
@masks
def test_forward(device, dtype, make_qkv, mask):
    for seqlens in ((150, 150), (70, 190), (190, 70)):
        q, k, v = make_qkv(2, *seqlens, 4, 2, 64, dtype=dtype)
        check_forward(q, k, v, alibi_slopes=slopes_of(device, 4), **mask)
    check_forward(q, k, v, alibi_slopes=slopes_of(device, 4, batch=2), **mask)


@masks
def test_slopes_of_any_size(device, dtype, make_qkv, mask):
    """The sum of a row overflows where scores rise away from the diagonal: then its maximum is found again."""
    q, k, v = make_qkv(1, 150, 150, 4, 4, 64, dtype=dtype)
    for slopes in ([0.0, 1e-3, 1.0, 60.0], [-0.01, -0.5, -8.0, -60.0]):
        slopes = device.place(torch.tensor(slopes))
        check_forward(q, k, v, alibi_slopes=slopes, **mask)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30])
def test_softmax_scale(device, dtype, make_qkv, scale):
    """Slopes are not scaled."""
    q, k, v = make_qkv(1, 33, 65, 2, 2, 64, dtype=dtype)
    options = {"alibi_slopes": slopes_of(device, 2), "softmax_scale": scale, "causal": True}
    check_forward(q, k, v, **options)


@pytest.mark.parametrize("head_dims", [(128, 128), (72, 40), (64, 128), (256, 256)], ids=str)
def test_everything_at_once(device, make_qkv, head_dims):
    """After the cap, before the mask; with a sink, packed heads, and parts of the keys."""
    q, k, v = make_qkv(2, 5, 300, 6, 2, *head_dims, dtype=device.dtypes[0])
    options = {
        "alibi_slopes": slopes_of(device, 6, batch=2),
        "softcap": 3.0,
        "learnable_sink": device.place(torch.linspace(-2, 2, 6)),
        "window_size": (200, 2),
    }
    for pack_gqa, num_splits in ((False, 1), (True, 1), (True, 3)):
        check_forward(q, k, v, pack_gqa=pack_gqa, num_splits=num_splits, **options)


def test_queries_far_from_all_keys(device, make_qkv):
    q, k, v = make_qkv(1, 300, 20, 2, 2, 64, dtype=device.dtypes[0])
    check_forward(q, k, v, alibi_slopes=device.place(torch.tensor([1.0, 5.0])))


def test_no_key_is_seen(device, make_qkv):
    q, k, v = make_qkv(1, 40, 0, 2, 2, 64, dtype=device.dtypes[0])
    check_forward(q, k, v, alibi_slopes=slopes_of(device, 2))


# ---- the backward --------------------------------------------------------------------------------


on_each_device = pytest.mark.parametrize("device", params_of(CPU, EMULATOR, CUDA))


@pytest.mark.quick("*cpu*", "*causal-emulator")
@on_each_device
@masks
def test_backward(device, mask):
    for heads, softcap in (((4, 2), 0.0), ((2, 2), 2.0)):
        if mask and softcap and device is EMULATOR:
            continue
        q, k, v = (
            device.place(torch.randn(2, n, h, d).to(device.dtypes[0]))
            for n, h, d in ((70, heads[0], 64), (150, heads[1], 64), (150, heads[1], 40))
        )
        options = {"alibi_slopes": slopes_of(device, heads[0], batch=2), "softcap": softcap}
        check_gradients(q, k, v, dout_for(device, q, v), **options, **mask)


@on_each_device
def test_backward_with_a_sink_and_in_order(device):
    q, k, v = (device.place(torch.randn(1, n, 2, 64).to(device.dtypes[0])) for n in (150, 150, 150))
    options = {
        "alibi_slopes": device.place(torch.tensor([0.3, -0.1])),
        "learnable_sink": device.place(torch.tensor([0.5, -0.5])),
        "deterministic": True,
    }
    check_gradients(q, k, v, dout_for(device, q, v), causal=True, **options)


# ---- packed and paged ----------------------------------------------------------------------------


@pytest.mark.quick("*cpu*")
@on_each_device
@pytest.mark.parametrize("causal", [False, True])
def test_varlen(device, causal):
    """Each sequence has the diagonal of its own lengths, and, where they are given so, its slopes."""
    lengths = [70, 0, 33, 5], [40, 9, 90, 20]
    batch = make_batch(device, *lengths, dtype=device.dtypes[0])
    check_varlen(batch, alibi_slopes=slopes_of(device, 4), causal=causal)
    slopes = slopes_of(device, 4, batch=4)
    packed = flash_attn_varlen_func(
        *batch.inputs, **batch.lengths, alibi_slopes=slopes, causal=causal
    )[0]
    for b, (rows, keys) in enumerate(zip(*(s.slices() for s in batch.sides), strict=True)):
        q, k, v = batch.q[None, rows], batch.k[None, keys], batch.v[None, keys]
        if q.shape[1]:
            alone = flash_attn_func(q, k, v, alibi_slopes=slopes[b], causal=causal)[0]
            torch.testing.assert_close(packed[None, rows], alone, rtol=0.01, atol=0.01)


def test_pages(device):
    batch = make_paged(device, [70, 1, 0, 33], [150, 40, 9, 0], 16, dtype=device.dtypes[0])
    check_varlen_forward(batch, alibi_slopes=slopes_of(device, 4), causal=True)


# ---- doors ---------------------------------------------------------------------------------------


def randn(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.quick
def test_fa2():
    """FlashAttention-2's functions hand the slopes on."""
    q, k, v = randn(2, 9, 4, 16), randn(2, 13, 4, 16), randn(2, 13, 4, 16)
    slopes = slopes_of(CPU, 4, batch=2)
    expected = flash_attn_func(q, k, v, alibi_slopes=slopes, causal=True)[0]
    assert_all_equal([fa2.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)], [expected])
    kv = torch.stack([k, v], dim=2)
    out = fa2.flash_attn_kvpacked_func(q, kv, causal=True, alibi_slopes=slopes)
    assert_all_equal([out], [expected])
    qkv = randn(2, 9, 3, 4, 16)
    out = fa2.flash_attn_qkvpacked_func(qkv, alibi_slopes=slopes)
    assert_all_equal([out], [flash_attn_func(*qkv.unbind(2), alibi_slopes=slopes)[0]])
    cu_seqlens = torch.tensor([0, 9, 18], dtype=torch.int32)
    out = fa2.flash_attn_varlen_qkvpacked_func(
        qkv.flatten(0, 1), cu_seqlens, 9, alibi_slopes=slopes
    )
    alone = fa2.flash_attn_qkvpacked_func(qkv, alibi_slopes=slopes).flatten(0, 1)
    torch.testing.assert_close(out, alone)


@pytest.mark.quick
def test_kv_cache():
    q, cache = torch.randn(2, 3, 4, 16), torch.randn(2, 20, 2, 16)
    slopes = slopes_of(CPU, 4, batch=2)
    lengths = torch.tensor([7, 20], dtype=torch.int32)
    out = fa2.flash_attn_with_kvcache(
        q, cache, cache, cache_seqlens=lengths, causal=True, alibi_slopes=slopes
    )
    for b, n in enumerate(lengths.tolist()):
        keys = cache[b : b + 1, :n]
        expected, _ = attention_reference(
            q[b : b + 1], keys, keys, causal=True, alibi_slopes=slopes[b]
        )
        torch.testing.assert_close(out[b : b + 1].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_operators():
    inputs = *(randn(2, 9, 4, 16) for _ in range(3)), None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for slopes in (slopes_of(CPU, 4), slopes_of(CPU, 4, batch=2)):
        torch.library.opcheck(ops.FORWARD, (*inputs, slopes), {"causal": True}, test_utils=checks)
        options = {"causal": True, "alibi_slopes": slopes}
        expected = flash_attn_func(*inputs[:3], **options)[0]
        out = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True)(
            *inputs[:3], **options
        )[0]
        assert_all_equal([out], [expected])
        pairs = (torch.autograd.grad(x.sum(), inputs[:3]) for x in (out, expected))
        assert_all_equal(*pairs)


@pytest.mark.quick
def test_operator_with_lengths():
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    inputs = *(randn(9, 4, 16) for _ in range(3)), None
    lengths = cu_seqlens, cu_seqlens, None, None, None
    slopes = slopes_of(CPU, 4, batch=2)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        ops.VARLEN_FORWARD, (*inputs, *lengths, slopes), {"causal": True}, test_utils=checks
    )


@pytest.mark.quick
@pytest.mark.parametrize("batch", [None, 2])
def test_vmap(batch):
    q, k, v = (torch.randn(3, 2, 9, 4, 16) for _ in range(3))
    shared = slopes_of(CPU, 4, batch)
    own = torch.stack([shared, 2 * shared, 3 * shared])

    def attention(q, k, v, slopes):
        return flash_attn_func(q, k, v, alibi_slopes=slopes)[0]

    for slopes, in_dims in ((shared, (0, 0, 0, None)), (own, 0)):
        out = torch.vmap(attention, in_dims)(q, k, v, slopes)
        for i in range(3):
            alone = attention(q[i], k[i], v[i], slopes if in_dims else slopes[i])
            torch.testing.assert_close(out[i], alone)


@pytest.mark.quick
def test_variants():
    """Slopes are a constant of the main kernels alone; a call without them has the kernels that it had."""
    q = torch.empty(1, 256, 4, 64).bfloat16()
    for explained in (explain, explain_backward):
        plain = explained(q, q, q, causal=True, arch=120)
        plan = explained(q, q, q, causal=True, alibi_slopes=torch.empty(4), arch=120)
        assert plan.variant == plain.variant.replace("_right", "_right_alibi")
        others = [s.variant for s in plan.steps if s.variant != plan.variant]
        assert others == [s.variant for s in plain.steps if s.variant != plain.variant]


# ---- errors --------------------------------------------------------------------------------------

WRONG = {
    "heads": (
        torch.empty(3),
        ValueError,
        "alibi_slopes must have q's heads 4 in dimension 0, got 3",
    ),
    "batch": (torch.empty(3, 4), ValueError, "alibi_slopes must have q's batch 2 in dimension 0"),
    "heads of each": (torch.empty(2, 3), ValueError, "must have q's heads 4 in dimension 1, got 3"),
    "no dimension": (torch.tensor(0.5), ValueError, "alibi_slopes must have 2 dimensions, got 0"),
    "three": (torch.empty(1, 2, 4), ValueError, "alibi_slopes must have 2 dimensions, got 3"),
    "bfloat16": (
        torch.empty(4).bfloat16(),
        TypeError,
        "alibi_slopes must be float32, got bfloat16",
    ),
    "int64": (torch.arange(4), TypeError, "alibi_slopes must be .* got int64"),
    "float": (0.5, TypeError, "alibi_slopes cannot be read|alibi_slopes must be"),
}


@pytest.mark.quick
@pytest.mark.parametrize("slopes, error, message", WRONG.values(), ids=WRONG)
def test_wrong_slopes(slopes, error, message):
    q = torch.randn(2, 5, 4, 16)
    with pytest.raises(error, match=message):
        flash_attn_func(q, q, q, alibi_slopes=slopes)
    flash_attn_func(q, q, q, alibi_slopes=torch.zeros(4))


@pytest.mark.quick
def test_wrong_device():
    q = torch.randn(2, 5, 4, 16)
    with pytest.raises((ValueError, RuntimeError), match="alibi_slopes must be on q's device"):
        flash_attn_func(q, q, q, alibi_slopes=torch.empty(4, device="meta"))


@pytest.mark.quick
@pytest.mark.parametrize("device", params_of(CPU, CUDA))
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0}], ids=["all", "capped"])
@pytest.mark.parametrize("batch", [None, 2])
def test_slopes_that_are_learned(device, options, batch):
    """The gradient of slopes is that of autograd through the same scores in plain torch."""
    q, k, v = (device.place(torch.randn(2, n, 2, 16).half()) for n in (20, 40, 40))
    slopes = slopes_of(device, 2, batch).detach().requires_grad_()
    expected = slopes.detach().clone().requires_grad_()
    flash_attn_func(q, k, v, alibi_slopes=slopes, **options)[0].float().square().sum().backward()
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / 4
    distance = torch.arange(20, device=q.device)[:, None] + 20 - torch.arange(40, device=q.device)
    if options:
        scores = 2 * (scores / 2).tanh()
    scores = scores - expected.expand(2, 2)[:, :, None, None] * distance.abs()
    if options:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    weights = scores.softmax(-1)
    torch.einsum("bhqk,bkhd->bqhd", weights, v.float()).square().sum().backward()
    torch.testing.assert_close(slopes.grad, expected.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.quick
def test_slopes_are_learned_beside_a_score_mod():
    """The mod comes first, as in calls without gradients, which have the built-in ALiBi."""
    q = torch.randn(1, 24, 2, 16)
    slopes = torch.tensor([0.3, -0.1], requires_grad=True)
    out = flash_attn_func(q, q, q, alibi_slopes=slopes, score_mod=lambda s, b, h, i, j: 2 * s)[0]
    with torch.no_grad():
        expected = flash_attn_func(q, q, q, alibi_slopes=slopes, softmax_scale=0.5)[0]
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert slopes.grad.abs().min() > 0


@pytest.mark.quick
def test_slopes_have_no_gradient():
    q, slopes = torch.randn(2, 5, 4, 16), torch.ones(4, requires_grad=True)
    cache = q.clone()
    for call in (
        lambda: ops.FORWARD(q, q, q, None, slopes),
        lambda: fa2.flash_attn_with_kvcache(q, cache, cache, alibi_slopes=slopes),
    ):
        with pytest.raises(NotImplementedError, match="gradient"):
            call()
    with torch.no_grad():
        assert_all_equal(
            attend(q, q, q, alibi_slopes=slopes), attend(q, q, q, alibi_slopes=slopes.detach())
        )
