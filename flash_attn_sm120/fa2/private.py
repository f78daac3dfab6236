"""FlashAttention-2's private functions: forward and backward, each alone, and without autograd.

Programs that put results over different keys together, as ring-flash-attention, call them. Names,
order and returns are those of FlashAttention-2.7 and 2.8, with these differences:

- Head dims must be multiples of 8, as FlashAttention-2's own functions see to before they call.
- ``rng_state`` holds nothing: there is no dropout.
- A backward computes its own tensors and copies them to ``dq``, ``dk`` and ``dv``, and returns an
  empty tensor for ``softmax_d``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn_sm120 import interface, ops
from flash_attn_sm120.fa2.attention import as_fa2_lse, bound, from_fa2_lse, unbounded
from flash_attn_sm120.following import is_followed

__all__ = [
    f"_{wrapped}flash_attn_{varlen}{direction}"
    for wrapped in ("", "wrapped_")
    for varlen in ("", "varlen_")
    for direction in ("forward", "backward")
]

Forward = tuple[Tensor, Tensor, Tensor, Tensor]


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> Forward:
    """``(out, lse, S_dmask, rng_state)``; the last two are without use."""
    _refuse(dropout_p=dropout_p)
    options = _options(softmax_scale, causal, window_size_left, window_size_right, softcap)
    with torch.no_grad():
        return _result(
            *interface.flash_attn_func(
                q, k, v, alibi_slopes=alibi_slopes, return_lse=True, **options
            )
        )


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> Forward:
    """``(out, lse, S_dmask, rng_state)`` of packed sequences; the last two are without use.

    Rows that no sequence has are 0 in any case, which ``zero_tensors`` asks for.
    """
    _refuse(dropout_p=dropout_p, leftpad_k=leftpad_k)
    keys: dict[str, Any] = {"cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    if block_table is not None:
        used = torch.diff(cu_seqlens_k) if seqused_k is None else seqused_k
        keys = {"page_table": block_table, "seqused_k": used}
    options = _options(softmax_scale, causal, window_size_left, window_size_right, softcap)
    with torch.no_grad():
        return _result(
            *interface.flash_attn_varlen_func(
                q,
                k,
                v,
                cu_seqlens_q=cu_seqlens_q,
                max_seqlen_q=bound(max_seqlen_q),
                max_seqlen_k=bound(max_seqlen_k),
                alibi_slopes=alibi_slopes,
                return_lse=True,
                **keys,
                **options,
            )
        )


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes ``dq``, ``dk`` and ``dv``. ``out`` and ``softmax_lse`` may be over more keys."""
    _refuse(dropout_p=dropout_p)
    options = _options(softmax_scale, causal, window_size_left, window_size_right, softcap)
    options["deterministic"] = deterministic
    slopes = () if alibi_slopes is None else (alibi_slopes,)
    return _write(options, dout, (q, k, v), out, softmax_lse, (dq, dk, dv), slopes)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes ``dq``, ``dk`` and ``dv`` of packed sequences; 0 in rows that no sequence has."""
    _refuse(dropout_p=dropout_p)
    options: dict[str, Any] = {
        **_options(softmax_scale, causal, window_size_left, window_size_right, softcap),
        "max_seqlen_q": bound(max_seqlen_q),
        "max_seqlen_k": bound(max_seqlen_k),
        "deterministic": deterministic,
    }
    others = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, ops.SLOPES: alibi_slopes}
    return _write(options, dout, (q, k, v), out, softmax_lse, (dq, dk, dv), ops.in_order(others))


# FlashAttention-2 also has them as operators of torch. These are followed by torch as they are.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def _refuse(dropout_p: float, **tensors: Tensor | None) -> None:
    asked = ["dropout_p"] if dropout_p else []
    asked += [name for name, x in tensors.items() if x is not None]
    if asked:
        raise NotImplementedError(f"fa2's private functions do not support {', '.join(asked)} yet")


def _options(
    softmax_scale: float | None, causal: bool, left: int, right: int, softcap: float
) -> dict[str, Any]:
    return {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": unbounded((left, right)),
        "softcap": softcap,
    }


def _result(out: Tensor, lse: Tensor | None) -> Forward:
    assert lse is not None
    return out, as_fa2_lse(lse), out.new_empty(0), out.new_empty(2, dtype=torch.int64)


def _write(
    options: Any,
    dout: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    to: tuple[Tensor | None, Tensor | None, Tensor | None],
    lengths: tuple[Any, ...],  # and slopes, as operators take them
) -> Tensor:
    """Gradients of ``inputs``, copied to ``to``. A row whose lse is +inf has none."""
    with torch.no_grad():
        lse = from_fa2_lse(lse)
        run = ops.backward if is_followed(dout, *inputs, out, lse) else ops.run_backward
        gradients = run(options, dout, None, *inputs, None, out, lse, *lengths)
        for gradient, target in zip(gradients, to, strict=False):
            if target is not None and gradient is not None:
                target.copy_(gradient)
    return lse.new_empty(0)
