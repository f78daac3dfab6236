"""A door into Hugging Face Transformers: ``attn_implementation="sm120_attention"``.

Two functions stand behind a name. The mask function is asked once per forward for each kind of
layer, and answers with a :class:`Mask`: a window, and where the rows of each sequence lie. The
attention function, which every layer calls, hands that on. What cannot be said so (chunks, unions
of masks, padding within a sequence, 4-dimensional masks) is a bias of -inf, but in one graph, where
chunks and unions raise NotImplementedError.

Lengths stay on the device. Padding costs a copy of the padded side, packed sequences and static
caches cost none.
"""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers import modeling_flash_attention_utils as flash_path_of_hf
from transformers.integrations.flash_attention import get_target_dtype

from flash_attn_sm120 import fa2, interface
from flash_attn_sm120.masks import as_bias, in_rows

ATTENTION = "sm120_attention"
# Transformers looks for "flash" in a name, and for decoding from pages for a 2 or 3 behind it.
FLASH = "flash_sm120"

_OLDEST_TRIED, _NEWEST_TRIED = (5, 17), (5, 24)

# ---- the door ------------------------------------------------------------------------------------


class Handle:
    """An open door; :meth:`remove` closes it."""

    def __init__(self, *undo: Callable[[], None]) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Takes back what the call that returned this has registered; a second time, nothing."""
        undo, self._undo = self._undo, ()
        for step in undo:
            step()


def register(flash_path: bool = False) -> Handle:
    """Makes ``attn_implementation="sm120_attention"`` known, until the handle's ``remove()``.

    Args:
        flash_path: also ``"flash_sm120"``: the same attention under a name that Transformers takes
            for FlashAttention, as continuous batching (``generate_batch``) wants it, and as vision
            towers do that else call attention once per image. Models that list the kernels which
            they are compatible with, such as gpt-oss, replace that name by the first of the list.
            It changes a private function of Transformers.

    What is registered by an earlier call stays; models made before keep what they have.

    Raises:
        ValueError: a name is taken by something else.
        NotImplementedError: ``flash_path`` in a version whose private function is another.

    Whatever is raised, nothing is registered.
    """
    _warn_of_untried_version()
    names = [name for name in (ATTENTION, FLASH)[: 1 + flash_path] if not _is_ours(name)]
    if FLASH in names:
        _check_lazy_imports()
    undo = [_register(name) for name in names]
    if FLASH in names:
        undo.append(_wrap_lazy_imports())
    return Handle(*undo)


def registered() -> tuple[str, ...]:
    """The names that are registered now."""
    return tuple(name for name in (ATTENTION, FLASH) if _behind(name) == _FUNCTIONS)


_INTERFACES = (AttentionInterface, AttentionMaskInterface)


def _behind(name: str) -> tuple[Any, ...]:
    return tuple(kind._global_mapping.get(name) for kind in _INTERFACES)


def _is_ours(name: str) -> bool:
    found = _behind(name)
    if found not in (_FUNCTIONS, (None, None)):
        raise ValueError(
            f"Transformers knows the attention {name!r} already, as {found}: remove that first"
        )
    return found == _FUNCTIONS


def _register(name: str) -> Callable[[], None]:
    for kind, function in zip(_INTERFACES, _FUNCTIONS, strict=True):
        kind.register(name, function)

    def undo() -> None:
        for kind in _INTERFACES:
            kind._global_mapping.pop(name, None)

    return undo


@cache
def _warn_of_untried_version() -> None:
    version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    if not _OLDEST_TRIED <= version <= _NEWEST_TRIED:
        warnings.warn(
            "flash_attn_sm120.transformers has been tried with Transformers 5.17 to 5.24, not with "
            f"{transformers.__version__}",
            RuntimeWarning,
            stacklevel=3,  # the caller of register()
        )


# ---- masks ---------------------------------------------------------------------------------------


Window = tuple[int | None, int | None]


class Rows(NamedTuple):
    """Where the rows of each sequence lie; without tensors, a batch whose rows are all used."""

    cu_seqlens: Tensor | None = None  # of a side that is packed
    seqused: Tensor | None = None
    max_seqlen: int | None = None


class NotATensor(NotImplementedError, AttributeError):
    """A model does more with its mask than hand it to the attention function."""


def _no_tensor(wanted: str) -> NotATensor:
    return NotATensor(
        f"{ATTENTION} makes masks that are no tensors, and the model wants {wanted} of one: load "
        'it with attn_implementation="sdpa" or "eager"'
    )


class Mask(NamedTuple):
    """Which keys the queries see. It is the mask that "eager" would apply, layer by layer."""

    window_size: Window  # bottom right; (None, 0) is causal
    lengths: tuple[int, int]  # rows of q and of k
    q: Rows = Rows()
    k: Rows = Rows()
    seen: Tensor | None = None  # (batch or 1, heads or 1, q or 1, k): True, or added to the scores
    is_one_sequence: Tensor | None = None  # what the layer is to assert, unless it is given lengths

    @property
    def ndim(self) -> int:
        """That of prepared masks: where there are fewer, models prepare them."""
        return 4

    def __getattr__(self, name: str) -> NoReturn:
        raise _no_tensor(name)

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> NoReturn:
        raise _no_tensor(getattr(function, "__name__", str(function)))


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    device: torch.device | str = "cpu",
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool | None = None,
    config: Any = None,
    **_: Any,
) -> Mask:
    """The mask function of both names. Arguments are Transformers'.

    Query ``i`` stands at position ``q_offset + i``, key ``j`` at ``kv_offset + j``; the last rows
    of a static cache, whose ``q_offset`` is a tensor, are not filled yet.

    Raises:
        NotImplementedError: it is no window of whole sequences, in one graph.
    """
    if isinstance(attention_mask, Mask):  # made beforehand, for a compiled step
        return attention_mask
    lengths = (q_length, kv_length)

    def every_pair() -> Mask:
        """By a tensor, as scaled_dot_product_attention would be given it."""
        seen = masking_utils.sdpa_mask(
            *(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask),
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return Mask((None, None), lengths, seen=seen)

    is_one_sequence = None
    if mask_function in _PLAIN or use_vmap or not _is_one_graph():
        found = _window_of(mask_function, kv_offset + kv_length)
        if found is None:
            return every_pair()
        window_size, sequences = found
        if sequences is not None:
            rows = _rows_of_sequences(sequences)
            return Mask(window_size, lengths, rows, rows)
    else:
        is_bidirectional = allow_is_bidirectional_skip is not None  # only those may have it
        keys = (kv_offset, kv_offset + kv_length)
        window_size = _local_window(local_size, is_bidirectional, config, keys[1])
        queries = torch.arange(q_length, device=device) + q_offset
        is_one_sequence = _assert_window(mask_function, window_size, batch_size, queries, keys)
    is_self_attention = window_size != (None, None)
    end = q_offset + (q_length - kv_offset) if is_self_attention else kv_length  # behind the last
    if attention_mask is not None:
        valid = _rows_of_keys(attention_mask, kv_length, kv_offset)
        if is_self_attention:
            valid = valid & (torch.arange(kv_length, device=device) < end)
        padded = _padded(window_size, lengths, valid, end)
        return every_pair() if padded is None else padded
    if isinstance(end, Tensor):
        used = end.to(device, torch.int32).expand(batch_size).contiguous()
    elif end == kv_length:
        return Mask(window_size, lengths, is_one_sequence=is_one_sequence)
    elif end < kv_length and window_size[1] == 0:
        used = torch.full((batch_size,), end, dtype=torch.int32, device=device)
    else:
        return every_pair()
    return Mask(window_size, lengths, k=Rows(seqused=used, max_seqlen=kv_length))


def _rows_of_keys(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """``(batch, kv_length)``, True where a row of k may be seen; missing columns are False."""
    if attention_mask.ndim != 2:
        raise NotImplementedError(_NO_MASK_OF.format(f"{attention_mask.ndim} dimensions"))
    missing = max(kv_offset + kv_length - attention_mask.shape[1], 0)
    columns = pad(attention_mask.bool(), (0, missing))
    return columns[:, kv_offset : kv_offset + kv_length]


def _padded(
    window_size: Window, lengths: tuple[int, int], valid: Tensor, end: int | Tensor
) -> Mask | None:
    """The mask of sequences that have padding before or behind them, ``valid`` between.

    With padding within them it is one of keys, or None where the last query does not stand beside
    the last key. Packed, a sequence has its rows and the padding of the next one, which ``seqused``
    leaves out.
    """
    q_length, kv_length = lengths
    used = valid.sum(1, dtype=torch.int32)
    begin = valid.to(torch.int32).argmax(1).to(torch.int32)
    rises = valid[:, 0] + (valid[:, 1:] & ~valid[:, :-1]).sum(1)
    q_first = end - q_length  # the row of k that the first query stands beside
    q_begin = (begin - q_first).clamp(0, q_length)
    q_used = (begin + used - q_first).clamp(0, q_length) - q_begin
    if _may_read(valid):
        facts = torch.stack([(rises > 1).any(), ~valid.all(), begin.any(), q_begin.any()])
        has_gaps, is_padded, k_begins, q_begins = facts.tolist()
        if has_gaps:
            is_aligned = not isinstance(end, Tensor) and end == kv_length
            return Mask(window_size, lengths, seen=valid[:, None, None]) if is_aligned else None
        if not is_padded:
            return Mask(window_size, lengths)
    else:  # both sides may begin anywhere
        torch._assert_async((rises <= 1).all(), _NO_GAPS)
        k_begins, q_begins = True, q_length > 1
    k = _rows(begin if k_begins else None, used, kv_length)
    if window_size == (None, None):  # queries are of any number, and padding attends, too
        return Mask(window_size, lengths, k=k)
    return Mask(window_size, lengths, _rows(q_begin if q_begins else None, q_used, q_length), k)


_NO_GAPS = (
    f"{ATTENTION} takes an attention_mask with padding before and behind each sequence, not "
    "within it"
)
_NO_MASK_OF = (
    f"{ATTENTION} takes no attention_mask of {{}}: pass (batch, seqlen) with 1 for tokens and 0 "
    "for padding, packed position_ids, or cu_seq_lens_q and cu_seq_lens_k"
)


def _rows(begin: Tensor | None, used: Tensor, length: int) -> Rows:
    """``used`` rows of each sequence of a batch, from ``begin`` on; packed, unless that is 0."""
    if begin is None:
        return Rows(None, used, length)
    batch = used.shape[0]
    firsts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=used.device)
    return Rows(firsts + pad(begin, (0, 1)), used, length)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _rows_of_sequences(ids: Tensor) -> Rows:
    """The rows of packed sequences: ``ids (batch, seqlen)`` differ where another begins."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first_rows = starts.flatten().nonzero().flatten()
    cu_seqlens = pad(first_rows, (0, 1), value=ids.numel()).to(torch.int32)
    return Rows(cu_seqlens, None, int(cu_seqlens.diff().max()))


