"""A door into torch's own attention: what torch computes by FlashAttention is computed here.

torch lets an implementation take the place of its FlashAttention-2, operator by operator. That
reaches F.scaled_dot_product_attention on CUDA and all that stands on it: nn.MultiheadAttention,
jagged nested tensors, varlen_attn, Transformers' and diffusers' default attention, eager, compiled
or exported. torch's autograd and its shapes without data stay in use.

scaled_dot_product_attention() is for programs that call it by name, and takes more: it meets calls
before torch has sorted out those that its own FlashAttention cannot compute.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import attention as registry
from torch.nn import functional as F

from flash_attn_sm120 import _C
from flash_attn_sm120.autograd import written_in_place
from flash_attn_sm120.interface import flash_attn_func
from flash_attn_sm120.plan import Window

NAME = "SM120"  # in torch.nn.attention.list_flash_attention_impls()

_OLDEST_TRIED, _NEWEST_TRIED = (2, 11), (2, 13)

# ---- what went where -----------------------------------------------------------------------------


class Stats(NamedTuple):
    """Calls since the import, by torch's name of the operator or function."""

    taken: dict[str, int]  # name -> calls computed here
    left: dict[str, int]  # "name: reason" -> calls left to torch


def stats() -> Stats:
    """How many calls were computed here, and how many were left to torch, and why."""
    with _counting:
        return Stats(dict(_taken), dict(_left))


_counting = threading.Lock()
_taken: Counter[str] = Counter()
_left: Counter[str] = Counter()


def _count(counter: Counter[str], name: str) -> None:
    with _counting:
        counter[name] += 1


class NotTaken(NotImplementedError):
    """A call that is torch's to compute; the text says why."""


# ---- the door ------------------------------------------------------------------------------------


class Handle:
    """An open door; :meth:`remove` closes it."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def remove(self) -> None:
        """Brings torch's own operators back. A second time it does nothing."""
        library, self._library = self._library, None
        if library is None:
            return
        library._destroy()
        if registry.current_flash_attention_impl() == NAME:
            registry.restore_flash_attention_impl()


def activate() -> Handle:
    """Computes here what torch computes by FlashAttention on CUDA, until the handle's ``remove()``.

    The same as ``torch.nn.attention.activate_flash_attention_impl("SM120")``, which needs this
    module to be imported, and which ``restore_flash_attention_impl()`` undoes. Calls that are not
    taken go to the operator that was there before: dropout, debug masks, ALiBi slopes, head dims of
    more than 256, GPUs before compute capability 8.0. :func:`stats` counts them, with the reason.

    Raises:
        NotImplementedError: PyTorch before 2.11, which has no such door.

    Whatever is raised, torch's operators are those that were active before.
    """
    if not hasattr(registry, "restore_flash_attention_impl"):
        raise NotImplementedError(
            "sdpa.activate() needs torch.nn.attention.activate_flash_attention_impl and its "
            f"counterpart, which PyTorch {torch.__version__} does not have"
        )
    before = registry.current_flash_attention_impl()
    try:
        registry.activate_flash_attention_impl(NAME)
    except BaseException:
        if before is not None:
            registry.activate_flash_attention_impl(before)
        raise
    assert _handle is not None
    return _handle


def override(key: str) -> Handle:
    """Puts :data:`OPERATORS` in the place of torch's for one dispatch key: all of them, or none."""
    originals = {name: _original(name, key) for name in OPERATORS if hasattr(torch.ops.aten, name)}
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():  # torch says that an operator is overridden, as is meant
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for name, original in originals.items():
                function = _or_else(original, name, OPERATORS[name])
                library.impl(name, function, key, with_keyset=True)
    except BaseException:
        library._destroy()
        raise
    return Handle(library)


