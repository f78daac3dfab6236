"""The forward of flash_attn_func: right for every shape, mask, layout and number."""

import math

import pytest
import torch
from torch.nn import functional as F

from flash_attn_sm120 import flash_attn_func
from helpers import cases
from helpers.cases import EDGES, HEAD_DIMS, MASKS, WINDOWED_SEQLENS
from helpers.checks import assert_all_equal, attend, check_forward
from helpers.reference import assert_close, assert_close_to, attention_reference, visible_keys


def sdpa(q, k, v, causal):
    """torch's own attention in fp64, aligned to the bottom right; for rows that all see a key."""
    rows = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
    mask = visible_keys(rows, k.shape[1], None, 0 if causal else None)
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


# ---- the oracle itself ---------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("causal", [False, True])
def test_reference_agrees_with_sdpa(causal, monkeypatch):
    monkeypatch.setattr("helpers.reference.CHUNK_SCORES", 2 * 8 * 50 * 7)  # 7 query rows at a time
    q, k, v = torch.randn(2, 33, 8, 40), torch.randn(2, 50, 2, 40), torch.randn(2, 50, 2, 16)
    out, lse = attention_reference(q, k, v, causal=causal)
    torch.testing.assert_close(out, sdpa(q, k, v, causal), rtol=1e-12, atol=1e-12)
    keys = k.double().repeat_interleave(4, dim=2)
    scores = torch.einsum("bhd,bjhd->bhj", q[:, -1].double(), keys) / math.sqrt(40)
    torch.testing.assert_close(lse[..., -1], scores.logsumexp(-1))  # the last row sees every key


@pytest.mark.quick
@pytest.mark.parametrize(
    "wrong",
    [
        {"causal": False, "window_size": (None, 1)},
        {"window_size": (30, None)},
        {"softmax_scale": 0.99 / 8},
        {"softcap": 5.0},
        {"learnable_sink": torch.zeros(4)},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_rule_notices_what_is_wrong(wrong):
    """The tolerance is not so wide that it lets a wrong mask, scale, cap or sink through."""
    q, k, v = (torch.randn(2, 64, 4, 64).bfloat16() for _ in range(3))
    right_out, right_lse = attention_reference(q, k, v, causal=True)
    wrong_out, wrong_lse = attention_reference(q, k, v, **{"causal": True, **wrong})
    assert_close(right_out.bfloat16(), right_lse, q, k, v, causal=True)
    with pytest.raises(AssertionError, match="lse, "):
        assert_close(right_out.bfloat16(), wrong_lse, q, k, v, causal=True)
    if "softmax_scale" not in wrong:  # 1 % of the scale is within the errors of bf16
        with pytest.raises(AssertionError, match="out, "):
            assert_close(wrong_out.bfloat16(), None, q, k, v, causal=True)


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.quick("*-fp32-14to2-72x40")
@cases.head_dims
@cases.heads
def test_heads_and_head_dims(device, dtype, make_qkv, heads, head_dims):
    q, k, v = make_qkv(2, 47, 83, *heads, *head_dims, dtype=dtype)
    turn = HEAD_DIMS.index(head_dims) + (heads[0] == heads[1])  # or else heads may be packed
    for causal in (False, True):
        if device.takes(turn + causal):
            out, _ = check_forward(q, k, v, causal=causal)
            pt, _ = attention_reference(q, k, v, causal=causal, upcast=False)
            assert_close_to(out, sdpa(q, k, v, causal), pt, case=f"against SDPA, causal={causal}")


@cases.head_dim
def test_every_head_dim(device, make_qkv, head_dim):
    """As that of Q and K, and as that of V."""
    turn = head_dim // 16  # that of 264 - head_dim is as even or odd
    if device.takes(turn):
        check_forward(*make_qkv(1, 40, 70, 2, 1, head_dim, 264 - head_dim), causal=True)
    if device.takes(turn + 1):
        check_forward(*make_qkv(1, 40, 70, 2, 1, head_dim, head_dim))


@pytest.mark.quick("*-fp32-*", "*-bf16-65-causal")
@cases.causal
@cases.seqlen_q
def test_lengths(device, dtype, make_qkv, seqlen_q, causal):
    """All pairs of lengths; with more queries than keys the first causal rows see no key at all."""
    for seqlen_k in EDGES:
        check_forward(*make_qkv(2, seqlen_q, seqlen_k, 4, 2, dtype=dtype), causal=causal)


def test_long(device, make_qkv):
    check_forward(*make_qkv(1, 1500, 2100, 2, 1, 64, mean=0.25), causal=True)
    check_forward(*make_qkv(1, 3, 10_000, 2, 1, 64), window_size=(9000, 0))


@pytest.mark.quick("cpu-fp32-*")
@cases.sink
def test_no_keys(device, dtype, make_qkv, sink):
    q, k, v = make_qkv(2, 5, 0, 4, 2, dtype=dtype)
    sinks = device.place(torch.randn(4)) if sink else None
    out, lse = check_forward(q, k, v, causal=True, learnable_sink=sinks)
    assert (out == 0).all()
    assert (lse == (sinks.view(1, 4, 1) if sink else -math.inf)).all()


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 0, 0), (0, 0, 0)])
def test_no_queries(device, dtype, make_qkv, sizes):
    out, lse = check_forward(*make_qkv(*sizes, 4, 2, 64, 32, dtype=dtype), causal=True)
    assert out.shape == (sizes[0], sizes[1], 4, 32) and lse.shape == (sizes[0], 4, sizes[1])


