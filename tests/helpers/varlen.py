"""Calls of packed sequences, each held against the reference of its slice alone."""

import itertools
from dataclasses import dataclass

import torch

from flash_attn_sm120 import _C
from helpers.reference import (
    assert_close,
    assert_gradients_close,
    gradient_reference,
)


def on(device, numbers):
    """int32 on the device of the calls."""
    return device.place(torch.tensor(numbers, dtype=torch.int32))


@dataclass
class Side:
    """Where the rows of each sequence are in a tensor, and the arguments that say so."""

    begins: list
    lengths: list
    rows: int  # of the tensor, or of an entry of its batch where it is not packed
    packed: bool

    @classmethod
    def make(cls, lengths, packed=True, slack=5, used=None):
        """`slack`: rows after the last sequence. `used`: rows of each that are in use."""
        begins = [0, *itertools.accumulate(lengths)]
        if not packed:
            rows = max(lengths, default=0)
            return cls([rows * b for b in range(len(lengths))], used or lengths, rows, False)
        return cls(begins[:-1], used or lengths, begins[-1] + slack, True)

    @property
    def batch(self):
        return len(self.lengths)

    def slices(self):
        """Of the tensor as [all rows, heads, dim]."""
        return [
            slice(begin, begin + length)
            for begin, length in zip(self.begins, self.lengths, strict=True)
        ]

    def covered(self):
        rows = torch.zeros(self.rows if self.packed else self.rows * self.batch, dtype=torch.bool)
        for part in self.slices():
            rows[part] = True
        return rows

    def tensor(self, device, heads, dim, dtype=torch.bfloat16):
        """Random; NaN in all rows that no sequence has."""
        covered = self.covered()
        x = torch.full((len(covered), heads, dim), torch.nan)
        x[covered] = torch.randn(int(covered.sum()), heads, dim)
        shape = x.shape if self.packed else (self.batch, self.rows, heads, dim)
        return device.place(x.reshape(shape).to(dtype))

    def arguments(self, device, name, ends, used):
        """cu_seqlens and seqused of side `name`."""
        found = {}
        if self.packed:
            found[f"cu_seqlens_{name}"] = on(device, [*self.begins, ends])
        if used or (not self.packed and self.lengths != [self.rows] * self.batch):
            found[f"seqused_{name}"] = on(device, self.lengths)
        return found


@dataclass
class Batch:
    """A call: its tensors, and where its sequences are."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor
    sides: tuple
    lengths: dict

    @property
    def inputs(self):
        return self.q, self.k, self.v


def make_batch(
    device,
    lengths_q,
    lengths_k,
    heads=(4, 2),
    dims=(64, 64),
    dtype=torch.bfloat16,
    *,
    packed=(True, True),
    used=(None, None),
    slack=5,
):
    """`used`: rows in use of each sequence, per side; None: all of them."""
    sides = tuple(
        Side.make(lengths, is_packed, slack, some)
        for lengths, is_packed, some in zip((lengths_q, lengths_k), packed, used, strict=True)
    )
    q_side, k_side = sides
    lengths = {}
    for name, side, given, some in zip("qk", sides, (lengths_q, lengths_k), used, strict=True):
        lengths |= side.arguments(device, name, sum(given), some is not None)
    dlse = q_side.tensor(device, heads[0], 1, torch.float32)[..., 0]
    return Batch(
        q_side.tensor(device, heads[0], dims[0], dtype),
        k_side.tensor(device, heads[1], dims[0], dtype),
        k_side.tensor(device, heads[1], dims[1], dtype),
        q_side.tensor(device, heads[0], dims[1], dtype),
        dlse.transpose(-1, -2).contiguous(),
        sides,
        lengths,
    )


def flat(x):
    """[all rows, heads, dim], of a packed tensor or any other."""
    return x if x.dim() == 3 else x.flatten(0, 1)


def flat_lse(x):
    """[heads, all rows]."""
    return x if x.dim() == 2 else x.transpose(0, 1).flatten(1, 2)


def sequences(batch):
    """q, k, v, dout, dlse of each sequence as a call of its own has them, and its slices."""
    for rows, keys in zip(*(side.slices() for side in batch.sides), strict=True):
        yield (
            flat(batch.q)[None, rows],
            flat(batch.k)[None, keys],
            flat(batch.v)[None, keys],
            flat(batch.dout)[None, rows],
            flat_lse(batch.dlse)[None, :, rows],
            rows,
            keys,
        )


def attend(batch, **options):
    """(out, lse)"""
    return _C.forward(*batch.inputs, return_lse=True, **batch.lengths, **options)


def gradients_of(batch, out, lse, with_dlse=True, **options):
    """dq, dk, dv, dsink"""
    dlse = batch.dlse if with_dlse else None
    return _C.backward(batch.dout, *batch.inputs, out, lse, dlse, **batch.lengths, **options)


def check_forward(batch, *, num_splits=0, pack_gqa=None, **options):
    """(out, lse), held against the reference."""
    out, lse = attend(batch, num_splits=num_splits, pack_gqa=pack_gqa, **options)
    assert out.shape == (*batch.q.shape[:-1], batch.v.shape[-1])
    for q, k, v, _dout, _dlse, rows, _keys in sequences(batch):
        if q.shape[1]:
            results = flat(out)[None, rows], flat_lse(lse)[None, :, rows]
            assert_close(*results, q, k, v, **options)
    outside = ~batch.sides[0].covered()
    assert (flat(out).cpu()[outside] == 0).all()
    assert (flat_lse(lse).cpu()[:, outside] == -torch.inf).all()
    return out, lse


def check(batch, *, deterministic=False, with_dlse=True, bounds=None, **options):
    """(out, lse) and gradients, held against the reference. `bounds`: the backward's alone."""
    out, lse = check_forward(batch, **options)
    bounds = bounds or {}
    *gradients, dsink = gradients_of(
        batch, out, lse, with_dlse, deterministic=deterministic, **bounds, **options
    )
    sink = options.get("learnable_sink")
    dsink_ref = None if sink is None else torch.zeros(sink.shape, dtype=torch.float64)
    for q, k, v, dout, dlse, rows, keys in sequences(batch):
        dlse = dlse if with_dlse else None
        own = [flat(x)[None, part] for x, part in zip(gradients, (rows, keys, keys), strict=True)]
        if sink is not None and q.shape[1]:
            ref = gradient_reference(q, k, v, dout, dlse, **options)[3]
            dsink_ref += ref.cpu()
            own.append(ref.float())
        if q.shape[1] and k.shape[1]:
            assert_gradients_close(own, q, k, v, dout, dlse, **options)
        else:
            assert all((x == 0).all() for x in own[:3])
    for x, side in zip(gradients, (batch.sides[0], batch.sides[1], batch.sides[1]), strict=True):
        assert (flat(x).cpu()[~side.covered()] == 0).all()
    assert (dsink is None) == (sink is None)
    if sink is not None:
        scale = max(1.0, dsink_ref.abs().max().item())
        torch.testing.assert_close(dsink.cpu().double(), dsink_ref, rtol=0, atol=0.02 * scale)
    return out, lse, gradients, dsink