# ---- mask functions ------------------------------------------------------------------------------


_PLAIN: dict[Any, Window] = {
    masking_utils.causal_mask_function: (None, 0),
    masking_utils.bidirectional_mask_function: (None, None),
}


def _window_of(
    mask_function: Callable[..., Any], kv_end: int
) -> tuple[Window, Tensor | None] | None:
    """What a mask function of Transformers shows: a window, and ids where sequences are packed.

    None: something else."""
    if mask_function in _PLAIN:
        return _PLAIN[mask_function], None
    found: tuple[Window, Tensor | None] | None = _window_of_closure(mask_function, kv_end)
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _window_of_closure(
    mask_function: Callable[..., Any], kv_end: int
) -> tuple[Window, Tensor | None] | None:
    """The same of a function that another one made: by its name, and by what it holds."""
    name = getattr(mask_function, "__qualname__", repr(mask_function)).split(".<locals>")[0]
    if getattr(mask_function, "__module__", "") != masking_utils.__name__:
        name = ""
    held = inspect.getclosurevars(mask_function).nonlocals if name else {}
    if name == "sliding_window_overlay":
        return (held["sliding_window"] - 1, None), None
    if name == "sliding_window_bidirectional_overlay":
        return (held["sliding_window"], held["sliding_window"]), None
    if name == "chunked_overlay" and kv_end <= held["chunk_size"]:
        return (None, None), None
    if name == "packed_sequence_mask_function":
        return (None, None), held["packed_sequence_mask"]
    if name == "remap_positions_for_packed_sequence":  # within a sequence distances are the same
        return _window_of(held["mask_function"], kv_end)
    if name == "and_masks":
        found = [_window_of(part, kv_end) for part in held["mask_functions"]]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            return None
        left, right = zip(*(window for window, _ in parts), strict=True)
        ids = [x for _, x in parts if x is not None]
        return (_smallest(left), _smallest(right)), ids[0] if ids else None
    return None


