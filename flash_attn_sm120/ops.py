"""The operators flash_attn_sm120::forward and ::backward, which torch can follow.

Both compute what _C computes, by the same call, and add what torch asks of an operator: a schema,
shapes without data, rules for vmap and for DTensor, and FLOPs. autograd.py adds the derivatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flash_attn_sm120 import _C
from flash_attn_sm120.imports import when_imported
from flash_attn_sm120.plan import ScalarOptions

if TYPE_CHECKING:
    from torch import Tensor

# ---- schemas -------------------------------------------------------------------------------------

# The options of csrc/options.h in types that operators have; a window is two of them.
_OPTIONS = (
    "float? softmax_scale=None, bool causal=False, SymInt? window_left=None, "
    "SymInt? window_right=None, float softcap=0.0, SymInt num_splits=0, bool? pack_gqa=None, "
    "bool deterministic=False"
)

LIBRARY: Any = torch.library.Library("flash_attn_sm120", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(
    f"forward(Tensor q, Tensor k, Tensor v, Tensor? learnable_sink, *, {_OPTIONS})"
    " -> (Tensor out, Tensor lse)"
)
LIBRARY.define(  # dsink has no elements where there is no sink
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? learnable_sink,"
    f" Tensor out, Tensor lse, *, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)"
)
FORWARD: Any = torch.ops.flash_attn_sm120.forward.default
BACKWARD: Any = torch.ops.flash_attn_sm120.backward.default


def to_schema(window_size: Any = None, **options: Any) -> dict[str, Any]:
    """Options of _C as the operators take them.

    Raises:
        TypeError: a tensor where a number is wanted, or a window that is no pair.
    """
    if window_size is None:
        window_size = (None, None)
    if len(window_size) != 2:
        raise TypeError(f"window_size must be (left, right), got {window_size}")
    options.update(window_left=window_size[0], window_right=window_size[1])
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a number, got a tensor: no gradient would reach it")
    for name in ("causal", "deterministic"):
        options[name] = bool(options.get(name))
    return options


def from_schema(
    window_left: int | None = None, window_right: int | None = None, **options: Any
) -> ScalarOptions:
    """Options of an operator as _C takes them."""
    return {"window_size": (window_left, window_right), **options}  # type: ignore[typeddict-item]


# ---- calls ---------------------------------------------------------------------------------------


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    options: ScalarOptions,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)`` by the operator; lse is None without ``return_lse``."""
    check_tensors("torch follows the call", q, k, v, learnable_sink)
    out, lse = FORWARD(q, k, v, learnable_sink, **to_schema(**options))
    return out, lse if return_lse else None


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: ScalarOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv, dsink)`` by the operator; dsink has no elements without a sink."""
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = BACKWARD(
        dout, dlse, q, k, v, learnable_sink, out, lse, **to_schema(**options)
    )
    return gradients


def check_tensors(where: str, q: Any, k: Any, v: Any, learnable_sink: Any, **lengths: Any) -> None:
    """What torch follows is torch's: tensors, or what stands for them, as torch.fx.Proxy.

    Raises:
        TypeError: an argument is something else.
        NotImplementedError: a nested tensor.
    """
    tensors = {"q": q, "k": k, "v": v, "learnable_sink": learnable_sink, **lengths}
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor):
            if x.is_nested:
                raise NotImplementedError(f"{name} is a nested tensor, which is not supported yet")
        elif not hasattr(x, "__torch_function__") and (x is not None or name in ("q", "k", "v")):
            raise TypeError(f"{name} must be a torch.Tensor where {where}, got {type(x).__name__}")


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, learnable_sink: Tensor | None, options: ScalarOptions
) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, straight from C."""
    return _C.forward(q, k, v, learnable_sink=learnable_sink, return_lse=True, **options)  # type: ignore[return-value]