def test_lse_only_on_request(device, dtype, make_qkv):
    q, k, v = make_qkv(dtype=dtype)
    out, lse = flash_attn_func(q, k, v, causal=True)
    assert lse is None
    assert torch.equal(out, flash_attn_func(q, k, v, causal=True, return_lse=True)[0])


@pytest.mark.parametrize("refused", [torch.float32, torch.float64, torch.int8])
def test_dtypes_that_the_device_lacks(device, make_qkv, refused):
    if refused in device.dtypes:
        pytest.skip(f"{device.name} has {refused}")
    q, k, v = (x.to(refused) for x in make_qkv())
    with pytest.raises((TypeError, NotImplementedError), match=str(refused).removeprefix("torch.")):
        flash_attn_func(q, k, v)


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.quick("cpu-fp32-*-full", "*-bf16-(15, 16)-full")
@cases.causal
@cases.window_size
def test_windows(device, dtype, make_qkv, window_size, causal):
    """causal on top of a window makes its right side 0."""
    for seqlens in WINDOWED_SEQLENS:
        q, k, v = make_qkv(2, *seqlens, 2, 1, 40, dtype=dtype)
        check_forward(q, k, v, window_size=window_size, causal=causal)


def test_causal_is_a_window(device, make_qkv):
    q, k, v = make_qkv(2, 60, 90)
    causal = attend(q, k, v, causal=True)
    window = attend(q, k, v, window_size=(None, 0))
    assert_all_equal(causal, window)


# ---- softcap and sink ----------------------------------------------------------------------------


@pytest.mark.quick("*-fp32-5.0-*", "*-bf16-5.0-causal")
@cases.mask(MASKS)
@cases.softcap
def test_softcap(device, dtype, make_qkv, softcap, mask):
    check_forward(
        *make_qkv(2, 70, 70, 4, 2, 64, 72, dtype=dtype, mean=0.5), softcap=softcap, **mask
    )


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30])
def test_softcap_and_scale(device, dtype, make_qkv, scale):
    q, k, v = make_qkv(1, 40, 70, 4, 2, dtype=dtype)
    check_forward(q, k, v, softcap=2.0, softmax_scale=scale, causal=True)


def test_softcap_at_the_ends_of_fp32(device, dtype, make_qkv):
    """A cap that no score is near changes none; one that all are beyond makes all but zeros equal."""
    q, k, v = make_qkv(1, 40, 70, 4, 2, dtype=dtype)
    for causal in (False, True):
        out, lse = attend(q, k, v, softcap=3e38, causal=causal)
        assert_close(out, lse, q, k, v, causal=causal)
        out, lse = attend(torch.zeros_like(q), k, v, softcap=1e-44, causal=causal)
        assert_close(out, lse, q, k, v, softmax_scale=0.0, causal=causal)


@pytest.mark.quick("*-fp32-torch.bfloat16-5.0-*", "*-bf16-torch.float32-0.0-causal")
@cases.mask(MASKS)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@cases.sink_dtype
def test_sink(device, dtype, make_qkv, sink_dtype, softcap, mask):
    q, k, v = make_qkv(2, 70, 70, 6, 2, dtype=dtype)
    sinks = cases.sinks_of_every_kind(device, sink_dtype)
    check_forward(q, k, v, learnable_sink=sinks, softcap=softcap, **mask)


