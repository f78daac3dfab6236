"""Lists of blocks for tests, and what they let queries see."""

import math
from types import SimpleNamespace

import torch

from flash_attn_sm120 import _C, block_mask
from helpers.dropout import factors
from helpers.reference import (
    assert_close,
    assert_close_to,
    gradient_floors,
    gradient_reference,
    rounding_of_out,
)

# Options that the reference has not got.
NOT_OF_RESULTS = ("num_splits", "pack_gqa", "deterministic", "dropout_p", "dropout_seed")


def random_map(batch, heads, rows, columns, density=0.4):
    """(partial, full) maps of blocks; the first row lists nothing, the last column is full."""
    drawn = torch.rand(batch, heads, rows, columns)
    partial, full = drawn < density / 2, (drawn >= density / 2) & (drawn < density)
    full[..., -1], partial[..., -1] = True, False
    if rows > 1:
        partial[:, :, 0] = full[:, :, 0] = False
    return partial, full


def lists_of(device, partial, full, block):
    """FlashAttention-4's fields, on the test's device."""
    tensors = [*block_mask._lists_of(partial), *block_mask._lists_of(full)]
    names = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
    placed = {name: device.place(x) for name, x in zip(names, tensors, strict=True)}
    return SimpleNamespace(**placed, block_size=block)


def seen_by(partial, full, block, seqlen_q, seqlen_k):
    """(batch, heads, queries, keys): pairs in listed blocks."""
    listed = partial | full
    pairs = listed.repeat_interleave(block[0], dim=2).repeat_interleave(block[1], dim=3)
    return pairs[:, :, :seqlen_q, :seqlen_k]


def as_bias(seen):
    """What hides the other pairs from the reference."""
    return torch.where(seen, 0.0, -math.inf)


def options_of(device, tensors, q, k, mask_mod=None):
    """Those of _C, both directions."""
    blocks = block_mask.read(tensors, None, q.shape[1], k.shape[1])
    options = blocks.options(k.shape[1], True)
    return {
        name: type(lists)(*lists[:2], *(x if x is None else device.place(x) for x in lists[2:]))
        for name, lists in options.items()
    }


def check(device, q, k, v, blocks, seen, dout=None, **options):
    """Both directions of a call, held against the reference; without `dout` the forward alone."""
    out, lse = _C.forward(q, k, v, return_lse=True, **blocks, **options)
    case = {x: y for x, y in options.items() if x not in NOT_OF_RESULTS}
    if "dropout_p" in options:
        numbers = (options["dropout_seed"].tolist(), options["dropout_p"], range(q.shape[0]))
        case["dropout"] = factors(*numbers, q.shape[2], q.shape[1], k.shape[1]).to(q.device)
    assert_close(out, lse, q, k, v, attn_bias=as_bias(seen).to(q.device), **case)
    if dout is None:
        return
    gradients = _C.backward(dout, q, k, v, out, lse, None, **blocks, **options)[:3]
    given = (q, k, v, dout)
    ref = gradient_reference(*given, attn_bias=as_bias(seen).to(q.device), **case)
    pt = gradient_reference(*given, attn_bias=as_bias(seen).to(q.device), upcast=False, **case)
    floors = gradient_floors(*given, None, case.get("softmax_scale"))
    for name, x in rounding_of_out(*given, attn_bias=as_bias(seen).to(q.device), **case).items():
        floors[name] += x
    for name, got, *expected in zip(("dq", "dk", "dv"), gradients, ref, pt, strict=False):
        got = got.as_subclass(torch.Tensor)
        assert_close_to(got, *expected, 2, str(case), name, floors[name])
