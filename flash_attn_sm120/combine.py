"""Parts of attention put together: FlashAttention-4's flash_attn_combine."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_sm120 import _C, autograd
from flash_attn_sm120.following import is_followed


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    virtual_batch_idx: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention over all keys from attention over parts of them, say of other devices.

    ``out = sum_i exp(lse_i - lse) * out_i``, with ``lse = log(sum_i exp(lse_i))``. A part without
    keys has an lse of -inf, and may hold anything finite.

    Args:
        out_partial: ``(parts, batch, seqlen, heads, head_dim)``, or packed ``(parts, total, heads,
            head_dim)``; float32, float16 or bfloat16. ``head_dim`` is a multiple of 8 from 8 to
            512. Strides as in :func:`flash_attn_func`.
        lse_partial: ``(parts, batch, seqlen, heads)`` or ``(parts, total, heads)`` float32, natural
            logarithm, any strides. That of :func:`flash_attn_func` is ``(batch, heads, seqlen)``:
            its ``transpose(1, 2)`` is one part.
        out: like ``out_partial`` without the parts, of any of these types, to write the result to.
        out_dtype: of a new ``out``; default that of ``out_partial``.
        cu_seqlens: ``(sequences + 1,)`` int32, where sequences of a packed side begin and end.
        seqused: ``(batch,)`` or ``(sequences,)`` int32: only so many first rows are used. Rows that
            no sequence has, or uses, get out 0 and lse -inf.
        virtual_batch_idx: an order of FlashAttention-4's scheduler: not supported.
        return_lse: whether to return the lse.

    Returns:
        ``(out, lse)``: ``lse (batch, seqlen, heads)`` or ``(total, heads)`` float32, a transposed
        view of ``(batch, heads, seqlen)``, or None.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: shapes, sizes, devices; an ``out`` that cannot be written in place.
        NotImplementedError: ``virtual_batch_idx``, or torch follows the call.
        RuntimeError: a gradient is wanted, which the function has not; the driver or the compiler.
    """
    if virtual_batch_idx is not None:
        raise NotImplementedError("flash_attn_combine does not support virtual_batch_idx")
    for name, x in (("out_partial", out_partial), ("lse_partial", lse_partial)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if is_followed(out_partial, lse_partial, out, cu_seqlens, seqused):
        raise NotImplementedError("flash_attn_combine is not supported where torch follows a call")
    if torch.is_grad_enabled() and (out_partial.requires_grad or lse_partial.requires_grad):
        raise RuntimeError("flash_attn_combine has no gradient: use no_grad()")
    is_packed = out_partial.dim() == 4
    if out_partial.dim() not in (4, 5) or lse_partial.dim() != out_partial.dim() - 1:
        raise ValueError(
            "out_partial must have 5 dimensions and lse_partial 4, or packed 4 and 3, got "
            f"{out_partial.dim()} and {lse_partial.dim()}"
        )
    if cu_seqlens is not None and not is_packed:
        raise ValueError("cu_seqlens asks for a packed out_partial, of 4 dimensions")
    result = out
    if result is None:
        result = out_partial.new_empty(
            out_partial.shape[1:], dtype=out_partial.dtype if out_dtype is None else out_dtype
        )
    elif out_dtype not in (None, result.dtype):
        raise ValueError(f"out_dtype is {out_dtype}, and out has {result.dtype}")
    *batch, seqlen, heads = out_partial.shape[1:-1]
    lse = None
    if return_lse:
        lse = out_partial.new_empty((*batch, heads, seqlen), dtype=torch.float32)
    parts = (out_partial, lse_partial)
    results = (result, lse)
    if is_packed:
        parts = (out_partial.unsqueeze(1), lse_partial.unsqueeze(1))
        results = (result.unsqueeze(0), None if lse is None else lse.unsqueeze(0))
    _C.combine(*parts, *results, cu_seqlens, seqused)
    if out is not None:
        autograd.written_in_place(out, None)
    return result, None if lse is None else lse.transpose(-1, -2)
