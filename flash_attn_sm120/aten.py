"""torch's operators of FlashAttention, and those of calls with a mask, with torch's signatures and
returns, computed here.

sdpa.py puts them in the place of torch's own. test_sdpa.py holds the signatures against torch's
schemas, and the returns against torch's kernels for tensors without data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flash_attn_sm120 import _C
from flash_attn_sm120.autograd import written_in_place
from flash_attn_sm120.dropout import draw_seed
from flash_attn_sm120.masks import in_rows
from flash_attn_sm120.plan import Window


class NotTaken(NotImplementedError):
    """A call that is torch's to compute; the text says why."""


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """Tensors are (batch, heads, seqlen, head_dim), and out has the layout of the query."""
    _check(query, value, dropout_p, return_debug_mask)
    drawn = _random_numbers(query, dropout_p)
    out, lse = _C.forward(
        query,
        key,
        value,
        softmax_scale=scale,
        causal=is_causal,
        dropout_p=dropout_p,
        dropout_seed=drawn[0] if dropout_p else None,
        heads_first=True,
        return_lse=True,
    )
    return out, lse, None, None, query.shape[2], key.shape[2], *drawn


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> list[Tensor]:
    _check(query, value, dropout_p)
    gradients = _gradients(
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        softmax_scale=scale,
        causal=is_causal,
        heads_first=True,
        **_dropout(dropout_p, philox_seed),
    )
    return _in_layout_of((query, key, value), gradients)


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Any, ...]:
    """Tensors are (batch, seqlen, heads, head_dim), or (total, heads, head_dim) and packed."""
    if alibi_slopes is not None:
        _leave("alibi_slopes", dropout_p)
    if block_table is not None and seqused_k is None:
        _leave("block_table without seqused_k", dropout_p)
    _check(query, value, dropout_p, return_debug_mask)
    out, drawn = torch.empty_like(query), _random_numbers(query, dropout_p)
    _, lse = _C.forward(
        query,
        key,
        value,
        **_lengths(cum_seq_q, cum_seq_k, max_q, max_k, seqused_k, block_table),
        out=out,
        return_lse=True,
        softmax_scale=scale,
        causal=is_causal,
        window_size=_window(window_size_left, window_size_right),
        num_splits=num_splits or 0,
        **_dropout(dropout_p, drawn[0]),
    )
    return out, lse, *drawn


def _flash_forward_inplace(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """The same into ``out``; returns the log-sum-exp."""
    if dropout_p:
        raise NotTaken("dropout_p")
    if alibi_slopes is not None:
        raise NotTaken("alibi_slopes")
    if block_table is not None and seqused_k is None:
        raise NotTaken("block_table without seqused_k")
    _check(query, value, dropout_p, return_debug_mask)
    _, lse = _C.forward(
        query,
        key,
        value,
        **_lengths(cum_seq_q, cum_seq_k, max_q, max_k, seqused_k, block_table),
        out=out,
        return_lse=True,
        softmax_scale=scale,
        causal=is_causal,
        window_size=_window(window_size_left, window_size_right),
        num_splits=num_splits or 0,
    )
    written_in_place(out)  # as autograd knows of no function of this name
    return lse  # type: ignore[return-value]


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> list[Tensor]:
    _check(query, value, dropout_p)
    gradients = _gradients(
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        **_lengths(cum_seq_q, cum_seq_k, max_q, max_k),
        softmax_scale=scale,
        causal=is_causal,
        window_size=_window(window_size_left, window_size_right),
        **_dropout(dropout_p, rng_state),
    )
    return _in_layout_of((query, key, value), gradients)


def _efficient_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """Where torch comes with a mask. Tensors are (batch, heads, seqlen, head_dim), the bias (batch,
    heads, seqlen_q, seqlen_k)."""
    _check_dense(query, value, attn_bias, dropout_p)
    batch, heads, rows, _ = query.shape
    out = query.new_empty((batch, rows, heads, value.shape[-1])).transpose(1, 2)
    drawn = draw_seed(query) if dropout_p else query.new_empty(2, dtype=torch.int64)
    _, lse = _C.forward(
        query,
        key,
        value,
        out=out,
        return_lse=compute_log_sumexp,
        heads_first=True,
        attn_bias=None if attn_bias is None else _without_copies(attn_bias),
        softmax_scale=scale,
        window_size=_top_left(query, key, is_causal),
        **_dropout(dropout_p, drawn),
    )
    if lse is None:
        lse = query.new_empty((batch, heads, 0), dtype=torch.float32)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32))
    return out, padded, *(x.clone() for x in drawn)


def _efficient_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    _check_dense(query, value, attn_bias, dropout_p)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (grad_out_, query, key, value, out))
    wants_bias = attn_bias is not None and grad_input_mask[3]
    options: dict[str, Any] = {"bias_gradient": wants_bias}
    if attn_bias is not None:  # whose gradient has all its elements, those that share memory, too
        options["attn_bias"] = in_rows(attn_bias) if wants_bias else _without_copies(attn_bias)
    if dropout_p:
        options.update(_dropout(dropout_p, torch.stack((philox_seed, philox_offset))))
    dq, dk, dv, _, *dbias = _C.backward(
        *(dout, q, k, v, out, logsumexp[..., : query.shape[2]], None),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        softmax_scale=scale,
        window_size=_top_left(query, key, is_causal),
        **options,
    )
    gradients = (x.transpose(1, 2) for x in (dq, dk, dv))
    return *gradients, _in_padded_rows(dbias[0], attn_bias) if wants_bias else None


