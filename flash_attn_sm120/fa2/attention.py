"""The functions without a cache: dense and packed sequences, and projections that are packed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash_attn_sm120 import interface

Window = tuple[int, int]
Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
) -> Result:
    """Attention as :func:`flash_attn_sm120.flash_attn_func` computes it.

    Args:
        dropout_p: as there, with a seed from torch's generator.
        alibi_slopes: as there. The lse is that of these scores with ``causal``, too, where
            FlashAttention-2 adds ``slope * j`` alone, which gives the same ``out``.
        window_size: ``(left, right)``; a negative side is unbounded.
        return_attn_probs: return ``(out, lse, S_dmask)``.
        learnable_sink: as there; FlashAttention-2 has none.
    """
    out, lse = interface.flash_attn_func(
        padded(q),
        padded(k),
        padded(v),
        learnable_sink=learnable_sink,
        softmax_scale=scale_of(q, softmax_scale),
        causal=causal,
        window_size=unbounded(window_size),
        softcap=softcap,
        dropout_p=dropout_p,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_lse=return_attn_probs,
    )
    return _result(out, lse, v, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of ``qkv (batch, seqlen, 3, heads, head_dim)``.

    It is read in place, and its gradient is one tensor, too.
    """
    q, k, v = unpacked("qkv", qkv, 5, 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of ``kv (batch, seqlen_k, 2, heads_kv, head_dim)``.

    It is read in place, and its gradient is one tensor, too.
    """
    k, v = unpacked("kv", kv, 5, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    learnable_sink: Tensor | None = None,
) -> Result:
    """Attention of packed sequences, as :func:`flash_attn_sm120.flash_attn_varlen_func`.

    Args:
        q: ``(total_q, heads_q, head_dim)``; k, v: ``(total_k, heads_kv, head_dim)``, or with
            ``block_table`` pages, ``(num_pages, page_size, heads_kv, head_dim)``.
        max_seqlen_q, max_seqlen_k: bounds of the lengths. A tensor on a CUDA device is not waited
            for: without a bound the call is the same, in a larger grid.
        block_table: ``(batch, max_pages)`` int32; of ``cu_seqlens_k`` the differences are used,
            which takes a small kernel. Without gradients.
        dropout_p, alibi_slopes, window_size, return_attn_probs, learnable_sink: as in
            :func:`flash_attn_func`; the lse is ``(heads_q, total_q)``.
    """
    keys: dict[str, Any] = {"cu_seqlens_k": cu_seqlens_k}
    if block_table is not None:
        keys = {"page_table": block_table, "seqused_k": torch.diff(cu_seqlens_k)}
    out, lse = interface.flash_attn_varlen_func(
        padded(q),
        padded(k),
        padded(v),
        learnable_sink=learnable_sink,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=bound(max_seqlen_q),
        max_seqlen_k=bound(max_seqlen_k),
        softmax_scale=scale_of(q, softmax_scale),
        causal=causal,
        window_size=unbounded(window_size),
        softcap=softcap,
        dropout_p=dropout_p,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_lse=return_attn_probs,
        **keys,
    )
    return _result(out, lse, v, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of ``qkv (total, 3, heads, head_dim)``.

    It is read in place, and its gradient is one tensor, too.
    """
    q, k, v = unpacked("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of ``kv (total_k, 2, heads_kv, head_dim)``.

    It is read in place, and its gradient is one tensor, too.
    """
    k, v = unpacked("kv", kv, 4, 2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


# ---- what FlashAttention-2 does otherwise --------------------------------------------------------


def unbounded(window_size: Window) -> tuple[int | None, int | None]:
    """A window in which None is unbounded, of one in which negative numbers are."""
    left, right = window_size
    return None if left < 0 else left, None if right < 0 else right


def scale_of(q: Tensor, softmax_scale: float | None) -> float | None:
    """The default is that of the head dim before it is padded."""
    head_dim = q.shape[-1]
    if softmax_scale is not None or head_dim % 8 == 0:
        return softmax_scale
    return 1 / math.sqrt(head_dim)


def padded(x: Tensor) -> Tensor:
    """With a head dim that is a multiple of 8."""
    return pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def as_fa2_lse(lse: Tensor) -> Tensor:
    """+inf where a query sees no key; +inf and NaN stay."""
    return lse.nan_to_num(nan=math.nan, posinf=math.inf, neginf=math.inf)


def from_fa2_lse(lse: Tensor) -> Tensor:
    """The other way round: ours is +inf where a score is."""
    return lse.masked_fill(lse == math.inf, -math.inf)


def unpacked(name: str, packed: Tensor, ndim: int, count: int) -> tuple[Tensor, ...]:
    """The tensors in the third dimension from the end; their gradients are stacked again."""
    if packed.ndim != ndim or packed.shape[-3] != count:
        dims = "batch, seqlen" if ndim == 5 else "total"
        raise ValueError(
            f"{name} must have {ndim} dimensions, ({dims}, {count}, heads, head_dim), got "
            f"{tuple(packed.shape)}"
        )
    return packed.unbind(-3)


def bound(max_seqlen: int | Tensor | None) -> int | None:
    if isinstance(max_seqlen, Tensor):
        return None if max_seqlen.is_cuda else int(max_seqlen)
    return max_seqlen


def _result(out: Tensor, lse: Tensor | None, v: Tensor, return_attn_probs: bool) -> Result:
    if v.shape[-1] % 8:
        out = out[..., : v.shape[-1]]
    if lse is None:
        return out
    return out, as_fa2_lse(lse), out.new_empty(0)