def run_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: ScalarOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(dq, dk, dv, dsink)``, straight from C; dsink is None without a sink.

    torch.use_deterministic_algorithms(True) asks for reproducible gradients of every operation.
    """
    if torch.are_deterministic_algorithms_enabled():
        options = {**options, "deterministic": True}
    return _C.backward(dout, q, k, v, out, lse, dlse, learnable_sink=learnable_sink, **options)


# ---- what computes them --------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, **options: Any) -> Any:
    return run_forward(q, k, v, sink, from_schema(**options))


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    **options: Any,
) -> Any:
    dq, dk, dv, dsink = run_backward(dout, dlse, q, k, v, sink, out, lse, from_schema(**options))
    return dq, dk, dv, _no_sink(q) if dsink is None else dsink


def _no_sink(like: Tensor) -> Tensor:
    return like.new_empty((0,), dtype=torch.float32)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("forward", _forward, _device)
    LIBRARY.impl("backward", _backward, _device)


# ---- shapes without data -------------------------------------------------------------------------


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, **_: Any) -> Any:
    _check(q, k, v, sink)
    batch, seqlen_q, heads, _head_dim = q.shape
    out = q.new_empty((batch, seqlen_q, heads, v.shape[3]))
    return out, q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    *_: Any,
    **__: Any,
) -> Any:
    dsink = _no_sink(q) if sink is None else sink.new_empty(sink.shape, dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dsink


torch.library.register_fake("flash_attn_sm120::forward", _fake_forward, lib=LIBRARY)
torch.library.register_fake("flash_attn_sm120::backward", _fake_backward, lib=LIBRARY)


def _check(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> None:
    """What csrc/problem.c asks of shapes, types and devices, before there is data."""
    for name, x, ndim in (("q", q, 4), ("k", k, 4), ("v", v, 4), ("learnable_sink", sink, 1)):
        if x is None:
            continue
        _require(x.dim() == ndim, f"{name} must have {ndim} dimensions, got {x.dim()}")
        _require(x.device == q.device, f"{name} must be on q's device, {q.device}, got {x.device}")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(f"{name} must be float16, bfloat16 or float32, got {x.dtype}")
        if x is not sink and x.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} like q, got {x.dtype}")
    for what, x in (("head_dim (of q and k)", q), ("head_dim_v (of v)", v)):
        good = (x.shape[3] % 8 == 0, x.shape[3] >= 8, x.shape[3] <= 256)
        _require(all(good), f"{what} must be a multiple of 8 from 8 to 256, got {x.shape[3]}")
    for name, x, meaning, dim, like in (
        ("k", k, "q's head_dim", 3, q.shape[3]),
        ("k", k, "q's batch", 0, q.shape[0]),
        ("v", v, "q's batch", 0, q.shape[0]),
        ("v", v, "k's seqlen", 1, k.shape[1]),
        ("v", v, "k's heads", 2, k.shape[2]),
        *([] if sink is None else [("learnable_sink", sink, "q's heads", 0, q.shape[2])]),
    ):
        got = x.shape[dim]
        _require(got == like, f"{name} must have {meaning} {like} in dimension {dim}, got {got}")
    heads_q, heads_kv = q.shape[2], k.shape[2]
    _require(
        heads_q > 0 and heads_kv > 0 and heads_q % heads_kv == 0,
        f"the heads of q must be a multiple of the heads of k and v, got {heads_q} and {heads_kv}",
    )


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---- vmap: one more dimension is folded into the batch, or into the heads ------------------------

# The dimensions of batch and heads. A sink is one number per head: with one, heads are folded.
_QKV, _LSE, _SINK = (0, 2), (0, 1), (None, 0)


def _fold(info: Any, in_dims: Any, tensors: Any, kinds: Any, by_heads: bool) -> list[Any]:
    """The tensors with the mapped dimension in front of the folded one, as one."""
    folded: list[Any] = []
    for x, in_dim, kind in zip(tensors, in_dims, kinds, strict=True):
        dim = kind[by_heads]
        if x is not None:
            x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if in_dim is None else x
            x = x.movedim(in_dim or 0, dim).flatten(dim, dim + 1)
        folded.append(x)
    return folded


def _unfold(info: Any, results: Any, kinds: Any, by_heads: bool) -> tuple[Any, Any]:
    """The inverse, and where the mapped dimension is then."""
    dims = tuple(kind[by_heads] for kind in kinds)
    pairs = zip(results, dims, strict=True)
    return tuple(_split(x, dim, info.batch_size) for x, dim in pairs), dims


def _split(x: Any, dim: int, size: int) -> Any:
    return x.unflatten(dim, (size, x.shape[dim] // size))


def _vmap_forward(info: Any, in_dims: Any, *tensors: Any, **options: Any) -> Any:
    by_heads = tensors[3] is not None
    kinds = (_QKV, _QKV, _QKV, _SINK)
    results = FORWARD(*_fold(info, in_dims, tensors, kinds, by_heads), **options)
    return _unfold(info, results, (_QKV, _LSE), by_heads)


def _vmap_backward(info: Any, in_dims: Any, *tensors: Any, **options: Any) -> Any:
    by_heads = tensors[5] is not None
    kinds = (_QKV, _LSE, _QKV, _QKV, _QKV, _SINK, _QKV, _LSE)
    *gradients, dsink = BACKWARD(*_fold(info, in_dims, tensors, kinds, by_heads), **options)
    unfolded, dims = _unfold(info, gradients, (_QKV, _QKV, _QKV), by_heads)
    return (*unfolded, _split(dsink, 0, info.batch_size)), (*dims, 0)


if hasattr(torch.library, "register_vmap"):  # PyTorch 2.5; before, vmap calls once per element
    torch.library.register_vmap("flash_attn_sm120::forward", _vmap_forward, lib=LIBRARY)
    torch.library.register_vmap("flash_attn_sm120::backward", _vmap_backward, lib=LIBRARY)


# ---- FLOPs: those of SDPA, which count masked scores, too ----------------------------------------


def _register_flops() -> None:
    from torch.utils.flop_counter import (
        register_flop_formula,
        sdpa_backward_flop_count,
        sdpa_flop_count,
    )

    def heads_first(x: Any, heads: int) -> tuple[int, ...]:
        return (x[0], heads, x[1], x[3])

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        return sdpa_flop_count(*(heads_first(x, q[2]) for x in (q, k, v)))  # type: ignore[no-untyped-call]

    def backward(dout: Any, dlse: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        shapes = (heads_first(x, q[2]) for x in (dout, q, k, v))
        return sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]

    register_flop_formula(torch.ops.flash_attn_sm120.forward)(forward)
    register_flop_formula(torch.ops.flash_attn_sm120.backward)(backward)


when_imported("torch.utils.flop_counter", _register_flops)


# ---- DTensor -------------------------------------------------------------------------------------


def _register_sharding() -> None:
    try:
        from flash_attn_sm120 import sharding
    except ImportError:  # PyTorch before 2.5, where DTensor says that the operator has no rule
        return
    sharding.register()


when_imported("torch.distributed.tensor", _register_sharding)