def _original(name: str, key: str) -> Callable[..., Any] | None:
    """The kernel that an operator has now; None where it has none, as in builds without CUDA."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
        return None
    call: Callable[..., Any] = torch.library.get_kernel(f"aten::{name}", key).call_boxed
    return call


def _or_else(
    original: Callable[..., Any] | None, name: str, ours: Callable[..., Any]
) -> Callable[..., Any]:
    """Our operator, and the original one for calls that it does not take."""

    def operator(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            results = ours(*args, **kwargs)
        except NotTaken as why:
            if original is None:
                raise
            _count(_left, f"{name}: {why}")
        else:
            _count(_taken, name)
            return results
        return original(keyset, *args, **kwargs)

    return operator


def _override_cuda() -> Handle:
    global _handle
    _warn_of_untried_version()
    _handle = override("CUDA")
    return _handle


_handle: Handle | None = None  # of the last activation


@cache
def _warn_of_untried_version() -> None:
    version = tuple(int(x) for x in torch.__version__.split(".")[:2])
    if not _OLDEST_TRIED <= version <= _NEWEST_TRIED:
        warnings.warn(
            f"flash_attn_sm120.sdpa has been tried with PyTorch 2.11 to 2.13, not with "
            f"{torch.__version__}",
            RuntimeWarning,
            stacklevel=5,  # the caller of activate()
        )


if hasattr(registry, "register_flash_attention_impl"):  # by name alone: nothing changes here
    registry.register_flash_attention_impl(NAME, register_fn=_override_cuda)


# ---- the function --------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, computed here where that is possible.

    It takes what torch's own FlashAttention does not: ``is_causal`` (aligned top left) where the
    lengths differ, a ``value`` of another head dim, and float32 on the CPU. Gradients, autocast,
    torch.compile and the rest of docs/torch.md are those of :func:`flash_attn_func`.

    Args:
        query: ``(..., heads, seqlen_q, head_dim)`` of 2 dimensions or more, as torch takes it.
        key: ``(..., heads, seqlen_k, head_dim)``.
        value: ``(..., heads, seqlen_k, head_dim_v)``. Dimensions before the last two broadcast.
        attn_mask: calls with a mask are computed by torch.
        dropout_p: so are calls with dropout.
        is_causal: query ``i`` sees the keys ``j <= i``.
        scale: factor of the scores; default ``1 / sqrt(head_dim)``.
        enable_gqa: the heads of ``query`` are a multiple of those of ``key`` and ``value``.

    Returns:
        ``(..., heads, seqlen_q, head_dim_v)``.

    torch also computes calls without elements, head dims of more than 256, float64, float32 on
    CUDA, nested tensors, other devices, and GPUs before compute capability 8.0. :func:`stats`
    counts them, with the reason; calls in compiled code are not counted.
    """
    why = _why_left(query, key, value, attn_mask, dropout_p)
    if not torch.compiler.is_compiling():
        name = "scaled_dot_product_attention"
        _count(*((_left, f"{name}: {why}") if why else (_taken, name)))
    if why:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if scale is None:
        scale = query.shape[-1] ** -0.5  # before it is padded
    seqlen_q, seqlen_k, head_dim_v = query.shape[-2], key.shape[-2], value.shape[-1]
    q, k, v, shape = _to_heads(query, key, value, enable_gqa)
    out: Tensor = flash_attn_func(
        _padded(q).transpose(1, 2),
        _padded(k).transpose(1, 2),
        _padded(v).transpose(1, 2),
        softmax_scale=scale,
        causal=is_causal and seqlen_q == seqlen_k,
        # causal is aligned bottom right, and this top left
        window_size=(None, seqlen_q - seqlen_k if is_causal else None),
    )[0]
    out = out.transpose(1, 2)[..., :head_dim_v]
    return out if len(shape) == 2 else out.reshape(*shape, seqlen_q, head_dim_v)


def _why_left(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> str:
    """Why torch is to compute a call; empty where we do."""
    if attn_mask is not None:
        return "attn_mask"
    if dropout_p:
        return "dropout_p"
    if query.is_nested or key.is_nested or value.is_nested:
        return "nested tensor"
    device = query.device.type
    if device not in ("cpu", "cuda"):
        return "device"
    if min(query.dim(), key.dim(), value.dim()) < 2 or 0 in (
        *query.shape,
        *key.shape,
        *value.shape,
    ):
        return "no elements"
    if max(query.shape[-1], value.shape[-1]) > 256:
        return "head_dim"
    dtypes = _dtypes_on(query.get_device())
    if not dtypes:
        return "compute capability"
    is_cast = query.dtype is torch.float32 and torch.is_autocast_enabled(device)
    return "" if is_cast or query.dtype in dtypes else "dtype"


def _to_heads(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """The tensors as (batch, heads, seqlen, head_dim), and the dimensions of out before seqlen."""
    ndim = max(query.dim(), key.dim(), value.dim()) - 2
    tensors = [x if x.dim() > 2 else x.unsqueeze(0) for x in (query, key, value)]
    if enable_gqa:
        heads, *heads_kv = (x.shape[-3] for x in tensors)
        if heads_kv[0] != heads_kv[1]:
            tensors[1:] = (x.repeat_interleave(heads // x.shape[-3], -3) for x in tensors[1:])
    else:
        heads = _broadcast(x.shape[-3:-2] for x in tensors)[0]
        tensors = [x.expand(*x.shape[:-3], heads, -1, -1) for x in tensors]
    batch = _broadcast(x.shape[:-3] for x in tensors)
    if any(x.shape[:-3] != batch for x in tensors):
        tensors = [x.expand(*batch, -1, -1, -1) for x in tensors]
    if len(batch) != 1:
        tensors = [x.reshape(-1, *x.shape[-3:]) for x in tensors]
    q, k, v = tensors
    return q, k, v, (*batch, heads)[-ndim:] if ndim else ()


def _broadcast(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _padded(x: Tensor) -> Tensor:
    """With zeros up to a head dim that kernels have, which change no score."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x


# ---- the operators, as torch calls them ----------------------------------------------------------


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
    dtypes = _dtypes_on(query.get_device())
    if query.dtype not in dtypes:
        raise NotTaken("dtype" if dtypes else "compute capability")


def _dtypes_on(device: int) -> tuple[torch.dtype, ...]:
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
