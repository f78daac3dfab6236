"""torch's operators of FlashAttention, with torch's signatures and returns, computed here.

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
    out = torch.empty_like(query)
    _, lse = _C.forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        out=out.transpose(1, 2),
        return_lse=True,
        softmax_scale=scale,
        causal=is_causal,
    )
    return out, lse, None, None, query.shape[2], key.shape[2], *_nothing_drawn(query)


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
    dout, q, k, v, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    gradients = _gradients(dout, q, k, v, out, logsumexp, softmax_scale=scale, causal=is_causal)
    return _in_layout_of((query, key, value), (x.transpose(1, 2) for x in gradients))


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
    out = torch.empty_like(query)
    lse = _flash_forward_inplace(
        out,
        query,
        key,
        value,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        scale=scale,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        seqused_k=seqused_k,
        alibi_slopes=alibi_slopes,
        block_table=block_table,
        num_splits=num_splits,
    )
    return out, lse, *_nothing_drawn(query)


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
    )
    return _in_layout_of((query, key, value), gradients)


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
}


# ---- their arguments -----------------------------------------------------------------------------


def _check(
    query: Tensor,
    value: Tensor,
    dropout_p: float,
    return_debug_mask: bool = False,
) -> None:
    """Raises NotTaken for what is torch's to compute, or to refuse."""
    if dropout_p:
        raise NotTaken("dropout_p")
    if return_debug_mask:
        raise NotTaken("return_debug_mask")
    head_dim = query.shape[-1]
    if head_dim > 256 or head_dim % 8 or value.shape[-1] != head_dim:
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


def _nothing_drawn(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What torch returns of its random numbers and of its debug mask where there are none."""
    state, unused = _random_numbers(query.device)
    return torch.empty_like(state), torch.empty_like(unused), query.new_empty(0)


@cache
def _random_numbers(device: torch.device) -> tuple[Tensor, Tensor]:
    """Tensors to make others like, which takes torch half the time of saying type and device."""
    state = torch.empty(2, dtype=torch.uint64, device=device)
    return state, torch.empty((), dtype=torch.uint64, device=device)
