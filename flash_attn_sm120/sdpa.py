"""A door into torch's own attention: what torch computes by FlashAttention is computed here, and so
are calls with a mask.

torch lets an implementation take the place of its FlashAttention-2, operator by operator, and of
the operators that it has for masks, too. That reaches F.scaled_dot_product_attention on CUDA and
all that stands on it: nn.MultiheadAttention, jagged nested tensors, varlen_attn, Transformers' and
diffusers' default attention, eager, compiled or exported. torch's autograd and its shapes without
data stay in use.

scaled_dot_product_attention() is for programs that call it by name, and takes more: it meets calls
before torch has sorted out those that its own FlashAttention cannot compute.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import attention as registry
from torch.nn import functional as F

from flash_attn_sm120.aten import OPERATORS, NotTaken, dtypes_on
from flash_attn_sm120.interface import flash_attn_func
from flash_attn_sm120.masks import as_bias, in_rows

NAME = "SM120"  # in torch.nn.attention.list_flash_attention_impls()

_OLDEST_TRIED, _NEWEST_TRIED = (2, 11), (2, 14)

# One override on top of another must be asked for, in versions that do not take it for granted.
_OVERRIDING = {
    name: True
    for name in inspect.signature(torch.library.Library.impl).parameters
    if name == "allow_override"
}

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

    Calls with a mask, which torch hands to its memory-efficient attention, are computed here, too.
    The same as ``torch.nn.attention.activate_flash_attention_impl("SM120")``, which needs this
    module to be imported, and which ``restore_flash_attention_impl()`` undoes. Calls that are not
    taken go to the operator that was there before: debug masks, ALiBi slopes, head dims of more
    than 256, GPUs before compute capability 8.0. :func:`stats` counts them, with the reason.
    Dropout draws its seed from torch's generator, but drops other weights than torch's kernels do.

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
    """Puts all operators of aten.py in the place of torch's for one dispatch key, or none."""
    originals = {name: _original(name, key) for name in OPERATORS if hasattr(torch.ops.aten, name)}
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():  # torch says that an operator is overridden, as is meant
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for name, original in originals.items():
                function = _or_else(original, name, OPERATORS[name])
                library.impl(name, function, key, **_OVERRIDING)
    except BaseException:
        library._destroy()
        raise
    return Handle(library)


def _original(name: str, key: str) -> Callable[..., Any] | None:
    """The kernel that an operator has now; None where it has none, as in builds without CUDA."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
        return None
    call: Callable[..., Any] = torch.library.get_kernel(f"aten::{name}", key).call_boxed
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return partial(call, keyset)


def _or_else(
    original: Callable[..., Any] | None, name: str, ours: Callable[..., Any]
) -> Callable[..., Any]:
    """Our operator, and the original one for calls that it does not take."""
    known = inspect.signature(ours).parameters.keys()

    def operator(*args: Any, **kwargs: Any) -> Any:
        try:
            # Of a newer PyTorch; the default is never passed.
            if kwargs and not kwargs.keys() <= known:
                raise NotTaken(", ".join(kwargs.keys() - known))
            results = ours(*args, **kwargs)
        except NotTaken as why:
            if original is None:
                raise
            _count(_left, f"{name}: {why}")
        else:
            _count(_taken, name)
            return results
        return original(*args, **kwargs)

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
            f"flash_attn_sm120.sdpa has been tried with PyTorch 2.11 to 2.14, not with "
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

    It takes what torch's own FlashAttention does not: masks, ``is_causal`` (aligned top left) where
    the lengths differ, a ``value`` of another head dim, and float32 on the CPU. Gradients,
    autocast, torch.compile and the rest of docs/torch.md are those of :func:`flash_attn_func`.

    Args:
        query: ``(..., heads, seqlen_q, head_dim)`` of 2 dimensions or more, as torch takes it.
        key: ``(..., heads, seqlen_k, head_dim)``.
        value: ``(..., heads, seqlen_k, head_dim_v)``. Dimensions before the last two broadcast.
        attn_mask: True where a query sees a key, or what is added to the scores, in float32 or the
            dtype of ``query``; of any shape that broadcasts to ``(..., heads, seqlen_q,
            seqlen_k)``. It reaches kernels as the ``attn_bias`` of :func:`flash_attn_func`, and is
            not expanded before, but for single keys. A query that sees no key gets 0.
        dropout_p: the probability with which a weight counts nothing; the seed is drawn from
            torch's generator on the device of ``query``. Of 1 torch computes the call.
        is_causal: query ``i`` sees the keys ``j <= i``.
        scale: factor of the scores; default ``1 / sqrt(head_dim)``.
        enable_gqa: the heads of ``query`` are a multiple of those of ``key`` and ``value``.

    Returns:
        ``(..., heads, seqlen_q, head_dim_v)``.

    torch also computes, or refuses, masks of other types or dimensions or with ``is_causal``, calls
    without elements, head dims of more than 256, float64, float32 on CUDA, nested tensors, other
    devices, and GPUs before compute capability 8.0. :func:`stats` counts them, with the reason;
    calls in compiled code are not counted.
    """
    why = _why_left(query, key, value, attn_mask, dropout_p, is_causal)
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
    bias = None if attn_mask is None else _to_bias(attn_mask, q, seqlen_k, shape[:-1])
    out: Tensor = flash_attn_func(
        _padded(q).transpose(1, 2),
        _padded(k).transpose(1, 2),
        _padded(v).transpose(1, 2),
        softmax_scale=scale,
        causal=is_causal and seqlen_q == seqlen_k,
        dropout_p=dropout_p,
        attn_bias=bias,
        # causal is aligned bottom right, and this top left
        window_size=(None, seqlen_q - seqlen_k if is_causal else None),
    )[0]
    out = out.transpose(1, 2)
    if head_dim_v % 8:
        out = out[..., :head_dim_v]
    return out if len(shape) == 2 else out.reshape(*shape, seqlen_q, head_dim_v)


