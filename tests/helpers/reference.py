"""The oracle: attention in plain PyTorch, and the rule by which a result is close enough to it."""

import math

import torch

from flash_attn_sm120._measure import allowed_error

# Scores (batch * heads * rows * keys) that the reference holds at a time.
CHUNK_SCORES = 1 << 25


def attention_reference(
    q,
    k,
    v,
    *,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    softcap=0.0,
    learnable_sink=None,
    dropout=None,
    score_mod=None,
    alibi_slopes=None,
    attn_bias=None,
    mask_mod=None,
    upcast=True,
):
    """(out, lse) of q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), as they are defined.

    `dropout`: what weights are multiplied by before they weigh v, (B, Hq, Sq, Sk). Mods get whole
    grids of indices, not one element at a time.

    With `upcast` everything is computed one precision up: in fp32 for fp16 and bf16, in fp64 for
    fp32. Without it, everything is computed (and rounded at every step) in the type of the inputs:
    the `pt` of the tolerance rule. The results keep the type they were computed in.
    """
    dtype = q.dtype
    if upcast:
        dtype = torch.float64 if q.dtype in (torch.float32, torch.float64) else torch.float32
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_k, heads_kv, head_dim_v = v.shape[1:]
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    left, right = resolved_window(causal, window_size)

    # [B, H, S, D], every query head with its own copy of K and V
    q = q.transpose(1, 2).to(dtype) * scale
    k, v = (
        x.transpose(1, 2).to(dtype).repeat_interleave(heads_q // heads_kv, dim=1) for x in (k, v)
    )
    no_sink = q.new_full((heads_q,), -math.inf)  # a score of -inf changes nothing
    sink = no_sink if learnable_sink is None else learnable_sink.to(dtype)

    out = q.new_empty(batch, heads_q, seqlen_q, head_dim_v)
    lse = q.new_empty(batch, heads_q, seqlen_q)
    rows_at_a_time = max(1, CHUNK_SCORES // max(1, batch * heads_q * seqlen_k))
    for begin in range(0, seqlen_q, rows_at_a_time):
        rows = torch.arange(begin, min(begin + rows_at_a_time, seqlen_q), device=q.device)
        visible = visible_keys(rows + (seqlen_k - seqlen_q), seqlen_k, left, right)
        scores = q[:, :, rows] @ k.transpose(-1, -2)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        indices = grids(batch, heads_q, rows, seqlen_k) if score_mod or mask_mod else ()
        if score_mod:
            scores = score_mod(scores, *indices)
        if alibi_slopes is not None:
            bias = alibi_bias(alibi_slopes, rows + (seqlen_k - seqlen_q), seqlen_k)
            scores = (scores - bias).to(dtype)
        if attn_bias is not None:
            bias = attn_bias.expand(batch, heads_q, seqlen_q, seqlen_k)[:, :, rows]
            scores = scores + bias.to(dtype)
        scores = scores.masked_fill(~visible, -math.inf)
        if mask_mod:
            scores = scores.masked_fill(~mask_mod(*indices), -math.inf)
        scores = torch.cat(
            [scores, sink.view(1, -1, 1, 1).expand(batch, -1, rows.numel(), 1)], dim=-1
        )
        empty = (scores == -math.inf).all(-1, keepdim=True)  # where softmax gives 0/0
        scores = scores.masked_fill(empty, 0)
        weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0)
        weights = weights[..., :-1]
        if dropout is not None:
            weights = weights * dropout[:, :, rows].to(weights)
        out[:, :, rows] = weigh(weights, v, visible)
        lse[:, :, rows] = torch.logsumexp(scores, dim=-1).masked_fill(empty[..., 0], -math.inf)
    return out.transpose(1, 2), lse


def gradient_reference(q, k, v, dout, dlse=None, *, upcast=True, **kwargs):
    """(dq, dk, dv), dsink where there is a sink, dbias where there is a bias: autograd through
    attention_reference().

    With `upcast` everything is fp64, the gradients too; without, all is of the type of the inputs.
    """
    names = [name for name in ("learnable_sink", "attn_bias") if kwargs.get(name) is not None]
    inputs = [q, k, v, *(kwargs[name] for name in names)]
    inputs = [x.detach().as_subclass(torch.Tensor) for x in inputs]
    inputs = [(x.double() if upcast else x).requires_grad_() for x in inputs]
    kwargs = kwargs | dict(zip(names, inputs[3:], strict=True))
    with torch.enable_grad():
        out, lse = attention_reference(*inputs[:3], upcast=upcast, **kwargs)
    if not out.requires_grad:  # there are no queries
        return [torch.zeros_like(x) for x in inputs]
    results, gradients = [out], [dout]
    if dlse is not None:
        results, gradients = [out, lse], [dout, dlse]
    gradients = [
        x.as_subclass(torch.Tensor).to(result.dtype)
        for x, result in zip(gradients, results, strict=True)
    ]
    return torch.autograd.grad(results, inputs, gradients)


def rounding_of_out(q, k, v, dout, *, learnable_sink=None, **kwargs):
    """What gradients may be off by because out is rounded to its type: three standard deviations.

    delta_i = dout_i . out_i enters dq_i = scale sum_j p_ij (dp_ij - delta_i) k_j, dk_j, which has
    q_i in place of k_j, and dsink = -sum_i exp(sink - lse_i) delta_i. Where a tensor has few rows
    plain PyTorch, which rounds otherwise, is sometimes right by luck.
    """
    half_ulp = torch.finfo(q.dtype).eps / 2
    scale = kwargs.get("softmax_scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else abs(scale)
    q, k, v, dout = (x.as_subclass(torch.Tensor).double() for x in (q, k, v, dout))
    sink = learnable_sink
    if sink is not None:
        sink = kwargs["learnable_sink"] = sink.as_subclass(torch.Tensor).double()
    out, lse = attention_reference(q, k, v, **kwargs)
    delta = half_ulp * (dout * out).norm(dim=-1)  # [B, Sq, H]
    mean_k, _ = attention_reference(q, k, k, **kwargs)
    # Twice the score gives exp(2 s_ij - lse2_i) for p_ij: but for a factor of row i the square of it.
    # The sum over i of p_ij^2 x_i is then what such weights make of dout = x on its way to dv.
    twice = {**kwargs, "softmax_scale": 2 * (kwargs.get("softmax_scale") or scale)}
    twice["softcap"] = 2 * kwargs.get("softcap", 0.0)
    if kwargs.get("alibi_slopes") is not None:
        twice["alibi_slopes"] = 2 * kwargs["alibi_slopes"]
    if kwargs.get("attn_bias") is not None:
        bias = kwargs["attn_bias"] = kwargs["attn_bias"].as_subclass(torch.Tensor).double()
        twice["attn_bias"] = 2 * bias
    twice["learnable_sink"] = None if sink is None else 2 * sink
    _, lse2 = attention_reference(q, k, v, **twice)
    squared = torch.exp(lse2 - 2 * lse).nan_to_num(0).transpose(1, 2) * delta**2
    variance = gradient_reference(q, k, torch.zeros_like(k), squared[..., None] * q**2, **twice)[2]
    deviations = {
        "dq": 3 * scale * max_finite(delta[..., None] * mean_k.abs()),
        "dk": 3 * scale * max_finite(variance.sqrt()),
    }
    if kwargs.get("attn_bias") is not None:
        one_for_each = torch.eye(k.shape[1]).double().to(k.device)[None, :, None]
        weights, _ = attention_reference(
            q, k, one_for_each.expand(*k.shape[:3], -1), **{**kwargs, "dropout": None}
        )
        squared = (weights * delta[..., None]).transpose(1, 2).square()
        deviations["dbias"] = 3 * max_finite(squared.sum_to_size(bias.shape).sqrt())
    if sink is not None:
        weights = torch.exp(sink[:, None] - lse).nan_to_num(0).transpose(1, 2)
        deviations["dsink"] = 3 * max_finite((weights * delta).square().sum(dim=(0, 1)).sqrt())
    return deviations


def resolved_window(causal, window_size):
    """(left, right) of the two options; one that hides every key from every query is none."""
    left, right = window_size[0], 0 if causal else window_size[1]
    if left is not None and right is not None and left + right < 0:
        return None, 0 if causal else None
    return left, right


def visible_keys(diagonal, seqlen_k, left, right):
    """[rows, keys]: whether a row sees a key, given each row's key on the diagonal."""
    distance = torch.arange(seqlen_k, device=diagonal.device) - diagonal[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    return visible


def grids(batch, heads, rows, seqlen_k):
    """What mods call b, h, q_idx and kv_idx, [batch, heads, rows, keys] each."""
    b, h, keys = (torch.arange(n, device=rows.device) for n in (batch, heads, seqlen_k))
    return torch.meshgrid(b, h, rows, keys, indexing="ij")


def alibi_bias(slopes, diagonal, seqlen_k):
    """[batch or 1, heads, rows, keys]: what ALiBi takes off scores."""
    distance = (torch.arange(seqlen_k, device=diagonal.device) - diagonal[:, None]).abs()
    slopes = slopes.as_subclass(torch.Tensor).double()
    return slopes.reshape(-1, slopes.shape[-1], 1, 1) * distance


def weigh(weights, v, visible):
    """weights @ v in which masked keys count for nothing, even where 0 * NaN would be NaN.

    weights [B, H, rows, keys], v [B, H, keys, Dv], visible [rows, keys]
    """
    finite = v.isfinite()
    out = weights @ torch.where(finite, v, 0)
    for key in (~finite).any(dim=-1).any(dim=0).any(dim=0).nonzero().flatten().tolist():
        special = torch.where(finite[:, :, key], 0, v[:, :, key])  # [B, H, Dv]
        rows = visible[:, key]
        out[:, :, rows] += weights[:, :, rows, key, None] * special[:, :, None]
    return out


def assert_close(out, lse, q, k, v, **kwargs):
    """Holds out, and lse unless it is None, against the reference for the same arguments.

    The rule for out, of docs/numerics.md:

        max|out - ref| <= 2 * max|pt - ref| + 2 * max|ref + 0.3 - 0.3 - ref|

    (with softcap, 3 * max|pt - ref|), that is: at most twice as wrong as plain PyTorch in the input
    type, plus the rounding of numbers like these; and each element may be off by its own rounding, as
    plain PyTorch is right by luck now and then.

    The bound for lse: it is off by at most the error of the worst score (log-sum-exp moves by no
    more than its arguments do), and by its own rounding. A score is a dot product, summed up in
    fp32, whose partial sums stay below |scale| * |q| * |k| (Cauchy-Schwarz). So

        |lse - ref| <= 2^-18 * (1 + |scale| * max|q| * max|k| + max|bias|) + 2^-22 * |ref|

    where 2^-18 is 32 roundings of fp32: enough for the longest dot product and for exp2 and log2 as
    the hardware approximates them, far less than a wrong mask, scale or base costs.
    """
    ref, ref_lse = attention_reference(q, k, v, **kwargs)
    pt, _ = attention_reference(q, k, v, upcast=False, **kwargs)
    case = describe(q, k, v, kwargs)
    assert out.shape == ref.shape and out.dtype == q.dtype, (
        f"out is {out.dtype} {tuple(out.shape)}: {case}"
    )
    assert_close_to(out, ref, pt, factor=3 if kwargs.get("softcap") else 2, case=case)
    if lse is not None:
        assert lse.shape == ref_lse.shape and lse.dtype == torch.float32, (
            f"lse is {lse.dtype} {tuple(lse.shape)}: {case}"
        )
        bound = lse_bound(ref_lse, q, k, kwargs.get("softmax_scale"), kwargs.get("attn_bias"))
        assert_bounded(lse, ref_lse, bound, f"lse, {case}")


def assert_close_to(out, ref, pt, factor=2, case="", name="out", floor=0.0):
    """The tolerance rule for any result: `ref` one precision up, `pt` in the type of `out`."""
    bound = allowed_error(ref, pt, factor=factor).item() + floor
    half_ulp = torch.finfo(out.dtype).eps / 2
    assert_bounded(out, ref, bound + half_ulp * ref.abs(), f"{name}, {case}")


def assert_gradients_close(gradients, q, k, v, dout, dlse=None, *, of_bias=True, **kwargs):
    """Holds dq, dk, dv (dsink, dbias) against the reference for the same arguments: the rule for out."""
    ref = gradient_reference(q, k, v, dout, dlse, **kwargs)
    pt = gradient_reference(q, k, v, dout, dlse, upcast=False, **kwargs)
    floors = gradient_floors(q, k, v, dout, dlse, kwargs.get("softmax_scale"))
    inputs = {"dq": q, "dk": k, "dv": v}
    if kwargs.get("learnable_sink") is not None:
        inputs["dsink"] = kwargs["learnable_sink"]
    if kwargs.get("attn_bias") is not None and of_bias:
        inputs["dbias"] = kwargs["attn_bias"]
    ref, pt = ref[: len(inputs)], pt[: len(inputs)]
    for name, deviation in rounding_of_out(q, k, v, dout, **kwargs).items():
        floors[name] += deviation
    assert len(gradients) == len(ref) == len(inputs)
    for (name, x), gradient, *expected in zip(inputs.items(), gradients, ref, pt, strict=True):
        case = describe(q, k, v, kwargs | ({} if dlse is None else {"dlse": dlse}))
        gradient = gradient.detach().as_subclass(torch.Tensor)
        assert gradient.shape == x.shape and gradient.device == x.device, (name, case)
        assert gradient.dtype == (torch.float32 if name in ("dsink", "dbias") else x.dtype), (
            name,
            case,
        )
        factor = 3 if kwargs.get("softcap") else 2
        assert_close_to(gradient, *expected, factor, case, name, floors[name])


def gradient_floors(q, k, v, dout, dlse, scale):
    """What sums in fp32 may be off by where plain PyTorch happens to be exact.

    With a single visible key ds is p * (dout . v - dout . out) = 0, as the difference of two dot
    products that need not be rounded alike. Each term of a sum may be off by 2^-20 of the largest
    term there can be (Cauchy-Schwarz), n of them by sqrt(n) times that. The weights of a query sum
    up to 1: all terms of dq are as good as one.
    """
    if not min(q.numel(), k.numel(), v.numel()):
        return dict.fromkeys(("dq", "dk", "dv", "dsink", "dbias"), 0.0)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else abs(scale)
    norm_q, norm_k, norm_v, norm_dout = (
        max_finite(x.double().norm(dim=-1)) for x in (q, k, v, dout)
    )
    ds = norm_dout * norm_v + (0 if dlse is None else max_finite(dlse))
    batch, rows = q.shape[0], q.shape[1]
    rows_per_key = rows * q.shape[2] // k.shape[2]
    return {
        "dq": 2**-20 * scale * ds * norm_k,
        "dk": 2**-20 * scale * ds * norm_q * math.sqrt(rows_per_key),
        "dv": 2**-20 * norm_dout * math.sqrt(rows_per_key),
        "dsink": 2**-20 * ds * math.sqrt(batch * rows),
        "dbias": 2**-20 * ds * math.sqrt(batch * rows * q.shape[2]),
    }


def lse_bound(ref, q, k, scale, bias=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    largest_score = (
        abs(scale) * max_finite(q.double().norm(dim=-1)) * max_finite(k.double().norm(dim=-1))
    )
    if bias is not None:
        largest_score += max_finite(bias)
    return 2**-18 * (1 + largest_score) + 2**-22 * ref.abs()


def assert_bounded(actual, ref, bound, case):
    """|actual - ref| <= bound wherever ref is finite; the same NaN and inf where it is not."""
    expected = ref.to(actual.dtype)  # what overflows the type of the result is inf there
    finite = expected.isfinite()
    wrong = ~torch.where(
        finite, actual.isfinite(), (actual == expected) | (actual.isnan() & expected.isnan())
    )
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{case}\n{int(wrong.sum())} of {wrong.numel()} elements are NaN or inf, or should be: "
            f"first at {where}: {actual[where].item()}, expected {expected[where].item()}"
        )
    error = torch.where(finite, actual.to(ref.dtype) - ref, 0).abs()
    excess = torch.where(finite, error - bound, -math.inf)
    if (excess > 0).any():
        where = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{case}\n{int((excess > 0).sum())} of {excess.numel()} elements are too far off, "
            f"most at {where}: {actual[where].item()}, expected {ref[where].item()}; "
            f"error {error[where].item():.3e}, bound {bound[where].item():.3e}"
        )


def max_finite(x):
    """max|x| over the elements that are neither NaN nor inf; 0 if there are none."""
    return torch.where(x.isfinite(), x, 0).abs().max().item() if x.numel() else 0.0


def describe(q, k, v, kwargs):
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
    options = "".join(
        f", {name}={tuple(value.shape) if torch.is_tensor(value) else value}"
        for name, value in kwargs.items()
    )
    return f"{q.dtype} on {q.device}: {shapes}{options}"
