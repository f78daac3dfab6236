"""The backward of the extension: right for every shape, mask, layout and number."""

import math

import pytest
import torch
from torch.nn import functional as F

from flash_attn_sm120 import explain_backward
from helpers import cases
from helpers.cases import EDGES, MASKS, WINDOWED_SEQLENS
from helpers.checks import assert_all_equal, check_gradients, dlse_for, dout_for, gradients_of
from helpers.devices import CPU, CUDA, EMULATOR, params_of
from helpers.reference import (
    assert_gradients_close,
    attention_reference,
    gradient_reference,
    max_finite,
    visible_keys,
)

pytestmark = pytest.mark.usefixtures("outputs_full_of_nan")


@pytest.fixture(params=params_of(CPU, EMULATOR, CUDA))
def device(request):
    return request.param


def check(device, q, k, v, dout=None, dlse=None, **options):
    """With a random dout unless there is one."""
    dout = dout_for(device, q, v) if dout is None else dout
    return check_gradients(q, k, v, dout, dlse, **options)


# ---- the oracle itself ---------------------------------------------------------------------------

EVERYTHING = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "softcap": {"softcap": 2.0, "causal": True},
    "sink": {"learnable_sink": torch.tensor([0.3, -1.0]), "window_size": (None, -3)},
}


