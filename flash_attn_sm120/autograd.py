"""What torch asks of an operation besides its result: gradients, and autocast.

One formula, recorded in two ways: around the operator where torch follows the call, and around the
call of C where it does not, which takes half the time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch._functorch import autograd_function as functorch
from torch.autograd import profiler
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from flash_attn_sm120 import ops
from flash_attn_sm120.following import is_followed
from flash_attn_sm120.plan import ScalarOptions

Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    learnable_sink: torch.Tensor | None,
    lengths: dict[str, torch.Tensor | None],
    options: ScalarOptions,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(out, lse)`` of a call that autograd is to record; lse is None without ``return_lse``."""
    ops.check_tensors("a gradient is wanted", q, k, v, learnable_sink, **lengths)
    tensors = (q, k, v, learnable_sink, *ops.in_order(lengths))
    _refuse_gradients(tensors)
    results = _record(ops.run_forward, return_lse, options, *tensors)
    return results if return_lse else (results, None)


def written_in_place(*tensors: Any) -> None:
    """Counts a change of torch tensors that the call wrote to, as torch's own functions do."""
    for x in tensors:
        if isinstance(x, torch.Tensor) and not x.is_inference():
            torch.autograd.graph.increment_version(x)


# ---- the formula ---------------------------------------------------------------------------------