# ---- numbers -------------------------------------------------------------------------------------


@cases.mean
def test_mean_that_is_not_zero(device, dtype, make_qkv, mean):
    check_forward(*make_qkv(2, 100, 100, head_dim=128, dtype=dtype, mean=mean), causal=True)


@cases.softmax_scale
def test_softmax_scale(device, dtype, make_qkv, scale):
    check_forward(*make_qkv(2, 70, 90, dtype=dtype), softmax_scale=scale, causal=True)


@pytest.mark.quick("cpu-fp32-*", "*-bf16-200.0-middle")
@cases.key_of_spike
@cases.score_of_spike
def test_spikes(device, dtype, make_qkv, key, score):
    """One key, or all, whose score is far from 0: running maxima have to move, or must not."""
    q, k, v = make_qkv(1, 200, 200, 2, dtype=dtype)
    cases.add_spike(q, k, key, score)
    for causal in (False, True):
        check_forward(q, k, v, causal=causal)


@pytest.mark.parametrize("score", [40.0, 90.0])
def test_a_key_far_above_the_first(device, dtype, make_qkv, score):
    """In bf16 its p is near the end of the range, and stays: rounded, where that of a maximum is 1."""
    q, k, v = make_qkv(1, 200, 200, 2, dtype=dtype)
    cases.add_spike(q, k, 1, score)
    for causal in (False, True):
        out, lse = attend(q, k, v, causal=causal)
        expected, expected_lse = attention_reference(q, k, v, causal=causal)
        assert_same_but_rounding(out, expected.to(dtype))
        torch.testing.assert_close(lse, expected_lse.to(lse.dtype), rtol=1e-5, atol=1e-5)


def test_scores_beyond_half(device, dtype, make_qkv):
    """Numbers near 1e3, whose scores no fp16 can hold."""
    q, k, v = make_qkv(2, 70, 90, dtype=dtype)
    check_forward(q * 1000, k * 1000, v, causal=True)
    check_forward(q * 1000, k, v * 1000)


def test_output_at_the_end_of_the_range(device, dtype, make_qkv):
    """An average of the largest numbers of the type is that number, not inf."""
    q, k, v = make_qkv(1, 33, 64, 2, dtype=dtype)
    check_forward(q, k, torch.full_like(v, torch.finfo(dtype).max), softmax_scale=0.0)


# ---- NaN and inf ---------------------------------------------------------------------------------


def assert_same_but_rounding(x, clean):
    """Bad numbers may change the order of sums in their block of rows, and nothing else."""
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(x, clean, rtol=2 * eps, atol=2 * eps)


@pytest.mark.quick("cpu-fp32-*-nan", "*-bf16-(10, 0)-nan")
@cases.poison
@cases.hiding_window
def test_what_is_masked_stays_out(device, dtype, make_qkv, window_size, poison):
    """The first 30 and last 20 keys are NaN or inf: who does not see them must not notice."""
    q, k, v = make_qkv(1, 150, 150, 2, 1, 64, 40, dtype=dtype)
    clean, clean_lse = attend(q, k, v, window_size=window_size)
    bad, visible = cases.bad_keys(window_size, device=q.device)
    for x in (k, v):
        x[:, bad] = poison
    out, lse = attend(q, k, v, window_size=window_size)
    innocent = ~(visible & bad).any(dim=1)
    assert 60 < innocent.sum() < 150
    assert_same_but_rounding(out[:, innocent], clean[:, innocent])
    assert_same_but_rounding(lse[..., innocent], clean_lse[..., innocent])


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_visible_nan_reaches_who_sees_it(device, dtype, make_qkv, where):
    q, k, v = make_qkv(2, 100, 100, 4, 2, dtype=dtype)
    options = {"window_size": (30, 5)}
    clean, clean_lse = attend(q, k, v, **options)
    {"q": q, "k": k, "v": v}[where][1, 50, 1, 3] = torch.nan
    out, lse = check_forward(q, k, v, **options)

    distance = 50 - torch.arange(100, device=q.device)
    seeing = (distance >= -30) & (distance <= 5)
    hit = torch.zeros_like(out, dtype=torch.bool)
    if where == "q":
        hit[1, 50, 1] = True
    elif where == "k":
        hit[1, seeing, 2:] = True  # query heads 2 and 3 read KV head 1
    else:
        hit[1, seeing, 2:, 3] = True
    assert torch.equal(out.isnan(), hit)
    assert_same_but_rounding(out[~hit], clean[~hit])
    if where == "v":
        assert_same_but_rounding(lse, clean_lse)


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.quick("cpu-fp32-*", "*-bf16-(64, 64)-in_nan")
@cases.layout
@cases.head_dims_of_layouts
def test_layouts(device, dtype, make_qkv, layout, head_dims):
    """The layout of the inputs changes nothing, to the bit; nor does NaN beyond them."""
    q, k, v = make_qkv(3, 45, 77, 4, 2, *head_dims, dtype=dtype, layout=layout)
    results = check_forward(q, k, v, causal=True)
    assert_all_equal(results, attend(*(x.contiguous() for x in (q, k, v)), causal=True))


