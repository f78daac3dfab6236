"""The door: what calls of quantised attention take, and where they are computed."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_sm120.autograd import written_in_place
from flash_attn_sm120.interface import flash_attn_func, flash_attn_varlen_func
from flash_attn_sm120.plan import Window
from flash_attn_sm120.quantized import device, reference
from flash_attn_sm120.quantized.layout import (
    Quantized,
    check_field,
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
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    *,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **unsupported: Any,
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
        softmax_scale, causal, window_size, learnable_sink, softcap, num_splits, deterministic: as
            in :func:`flash_attn_func`. A sink is not rounded, nor is P rounded in another way
            where there is one. Results of different numbers of splits have the same codes of P.
        pack_gqa: query heads have blocks of their own: True is refused.
        return_lse: whether to return the lse: that of the quantised Q and K.
        out_dtype: bfloat16, float16 or float32; default that of ``out``, or of ``q`` before it was
            quantised.
        out, lse: where results are written, contiguous; ``lse`` is returned then, too.
        unsupported: other parameters of :func:`flash_attn_func` and
            :func:`flash_attn_varlen_func`: NotImplementedError by name, unless they ask for
            nothing.

    Returns:
        ``(out, lse)``: ``(batch, seqlen_q, heads_q, head_dim_v)``; ``(batch, heads_q, seqlen_q)``
        float32, natural logarithm, or None.

    Raises:
        TypeError: not a tensor or :class:`Quantized`, or a dtype other than the above.
        ValueError: an unknown recipe; shapes, head dims, devices; scales of another shape, or not
            positive and finite.
        NotImplementedError: a gradient is wanted; packed sequences, pages, ``pack_gqa`` and
            whatever else there is no kernel for.
        RuntimeError: a device that cannot run the recipe; NVRTC or the driver fail.
    """
    call = checked_call(
        q, k, v, recipe,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        learnable_sink=learnable_sink, softcap=softcap, num_splits=num_splits, pack_gqa=pack_gqa,
        deterministic=deterministic, return_lse=return_lse, out_dtype=out_dtype, out=out, lse=lse,
        **unsupported,
    )  # fmt: skip
    place = call.device
    if place.type == "cuda":
        device.check(recipe, place.index or 0)
    elif place.type != "cpu":
        raise RuntimeError(
            f"quantized_attention has no kernels for {place.type} devices: it takes CUDA and CPU "
            "tensors"
        )
    given = {"q": q, "k": k, "v": v}
    wide = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    narrow = {name: x for name, x in given.items() if isinstance(x, Quantized)}
    narrow |= quantize_together(wide, recipe)
    narrow_q, narrow_k, narrow_v = (narrow[name] for name in ("q", "k", "v"))
    check_rotations(narrow_q, narrow_k)
    result = (
        out if out is not None else torch.empty(call.out_shape, dtype=call.out_dtype, device=place)
    )
    logs = lse
    if logs is None and call.returns_lse:
        logs = torch.empty(call.lse_shape, dtype=torch.float32, device=place)
    with torch.no_grad():
        attend = device.attend if place.type == "cuda" else reference.attend_into
        attend(narrow_q, narrow_k, narrow_v, call.options, result, logs)
    written_in_place(out, lse)
    return result, logs


class Call(NamedTuple):
    """A call that has been checked."""

    operands: tuple[Operand, Operand, Operand]
    options: dict[str, Any]  # softmax_scale is a number
    out_dtype: torch.dtype
    out_shape: tuple[int, int, int, int]
    lse_shape: tuple[int, int, int]
    returns_lse: bool

    @property
    def device(self) -> torch.device:
        """Of the operands."""
        return _data(self.operands[0]).device


