"""Attention of a KV cache, to which a call may append: decoding, by one call a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from flash_attn_sm120 import _C, autograd
from flash_attn_sm120.fa2.attention import Window, as_fa2_lse, unbounded
from flash_attn_sm120.following import is_followed


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    learnable_sink: Tensor | None = None,
    pack_gqa: bool | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    q_descale: Tensor | None = None,
    out: Tensor | None = None,
    **unsupported: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of ``q`` over caches, to which ``k`` and ``v`` are appended first, in place.

    The parameters are FlashAttention-2's, in its order; those by keyword alone are
    FlashAttention-3's, and ours. Lengths stay on the device, as in
    :func:`flash_attn_sm120.flash_attn_varlen_func`.

    Args:
        q: ``(batch, seqlen_q, heads_q, head_dim)``, or ``(total_q, heads_q, head_dim)`` with
            ``cu_seqlens_q``.
        k_cache: ``(batch_cache, seqlen_cache, heads_kv, head_dim)``, or pages ``(num_pages,
            page_size, heads_kv, head_dim)`` with a table. Read in place, or refused.
        v_cache: like ``k_cache``, with ``head_dim_v``. Both in the dtype of ``q``, or both in
            float8_e4m3fn.
        k, v: ``(batch, seqlen_new, heads_kv, head_dim or head_dim_v)``: row ``i`` of sequence ``b``
            becomes row ``cache_seqlens[b] + i`` of its cache, and takes part in the attention.
        rotary_cos, rotary_sin: ``(positions, rotary_dim / 2)`` in the dtype of ``q``, with a row
            for each position in the caches. The first ``rotary_dim`` dims of ``k`` are rotated by
            the row's position in the cache, those of ``q`` by the positions ``cache_seqlens[b] +
            i`` with a window or ``causal``, else all by ``cache_seqlens[b]``.
        cache_seqlens: rows that the caches hold: ``(batch,)`` int32, or a number for all. Without
            it, and without ``k``, all rows.
        cache_batch_idx: ``(batch,)`` int32: the entry of the caches that is a sequence's, or its
            row of the table.
        cache_leftpad: ``(batch,)`` int32: so many rows at the beginning of a cache are not seen.
            Positions count from row 0 on, all the same.
        block_table, page_table: the same by either name, ``(batch, max_pages)`` int32.
        softmax_scale, causal, softcap, alibi_slopes, num_splits, learnable_sink, pack_gqa, out: as
            in :func:`flash_attn_sm120.flash_attn_func`.
        k_descale, v_descale, q_descale: as there. Rows that are appended to caches in float8_e4m3fn
            are divided by them, and what is beyond 448 then becomes 448; with ``q`` in
            float8_e4m3fn nothing is appended.
        window_size: as in :func:`flash_attn_func`.
        rotary_interleaved: dims ``2i`` and ``2i + 1`` are rotated together (GPT-J), else ``i`` and
            ``i + rotary_dim / 2`` (GPT-NeoX).
        return_softmax_lse: return ``(out, lse)``; a query without keys has +inf.
        cu_seqlens_q, max_seqlen_q: as in :func:`flash_attn_sm120.flash_attn_varlen_func`.
        unsupported: NotImplementedError by name, unless they ask for nothing.

    On CUDA what is out of range is clamped, and rows for which a cache has no room are dropped; of
    CPU tensors it is a ValueError. A call that raises has appended nothing.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`flash_attn_sm120.flash_attn_func`.
        NotImplementedError: also where a gradient is wanted, or torch follows the call.
    """
    if unsupported:
        if k is None:
            unsupported.pop("cu_seqlens_k_new", None)  # it tells of k, and serving engines pass it
        _refuse(**unsupported)
    if is_dynamo_compiling():
        raise NotImplementedError(_FOLLOWED)
    if is_grad_enabled() and _any_requires_grad(
        q, k_cache, v_cache, k, v, learnable_sink, alibi_slopes
    ):
        raise NotImplementedError(
            "flash_attn_with_kvcache has no gradient: use torch.no_grad(), or detach its tensors"
        )
    if page_table is None:
        page_table = block_table
    elif block_table is not None:
        raise ValueError("block_table and page_table are two names of one table: got both")
    if page_table is not None and cache_batch_idx is not None:
        page_table, cache_batch_idx = _rows_of_table(page_table, cache_batch_idx), None
    for run in (_C.cache_forward_if_plain, _C.cache_forward):
        results = run(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            page_table=page_table,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=unbounded(window_size),
            learnable_sink=learnable_sink,
            alibi_slopes=alibi_slopes,
            k_descale=k_descale,
            v_descale=v_descale,
            q_descale=q_descale,
            softcap=softcap,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            return_lse=return_softmax_lse,
            out=out,
            k=k,
            v=v,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            cache_seqlens=cache_seqlens,
            cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad,
            rotary_interleaved=rotary_interleaved,
        )
        if results is not NotImplemented:
            break
        if is_followed(q, k_cache, v_cache, k, v, out):
            raise NotImplementedError(_FOLLOWED)
    if k is not None:
        autograd.written_in_place(k_cache, v_cache)
    if out is not None:
        autograd.written_in_place(out)
    result, lse = results
    return result if lse is None else (result, as_fa2_lse(lse))


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    for x in tensors:  # noqa: SIM110, as a generator takes twice the time
        if getattr(x, "requires_grad", None) is True:
            return True
    return False


def _rows_of_table(table: Tensor, rows: Tensor) -> Tensor:
    """The rows of the table that sequences have; those beyond it are clamped on CUDA."""
    if not table.is_cuda:
        wrong = ((rows < 0) | (rows >= len(table))).nonzero()
        if len(wrong):
            raise ValueError(
                f"cache_batch_idx must be from 0 to {len(table) - 1}, the last row of the table: "
                f"sequence {int(wrong[0])} has {int(rows[wrong[0]])}"
            )
    return table.index_select(0, rows.clamp(0, len(table) - 1))


_NAME = flash_attn_with_kvcache.__name__
_FOLLOWED = (
    f"{_NAME} is not supported yet where torch follows a call: torch.compile, torch.func, modes, "
    "tensor subclasses, lazy negation"
)

# Parameters of FlashAttention-3's function, and what asks for nothing.
_NOT_YET = {
    "qv": None,
    **dict.fromkeys(("cu_seqlens_k_new", "rotary_seqlens", "scheduler_metadata")),
    "attention_chunk": 0,
    "sm_margin": 0,
}


def _refuse(**arguments: Any) -> None:
    for name in arguments:
        if name not in _NOT_YET:
            raise TypeError(f"{_NAME}() got an unexpected keyword argument {name!r}")
    asked = [
        name
        for name, value in arguments.items()
        if value is not None and not (isinstance(value, int) and value == _NOT_YET[name])
    ]
    if asked:
        raise NotImplementedError(f"fa2.{_NAME} does not support {', '.join(asked)} yet")