def _smallest(bounds: tuple[int | None, ...]) -> int | None:
    return min((bound for bound in bounds if bound is not None), default=None)


# ---- mask functions in one graph -----------------------------------------------------------------
#
# torch cannot follow what a function holds. Elsewhere the graph breaks there; with fullgraph=True a
# mask is taken for the window that its arguments name, and the graph asserts at the borders of the
# window that it is.


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _is_one_graph() -> bool:
    """Whether torch compiles this with fullgraph=True; it is asked while it does."""
    # torch.compiler.is_compiling() is False here before torch 2.13.
    tracing = sys.modules.get("torch._dynamo.symbolic_convert")
    current = getattr(getattr(tracing, "tls", None), "current_tx", None)
    return bool(getattr(current, "one_graph", False))


def _local_window(
    local_size: int | None, is_bidirectional: bool, config: Any, kv_end: int
) -> Window:
    if is_bidirectional:
        return (local_size, local_size)
    if local_size is None:
        return (None, 0)
    if local_size == getattr(config, "attention_chunk_size", None) and local_size < kv_end:
        raise NotImplementedError(_NO_WINDOW.format("chunks"))
    return (local_size - 1, 0)


def _assert_window(
    mask_function: Callable[..., Any],
    window_size: Window,
    batch: int,
    queries: Tensor,
    keys: tuple[int, int],
) -> Tensor:
    """Asserts that a query sees the last key of its window, none behind it and none before it.

    Returns:
        whether it sees the first one, too: packed sequences may begin within a window.
    """
    left, right = window_size
    first = torch.full_like(queries, keys[0]) if left is None else queries - left
    last = torch.full_like(queries, keys[1] - 1) if right is None else queries + right
    first, last = first.clamp(min=keys[0]), last.clamp(max=keys[1] - 1)
    at = torch.stack([first, last, first - 1, last + 1], dim=1)
    is_key = (at >= keys[0]) & (at < keys[1])
    numbers = torch.arange(batch, device=queries.device)[:, None, None, None]
    seen = mask_function(
        numbers, torch.zeros_like(numbers), queries[:, None], at.clamp(keys[0], keys[1] - 1)
    )
    expected = torch.arange(4, device=queries.device) < 2
    holds: Tensor = (seen == expected) | ~is_key
    torch._assert_async(holds[..., 1:].all(), _NO_WINDOW.format("unions of masks"))
    return holds[..., 0].all()