def checked_call(
    q: Operand,
    k: Operand,
    v: Operand,
    recipe: str,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **unsupported: Any,
) -> Call:
    """What :func:`quantized_attention` would compute, whatever the device.

    Raises:
        The exceptions of :func:`quantized_attention` but RuntimeError.
    """
    chosen = recipe_of(recipe)
    _reject(pack_gqa, unsupported)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_operand(name, x, chosen)
    _check_together(q, k, v)
    if isinstance(q, Quantized) and isinstance(k, Quantized):
        check_rotations(q, k)
    batch, seqlen, heads, head_dim = sizes_of(q)
    out_shape, lse_shape = (batch, seqlen, heads, sizes_of(v)[3]), (batch, heads, seqlen)
    out_dtype = out_dtype or (q.dtype if out is None else out.dtype)
    if out_dtype not in _OUT_TYPES:
        raise TypeError(f"out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
    inputs = [_data(x) for x in (q, k, v)]
    _check_result("out", out, out_shape, out_dtype, inputs)
    _check_result("lse", lse, lse_shape, torch.float32, inputs)
    _check_sink(learnable_sink, heads, inputs[0].device)
    options = {
        "softmax_scale": 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale,
        "causal": causal,
        "window_size": (None, None) if window_size is None else window_size,
        "softcap": softcap,
        "learnable_sink": learnable_sink,
        "num_splits": num_splits,
    }
    _check_options(options)
    returns_lse = return_lse or lse is not None
    return Call((q, k, v), options, out_dtype, out_shape, lse_shape, returns_lse)


def _data(x: Operand) -> Tensor:
    return x.data if isinstance(x, Quantized) else x


def sizes_of(x: Operand) -> tuple[int, int, int, int]:
    """(batch, seqlen, heads, head_dim)."""
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
    batch, _, heads_q, head_dim = sizes_of(q)
    batch_k, seqlen_k, heads_kv, head_dim_k = sizes_of(k)
    batch_v, seqlen_v, heads_v, _ = sizes_of(v)
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


def check_rotations(q: Quantized, k: Quantized) -> None:
    """Of Q and K that are to be multiplied."""
    if q.rotation != k.rotation:
        raise ValueError(
            f"q and k must be rotated alike, got blocks of {q.rotation} and {k.rotation}"
        )


def _check_result(
    name: str,
    x: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    inputs: list[Tensor],
) -> None:
    """A tensor that is written in place."""
    if x is None:
        return
    check_field(name, x, (shape, dtype), inputs[0].device)
    if not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(f"{name} must be contiguous and begin at a multiple of 16 bytes")
    storage = x.untyped_storage().data_ptr()
    if storage and any(storage == y.untyped_storage().data_ptr() for y in inputs):
        raise ValueError(f"{name} must not share memory with q, k or v")
    if torch.is_grad_enabled() and x.requires_grad:
        raise NotImplementedError(f"{name} requires a gradient: quantised attention has none")


def _check_sink(sink: Any, heads: int, place: torch.device) -> None:
    if sink is None:
        return
    if not isinstance(sink, Tensor):
        raise TypeError(f"learnable_sink must be a tensor, got {type(sink).__name__}")
    if sink.dtype not in _OUT_TYPES:
        raise TypeError(f"learnable_sink must be float32, float16 or bfloat16, got {sink.dtype}")
    check_field("learnable_sink", sink, ((heads,), sink.dtype), place)
    if torch.is_grad_enabled() and sink.requires_grad:
        raise NotImplementedError(
            "learnable_sink requires a gradient: quantised attention is forward only"
        )


def _check_options(options: dict[str, Any]) -> None:
    scale, softcap, window = (options[x] for x in ("softmax_scale", "softcap", "window_size"))
    if not math.isfinite(scale):
        raise ValueError(f"softmax_scale must be finite, got {scale}")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be finite and not negative, got {softcap}")
    if len(window) != 2 or not all(x is None or isinstance(x, int) for x in window):
        raise ValueError(f"window_size must be (left, right), got {window!r}")
    splits = options["num_splits"]
    if not isinstance(splits, int) or splits < 0:
        raise ValueError(f"num_splits must be a number from 0 on, got {splits!r}")


def _reject(pack_gqa: bool | None, unsupported: dict[str, Any]) -> None:
    """What other functions take and this one has no kernel for."""
    known = _parameters_of_others()
    for name in unsupported:
        if name not in known:
            raise TypeError(f"quantized_attention() got an unexpected keyword argument {name!r}")
    asked = ["pack_gqa"] if pack_gqa else []
    asked += [name for name, value in unsupported.items() if _asks(value, known[name])]
    if asked:
        raise NotImplementedError(f"quantized_attention does not support {', '.join(asked)}")


def _asks(value: Any, default: Any) -> bool:
    is_scalar = isinstance(value, (bool, int, float))
    return value is not default and not (is_scalar and value == default)


@functools.cache
def _parameters_of_others() -> dict[str, Any]:
    """Names and defaults."""
    functions = flash_attn_func, flash_attn_varlen_func
    parameters = [x for f in functions for x in inspect.signature(f).parameters.values()]
    return {x.name: x.default for x in parameters if x.kind != x.VAR_KEYWORD}
