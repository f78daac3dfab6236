"""The forward of flash_attn_func: right for every shape, mask, layout and number."""

import math

import pytest
import torch
from torch.nn import functional as F

from flash_attn_sm120 import flash_attn_func
from helpers.masks import HIDING_WINDOWS, MASKS, WINDOWED_SEQLENS, WINDOWS, bad_keys
from helpers.reference import assert_close, assert_close_to, attention_reference, visible_keys

# Lengths around the edges of every tile there may be.
EDGES = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257]

HEADS = [(4, 4), (8, 2), (14, 2), (6, 1)]  # MHA, GQA with 4 and with 7 query heads per KV head, MQA

HEAD_DIMS = [(d, d) for d in (8, 40, 64, 72, 96, 128, 136, 192, 256)]
HEAD_DIMS += [(64, 128), (128, 64), (192, 128), (8, 256), (256, 8), (72, 40)]


def attend(device, q, k, v, **kwargs):
    return flash_attn_func(q, k, v, return_lse=True, **kwargs)


def check(device, q, k, v, **kwargs):
    """One call, held against the reference; returns (out, lse)."""
    out, lse = attend(device, q, k, v, **kwargs)
    assert out.device == q.device and out.is_contiguous() and lse.is_contiguous()
    assert_close(out, lse, q, k, v, **kwargs)
    return out, lse


def sdpa(q, k, v, causal):
    """torch's own attention in fp64, aligned to the bottom right; for rows that all see a key."""
    rows = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
    mask = visible_keys(rows, k.shape[1], None, 0 if causal else None)
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


# ---- the oracle itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_reference_agrees_with_sdpa(causal, monkeypatch):
    monkeypatch.setattr("helpers.reference.CHUNK_SCORES", 2 * 8 * 50 * 7)  # 7 query rows at a time
    q, k, v = torch.randn(2, 33, 8, 40), torch.randn(2, 50, 2, 40), torch.randn(2, 50, 2, 16)
    out, lse = attention_reference(q, k, v, causal=causal)
    torch.testing.assert_close(out, sdpa(q, k, v, causal), rtol=1e-12, atol=1e-12)
    keys = k.double().repeat_interleave(4, dim=2)
    scores = torch.einsum("bhd,bjhd->bhj", q[:, -1].double(), keys) / math.sqrt(40)
    torch.testing.assert_close(lse[..., -1], scores.logsumexp(-1))  # the last row sees every key


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


@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=lambda dims: f"{dims[0]}x{dims[1]}")
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}to{heads[1]}")
def test_heads_and_head_dims(device, dtype, make_qkv, heads, head_dims):
    q, k, v = make_qkv(2, 47, 83, *heads, *head_dims, dtype=dtype)
    turn = HEAD_DIMS.index(head_dims) + (heads[0] == heads[1])  # or else heads may be packed
    for causal in (False, True):
        if device.takes(turn + causal):
            out, _ = check(device, q, k, v, causal=causal)
            pt, _ = attention_reference(q, k, v, causal=causal, upcast=False)
            assert_close_to(out, sdpa(q, k, v, causal), pt, case=f"against SDPA, causal={causal}")


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(device, make_qkv, head_dim):
    """As that of Q and K, and as that of V."""
    turn = head_dim // 16  # that of 264 - head_dim is as even or odd
    if device.takes(turn):
        check(device, *make_qkv(1, 40, 70, 2, 1, head_dim, 264 - head_dim), causal=True)
    if device.takes(turn + 1):
        check(device, *make_qkv(1, 40, 70, 2, 1, head_dim, head_dim))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("seqlen_q", EDGES)
def test_lengths(device, dtype, make_qkv, seqlen_q, causal):
    """All pairs of lengths; with more queries than keys the first causal rows see no key at all."""
    for seqlen_k in EDGES:
        check(device, *make_qkv(2, seqlen_q, seqlen_k, 4, 2, dtype=dtype), causal=causal)