_NO_WINDOW = f"{ATTENTION} takes causal masks and sliding windows in one graph, not {{}}"


# ---- attention -----------------------------------------------------------------------------------


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Mask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    deterministic: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    block_table: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of both names, as layers call it: ``q (batch, heads, seqlen, dim)``.

    Returns:
        ``(out, None)``: ``out (batch, seqlen_q, heads, head_dim_v)``; rows of padding are 0.

    Raises:
        NotImplementedError: attention weights, position biases, dropout in continuous batching.
    """
    _refuse(others)
    q, k, v = (x.transpose(1, 2) for x in _in_one_dtype(module, query, key, value))
    lengths = (q.shape[1], k.shape[1])
    if isinstance(attention_mask, Mask):
        window_size = attention_mask.window_size
    else:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        left = None if sliding_window is None else sliding_window - 1
        window_size = (left, 0 if is_causal else left)
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "learnable_sink": s_aux,
    }
    if block_table is not None:
        if dropout:
            raise NotImplementedError(f"{FLASH} does not support dropout with a block_table")
        pages = (k_cache, v_cache, block_table, cu_seq_lens_k)
        return _decode(q, k, v, pages, window_size, options), None
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        rows_q = Rows(cu_seq_lens_q.to(torch.int32), None, _bound(max_length_q))
        rows_k = Rows(cu_seq_lens_k.to(torch.int32), None, _bound(max_length_k))
        shown = Mask(window_size, lengths, rows_q, rows_k)
    else:
        shown = _mask_of_layer(window_size, lengths, attention_mask)
        if shown.is_one_sequence is not None:
            torch._assert_async(shown.is_one_sequence, _NO_POSITIONS)
        if position_ids is not None and position_ids.ndim == 2:
            shown = _packed_by_positions(shown, position_ids, q.shape[0])
    options["dropout_p"] = dropout
    return _attend(q, k, v, shown, options, bool(deterministic)), None


def _in_one_dtype(module: torch.nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k and v; where float32 is what norms in float32 left of another dtype, that one.

    On CUDA, and of a v that is not float32, it can only be that: QLoRA keeps norms so. Transformers
    looks for the dtype of the layer's weights, and says so once.
    """
    is_left_over = tensors[0].dtype == torch.float32 and (
        tensors[0].is_cuda or tensors[2].dtype != torch.float32
    )
    if not is_left_over or torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    dtype = get_target_dtype(tensors[0], module)
    cast: tuple[Tensor, ...] = flash_path_of_hf.fa_peft_integration_check(*tensors, dtype)
    return cast