@pytest.mark.quick
@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
def test_reference_agrees_with_finite_differences(options):
    q, k, v = (torch.randn(1, n, h, 4, dtype=torch.float64) for n, h in ((6, 2), (9, 1), (9, 1)))
    options = dict(options)
    sink = options.pop("learnable_sink", torch.zeros(0)).double()
    inputs = [x.requires_grad_() for x in (q, k, v, sink)]

    def attention(q, k, v, sink):
        sink = sink if sink.numel() else None
        out, lse = attention_reference(q, k, v, learnable_sink=sink, **options)
        return out, lse[lse > -math.inf]

    assert torch.autograd.gradcheck(attention, inputs, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_agrees_with_sdpa(causal):
    q, k, v = torch.randn(2, 33, 8, 40), torch.randn(2, 50, 2, 40), torch.randn(2, 50, 2, 16)
    dout = torch.randn(2, 33, 8, 16)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    mask = visible_keys(torch.arange(33) + 17, 50, None, 0 if causal else None)
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in inputs), attn_mask=mask, enable_gqa=True
    )
    expected = torch.autograd.grad(out.transpose(1, 2), inputs, dout.double())
    for gradient, other in zip(
        gradient_reference(q, k, v, dout, causal=causal), expected, strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize(
    "wrong",
    [
        {"causal": False, "window_size": (None, 1)},
        {"window_size": (30, None)},
        {"softcap": 5.0},
        {"learnable_sink": torch.zeros(4)},
        {"dlse": torch.zeros(2, 4, 64)},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_rule_notices_what_is_wrong(wrong):
    """The tolerance is not so wide that it lets a wrong mask, cap, sink or dlse through."""
    q, k, v, dout = (torch.randn(2, 64, 4, 64).bfloat16() for _ in range(4))
    arguments = {"dlse": torch.randn(2, 4, 64), "causal": True}
    right = gradient_reference(q, k, v, dout, **arguments)
    assert_gradients_close([x.bfloat16() for x in right], q, k, v, dout, **arguments)
    for i in range(2):  # dlse does not reach dv
        mixed = list(right)
        mixed[i] = gradient_reference(q, k, v, dout, **(arguments | wrong))[i]
        with pytest.raises(AssertionError, match=("dq, ", "dk, ")[i]):
            assert_gradients_close([x.bfloat16() for x in mixed], q, k, v, dout, **arguments)


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.quick("cpu-fp32-14to2-72x40")
@cases.head_dims
@cases.heads
def test_heads_and_head_dims(device, dtype, make_qkv, heads, head_dims):
    if device == EMULATOR and heads != (4, 2) and head_dims != (64, 64):
        pytest.skip("one ratio of heads for each head dim is enough for the emulator")
    check(device, *make_qkv(2, 47, 83, *heads, *head_dims, dtype=dtype), causal=heads[0] % 2 == 0)


@cases.head_dim
def test_every_head_dim(device, make_qkv, head_dim):
    if device == EMULATOR:
        pytest.skip("a kernel to compile for each: on the emulator HEAD_DIMS have to do")
    check(device, *make_qkv(1, 40, 70, 2, 1, head_dim, 264 - head_dim), causal=True)
    check(device, *make_qkv(1, 40, 70, 2, 1, head_dim, head_dim))


@pytest.mark.quick("cpu-fp32-65-*", "*-bf16-65-causal")
@cases.causal
@cases.seqlen_q
def test_lengths(device, dtype, make_qkv, seqlen_q, causal):
    """Pairs of lengths; with more queries than keys the first causal rows see no key at all."""
    all_pairs = device == CUDA or dtype == torch.float32  # which the CPU alone has
    step = 1 if all_pairs else 4
    for seqlen_k in EDGES[EDGES.index(seqlen_q) % step :: step]:
        check(device, *make_qkv(1, seqlen_q, seqlen_k, 2, 1, dtype=dtype), causal=causal)


def test_float16(device, make_qkv):
    q, k, v = make_qkv(2, 65, 129, 4, 2, dtype=torch.float16)
    check(device, q, k, v, None, dlse_for(device, q), causal=True)
    check(device, q, k, v)


def test_long(device, make_qkv):
    check(device, *make_qkv(1, 600, 900, 2, 1, 64, mean=0.25), causal=True)
    check(device, *make_qkv(1, 3, 3000, 2, 1, 64), window_size=(2500, 0))
    check(device, *make_qkv(1, 3000, 3, 2, 1, 64))


@cases.sink
@pytest.mark.parametrize("sizes", [(2, 0, 7), (2, 5, 0), (2, 0, 0), (0, 5, 7), (0, 0, 0)], ids=str)
def test_no_pairs(device, dtype, make_qkv, sizes, sink):
    """Without queries or keys all gradients are 0, but for what flows through the lse of a sink."""
    q, k, v = make_qkv(*sizes, 4, 2, 64, 32, dtype=dtype)
    sinks = device.place(torch.randn(4)) if sink else None
    for dlse in (None, dlse_for(device, q)):
        check(device, q, k, v, None, dlse, causal=True, learnable_sink=sinks)


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.quick("cpu-fp32-*")
@cases.window_size
def test_windows(device, dtype, make_qkv, window_size):
    for seqlens in WINDOWED_SEQLENS:
        q, k, v = make_qkv(1, *seqlens, 2, 1, 40, dtype=dtype)
        check(device, q, k, v, window_size=window_size)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "window_size", [(None, 0), (100, 0), (0, 100), (64, 64), (70, -30)], ids=str
)
def test_masks_over_many_tiles(device, make_qkv, window_size, head_dim):
    """Every warp of a block has masks of its own, in tiles on and off the diagonal."""
    seqlens = (140, 270) if device == EMULATOR else (300, 400)
    for seqlen_q, seqlen_k in (seqlens, seqlens[::-1]):
        q, k, v = make_qkv(1, seqlen_q, seqlen_k, 2, 1, head_dim)
        check(device, q, k, v, window_size=window_size)


def test_causal_is_a_window(device, make_qkv):
    q, k, v = make_qkv(2, 60, 90)
    dout = dout_for(device, q, v)
    causal = gradients_of(q, k, v, dout, causal=True, deterministic=True)
    window = gradients_of(q, k, v, dout, window_size=(None, 0), deterministic=True)
    assert_all_equal(causal, window)


def test_what_no_query_sees_has_no_gradient(device, dtype, make_qkv):
    q, k, v = make_qkv(2, 70, 100, 4, 2, dtype=dtype)
    dq, dk, dv = check(device, q, k, v, window_size=(-20, 40))  # keys 50 to 100 are seen
    assert (dk[:, :50] == 0).all() and (dv[:, :50] == 0).all()
    assert (dq[:, 50:] == 0).all()  # these see none


# ---- softcap, sink, lse --------------------------------------------------------------------------


@pytest.mark.quick("cpu-fp32-5.0-*")
@cases.mask(MASKS)
@cases.softcap
def test_softcap(device, dtype, make_qkv, softcap, mask):
    q, k, v = make_qkv(1, 70, 70, 4, 2, 64, 72, dtype=dtype, mean=0.5)
    check(device, q, k, v, softcap=softcap, **mask)


@pytest.mark.quick("cpu-fp32-torch.bfloat16-5.0-*", "*-bf16-torch.float32-5.0-causal")
@cases.mask(MASKS)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@cases.sink_dtype
def test_sink(device, dtype, make_qkv, sink_dtype, softcap, mask):
    q, k, v = make_qkv(2, 70, 70, 6, 2, dtype=dtype)
    sinks = cases.sinks_of_every_kind(device, sink_dtype)
    dlse = dlse_for(device, q)
    check(device, q, k, v, None, dlse, learnable_sink=sinks, softcap=softcap, **mask)
    check(device, q, k, v, learnable_sink=sinks, softcap=softcap, **mask)


@cases.mask(MASKS)
def test_gradient_of_lse(device, dtype, make_qkv, mask):
    q, k, v = make_qkv(2, 65, 90, 4, 2, dtype=dtype)
    dlse = dlse_for(device, q)
    check(device, q, k, v, None, dlse, **mask)
    *_, dv = check(device, q, k, v, device.place(torch.zeros_like(q)), dlse, **mask)
    assert (dv == 0).all()


def test_layouts_of_the_gradient_of_lse(device, make_qkv):
    q, k, v = make_qkv(2, 65, 90, 4, 2)
    dout = dout_for(device, q, v)
    number = device.place(torch.randn(1, 1, 1)).expand(2, 4, 65)
    plain = gradients_of(q, k, v, dout, number.contiguous(), deterministic=True)
    assert_all_equal(gradients_of(q, k, v, dout, number, deterministic=True), plain)
    check(device, q, k, v, dout, device.place(torch.randn(65, 4, 2)).permute(2, 1, 0))
    check(device, q, k, v, dout, device.place(torch.randn(2, 4, 66))[..., 1:])


# ---- numbers -------------------------------------------------------------------------------------


@cases.mean
def test_mean_that_is_not_zero(device, dtype, make_qkv, mean):
    q, k, v = make_qkv(2, 100, 100, head_dim=128, dtype=dtype, mean=mean)
    check(device, q, k, v, dout_for(device, q, v, mean), causal=True)


@cases.softmax_scale
def test_softmax_scale(device, dtype, make_qkv, scale):
    check(device, *make_qkv(2, 70, 90, dtype=dtype), softmax_scale=scale, causal=True)


@cases.key_of_spike
@cases.score_of_spike
def test_spikes(device, dtype, make_qkv, key, score):
    """One key, or all, whose score is far from 0."""
    q, k, v = make_qkv(1, 200, 200, 2, dtype=dtype)
    cases.add_spike(q, k, key, score)
    for causal in (False, True):
        check(device, q, k, v, causal=causal)


@pytest.mark.parametrize("zero", [0, 1, 2, 3], ids=["q", "k", "v", "dout"])
def test_zeros(device, make_qkv, zero):
    q, k, v = make_qkv(1, 70, 90, 2)
    inputs = [q, k, v, dout_for(device, q, v)]
    inputs[zero].zero_()
    gradients = check(device, *inputs, causal=True)
    if zero == 3:
        assert all((x == 0).all() for x in gradients)


# ---- NaN and inf ---------------------------------------------------------------------------------


@pytest.mark.quick("cpu-fp32-*-nan")
@cases.poison
@cases.hiding_window
def test_what_is_masked_stays_out(device, dtype, make_qkv, window_size, poison):
    """The first 30 and last 20 keys are NaN or inf: nobody whom they do not meet must notice."""
    if device != CPU:
        pytest.skip(
            "kernels multiply whole tiles: NaN next to visible keys is the reference's only"
        )
    q, k, v = make_qkv(1, 150, 150, 2, 1, 64, 40, dtype=dtype)
    dout = dout_for(device, q, v)
    bad, visible = cases.bad_keys(window_size)
    seeing_bad = (visible & bad).any(dim=1)
    clean = gradients_of(q, k, v, dout, window_size=window_size)
    for x in (k, v):
        x[:, bad] = poison
    dq, dk, dv = gradients_of(q, k, v, dout, window_size=window_size)

    innocent_rows = ~seeing_bad
    innocent_keys = ~bad & ~visible[seeing_bad].any(dim=0)
    assert 60 < innocent_rows.sum() < 150
    # unbounded to one side, the rows that see bad keys see all others, too
    assert None in window_size or 40 < innocent_keys.sum() < 150
    assert_all_equal([dq[:, innocent_rows]], [clean[0][:, innocent_rows]])
    assert_all_equal(
        [x[:, innocent_keys] for x in (dk, dv)], [x[:, innocent_keys] for x in clean[1:]]
    )


def test_rows_that_see_no_key_stay_out(device, dtype, make_qkv):
    """Whatever flows into their output, which is constant, goes nowhere."""
    if device != CPU:
        pytest.skip("kernels multiply whole tiles: NaN next to other rows is the reference's only")
    q, k, v = make_qkv(1, 50, 20, 2, 1, dtype=dtype)
    dout = dout_for(device, q, v)
    clean = gradients_of(q, k, v, dout, causal=True)
    for x in (q, dout):
        x[:, :30] = torch.nan  # query 30 is the first that sees key 0
    assert_all_equal(gradients_of(q, k, v, dout, causal=True), clean)
    assert (clean[0][:, :30] == 0).all()


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.quick("cpu-fp32-*")
@cases.layout
@cases.head_dims_of_layouts
def test_layouts(device, dtype, make_qkv, layout, head_dims):
    """The layout of inputs and dout changes nothing, to the bit; nor does NaN beyond them."""
    q, k, v = make_qkv(3, 45, 77, 4, 2, *head_dims, dtype=dtype, layout=layout)
    # shaped and laid out as it comes back from a model in that layout
    dout = make_qkv(3, 45, 45, 4, 4, head_dims[1], dtype=dtype, layout=layout)[0]
    gradients = check(device, q, k, v, dout, causal=True, deterministic=True)
    plain = [x.contiguous() for x in (q, k, v, dout)]
    assert_all_equal(gradients, gradients_of(*plain, causal=True, deterministic=True))


def test_packed_and_expanded(device, dtype, make_qkv):
    q, k, v = make_qkv(3, 45, 77, 4 + 2 + 2, dtype=dtype)[0].split([4, 2, 2], dim=2)
    check(device, q, k, v, causal=True)
    check(device, q, k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1))
    check(device, q, k[:, :1].expand(-1, 45, -1, -1), v)
    # what out.sum(), out.mean(1) and the like hand back
    dout = dout_for(device, q, v)
    check(device, q, k, v, dout[:1, :1, :1, :1].expand_as(dout))
    check(device, q, k, v, dout[:, :1].expand_as(dout))


def test_misaligned_rows(device, dtype, make_qkv):
    """Rows that start at odd elements cannot be read by 16 bytes at a time."""
    q, k, v = (x[..., 1:65] for x in make_qkv(2, 45, 77, 4, 2, 72, dtype=dtype))
    dout = make_qkv(2, 45, 45, 4, 4, 72, dtype=dtype)[0][..., 1:65]
    check(device, q, k, v, dout, causal=True)


@cases.far_dimension
def test_offsets_beyond_32_bits(device, dimension):
    check(device, *cases.far_apart(device, dimension, 4), causal=True)


# ---- reproducibility -----------------------------------------------------------------------------


@pytest.mark.quick("*-causal")
@cases.mask(MASKS)
def test_deterministic_runs_are_equal_to_the_bit(device, make_qkv, mask):
    """On a GPU blocks finish in ever new orders; elsewhere threads and warps do, which is quicker seen."""
    q, k, v = make_qkv(2, *((1500, 1700) if device == CUDA else (70, 130)), 6, 2)
    inputs = (q, k, v, dout_for(device, q, v), dlse_for(device, q))
    first = gradients_of(*inputs, deterministic=True, **mask)
    for _ in range(2 if device == EMULATOR else 49):
        assert_all_equal(first, gradients_of(*inputs, deterministic=True, **mask))


def test_blocks_that_take_turns_have_unequal_numbers_of_heads(device, make_qkv):
    """Seven heads of a KV head in four parts; and sums of dQ that not every tile of keys adds to."""
    q, k, v = make_qkv(16, 70, 130, 7, 1)
    dout = dout_for(device, q, v)
    parts = explain_backward(q, k, v, deterministic=True).q_splits
    assert device != EMULATOR or parts == 4
    first = check(device, q, k, v, dout, deterministic=True)
    assert_all_equal(gradients_of(q, k, v, dout, deterministic=True), first)


@pytest.mark.parametrize("seqlen_q", [1, 70])
@pytest.mark.parametrize("heads_per_kv", [4, 7])
def test_blocks_that_wait_for_others_write_nothing(device, make_qkv, heads_per_kv, seqlen_q):
    """One tile holds all keys, so that blocks store dQ; on a GPU they wait to add to dK and dV."""
    q, k, v = make_qkv(1, seqlen_q, 15, heads_per_kv, 1)
    dout = dout_for(device, q, v)
    first = check(device, q, k, v, dout, deterministic=True)
    for _ in range(20 if device == CUDA else 1):
        assert_all_equal(gradients_of(q, k, v, dout, deterministic=True), first)


@cases.mask(MASKS)
def test_deterministic_runs_are_equal_beside_other_work(cuda, mask):
    """Blocks that wait for their turn share the GPU with products, and with blocks of another backward."""

    def inputs():
        shapes = (2, 1500, 6, 64), (2, 1700, 2, 64), (2, 1700, 2, 64)
        q, k, v = (CUDA.place(torch.randn(shape).bfloat16()) for shape in shapes)
        return q, k, v, dout_for(CUDA, q, v), dlse_for(CUDA, q)

    ours, theirs = inputs(), inputs()
    options = {"deterministic": True, **mask}
    expected = gradients_of(CUDA, *ours, **options) + gradients_of(CUDA, *theirs, **options)
    matrix, product = CUDA.place(torch.randn(2, 4096, 4096).bfloat16())
    multiplying, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        with torch.cuda.stream(multiplying):
            for _ in range(3):
                torch.mm(matrix, matrix, out=product)
        with torch.cuda.stream(other):
            beside = gradients_of(CUDA, *theirs, **options)
        results.append(gradients_of(CUDA, *ours, **options) + beside)
    torch.cuda.synchronize()
    for gradients in results:
        assert_all_equal(gradients, expected)


def test_runs_differ_by_rounding_at_most(device, dtype, make_qkv):
    """Without deterministic=True sums may be added up in any order, and that is all."""
    q, k, v = make_qkv(2, 200, 200, 4, 2, dtype=dtype)
    dout = dout_for(device, q, v)
    first = check(device, q, k, v, dout, causal=True)
    for _ in range(1 if device == EMULATOR else 10):
        for x, y in zip(gradients_of(q, k, v, dout, causal=True), first, strict=True):
            eps = torch.finfo(x.dtype).eps
            torch.testing.assert_close(x, y, rtol=4 * eps, atol=eps * max_finite(y))


def test_batch_entries_do_not_depend_on_each_other(device, dtype, make_qkv):
    q, k, v = make_qkv(5, 70, 130, 3, 1, dtype=dtype)  # planned alike alone
    inputs = (q, k, v, dout_for(device, q, v), dlse_for(device, q))
    options = {"causal": True, "deterministic": True}
    together = gradients_of(*inputs, **options)
    for entry in (slice(0, 1), slice(3, 5)):
        alone = gradients_of(*(x[entry] for x in inputs), **options)
        assert_all_equal([x[entry] for x in together], alone)


def test_inputs_are_left_alone(device, dtype, make_qkv):
    q, k, v = make_qkv(2, 33, 65, 4, 2, dtype=dtype)
    inputs = (q, k, v, dout_for(device, q, v), dlse_for(device, q))
    copies = [x.clone() for x in inputs]
    gradients_of(*inputs, causal=True)
    assert_all_equal(inputs, copies)
