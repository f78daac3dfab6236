"""The bounds of docs/numerics.md where they are hard to keep: large scores, large means, +inf."""

from dataclasses import dataclass, field
from math import inf, nan

import pytest
import torch

from flash_attn_sm120 import _C
from flash_attn_sm120._measure import allowed_error
from helpers.checks import attend, dlse_for, dout_for, gradients_of
from helpers.devices import CPU
from helpers.reference import (
    assert_bounded,
    assert_gradients_close,
    attention_reference,
    gradient_floors,
    gradient_reference,
    max_finite,
)

# ---- how exact -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Normal numbers, of which q, k, v and dout have the given means, times `factor` in q."""

    q: float = 0
    k: float = 0
    v: float = 0
    dout: float = 0
    factor: float = 1
    options: dict = field(default_factory=dict)
    multiple: float = 2  # of plain PyTorch's error: the kernels' bound for dq and dk


CASES = {
    "mean_1000_times_0.01": Case(10, 10, 10, 10, multiple=8),
    "mean_1000_scale_0.01": Case(1000, 1000, 1000, options={"softmax_scale": 0.01}, multiple=inf),
    "large_scores": Case(factor=300),
    "negative_scale": Case(options={"softmax_scale": -30.0}),
    "mean_10": Case(10, 10, 10, multiple=8),
    "mean_10_of_v": Case(v=10, multiple=8),
    "mean_3": Case(3, 3, 3, 3),
    "mean_30": Case(30, 30, 30, 30, multiple=8),
    "mean_30_of_v": Case(v=30, multiple=8),
    "mean_100_of_k": Case(k=100),
    "mean_100_of_dout": Case(dout=100),
    "large_capped_scores": Case(factor=300, options={"softcap": 30.0}),
    "causal_mean_10": Case(10, 10, 10, 10, options={"causal": True}, multiple=8),
}


@pytest.mark.quick("cpu-fp32-mean_10", "emulator-bf16-mean_10")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_error_against_plain_pytorch(device, dtype, case):
    """All against fp64: on the CPU twice plain PyTorch's error, in kernels by the page's table."""
    options = case.options
    q, k, v, dout = (
        torch.randn(2, 75, 2, 64) + mean for mean in (case.q, case.k, case.v, case.dout)
    )
    inputs = [x.to(dtype) for x in (q * case.factor, k, v, dout)]
    plains = results_of(*inputs, **options)
    if not all(x.isfinite().all() for x in plains.values()):
        pytest.skip("plain PyTorch overflows")
    refs = results_of(*(x.double() for x in inputs), **options)
    q, k, v, dout = map(device.place, inputs)
    out, _ = attend(q, k, v, **options)
    gradients = gradients_of(q, k, v, dout, **options)
    results = dict(zip(refs, map(plain_tensor, (out, *gradients)), strict=True))
    numbers = torch.finfo(dtype)
    floors = gradient_floors(*inputs, None, options.get("softmax_scale"))
    delta_errors = errors_by_delta(*inputs, **options)
    for name, ref in refs.items():
        error = max_finite(plains[name] - ref)
        bound = numbers.eps / 2 * ref.abs().clamp(min=numbers.smallest_normal)
        if device != CPU:
            bound += allowed_error(ref, plains[name], factor=0) + floors.get(name, 0)
        if device == CPU or name not in delta_errors:
            assert_bounded(results[name], ref, bound + 2 * error, name)
        else:
            assert_bounded(results[name], ref, bound + case.multiple * error, name)
            assert_bounded(results[name], ref, bound + 2 * error + delta_errors[name], name)


def results_of(q, k, v, dout, **options):
    """Plain PyTorch's, in the type of the inputs."""
    out, _ = attention_reference(q, k, v, upcast=False, **options)
    gradients = gradient_reference(q, k, v, dout, upcast=False, **options)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))


def errors_by_delta(q, k, v, dout, **options):
    """By how much dq and dk may be off because kernels take delta = dout . out from an out that was
    rounded twice: the weights, then the sum."""
    eps = torch.finfo(q.dtype).eps
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    scale = abs(options.get("softmax_scale") or q.shape[-1] ** -0.5)
    mean_of_v, _ = attention_reference(q, k, v.abs(), **options)
    mean_of_k, _ = attention_reference(q, k, k.abs(), **options)
    delta = eps * (dout.abs() * mean_of_v).sum(-1, keepdim=True)  # [B, Sq, H, 1]
    sum_of_q = gradient_reference(q, k, torch.zeros_like(k), delta * q.abs(), **options)[2]
    return {"dq": scale * delta * mean_of_k, "dk": scale * sum_of_q}


