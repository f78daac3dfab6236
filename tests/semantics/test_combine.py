"""flash_attn_combine: parts of attention, of other keys each, put together."""

import math

import pytest
import torch

from flash_attn_sm120 import flash_attn_combine, flash_attn_func
from helpers.devices import CUDA, writable
from helpers.reference import assert_close

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_parts(device, parts, shape, dtype=torch.float32, empty=0.3):
    """(out_partial, lse_partial) of [*shape, head_dim]; some parts have no keys."""
    out = torch.randn(parts, *shape)
    lse = 3 * torch.randn(parts, *shape[:-1])
    nothing = torch.rand(lse.shape) < empty
    lse[nothing] = -math.inf
    out[nothing] = 0
    return device.place(out.to(dtype)), device.place(lse)


def reference(out_partial, lse_partial):
    """In fp64."""
    out, lse_parts = out_partial.cpu().double(), lse_partial.cpu().double()
    lse = (
        torch.logsumexp(lse_parts, 0)
        if len(lse_parts)
        else lse_parts.new_full(lse_parts.shape[1:], -math.inf)
    )
    weights = torch.exp(lse_parts - lse.masked_fill(lse == -math.inf, 0))
    return (weights[..., None] * out).sum(0), lse


def check(out_partial, lse_partial, **options):
    """(out, lse), held against the reference."""
    out, lse = flash_attn_combine(out_partial, lse_partial, **options)
    expected, expected_lse = reference(out_partial, lse_partial)
    assert out.shape == expected.shape and lse.shape == expected_lse.shape
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[out.dtype]
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-5, atol=1e-5)
    return out, lse


