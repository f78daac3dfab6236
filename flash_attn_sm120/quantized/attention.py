"""The door: what calls of quantised attention take, and where they are computed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flash_attn_sm120.plan import Window
from flash_attn_sm120.quantized import device, reference
from flash_attn_sm120.quantized.layout import (
    Quantized,
    check_head_dim,
    check_input,
    check_quantized,
)
from flash_attn_sm120.quantized.quantize import quantize_together
from flash_attn_sm120.quantized.recipes import Recipe, recipe_of

Operand = Tensor | Quantized
_OUT_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantized_attention(
    q: Operand,
    k: Operand,
    v: Operand,
    recipe: str = "int8_fp8",
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    softcap: float = 0.0,
    return_lse: bool = False,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`flash_attn_func` in 8- and 4-bit numbers, forward only.

    On CUDA devices ``"int8_fp8"`` and ``"fp8"`` run from compute capability 8.9 on, the others on
    12.x alone. On the CPU every recipe is computed rounding by rounding, for tests.

    Errors are relative L2 and cosine against fp64 of N(0, 1) inputs of 4096 tokens, head dim 128,
    made by ``benchmarks/accuracy.py``, whose table is in ``docs/quantized.md``.

    ``"int8_fp8"``: 0.040 and 0.9992. Q and K in int8 with scales of 32 queries and 64 keys
    (SageAttention 2, https://arxiv.org/abs/2411.10958), P and V in e4m3. The most accurate. Not for
    K that is in e4m3 already.

    ``"fp8"``: 0.055 and 0.9985. All in e4m3, a scale per head (FlashAttention-3,
    https://arxiv.org/abs/2407.08608). Not for sharp softmaxes or offsets before RoPE: there
    ``"int8_fp8"`` has 0.5 to 0.6 of the error.

    ``"mxfp8"``: 0.055 and 0.9985. Q and K in e4m3 with scales of 32 elements (OCP Microscaling,
    rounded up), P and V as in ``"fp8"``. Not for accuracy: it has no more than ``"fp8"``.

    ``"nvfp4_bf16"``: 0.128 and 0.9918; ``"nvfp4_fp8"``: 0.134 and 0.9911. Q and K in e2m1
    with e4m3 scales of 16 elements and one per head, rotated by Hadamard matrices; P and V in 16
    bits or e4m3. Not for sharp softmaxes or offsets before RoPE, where the errors double.

    ``"int8_nvfp4"``: 0.130 and 0.9916. P and V in e2m1 (SageAttention 3,
    https://arxiv.org/abs/2505.11594), V without its mean. Not where results near those of 8 bits
    are wanted: ``"int8_fp8"`` has a third of the error.

    ``"nvfp4"``: 0.182 and 0.9836. All in e2m1. Not for language models, nor for what
    ``"nvfp4_fp8"`` is not for.

    Args:
        q: ``(batch, seqlen_q, heads_q, head_dim)`` bfloat16 or float16, or what :func:`quantize`
            made of it with the same recipe.
        k: ``(batch, seqlen_k, heads_kv, head_dim)``, or quantised; ``heads_kv`` divides
            ``heads_q``.
        v: ``(batch, seqlen_k, heads_kv, head_dim_v)``, or quantised. Head dims are multiples of 16
            up to 256, of Q and K in mxfp8 multiples of 32, and need not be equal.
        recipe: a name in ``RECIPES``.
        softmax_scale, causal, window_size, softcap: as in :func:`flash_attn_func`.
        return_lse: whether to return the lse: that of the quantised Q and K.
        out_dtype: bfloat16, float16 or float32; default that of ``q`` before it was quantised.

    Returns:
        ``(out, lse)``: ``(batch, seqlen_q, heads_q, head_dim_v)``; ``(batch, heads_q, seqlen_q)``
        float32, natural logarithm, or None.

    Raises:
        TypeError: not a tensor or :class:`Quantized`, or a dtype other than the above.
        ValueError: an unknown recipe; shapes, head dims, devices; scales of another shape, or not
            positive and finite.
        NotImplementedError: a gradient is wanted.
        RuntimeError: a device that cannot run the recipe; NVRTC or the driver fail.
    """
    chosen = recipe_of(recipe)
    given = {"q": q, "k": k, "v": v}
    for name, x in given.items():
        _check_operand(name, x, chosen)
    out_dtype = out_dtype or q.dtype
    if out_dtype not in _OUT_TYPES:
        raise TypeError(f"out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
    _check_together(q, k, v)
    place = _data(q).device
    if place.type == "cuda":
        device.check(recipe, place.index or 0)
    elif place.type != "cpu":
        raise RuntimeError(
            f"quantized_attention has no kernels for {place.type} devices: it takes CUDA and CPU "
            "tensors"
        )
    options = _options(q, softmax_scale, causal, window_size, softcap)
    wide = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    narrow = {name: x for name, x in given.items() if isinstance(x, Quantized)}
    narrow |= quantize_together(wide, recipe)
    narrow_q, narrow_k, narrow_v = (narrow[name] for name in ("q", "k", "v"))
    if narrow_q.rotation != narrow_k.rotation:
        raise ValueError(
            f"q and k must be rotated alike, got blocks of {narrow_q.rotation} and "
            f"{narrow_k.rotation}"
        )
    if place.type == "cuda":
        return device.attend(narrow_q, narrow_k, narrow_v, options, out_dtype, return_lse)
    with torch.no_grad():
        out, lse = reference.attend(narrow_q, narrow_k, narrow_v, options)
    return out.to(out_dtype), lse if return_lse else None


def _data(x: Operand) -> Tensor:
    return x.data if isinstance(x, Quantized) else x


def _sizes(x: Operand) -> tuple[int, int, int, int]:
    if isinstance(x, Quantized):
        return x.batch, x.seqlen, x.heads, x.head_dim
    batch, seqlen, heads, head_dim = x.shape
    return batch, seqlen, heads, head_dim


def _check_operand(name: str, x: Any, recipe: Recipe) -> None:
    format = recipe.pv if name == "v" else recipe.qk
    if isinstance(x, Quantized):
        check_quantized(name, x, name, format)
        return
    check_input(name, x)
    check_head_dim(name, format, x.shape[3])


def _check_together(q: Operand, k: Operand, v: Operand) -> None:
    batch, _, heads_q, head_dim = _sizes(q)
    batch_k, seqlen_k, heads_kv, head_dim_k = _sizes(k)
    batch_v, seqlen_v, heads_v, _ = _sizes(v)
    if not batch == batch_k == batch_v:
        raise ValueError(f"batch sizes differ: q {batch}, k {batch_k}, v {batch_v}")
    if (seqlen_k, heads_kv) != (seqlen_v, heads_v):
        raise ValueError(
            f"k and v must have the same tokens and heads, got {(seqlen_k, heads_kv)} and "
            f"{(seqlen_v, heads_v)}"
        )
    if head_dim != head_dim_k:
        raise ValueError(f"q and k must have the same head dim, got {head_dim} and {head_dim_k}")
    if not heads_kv or heads_q % heads_kv:
        raise ValueError(f"heads of k must divide those of q, got {heads_kv} and {heads_q}")
    devices = [_data(x).device for x in (q, k, v)]
    if len(set(devices)) > 1:
        raise ValueError(f"q, k and v must be on one device, got {', '.join(map(str, devices))}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")


def _options(
    q: Operand, softmax_scale: Any, causal: Any, window_size: Any, softcap: Any
) -> dict[str, Any]:
    if softmax_scale is None:
        softmax_scale = 1 / math.sqrt(_sizes(q)[3])
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be finite and not negative, got {softcap}")
    if window_size is None:
        window_size = None, None
    if len(window_size) != 2 or not all(x is None or isinstance(x, int) for x in window_size):
        raise ValueError(f"window_size must be (left, right), got {window_size!r}")
    return {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
    }