def plain_tensor(x):
    return x.detach().as_subclass(torch.Tensor).cpu()


# ---- the lse that is given -----------------------------------------------------------------------


@pytest.mark.quick("cpu-fp32-0", "emulator-bf16-0")
@pytest.mark.parametrize("mean", [0, 10])
def test_keys_in_parts(device, dtype, make_qkv, mean):
    """As in ring attention: out and lse of all keys, gradients of one half of them at a time."""
    q, k, v = make_qkv(1, 50, 96, 2, dtype=dtype)
    q = q + mean
    dout, dlse = dout_for(device, q, v), dlse_for(device, q)
    out, lse = _C.forward(q, k, v, return_lse=True)
    parts = [
        _C.backward(dout, q, k[:, keys], v[:, keys], out, lse, dlse)
        for keys in (slice(0, 40), slice(40, 96))
    ]
    dq = (parts[0][0].double() + parts[1][0].double()).to(dtype)
    dk, dv = (torch.cat([part[i] for part in parts], dim=1) for i in (1, 2))
    assert_gradients_close([dq, dk, dv], q, k, v, dout, dlse)


def test_lse_of_no_key(device, dtype, make_qkv):
    """A row that is given -inf has no weights, whatever its scores are."""
    q, k, v = make_qkv(1, 20, 40, 1, dtype=dtype)
    out, lse = _C.forward(q, k, v, return_lse=True)
    out[:, 7], lse[..., 7] = 0, -inf
    dout = dout_for(device, q, v)
    dq, dk, dv, _ = _C.backward(dout, q, k, v, out, lse, None)
    others = [row for row in range(20) if row != 7]
    expected = gradients_of(q[:, others], k, v, dout[:, others])
    assert (dq[:, 7] == 0).all()
    eps = torch.finfo(dtype).eps
    for x, y in zip((dq[:, others], dk, dv), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2 * eps, atol=2 * eps)


# ---- a score of +inf -----------------------------------------------------------------------------


def inputs_with_inf(device, make_qkv, dtype, value, **kwargs):
    """Key 40 of 70 gives the score +inf or NaN, or -inf, to each query that sees it."""
    q, k, v = make_qkv(1, 70, 70, 2, dtype=dtype, **kwargs)
    k[:, 40, :, 0] = value
    return q, k, v


@pytest.mark.quick("cpu-fp32-inf-*", "emulator-bf16-inf-*")
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"num_splits": 3}], ids=str)
@pytest.mark.parametrize("sink", [None, 1.0, inf], ids=["", "sink", "sink_inf"])
@pytest.mark.parametrize("value", [inf, nan, 0], ids=str)
def test_forward_of_infinite_scores(device, dtype, make_qkv, value, sink, options):
    """lse as torch.logsumexp: +inf, NaN where a score is NaN; out NaN in both."""
    q, k, v = inputs_with_inf(device, make_qkv, dtype, value)
    sinks = {} if sink is None else {"learnable_sink": device.place(torch.full((2,), sink))}
    out, lse = map(plain_tensor, attend(q, k, v, **options, **sinks))
    masks = {name: x for name, x in options.items() if name == "causal"}
    plain_sinks = {name: plain_tensor(x) for name, x in sinks.items()}
    ref_out, ref_lse = attention_reference(*map(plain_tensor, (q, k, v)), **masks, **plain_sinks)
    assert torch.equal(out.isnan(), ref_out.isnan())
    if (
        device != CPU and value != value and sink == inf
    ):  # both in a row: the kernels' may be either
        lse = lse.where(~(ref_lse.isnan() & (lse == inf)), nan)
    assert torch.equal(lse == inf, ref_lse == inf)
    assert torch.equal(lse.isnan(), ref_lse.isnan())


@pytest.mark.quick("cpu-fp32", "emulator-bf16")
def test_gradients_of_infinite_scores(device, dtype, make_qkv):
    """A row with a score of +inf has NaN for weights, and so for gradients; the rows that do not see
    that key keep theirs."""
    q, k, v = inputs_with_inf(device, make_qkv, dtype, inf)
    q[..., 0] = q[..., 0].abs() + 1  # no score of -inf
    dout = dout_for(device, q, v)
    dq, dk, dv = gradients_of(q, k, v, dout, causal=True, deterministic=True)
    assert all(x[:, 40:].isnan().all() for x in (dq, dv))
    assert dk[:, :41].isnan().all()
    clean = gradients_of(q[:, :40], k[:, :40], v[:, :40], dout[:, :40], causal=True)
    if device == CPU:  # kernels multiply whole tiles
        assert torch.equal(dq[:, :40], clean[0])