@pytest.mark.parametrize("out_dtype", [None, *TYPES], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_types(device, dtype, out_dtype):
    if not device.takes(TYPES.index(dtype) + [None, *TYPES].index(out_dtype)):
        pytest.skip("the other size of tiles has this case")
    out, _ = check(*make_parts(device, 5, (2, 7, 3, 64), dtype), out_dtype=out_dtype)
    assert out.dtype == (out_dtype or dtype)


@pytest.mark.parametrize("parts", [0, 1, 2, 17, 133])
def test_numbers_of_parts(device, parts):
    check(*make_parts(device, parts, (1, 3, 2, 64)))


@pytest.mark.parametrize("head_dim", [8, 40, 128, 256, 512])
def test_head_dims(device, head_dim):
    check(*make_parts(device, 3, (2, 5, 2, head_dim)))


def test_rows_without_keys(device):
    out_partial, lse_partial = make_parts(device, 3, (1, 4, 2, 64), empty=1)
    out, lse = check(out_partial, lse_partial)
    assert (out == 0).all() and (lse == -math.inf).all()
    assert flash_attn_combine(out_partial, lse_partial, return_lse=False)[1] is None


def test_layouts(device):
    """Strides are read in place, and out is written in place."""
    out_partial, lse_partial = make_parts(device, 3, (2, 5, 4, 64))
    apart = out_partial.transpose(2, 3).contiguous().transpose(2, 3)
    lse_apart = lse_partial.transpose(2, 3).contiguous().transpose(2, 3)
    expected = check(out_partial, lse_partial)
    for got, want in zip(check(apart, lse_apart), expected, strict=True):
        assert torch.equal(got, want)
    assert expected[1].transpose(1, 2).is_contiguous(), "as FlashAttention-4's"
    room = out_partial.new_empty(2, 5, 4, 128)
    out = writable(room[..., 64:])
    result, _ = flash_attn_combine(out_partial, lse_partial, out=out)
    assert result is out and torch.equal(out, expected[0])


def test_packed(device):
    out_partial, lse_partial = make_parts(device, 3, (11, 4, 64))
    out, lse = check(out_partial, lse_partial)
    cu_seqlens = device.place(torch.tensor([1, 5, 5, 9], dtype=torch.int32))
    seqused = device.place(torch.tensor([2, 0, 7], dtype=torch.int32))
    for options, used in (
        ({"cu_seqlens": cu_seqlens}, range(1, 9)),
        ({"cu_seqlens": cu_seqlens, "seqused": seqused}, (1, 2, 5, 6, 7, 8)),
    ):
        some, some_lse = flash_attn_combine(out_partial, lse_partial, **options)
        for row in range(11):
            if row in used:
                assert torch.equal(some[row], out[row]) and torch.equal(some_lse[row], lse[row])
            else:
                assert (some[row] == 0).all() and (some_lse[row] == -math.inf).all()


def test_seqused_of_a_batch(device):
    out_partial, lse_partial = make_parts(device, 2, (3, 5, 2, 64))
    out, lse = check(out_partial, lse_partial)
    counts = [5, 0, 2]
    seqused = device.place(torch.tensor(counts, dtype=torch.int32))
    some, some_lse = flash_attn_combine(out_partial, lse_partial, seqused=seqused)
    for entry, count in enumerate(counts):
        assert torch.equal(some[entry, :count], out[entry, :count])
        assert torch.equal(some_lse[entry, :count], lse[entry, :count])
        assert (some[entry, count:] == 0).all() and (some_lse[entry, count:] == -math.inf).all()


@pytest.mark.parametrize("contents", [[-5, 100, 3, 2**31 - 1], [9, 5, 0, -(2**31)]], ids=str)
def test_lengths_may_hold_anything(device, contents):
    out_partial, lse_partial = make_parts(device, 3, (11, 2, 64))
    lengths = device.place(torch.tensor(contents, dtype=torch.int32))
    out, _ = flash_attn_combine(out_partial, lse_partial, cu_seqlens=lengths, seqused=lengths[:3])
    assert out.isfinite().all()


def test_keys_over_two_devices(device, make_qkv):
    """What the function is for: attention of each half of the keys, put together."""
    q, k, v = make_qkv(2, 9, 300, 4, 2)
    halves = [
        flash_attn_func(q, k[:, keys], v[:, keys], return_lse=True)
        for keys in (slice(0, 130), slice(130, None))
    ]
    out_partial = torch.stack([out for out, _ in halves])
    lse_partial = torch.stack([lse.transpose(1, 2) for _, lse in halves])
    out, lse = flash_attn_combine(out_partial, lse_partial)
    assert_close(out, lse.transpose(1, 2).contiguous(), q, k, v)


def test_bad_input(device):
    out_partial, lse_partial = make_parts(device, 3, (2, 5, 4, 64))
    int64 = device.place(torch.zeros(2, dtype=torch.int64))
    cases = [
        (ValueError, "5 dimensions", (out_partial[0, 0], lse_partial), {}),
        (ValueError, "lse_partial must have size 4", (out_partial, lse_partial[..., :3]), {}),
        (TypeError, "lse_partial must be float32", (out_partial, lse_partial.half()), {}),
        (ValueError, "head_dim", (out_partial[..., :60], lse_partial), {}),
        (TypeError, "seqused must be int32", (out_partial, lse_partial), {"seqused": int64}),
        (ValueError, "packed", (out_partial, lse_partial), {"cu_seqlens": int64.int()}),
        (ValueError, "out overlaps", (out_partial, lse_partial), {"out": out_partial[0]}),
        (NotImplementedError, "virtual", (out_partial, lse_partial), {"virtual_batch_idx": int64}),
        (TypeError, "got list", ([1], lse_partial), {}),
    ]
    for error, message, tensors, options in cases:
        with pytest.raises(error, match=message):
            flash_attn_combine(*tensors, **options)
        check(out_partial, lse_partial)
    with pytest.raises(RuntimeError, match="no gradient"):
        flash_attn_combine(out_partial.detach().requires_grad_(), lse_partial)


def test_graph_capture(cuda):
    parts = make_parts(CUDA, 3, (2, 5, 4, 64))
    check(*parts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = flash_attn_combine(*parts)
    parts[0].normal_()
    graph.replay()
    assert torch.equal(out, flash_attn_combine(*parts)[0])