def _why_left(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> str:
    """Why torch is to compute a call; empty where we do."""
    if attn_mask is not None:
        has_dims = 2 <= attn_mask.dim() <= max(query.dim(), key.dim(), value.dim())
        is_known = attn_mask.dtype in (torch.bool, torch.float32, query.dtype)
        if is_causal or attn_mask.is_nested or not has_dims or not is_known:
            return "attn_mask"
    if not 0 <= dropout_p < 1:
        return "dropout_p"
    if query.is_nested or key.is_nested or value.is_nested:
        return "nested tensor"
    device = query.device.type
    if device not in ("cpu", "cuda"):
        return "device"
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return "fewer than 2 dimensions"
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        return "no elements"
    if max(query.shape[-1], value.shape[-1]) > 256:
        return "head_dim"
    dtypes = dtypes_on(query.get_device())
    if not dtypes:
        return "compute capability"
    is_cast = query.dtype is torch.float32 and torch.is_autocast_enabled(device)
    return "" if is_cast or query.dtype in dtypes else "dtype"


def _to_heads(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """The tensors as (batch, heads, seqlen, head_dim), and the dimensions of out before seqlen."""
    if (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[: 1 if enable_gqa else 2] == key.shape[: 1 if enable_gqa else 2]
        and key.shape[:2] == value.shape[:2]
    ):
        return query, key, value, query.shape[:2]  # as nearly all calls come
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


def _to_bias(mask: Tensor, query: Tensor, seqlen_k: int, batch: tuple[int, ...]) -> Tensor:
    """A mask as a bias of (batch, heads, seqlen_q, seqlen_k), each 1 where it is one for all.

    ``query`` has its heads already; ``batch``: the dimensions that have become one.
    """
    mask = as_bias(mask, query)
    mask = mask[(None,) * (max(len(batch), 1) + 3 - mask.dim())]
    if mask.dim() > 4:
        if any(n != 1 for n in mask.shape[:-3]):
            mask = mask.expand(*batch, -1, -1, -1)
        mask = mask.flatten(0, -4)
    if mask.shape[-1] != seqlen_k:
        mask = mask.expand(-1, -1, -1, seqlen_k)
    return in_rows(mask)


def _broadcast(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _padded(x: Tensor) -> Tensor:
    """With zeros up to a head dim that kernels have, which change no score."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x
