"""Calls that are held against the reference, forward and backward."""

import torch

from flash_attn_sm120 import _C, flash_attn_func
from helpers.reference import assert_close, assert_gradients_close


def attend(q, k, v, **options):
    """(out, lse)"""
    return flash_attn_func(q, k, v, return_lse=True, **options)


def check_forward(q, k, v, *, num_splits=0, pack_gqa=None, **options):
    """One call, held against the reference; returns (out, lse)."""
    out, lse = attend(q, k, v, num_splits=num_splits, pack_gqa=pack_gqa, **options)
    assert out.device == q.device and out.is_contiguous() and lse.is_contiguous()
    assert_close(out, lse, q, k, v, **options)
    return out, lse


def gradients_of(q, k, v, dout, dlse=None, **options):
    """dq, dk, dv (dsink, dbias) by forward and backward."""
    out, lse = _C.forward(q, k, v, return_lse=True, **options)
    has_bias = options.get("attn_bias") is not None
    gradients = _C.backward(dout, q, k, v, out, lse, dlse, bias_gradient=has_bias, **options)
    assert (gradients[3] is None) == (options.get("learnable_sink") is None)
    assert len(gradients) == 4 + has_bias
    gradients = [x for x in gradients if x is not None]
    assert all(x.is_contiguous() for x in gradients)
    return gradients


def check_gradients(q, k, v, dout, dlse=None, *, deterministic=False, **options):
    """The gradients of one call, held against the reference."""
    gradients = gradients_of(q, k, v, dout, dlse, deterministic=deterministic, **options)
    assert_gradients_close(gradients, q, k, v, dout, dlse, **options)
    return gradients


def dout_for(device, q, v, mean=0.0):
    return device.place((torch.randn(*q.shape[:3], v.shape[3]) + mean).to(q.dtype))


def dlse_for(device, q):
    return device.place(torch.randn(q.shape[0], q.shape[2], q.shape[1]))


def assert_all_equal(some, others, equal_nan=False):
    """To the bit; with equal_nan, but for the bits of a NaN."""
    for x, y in zip(some, others, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=equal_nan)