def test_long(device, make_qkv):
    check(device, *make_qkv(1, 1500, 2100, 2, 1, 64, mean=0.25), causal=True)
    check(device, *make_qkv(1, 3, 10_000, 2, 1, 64), window_size=(9000, 0))


@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
def test_no_keys(device, dtype, make_qkv, sink):
    q, k, v = make_qkv(2, 5, 0, 4, 2, dtype=dtype)
    sinks = device.place(torch.randn(4)) if sink else None
    out, lse = check(device, q, k, v, causal=True, learnable_sink=sinks)
    assert (out == 0).all()
    assert (lse == (sinks.view(1, 4, 1) if sink else -math.inf)).all()


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 0, 0), (0, 0, 0)])
def test_no_queries(device, dtype, make_qkv, sizes):
    out, lse = check(device, *make_qkv(*sizes, 4, 2, 64, 32, dtype=dtype), causal=True)
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


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("window_size", WINDOWS, ids=str)
def test_windows(device, dtype, make_qkv, window_size, causal):
    """causal on top of a window makes its right side 0."""
    for seqlens in WINDOWED_SEQLENS:
        q, k, v = make_qkv(2, *seqlens, 2, 1, 40, dtype=dtype)
        check(device, q, k, v, window_size=window_size, causal=causal)


def test_causal_is_a_window(device, make_qkv):
    q, k, v = make_qkv(2, 60, 90)
    causal = attend(device, q, k, v, causal=True)
    window = attend(device, q, k, v, window_size=(None, 0))
    assert all(torch.equal(*pair) for pair in zip(causal, window, strict=True))


# ---- softcap and sink ----------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("softcap", [0.3, 5.0, 50.0, 1e4])
def test_softcap(device, dtype, make_qkv, softcap, mask):
    check(
        device, *make_qkv(2, 70, 70, 4, 2, 64, 72, dtype=dtype, mean=0.5), softcap=softcap, **mask
    )


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30])
def test_softcap_and_scale(device, dtype, make_qkv, scale):
    q, k, v = make_qkv(1, 40, 70, 4, 2, dtype=dtype)
    check(device, q, k, v, softcap=2.0, softmax_scale=scale, causal=True)


def test_softcap_at_the_ends_of_fp32(device, dtype, make_qkv):
    """A cap that no score is near changes none; one that all are beyond makes all but zeros equal."""
    q, k, v = make_qkv(1, 40, 70, 4, 2, dtype=dtype)
    for causal in (False, True):
        out, lse = attend(device, q, k, v, softcap=3e38, causal=causal)
        assert_close(out, lse, q, k, v, causal=causal)
        out, lse = attend(device, torch.zeros_like(q), k, v, softcap=1e-44, causal=causal)
        assert_close(out, lse, q, k, v, softmax_scale=0.0, causal=causal)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("sink_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sink(device, dtype, make_qkv, sink_dtype, softcap, mask):
    q, k, v = make_qkv(2, 70, 70, 6, 2, dtype=dtype)
    # among the scores, without effect, taking all, and ordinary ones; a slice, whose stride is 2
    sinks = torch.tensor([0.0, -math.inf, 300.0, -300.0, 3.0, -1.5]).repeat_interleave(2)
    sinks = device.place(sinks.to(sink_dtype))[::2]
    check(device, q, k, v, learnable_sink=sinks, softcap=softcap, **mask)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.5, -1.0, 3.0])
def test_mean_that_is_not_zero(device, dtype, make_qkv, mean):
    check(device, *make_qkv(2, 100, 100, head_dim=128, dtype=dtype, mean=mean), causal=True)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.125, 1e-6, 1e-30, 2.0])
def test_softmax_scale(device, dtype, make_qkv, scale):
    check(device, *make_qkv(2, 70, 90, dtype=dtype), softmax_scale=scale, causal=True)


@pytest.mark.parametrize("key", [None, 1, 66, 198], ids=["all", "early", "middle", "late"])
@pytest.mark.parametrize("score", [200.0, -1000.0])
def test_spikes(device, dtype, make_qkv, key, score):
    """One key, or all, whose score is far from 0: running maxima have to move, or must not."""
    q, k, v = make_qkv(1, 200, 200, 2, dtype=dtype)
    q[..., 0] = 8  # and the default scale is 1/8
    k[..., 0] = 0
    k[:, slice(None) if key is None else key, :, 0] = score
    for causal in (False, True):
        check(device, q, k, v, causal=causal)