def _gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _C.backward(dout, q, k, v, out, lse, None, deterministic=deterministic, **options)[:3]


OPERATORS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_forward_inplace,
    "_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention": _efficient_forward,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
}


# ---- their arguments -----------------------------------------------------------------------------


def _check(
    query: Tensor,
    value: Tensor,
    dropout_p: float,
    return_debug_mask: bool = False,
) -> None:
    """Raises NotTaken for what is torch's to compute, or to refuse."""
    if not 0 <= dropout_p < 1:
        raise NotTaken("dropout_p")
    if return_debug_mask:
        _leave("return_debug_mask", dropout_p)
    _check_tensors(query, value)
    if value.shape[-1] != query.shape[-1]:
        raise NotTaken("head_dim")


def _check_dense(query: Tensor, value: Tensor, bias: Tensor | None, dropout_p: float) -> None:
    if not 0 <= dropout_p < 1:
        raise NotTaken("dropout_p")
    _check_tensors(query, value)
    if bias is not None and (bias.dim() != 4 or bias.dtype not in (torch.float32, query.dtype)):
        raise NotTaken("attn_bias")


def _check_tensors(query: Tensor, value: Tensor) -> None:
    dim, dim_v = query.shape[-1], value.shape[-1]
    if dim > 256 or dim % 8 or dim_v > 256 or dim_v % 8:
        raise NotTaken("head_dim")
    if query.stride(-1) != 1:
        raise NotTaken("stride of the last dimension")
    dtypes = dtypes_on(query.get_device())
    if query.dtype not in dtypes:
        raise NotTaken("dtype" if dtypes else "compute capability")


def dtypes_on(device: int) -> tuple[torch.dtype, ...]:
    """Those that are computed on a CUDA device, or, of -1, on the CPU."""
    dtypes = _DTYPES.get(device)
    if dtypes is None:
        is_new_enough = torch.cuda.get_device_capability(device) >= (8, 0)
        dtypes = _DTYPES[device] = (torch.bfloat16, torch.float16) if is_new_enough else ()
    return dtypes


# torch.compile warns of functools.cache.
_DTYPES: dict[int, tuple[torch.dtype, ...]] = {-1: (torch.bfloat16, torch.float16, torch.float32)}


def _lengths(
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> dict[str, Any]:
    """The options of sequences with lengths of their own; none of a dense call."""
    if cum_seq_q is None and cum_seq_k is None and seqused_k is None:
        return {}
    return {
        "cu_seqlens_q": cum_seq_q,
        "cu_seqlens_k": cum_seq_k if block_table is None else None,
        "max_seqlen_q": max_q,
        "max_seqlen_k": max_k,
        "seqused_k": seqused_k,
        "page_table": block_table,
    }


def _window(left: int | None, right: int | None) -> Window:
    """torch has -1 for a side without a bound, too."""
    return (
        None if left is None or left < 0 else left,
        None if right is None or right < 0 else right,
    )


def _top_left(query: Tensor, key: Tensor, is_causal: bool) -> Window:
    """Causal as these operators align it: torch's first query sees the first key."""
    return (None, query.shape[2] - key.shape[2] if is_causal else None)


def _without_copies(bias: Tensor) -> Tensor:
    """Of dimensions in which all elements are the same memory one is left, but of keys."""
    for dim in range(3):
        if bias.stride(dim) == 0:
            bias = bias.narrow(dim, 0, min(bias.shape[dim], 1))
    return in_rows(bias)


def _in_padded_rows(gradient: Tensor, bias: Any) -> Tensor:
    """In the type of the bias, with rows of multiples of 16, as torch's own."""
    *outer, keys = bias.shape
    padded: Tensor = bias.new_empty((*outer, keys + -keys % 16))[..., :keys]
    return padded.copy_(gradient)


def _in_layout_of(inputs: Iterable[Tensor], gradients: Iterable[Any]) -> list[Tensor]:
    """The gradients with the strides of torch.empty_like(input), which compiled code relies on."""
    results = []
    for x, gradient in zip(inputs, gradients, strict=True):
        if gradient.stride() != x.stride():
            strides = torch.empty_like(x, device="meta").stride()
            if gradient.stride() != strides:
                gradient = torch.empty_like(x).copy_(gradient)
        results.append(gradient)
    return results


def _leave(why: str, dropout_p: float) -> None:
    """Leaves a forward to torch, whose backward would come here.

    Raises:
        NotImplementedError: with dropout, as torch's own numbers drop other weights than ours.
    """
    if dropout_p:
        raise NotImplementedError(f"dropout_p with {why} is not supported while SM120 is active")
    raise NotTaken(why)


def _dropout(dropout_p: float, drawn: Tensor) -> dict[str, Any]:
    return {"dropout_p": dropout_p, "dropout_seed": drawn} if dropout_p else {}


def _random_numbers(query: Tensor, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """What torch returns of its random numbers and of its debug mask: the first is our seed."""
    state, unused, mask = _like_random_numbers(query.device, query.dtype)
    state = draw_seed(query).view(torch.uint64) if dropout_p else torch.empty_like(state)
    return state, torch.empty_like(unused), mask


@cache
def _like_random_numbers(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors to make others like, which takes torch half the time of saying type and device; and
    the mask, which has no elements. The others are saved for the backward, and a CUDA graph of
    torch.compile refuses what was allocated before it."""
    state = torch.empty(2, dtype=torch.uint64, device=device)
    unused = torch.empty((), dtype=torch.uint64, device=device)
    return state, unused, torch.empty(0, dtype=dtype, device=device)
