"""What torch asks of an operation besides its result: gradients, and autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flash_attn_sm120 import _C
from flash_attn_sm120.plan import ScalarOptions


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    learnable_sink: torch.Tensor | None,
    options: ScalarOptions,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(out, lse)`` of a call that autograd is to record; lse is None without ``return_lse``."""
    for name, x in (("q", q), ("k", k), ("v", v), ("learnable_sink", learnable_sink)):
        if x is not None and not isinstance(x, torch.Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor where a gradient is wanted, got {type(x).__name__}"
            )
    results = _Attention.apply(  # type: ignore[no-untyped-call]
        q, k, v, learnable_sink, options, return_lse
    )
    return results if return_lse else (results, None)


def written_in_place(*tensors: Any) -> None:
    """Counts a change of torch tensors that the call wrote to, as torch's own functions do."""
    for x in tensors:
        if isinstance(x, torch.Tensor) and not x.is_inference():
            torch.autograd.graph.increment_version(x)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as autocast hands them to scaled_dot_product_attention: in its dtype.

    Only torch's tensors of at most 32 bits, on a device type for which autocast is on.
    """
    return tuple(_autocast(x) if isinstance(x, torch.Tensor) else x for x in tensors)


def _autocast(x: torch.Tensor) -> torch.Tensor:
    device_type = x.device.type
    is_cast = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not is_cast or not torch.is_autocast_enabled(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type))


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, out and lse (and the sink) for the backward, which recomputes all else."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sink: torch.Tensor | None,
        options: ScalarOptions,
        return_lse: bool,
    ) -> Any:
        out, lse = _C.forward(q, k, v, learnable_sink=sink, return_lse=True, **options)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(  # type: ignore[no-untyped-def]
        ctx, dout: torch.Tensor | None, dlse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        # Recorded only where somebody would differentiate again: recording takes time.
        gradients_of: Callable[..., Any] = (
            _Gradients.apply if torch.is_grad_enabled() else _gradients
        )
        gradients = gradients_of(dout, dlse, *ctx.saved_tensors, ctx.options)
        wanted = zip(gradients, ctx.needs_input_grad[:4], strict=True)
        return (*(gradient if needed else None for gradient, needed in wanted), None, None)


def _gradients(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: ScalarOptions,
) -> tuple[torch.Tensor | None, ...]:
    """Those of q, k, v and the sink."""
    if dout is None:  # only lse has been used
        dout = torch.zeros_like(out)
    dq, dk, dv, dsink = _C.backward(dout, q, k, v, out, lse, dlse, learnable_sink=sink, **options)
    return dq, dk, dv, None if sink is None else dsink.to(sink.dtype)


class _Gradients(torch.autograd.Function):
    """A function of its own, to say that it has no derivative instead of passing for a constant."""

    @staticmethod
    def forward(ctx, *arguments: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return _gradients(*arguments)

    @staticmethod
    def backward(ctx, *_: Any) -> Any:  # type: ignore[no-untyped-def]
        raise RuntimeError(
            "flash_attn_func has no second derivative: a gradient that came through it cannot be "
            "differentiated again (create_graph=True)"
        )