def test_packed_and_expanded(device, dtype, make_qkv):
    qkv = make_qkv(3, 45, 77, 4 + 2 + 2, dtype=dtype)[0]
    q, k, v = qkv.split([4, 2, 2], dim=2)
    check_forward(q, k, v, causal=True)
    check_forward(
        q, k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1)
    )  # one K and V for the whole batch
    check_forward(q, k[:, :1].expand(-1, 45, -1, -1), v)  # the same key everywhere


def test_misaligned_rows(device, dtype, make_qkv):
    """Rows that start at odd elements cannot be read by 16 bytes at a time."""
    q, k, v = (x[..., 1:65] for x in make_qkv(2, 45, 77, 4, 2, 72, dtype=dtype))
    check_forward(q, k, v, causal=True)


def test_inputs_are_read_in_place(device, make_qkv):
    if device.torch_device != "cuda":
        pytest.skip("only torch.cuda counts its memory")
    q, k, v = make_qkv(2, 512, 512, layout="heads_first")
    attend(q, k, v, num_splits=1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = attend(q, k, v, num_splits=1)
    assert torch.cuda.max_memory_allocated() - before <= out.nbytes + lse.nbytes + 2 * 512


@cases.far_dimension
def test_offsets_beyond_32_bits(device, dimension):
    check_forward(*cases.far_apart(device, dimension, 3), causal=True)


def test_output_beyond_32_bits(device):
    """An output of more than 2^31 elements, every batch entry of which is the same."""
    if device.torch_device != "cuda":
        pytest.skip("8 million rows: minutes on a CPU")
    batch, seqlen, heads, head_dim = 2**13 + 2, 256, 4, 256
    if torch.cuda.mem_get_info()[0] < 1.5 * 2 * batch * seqlen * heads * head_dim:
        pytest.skip("not enough memory")
    x = torch.randn(1, seqlen, heads, head_dim).to(torch.bfloat16).cuda()
    q, kv = x.expand(batch, -1, -1, -1), x[:, :16].expand(batch, -1, -1, -1)
    out, lse = attend(q, kv, kv)
    assert_close(out[:1], lse[:1], x, x[:, :16], x[:, :16])
    assert all(torch.equal(entry, out[0]) for entry in (out[1], out[batch // 2], out[-2], out[-1]))
    assert (lse == lse[0]).all()


# ---- reproducibility -----------------------------------------------------------------------------


def test_runs_are_equal_to_the_bit(device, dtype, make_qkv):
    q, k, v = make_qkv(2, 300, 500, 4, 2, dtype=dtype)
    out, lse = attend(q, k, v, causal=True)
    for _ in range(5):
        assert_all_equal(attend(q, k, v, causal=True), (out, lse))


def test_batch_entries_do_not_depend_on_each_other(device, dtype, make_qkv):
    q, k, v = make_qkv(5, 70, 130, 4, 2, dtype=dtype)
    options = {"causal": True, "num_splits": 1}  # else the batch has a say in how keys are split
    out, lse = attend(q, k, v, **options)
    for entry in (slice(0, 1), slice(3, 5)):
        alone = attend(q[entry], k[entry], v[entry], **options)
        assert_all_equal(alone, (out[entry], lse[entry]))


def test_inputs_are_left_alone(device, dtype, make_qkv):
    inputs = make_qkv(2, 33, 65, 4, 2, dtype=dtype)
    copies = [x.clone() for x in inputs]
    attend(*inputs, causal=True)
    assert_all_equal(inputs, copies)