class _Attention(_SingleLevelFunction):
    """Keeps q, k, v, out, lse (sink, lengths, seed, bias), and recomputes all else."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        forward: Forward,
        return_lse: bool,
        options: ScalarOptions,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sink: torch.Tensor | None,
        *lengths: torch.Tensor | None,
    ) -> Any:
        out, lse = forward(options, q, k, v, sink, *lengths)
        ctx.save_for_backward(q, k, v, sink, out, lse, *lengths)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(  # type: ignore[no-untyped-def]
        ctx, dout: torch.Tensor | None, dlse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sink, out, lse, *lengths = ctx.saved_tensors
        if dout is None:  # only lse has been used
            dout = torch.zeros_like(out)
        # A gradient that is to be differentiated again comes from the operator, which refuses.
        by_operator = (
            torch.is_grad_enabled()
            or is_followed(q, k, v, sink, dout, dlse)
            or (profiler._is_profiler_enabled and "key_blocks" not in ctx.options)
        )
        run = ops.backward if by_operator else ops.run_backward
        bias = ops.by_name(tuple(lengths)).get(ops.BIAS)  # the last of them, where there is one
        wants_bias = bias is not None and ctx.needs_input_grad[-1]
        dq, dk, dv, dsink, *dbias = run(
            ctx.options,
            *(dout, dlse, q, k, v, sink, out, lse),
            *lengths,
            bias_gradient=wants_bias,
        )
        _, _, _, wants_q, wants_k, wants_v, wants_sink, *_ = ctx.needs_input_grad
        return (
            None,
            None,
            None,
            dq if wants_q else None,
            dk if wants_k else None,
            dv if wants_v else None,
            dsink.to(sink.dtype) if wants_sink and dsink is not None else None,
            *(None for _ in lengths[wants_bias:]),
            *(x if bias is None else x.to(bias.dtype) for x in dbias),
        )

    @staticmethod
    def jvp(ctx, *_: Any) -> NoReturn:  # type: ignore[no-untyped-def]
        raise NotImplementedError(
            "flash_attn_sm120 has no forward derivative (dual numbers, torch.func.jvp, jacfwd): "
            "use torch.func.vjp or jacrev"
        )


class _Gradients(_SingleLevelFunction):
    """A function of its own, to say that it has no derivative instead of passing for a constant."""

    @staticmethod
    def forward(ctx, backward: Callable[..., Any], *tensors: Any) -> Any:  # type: ignore[no-untyped-def]
        return backward(*tensors)

    @staticmethod
    def backward(ctx, *_: Any) -> NoReturn:  # type: ignore[no-untyped-def]
        raise RuntimeError(
            "flash_attn_sm120 has no second derivative: a gradient that came through it cannot be "
            "differentiated again (create_graph=True)"
        )

    @staticmethod
    def jvp(ctx, *_: Any) -> NoReturn:  # type: ignore[no-untyped-def]
        raise RuntimeError(
            "flash_attn_sm120 has no second derivative: a gradient that came through it cannot be "
            "differentiated again (torch.func.hessian, dual numbers)"
        )


def _refuse_gradients(tensors: tuple[Any, ...]) -> None:
    """Raises NotImplementedError where a gradient is wanted of a call with pages, or of slopes."""
    others = ops.by_name(tensors[4:])
    slopes = others.get(ops.SLOPES)
    if slopes is not None and slopes.requires_grad:
        raise NotImplementedError(
            "alibi_slopes has no gradient in calls with lengths, nor by this operator: detach() "
            "it, or use no_grad()"
        )
    refuse_pages(others.get("page_table"), *tensors[:4])


def refuse_pages(page_table: Any, *inputs: Any) -> None:
    """Raises NotImplementedError where one of the inputs of a call with pages wants a gradient."""
    if page_table is not None and any(x is not None and x.requires_grad for x in inputs):
        raise NotImplementedError(
            "flash_attn_varlen_func has no gradient with page_table, as K and V are a cache: use "
            "no_grad()"
        )


# torch.autograd.Function's own apply() asks first for what is_followed() has answered.
_record: Any = _Attention.apply  # type: ignore[attr-defined]
_record_gradients: Any = _Gradients.apply  # type: ignore[attr-defined]


# ---- the operators' derivatives ------------------------------------------------------------------


def _forward(op: Any, keyset: Any, *tensors: Any, **options: Any) -> Any:
    def below(_: ScalarOptions, *tensors: Any) -> Any:
        return _redispatch(op, keyset, *tensors, **options)

    if torch.is_grad_enabled():
        _refuse_gradients(tensors)
    with _one_level():
        return _record(below, True, ops.from_schema(**options), *tensors)


def _backward(op: Any, keyset: Any, *tensors: Any, **options: Any) -> Any:
    def below(*tensors: Any) -> Any:
        return _redispatch(op, keyset, *tensors, **options)

    with _one_level():
        return _record_gradients(below, *tensors)


def _one_level() -> Any:
    """What a Function needs inside an operator, where functorch has one of its levels at work."""
    if torch._C._are_functorch_transforms_active():
        return functorch.enable_single_level_autograd_function()  # type: ignore[attr-defined]
    return nullcontext()


def _redispatch(op: Any, keyset: Any, *arguments: Any, **options: Any) -> Any:
    """The operator below autograd: functorch's outer levels, modes, then the kernel.

    Function.forward() runs without gradients, which the outer levels may want.
    """
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), _set_fwd_grad_enabled(True):
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **options)


for _formula, _ops in ((_forward, ops.FORWARDS), (_backward, ops.BACKWARDS)):
    for _op in _ops:
        ops.LIBRARY.impl(_op, partial(_formula, _op), "Autograd", with_keyset=True)


# ---- autocast ------------------------------------------------------------------------------------


def autocast(q: Any, k: Any, v: Any, page_table: Any = None) -> tuple[Any, Any, Any]:
    """The tensors as autocast hands them to scaled_dot_product_attention: in its dtype.

    Only torch's tensors of at most 32 bits, on a device type for which autocast is on; and only q
    where k and v are pages of a cache, which is read in place.
    """
    if page_table is None:
        k, v = _autocast(k), _autocast(v)
    return _autocast(q), k, v


def autocast_bias(bias: Any) -> Any:
    """A bias in the dtype of the others; in float32 it stays what it is."""
    return bias if getattr(bias, "dtype", None) is torch.float32 else _autocast(bias)


def _autocast(x: Any) -> Any:
    if not isinstance(x, torch.Tensor) or x.is_meta:
        return x
    device_type = x.device.type
    is_cast = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not is_cast or not torch.is_autocast_enabled(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type))


def _under_autocast(op: Any, key: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def forward(q: Any, k: Any, v: Any, sink: Any, *lengths: Any, **options: Any) -> Any:
        others = ops.by_name(lengths)
        q, k, v = autocast(q, k, v, others.get("page_table"))
        if others.get(ops.BIAS) is not None:
            lengths = (*lengths[:-1], autocast_bias(lengths[-1]))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(q, k, v, sink, *lengths, **options)

    return forward


for _key in ("AutocastCPU", "AutocastCUDA"):
    for _op in ops.FORWARDS:
        ops.LIBRARY.impl(_op, _under_autocast(_op, _key), _key)