def _attend(
    q: Tensor, k: Tensor, v: Tensor, shown: Mask, options: dict[str, Any], deterministic: bool
) -> Tensor:
    options |= {
        "causal": shown.window_size[1] == 0,
        "window_size": shown.window_size,
        "deterministic": deterministic,
    }
    if _is_dense(shown):
        bias = None if shown.seen is None else in_rows(as_bias(shown.seen, q))
        dense: Tensor = interface.flash_attn_func(q, k, v, attn_bias=bias, **options)[0]
        return dense
    k_is_packed = shown.k.cu_seqlens is not None
    out: Tensor = interface.flash_attn_varlen_func(
        q if shown.q.cu_seqlens is None else q.flatten(0, 1),
        k.flatten(0, 1) if k_is_packed else k,
        v.flatten(0, 1) if k_is_packed else v,
        cu_seqlens_q=shown.q.cu_seqlens,
        cu_seqlens_k=shown.k.cu_seqlens,
        max_seqlen_q=shown.q.max_seqlen,
        max_seqlen_k=shown.k.max_seqlen,
        seqused_q=shown.q.seqused,
        seqused_k=shown.k.seqused,
        **options,
    )[0]
    return out.view(*q.shape[:3], v.shape[3])


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: tuple[Tensor | None, ...],
    window_size: Window,
    options: dict[str, Any],
) -> Tensor:
    """A step of continuous batching: each row is a sequence, and is appended to its pages first.

    A graph captured for more sequences has rows of none: to those Transformers gives pages -1,
    which are read and written as page 0, where it keeps nothing.
    """
    k_cache, v_cache, table, cu_seqlens = pages
    if window_size[0] is not None or k_cache is None or v_cache is None or cu_seqlens is None:
        raise NotImplementedError(
            f"{FLASH} takes a block_table with k_cache, v_cache and cu_seq_lens_k, and no window"
        )
    assert table is not None
    if v_cache.data_ptr() == k_cache[1:].data_ptr():  # pages of K and of V in turn: all are both
        k_cache, v_cache, table = k_cache[::2], v_cache[::2], table >> 1
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    held = (cu_seqlens.diff()[: q.shape[0]] - 1).to(torch.int32)
    out: Any = fa2.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=held, block_table=table, **options
    )
    return out.transpose(0, 1)  # type: ignore[no-any-return]


def _is_dense(shown: Mask) -> bool:
    return shown.q.cu_seqlens is shown.q.seqused is shown.k.cu_seqlens is shown.k.seqused is None


def _mask_of_layer(
    window_size: Window, lengths: tuple[int, int], attention_mask: Tensor | Mask | None
) -> Mask:
    """The mask function's answer; for layers that have asked none, what their arguments say."""
    if isinstance(attention_mask, Mask):
        if attention_mask.lengths != lengths:
            raise ValueError(
                f"the mask is one of (queries, keys) {attention_mask.lengths}, and the layer has "
                f"{lengths}"
            )
        return attention_mask
    queries, keys = lengths
    if attention_mask is not None and attention_mask.ndim == 4:  # which all masks are part of
        return Mask((None, None), lengths, seen=attention_mask[..., :keys])
    if attention_mask is not None:
        valid = _rows_of_keys(attention_mask, keys, 0)
        shown = _padded(window_size, lengths, valid, min(attention_mask.shape[1], keys))
        if shown is None:
            raise NotImplementedError(_NO_GAPS)
        return shown
    if window_size[1] == 0 and 1 < queries != keys:
        raise NotImplementedError(
            f"a causal layer of {queries} queries, {keys} keys and no mask does not say beside "
            "which key its last query stands"
        )
    return Mask(window_size, lengths)


def _packed_by_positions(shown: Mask, position_ids: Tensor, batch: int) -> Mask:
    """Sequences that follow each other, where positions begin anew.

    Many models do not show the positions to their mask function. Transformers' FlashAttention looks
    for sequences in each layer, and so does this door; "eager" takes them for one.
    """
    queries, keys = shown.lengths
    is_whole = _is_dense(shown) and shown.seen is None
    if not is_whole or shown.window_size[1] != 0 or not 1 < queries == keys:
        return shown
    if _may_read(position_ids):
        rows = _rows_by_positions(position_ids, batch)
        return shown if rows is None else shown._replace(q=rows, k=rows)
    torch._assert_async((_starts(position_ids).sum(1) == 1).all(), _NO_POSITIONS)
    return shown