@pytest.mark.parametrize("score", [40.0, 90.0])
def test_a_key_far_above_the_first(device, dtype, make_qkv, score):
    """In bf16 its p is near the end of the range, and stays: rounded, where that of a maximum is 1."""
    q, k, v = make_qkv(1, 200, 200, 2, dtype=dtype)
    q[..., 0], k[..., 0] = 8, 0
    k[:, 1, :, 0] = score
    for causal in (False, True):
        out, lse = attend(device, q, k, v, causal=causal)
        expected, expected_lse = attention_reference(q, k, v, causal=causal)
        assert_same_but_rounding(out, expected.to(dtype))
        torch.testing.assert_close(lse, expected_lse.to(lse.dtype), rtol=1e-5, atol=1e-5)


def test_scores_beyond_half(device, dtype, make_qkv):
    """Numbers near 1e3, whose scores no fp16 can hold."""
    q, k, v = make_qkv(2, 70, 90, dtype=dtype)
    check(device, q * 1000, k * 1000, v, causal=True)
    check(device, q * 1000, k, v * 1000)


def test_output_at_the_end_of_the_range(device, dtype, make_qkv):
    """An average of the largest numbers of the type is that number, not inf."""
    q, k, v = make_qkv(1, 33, 64, 2, dtype=dtype)
    check(device, q, k, torch.full_like(v, torch.finfo(dtype).max), softmax_scale=0.0)


# ---- NaN and inf ---------------------------------------------------------------------------------


def assert_same_but_rounding(x, clean):
    """Bad numbers may change the order of sums in their block of rows, and nothing else."""
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(x, clean, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("window_size", HIDING_WINDOWS, ids=str)
def test_what_is_masked_stays_out(device, dtype, make_qkv, window_size, poison):
    """The first 30 and last 20 keys are NaN or inf: who does not see them must not notice."""
    q, k, v = make_qkv(1, 150, 150, 2, 1, 64, 40, dtype=dtype)
    clean, clean_lse = attend(device, q, k, v, window_size=window_size)
    bad, visible = bad_keys(window_size, q.device)
    for x in (k, v):
        x[:, bad] = poison
    out, lse = attend(device, q, k, v, window_size=window_size)
    innocent = ~(visible & bad).any(dim=1)
    assert 60 < innocent.sum() < 150
    assert_same_but_rounding(out[:, innocent], clean[:, innocent])
    assert_same_but_rounding(lse[..., innocent], clean_lse[..., innocent])


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_visible_nan_reaches_who_sees_it(device, dtype, make_qkv, where):
    q, k, v = make_qkv(2, 100, 100, 4, 2, dtype=dtype)
    options = {"window_size": (30, 5)}
    clean, clean_lse = attend(device, q, k, v, **options)
    {"q": q, "k": k, "v": v}[where][1, 50, 1, 3] = torch.nan
    out, lse = check(device, q, k, v, **options)

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


@pytest.mark.parametrize("layout", ["heads_first", "sequence_first", "in_nan", "last_dim_strided"])
@pytest.mark.parametrize("head_dims", [(64, 64), (72, 40)], ids=str)
def test_layouts(device, dtype, make_qkv, layout, head_dims):
    """The layout of the inputs changes nothing, to the bit; nor does NaN beyond them."""
    q, k, v = make_qkv(3, 45, 77, 4, 2, *head_dims, dtype=dtype, layout=layout)
    out, lse = check(device, q, k, v, causal=True)
    plain = attend(device, q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])


def test_packed_and_expanded(device, dtype, make_qkv):
    qkv = make_qkv(3, 45, 77, 4 + 2 + 2, dtype=dtype)[0]
    q, k, v = qkv.split([4, 2, 2], dim=2)
    check(device, q, k, v, causal=True)
    check(
        device, q, k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1)
    )  # one K and V for the whole batch
    check(device, q, k[:, :1].expand(-1, 45, -1, -1), v)  # the same key everywhere