_NO_POSITIONS = (
    f"{ATTENTION} finds packed sequences by position_ids only where it may read them: compiled, or "
    "in a CUDA graph, pass cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k"
)


def _starts(position_ids: Tensor) -> Tensor:
    """Where a sequence begins: at the lowest position, wherever it comes again."""
    starts = position_ids == position_ids.min(1, keepdim=True).values
    return starts | (torch.arange(position_ids.shape[1], device=position_ids.device) == 0)


def _rows_by_positions(position_ids: Tensor, batch: int) -> Rows | None:
    """The rows of packed sequences; None where each row of the batch is one.

    All layers of a forward have the same positions: they are read once. Inference tensors, whose
    changes are not counted, are read each time.
    """
    global _last_read
    version = -1 if position_ids.is_inference() else position_ids._version
    last, last_version, rows = _last_read
    if last() is position_ids and version == last_version != -1:
        return rows
    ids = _starts(position_ids).expand(batch, -1).cumsum(1)
    rows = None if bool((ids[:, -1] == 1).all()) else _rows_of_sequences(ids)
    _last_read = weakref.ref(position_ids), version, rows
    return rows


_last_read: tuple[Callable[[], Tensor | None], int, Rows | None] = (lambda: None, -1, None)


def _may_read(x: Tensor) -> bool:
    """Whether the host may wait for what a tensor holds."""
    if torch.compiler.is_compiling():
        return False
    return not (x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing()))


def _bound(length: int | Tensor | None) -> int | None:
    """``max_length_q`` where it is known without waiting for a GPU; else all rows are the bound."""
    if isinstance(length, Tensor):
        return int(length) if length.device.type == "cpu" else None
    return length


# Arguments of layers that would change the result, and are not supported.
_REFUSED = ("position_bias", "sinks", "block_indices", "output_attentions")


def _refuse(others: dict[str, Any]) -> None:
    for name in _REFUSED:
        if others.get(name) is not None and others[name] is not False:
            raise NotImplementedError(f"{ATTENTION} does not support {name} yet")


_FUNCTIONS = (attention, mask)  # behind both names

# ---- the flash path of Transformers --------------------------------------------------------------

_LAZY_IMPORTS = ("implementation", "attention_wrapper", "allow_all_kernels")


def _check_lazy_imports() -> None:
    function = getattr(flash_path_of_hf, "_lazy_imports", None)
    parameters = tuple(inspect.signature(function).parameters) if function else ()
    if parameters != _LAZY_IMPORTS:
        raise NotImplementedError(
            "flash_path=True stands on a private function, modeling_flash_attention_utils."
            f"_lazy_imports({', '.join(_LAZY_IMPORTS)}), which Transformers "
            f"{transformers.__version__} has with parameters {parameters}"
        )


def _wrap_lazy_imports() -> Callable[[], None]:
    """Transformers imports the functions of a name with "flash" in it; here it finds ours."""
    original = flash_path_of_hf._lazy_imports
    functions = (interface.flash_attn_func, interface.flash_attn_varlen_func)
    dense, packed = (_as_called(function) for function in functions)

    @wraps(original)  # with its parameters
    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation != FLASH:
            return original(implementation, *args, **kwargs)
        padding = flash_path_of_hf._pad_input, flash_path_of_hf._unpad_input
        return dense, packed, fa2.flash_attn_with_kvcache, *padding

    def undo() -> None:
        flash_path_of_hf._lazy_imports = original
        if flash_path_of_hf._loaded_implementation == FLASH:
            flash_path_of_hf._loaded_implementation = None

    flash_path_of_hf._lazy_imports = lazy_imports
    return undo


def _as_called(function: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., Tensor]:
    """One of our functions as Transformers' own _flash_attention_forward calls it.

    Layers with our name do not, other programs may. What a function can do is read from its
    signature.
    """

    def call(*tensors: Tensor, **options: Any) -> Tensor:
        for name in options.keys() & {"max_seqlen_q", "max_seqlen_k"}:
            options[name] = _bound(options[name])
        return function(*tensors, **options)[0]

    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("unsupported")
    call.__signature__ = inspect.Signature([*parameters.values()])  # type: ignore[attr-defined]
    return call