def test_misaligned_rows(device, dtype, make_qkv):
    """Rows that start at odd elements cannot be read by 16 bytes at a time."""
    q, k, v = (x[..., 1:65] for x in make_qkv(2, 45, 77, 4, 2, 72, dtype=dtype))
    check(device, q, k, v, causal=True)


def test_inputs_are_read_in_place(device, make_qkv):
    if device.torch_device != "cuda":
        pytest.skip("only torch.cuda counts its memory")
    q, k, v = make_qkv(2, 512, 512, layout="heads_first")
    attend(device, q, k, v, num_splits=1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = attend(device, q, k, v, num_splits=1)
    assert torch.cuda.max_memory_allocated() - before <= out.nbytes + lse.nbytes + 2 * 512


@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "sequence", "heads"])
def test_offsets_beyond_32_bits(device, dimension):
    """Two batch entries, keys or heads that lie 2^31 elements apart."""
    far = 2**31
    shapes = {0: (2, 16, 2, 64), 1: (1, 2, 2, 64), 2: (1, 16, 2, 64)}
    shape = shapes[dimension]
    room = math.prod(shape)
    try:
        storage = torch.empty(far + 3 * room, dtype=torch.bfloat16, device=device.torch_device)
        storage = device.place(storage)
    except RuntimeError as error:
        pytest.skip(f"not enough memory: {error}")
    strides = list(torch.empty(shape).stride())
    strides[dimension] = far
    q, k, v = (storage.as_strided(shape, strides, storage_offset=i * room) for i in range(3))
    for x in (q, k, v):
        x.copy_(torch.randn(shape))
    check(device, q, k, v, causal=True)


def test_output_beyond_32_bits(device):
    """An output of more than 2^31 elements, every batch entry of which is the same."""
    if device.torch_device != "cuda":
        pytest.skip("8 million rows: minutes on a CPU")
    batch, seqlen, heads, head_dim = 2**13 + 2, 256, 4, 256
    if torch.cuda.mem_get_info()[0] < 1.5 * 2 * batch * seqlen * heads * head_dim:
        pytest.skip("not enough memory")
    x = torch.randn(1, seqlen, heads, head_dim).to(torch.bfloat16).cuda()
    q, kv = x.expand(batch, -1, -1, -1), x[:, :16].expand(batch, -1, -1, -1)
    out, lse = attend(device, q, kv, kv)
    assert_close(out[:1], lse[:1], x, x[:, :16], x[:, :16])
    assert all(torch.equal(entry, out[0]) for entry in (out[1], out[batch // 2], out[-2], out[-1]))
    assert (lse == lse[0]).all()


# ---- reproducibility -----------------------------------------------------------------------------


def test_runs_are_equal_to_the_bit(device, dtype, make_qkv):
    q, k, v = make_qkv(2, 300, 500, 4, 2, dtype=dtype)
    out, lse = attend(device, q, k, v, causal=True)
    for _ in range(5):
        again, lse_again = attend(device, q, k, v, causal=True)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)


def test_batch_entries_do_not_depend_on_each_other(device, dtype, make_qkv):
    q, k, v = make_qkv(5, 70, 130, 4, 2, dtype=dtype)
    options = {"causal": True, "num_splits": 1}  # else the batch has a say in how keys are split
    out, lse = attend(device, q, k, v, **options)
    for entry in (slice(0, 1), slice(3, 5)):
        alone, lse_alone = attend(device, q[entry], k[entry], v[entry], **options)
        assert torch.equal(out[entry], alone) and torch.equal(lse[entry], lse_alone)


def test_inputs_are_left_alone(device, dtype, make_qkv):
    inputs = make_qkv(2, 33, 65, 4, 2, dtype=dtype)
    copies = [x.clone() for x in inputs]
    attend(device, *inputs, causal=True)
    assert all(torch.equal(*pair) for pair in zip(inputs, copies, strict=True))
