"""The public functions: FlashAttention-4's names, layouts and returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import is_grad_enabled
from torch._C import _is_any_autocast_enabled
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling

from flash_attn_sm120 import _C, autograd, block_mask, ops
from flash_attn_sm120.dropout import draw_seed
from flash_attn_sm120.following import is_followed
from flash_attn_sm120.plan import ScalarOptions, Tensor, VarlenOptions, Window


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: list[float] | None = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    q_descale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **unsupported: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention: ``softmax(softmax_scale * q @ k.T) @ v`` per head, in one pass over the keys.

    Args:
        q: ``(batch, seqlen_q, heads_q, head_dim)``. float16 or bfloat16; on the CPU float32
            too. float8_e4m3fn, if ``k`` and ``v`` are: then weights are rounded to it as well.
        k: ``(batch, seqlen_k, heads_kv, head_dim)``, dtype and device of ``q``, or like ``v``
            float8_e4m3fn: see ``k_descale``. ``heads_kv`` divides ``heads_q``: query head ``h``
            reads KV head ``h * heads_kv // heads_q`` (GQA, MQA).
        v: ``(batch, seqlen_k, heads_kv, head_dim_v)``.
            ``head_dim`` and ``head_dim_v`` are multiples of 8 from 8 to 256 and need not be equal.
            Any strides with a contiguous, 16-byte-aligned last dimension are read in place; other
            layouts are copied first.
        softmax_scale: factor of the scores; default ``1 / sqrt(head_dim)``.
        causal: query ``i`` sees the keys ``j <= i + seqlen_k - seqlen_q`` (aligned bottom right).
        window_size: ``(left, right)``: query ``i`` sees ``i + seqlen_k - seqlen_q - left <= j`` and
            ``j <= i + seqlen_k - seqlen_q + right``. None is unbounded, negative values are legal,
            ``causal`` makes ``right`` 0. A window that hides every key from every query
            (``left + right < 0``, as in FlashAttention-2's ``(-1, -1)``) is none, as in
            FlashAttention-4; ``causal`` stays.
        learnable_sink: ``(heads_q,)``: one more logit per head that takes part in the softmax and
            has no value (Xiao et al. 2023, https://arxiv.org/abs/2309.17453). float32, float16 or
            bfloat16; -inf is none.
        softcap: scores become ``softcap * tanh(score / softcap)``, before masks; 0 is none.
        num_splits: into how many parts the keys are divided, for calls with too few queries to fill
            a GPU: decoding, above all. Parts are computed beside each other and put together by a
            second kernel, from a workspace that is the call's own. 0: as many as pay, which
            :func:`explain` tells; 1: never split; more: as many, but no more than there are tiles
            of keys. Results of different numbers differ by rounding; those of 0 may then depend on
            batch size and GPU, too. FlashAttention-4's default is 1. The CPU splits nothing.
        pack_gqa: the query heads of one KV head share the blocks of query rows, which then are full
            where queries are few, as in decoding; never changes a bit of the result. None: where
            that takes fewer blocks. True asks for it, and warns once where it cannot be; False
            forbids it.
        deterministic: the backward is bitwise reproducible too, as the forward always is;
            ``torch.use_deterministic_algorithms(True)`` asks for the same. On an H200 that takes 3
            to 30% of its speed, most with few heads and short sequences. Gradients of what a
            score_mod captures then take 16 bytes of memory for each element, and their kernel
            twice the time.
        return_lse: also return the log-sum-exp of the scores, through which gradients flow, too.
        dropout_p: the probability, in [0, 1), rounded to a multiple of 2^-16, with which a weight
            of the softmax counts nothing; the others then count ``1 / (1 - dropout_p)`` times as
            much. The log-sum-exp is that of all. There is no training mode: pass 0 in inference.
        dropout_seed: ``[seed, offset]``, (2,) int64 or uint64 on the device of ``q``, which is read
            there. What is dropped is a function of these two numbers, of batch, query head, query
            and key alone: the same on every device, whatever the tiles, splits or order. None: two
            numbers from torch's generator of that device, so that every call, and every replay of a
            CUDA graph, drops anew. The backward drops what the forward has dropped.
        alibi_slopes: ``(heads_q,)`` or ``(batch, heads_q)`` float32, with any strides: ALiBi (Press
            et al. 2021, https://arxiv.org/abs/2108.12409) as FlashAttention-2 defines it, ``-slope
            * abs(i + seqlen_k - seqlen_q - j)`` added to the score of query ``i`` and key ``j``
            after ``softcap``. Of negative slopes CUDA computes most rows twice. Slopes that
            require a gradient get one, but not with lengths, pages or an ``attn_bias``.
        attn_bias: ``(batch or 1, heads_q or 1, seqlen_q or 1, seqlen_k)`` float32, or in the dtype
            of ``q``: added to the scores after ``softmax_scale``, ``softcap`` and
            ``alibi_slopes``, before the mask. It is read in place, with any strides, 0 included,
            and a contiguous last dimension. A key with -inf, or less than -2.35e38 as
            ``torch.finfo(torch.bfloat16).min``, is hidden from the query. Gradients reach it; with
            ``softcap`` on the CPU alone. Not with lengths or pages.
        k_descale, v_descale, q_descale: float32 on the device of ``q``: what ``k``, ``v`` and
            ``q`` in float8_e4m3fn are multiplied by; one number, or ``(batch, heads_kv)`` with any
            strides. Positive and finite; None: 1. Such tensors have head dims that are multiples of
            16, and no gradient; CUDA devices read them from compute capability 8.9 on. ``q`` in
            float8_e4m3fn comes without ``alibi_slopes`` and ``dropout_p``; ``docs/fp8.md`` says
            what its rounding costs.
        out: ``(batch, seqlen_q, heads_q, head_dim_v)`` in the dtype of ``q``, to write the result
            to; of ``q`` in float8_e4m3fn bfloat16 or float16, on the CPU float32 too. Any strides
            with a contiguous, 16-byte-aligned last dimension are written in place; others are
            refused, and so is memory that overlaps an input or itself.
        lse: ``(batch, heads_q, seqlen_q)`` float32, contiguous, to write the log-sum-exp to; it is
            returned, whether or not ``return_lse`` asks for it.
        block_sparse_tensors: a torch ``BlockMask``, or an object with the fields of
            FlashAttention-4's ``BlockSparseTensorsTorch``: the blocks of queries and keys that are
            computed, and no others; ``docs/block_sparse.md`` says how. Not with lengths or
            pages.
        block_sparse_tensors_bwd: the same fields for the backward, by blocks of keys; None: those
            of the ``BlockMask``, or made on the device.
        seqused_k, max_seqlen_k, page_table: lengths of the keys, and K and V in pages: the call is
            that of :func:`flash_attn_varlen_func`.
        score_mod: FlexAttention's ``(score, b, h, q_idx, kv_idx)``, which returns what takes the
            place of a score, after ``softcap`` and before ALiBi and masks. Traced by torch and
            compiled into the kernel; tensors that it captures are read in place, and get gradients.
        mask_mod: FlexAttention's ``(b, h, q_idx, kv_idx)``: True where the query sees the key, if
            ``causal`` and ``window_size`` let it, too.
        aux_tensors: handed on to mods that take one argument more.
        qv, gather_kv_indices, score_mod_bwd, aux_scalars: as in FlashAttention-4, not supported
            yet: all but the default raise NotImplementedError.
        unsupported: ``cu_seqlens_q`` and other parameters of FlashAttention's functions:
            NotImplementedError by name, unless they ask for nothing.

    Returns:
        ``(out, lse)``: ``out (batch, seqlen_q, heads_q, head_dim_v)`` in the dtype of ``q``,
        bfloat16 where that is float8_e4m3fn; ``lse (batch, heads_q, seqlen_q)`` float32, natural
        logarithm, or None without ``return_lse``. A query without any visible key gets out 0 and
        lse -inf (the sink's value where there is one); one with a score of +inf gets out NaN and
        lse +inf.
        numpy arrays give numpy arrays; producers other than torch and numpy give torch tensors.

    Gradients of torch tensors reach ``q``, ``k``, ``v``, ``learnable_sink`` and ``attn_bias``. That
    of a bias with a dimension of size 1 is summed in any order on CUDA; with ``deterministic`` in
    order, from a gradient of all scores in float32. The backward keeps those, ``out`` and the
    log-sum-exp. There are no second derivatives, and none in forward mode. Calls that torch follows
    (compile, export, vmap, modes, DTensor) are those of the operator
    ``torch.ops.flash_attn_sm120.forward``, or ``mods_forward`` with mods, or with lists of blocks.
    Under ``torch.autocast``, ``q``, ``k`` and ``v`` are cast to its dtype, as for
    ``torch.nn.functional.scaled_dot_product_attention``, and so is an ``attn_bias`` that is not in
    float32.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: shapes, sizes, devices or scalars out of range.
        NotImplementedError: valid, but not supported yet; the message says what.
        RuntimeError: the driver or the compiler; ``out`` or ``lse`` where a gradient is wanted or
            torch follows the call.
    """
    blocks = None
    if block_sparse_tensors is not None:
        blocks = block_mask.read(
            block_sparse_tensors, block_sparse_tensors_bwd, q.shape[1], k.shape[1]
        )
        if mask_mod is None:
            mask_mod = blocks.mask_mod
    if (
        qv is not None
        or gather_kv_indices is not None
        or score_mod_bwd is not None
        or aux_scalars is not None
        or (block_sparse_tensors_bwd is not None and blocks is None)
        or unsupported
    ):
        _reject_unsupported(
            "flash_attn_func",
            qv=qv,
            gather_kv_indices=gather_kv_indices,
            score_mod_bwd=score_mod_bwd,
            aux_scalars=aux_scalars,
            block_sparse_tensors_bwd=None if blocks else block_sparse_tensors_bwd,
            **unsupported,
        )
    if dropout_p and dropout_seed is None:
        dropout_seed = draw_seed(q)
    if seqused_k is not None or max_seqlen_k is not None or page_table is not None:
        return flash_attn_varlen_func(  # which refuses blocks
            q,
            k,
            v,
            max_seqlen_k=max_seqlen_k,
            seqused_k=seqused_k,
            page_table=page_table,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            learnable_sink=learnable_sink,
            alibi_slopes=alibi_slopes,
            k_descale=k_descale,
            v_descale=v_descale,
            q_descale=q_descale,
            softcap=softcap,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            deterministic=deterministic,
            block_sparse_tensors=block_sparse_tensors,
            score_mod=score_mod,
            mask_mod=mask_mod,
            aux_tensors=aux_tensors,
            return_lse=return_lse,
            out=out,
            lse=lse,
            attn_bias=attn_bias,
        )
    has_mods = score_mod is not None or mask_mod is not None
    wants_gradients = is_grad_enabled() and _any_requires_grad(
        q, k, v, learnable_sink, alibi_slopes, attn_bias
    )
    # No more keywords than these: CPython makes a dict of those of a call with more, in 0.5 us.
    if not (
        wants_gradients
        or has_mods
        or blocks is not None
        or attn_bias is not None
        or k_descale is not None
        or v_descale is not None
        or q_descale is not None
        or is_dynamo_compiling()
        or _is_any_autocast_enabled()
        or profiler._is_profiler_enabled
    ):
        results = _C.forward_if_plain(
            q,
            k,
            v,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            learnable_sink=learnable_sink,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            return_lse=return_lse,
            out=out,
            lse=lse,
        )
        if results is not NotImplemented:
            if out is not None or lse is not None:
                autograd.written_in_place(out, lse)
            return results  # type: ignore[no-any-return]
    options: ScalarOptions = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
        "deterministic": deterministic,
    }
    if blocks is not None:
        wants_lists = is_grad_enabled() if has_mods else wants_gradients  # what mods capture, too
        options.update(blocks.options(k.shape[1], wants_lists))  # type: ignore[typeddict-item]
    others = {} if alibi_slopes is None else {"alibi_slopes": alibi_slopes}
    others |= _descales(k_descale, v_descale, q_descale)
    if dropout_seed is not None:
        others["dropout_seed"] = dropout_seed
    if attn_bias is not None:
        others["attn_bias"] = attn_bias
    call = "flash_attn_func", q, k, v, learnable_sink, others, options, return_lse, out, lse
    if has_mods:
        return _attend_with_mods(score_mod, mask_mod, aux_tensors, *call)
    return _attend(*call)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_sparse_tensors: Any = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: list[float] | None = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    q_descale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **unsupported: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of sequences of any lengths, each as :func:`flash_attn_func` computes it alone.

    Lengths and pages stay on the device: no call reads them on the host or waits for them, and a
    CUDA graph that holds the call can be replayed with others. A side with ``cu_seqlens`` is
    packed: the rows of all sequences, one after the other. One without is ``(batch, seqlen, heads,
    head_dim)``; K and V with a ``page_table`` are a cache of pages.

    Args:
        q: ``(total_q, heads_q, head_dim)``, or ``(batch, seqlen_q, heads_q, head_dim)`` without
            ``cu_seqlens_q``.
        k: ``(total_k, heads_kv, head_dim)``, or ``(batch, seqlen_k, heads_kv, head_dim)`` without
            ``cu_seqlens_k``, or ``(num_pages, page_size, heads_kv, head_dim)`` with ``page_table``.
        v: like ``k``, with ``head_dim_v``.
        cu_seqlens_q, cu_seqlens_k: ``(batch + 1,)`` int32, contiguous, on the device of ``q``:
            sequence ``b`` has the rows from ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
        max_seqlen_q, max_seqlen_k: no sequence is longer. A bound makes grids smaller where a side
            is packed or in pages, and has no effect where it is not; None: all rows of the tensor,
            or all for which there are pages. Of a longer sequence CUDA uses so many first rows, as
            with ``seqused``; the CPU raises ValueError.
        seqused_q, seqused_k: ``(batch,)`` int32: only so many of a sequence's first rows are used.
            With ``page_table`` ``seqused_k`` is the sequences' lengths; None: ``max_seqlen_k``.
        page_table: ``(batch, max_pages)`` int32, rows contiguous: key ``j`` of sequence ``b`` is
            row ``j % page_size`` of page ``page_table[b, j // page_size]`` of ``k`` and ``v``.
            Pages have 1 to 1024 rows, come in any order and may be shared; entries whose keys no
            query sees may hold anything. The cache may be a view, as of ``(num_pages, 2,
            page_size, heads_kv, head_dim)``; it is read in place or refused, never copied, nor cast
            by autocast. Not with ``cu_seqlens_k``. There is no backward.
        softmax_scale, learnable_sink, softcap, pack_gqa, deterministic, return_lse, dropout_p:
            as in :func:`flash_attn_func`.
        dropout_seed: as there; batch is the number of the sequence, query and key count from its
            first ones.
        causal, window_size, alibi_slopes: as there, bottom right of each sequence by its own
            lengths.
        k_descale, v_descale, q_descale: as there, by the number of the sequence; for ``k`` and
            ``v`` in float8_e4m3fn, packed or in pages, too.
        num_splits: as there; 0 splits as if all sequences were as long as ``max_seqlen_q`` and
            ``max_seqlen_k``, the lengths being on the device.
        out: like ``q`` with ``head_dim_v``, to write the result to.
        lse: ``(heads_q, total_q)``, or ``(batch, heads_q, seqlen_q)`` where q is not packed,
            float32, contiguous, to write the log-sum-exp to.
        score_mod, mask_mod, aux_tensors: as there; indices count from the first ones of the
            sequence, and ``b`` is its number.
        min_seqlen_k, scheduler_metadata, seqlen_k_per_split, qv, gather_kv_indices,
            score_mod_bwd, block_sparse_tensors, aux_scalars: as in FlashAttention-4, not supported
            yet: all but the default raise NotImplementedError.
        attn_bias: of dense calls alone: all but the default raise NotImplementedError.
        disable_scheduler_metadata: no call makes any.
        unsupported: parameters of FlashAttention's other functions: NotImplementedError by name,
            unless they ask for nothing.

    Returns:
        ``(out, lse)``: ``out`` in the shape of ``q`` with ``head_dim_v``; ``lse (heads_q,
        total_q)``, or ``(batch, heads_q, seqlen_q)`` where q is not packed, or None without
        ``return_lse``. Rows that no sequence has, or does not use, get out 0, lse -inf and
        gradients 0, whatever q, k and v hold there.

    CUDA tensors of lengths and pages may hold anything: what is out of range is clamped to the
    tensors. Of CPU tensors it is a ValueError, and so it is of CUDA tensors where the environment
    variable FA_SM120_CHECK is 1.

    Calls that torch follows are those of the operator
    ``torch.ops.flash_attn_sm120.varlen_forward``, as there.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`flash_attn_func`.
        NotImplementedError: as there, and where a gradient with ``page_table`` is wanted.
    """
    if isinstance(cu_seqlens_k, int):
        raise TypeError(
            f"flash_attn_varlen_func() got {cu_seqlens_k} for cu_seqlens_k: FlashAttention-2's and "
            "-3's parameters after q, k, v come in another order; pass them by keyword"
        )
    if (
        qv is not None
        or min_seqlen_k is not None
        or gather_kv_indices is not None
        or score_mod_bwd is not None
        or block_sparse_tensors is not None
        or aux_scalars is not None
        or attn_bias is not None
        or scheduler_metadata is not None
        or seqlen_k_per_split is not None
        or unsupported
    ):
        _reject_unsupported(
            "flash_attn_varlen_func",
            qv=qv,
            min_seqlen_k=min_seqlen_k,
            gather_kv_indices=gather_kv_indices,
            score_mod_bwd=score_mod_bwd,
            block_sparse_tensors=block_sparse_tensors,
            aux_scalars=aux_scalars,
            attn_bias=attn_bias,
            scheduler_metadata=scheduler_metadata,
            seqlen_k_per_split=seqlen_k_per_split,
            **unsupported,
        )
    if dropout_p and dropout_seed is None:
        dropout_seed = draw_seed(q)
    has_mods = score_mod is not None or mask_mod is not None
    if not (
        has_mods
        or q_descale is not None
        or is_dynamo_compiling()
        or _is_any_autocast_enabled()
        or profiler._is_profiler_enabled
        or (is_grad_enabled() and _any_requires_grad(q, k, v, learnable_sink, alibi_slopes))
    ):
        # By keyword all of it would go through a dict, see flash_attn_func.
        results = _C.forward_if_plain(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            seqused_q,
            seqused_k,
            page_table,
            softmax_scale,
            causal,
            window_size,
            learnable_sink,
            alibi_slopes,
            softcap,
            dropout_p,
            dropout_seed,
            num_splits,
            pack_gqa,
            k_descale=k_descale,
            v_descale=v_descale,
            return_lse=return_lse,
            out=out,
            lse=lse,
        )
        if results is not NotImplemented:
            if out is not None or lse is not None:
                autograd.written_in_place(out, lse)
            return results  # type: ignore[no-any-return]
    lengths = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
        "page_table": page_table,
    }
    if dropout_seed is not None:
        lengths["dropout_seed"] = dropout_seed
    if alibi_slopes is not None:
        lengths["alibi_slopes"] = alibi_slopes
    lengths |= _descales(k_descale, v_descale, q_descale)
    options: VarlenOptions = {
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
        "deterministic": deterministic,
    }
    call = "flash_attn_varlen_func", q, k, v, learnable_sink, lengths, options, return_lse, out, lse
    if has_mods:
        return _attend_with_mods(score_mod, mask_mod, aux_tensors, *call)
    return _attend(*call)


def _attend_with_mods(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    from flash_attn_sm120.mods.attention import attend  # torch's tracer takes long to import

    return attend(*arguments)


def _descales(
    k_descale: Tensor | None, v_descale: Tensor | None, q_descale: Tensor | None
) -> dict[str, Tensor | None]:
    named = {"k_descale": k_descale, "v_descale": v_descale, "q_descale": q_descale}
    return {name: x for name, x in named.items() if x is not None}


def _attend(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    lengths: dict[str, Tensor | None],  # pages, slopes, a seed, a bias; empty where it has none
    options: ScalarOptions,
    return_lse: bool,
    out: Tensor | None,
    lse: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """A call that is more than plain inference: by an operator, by autograd, or cast first."""
    in_place = out is not None or lse is not None
    is_e4m3 = getattr(k, "dtype", None) is torch.float8_e4m3fn
    by_operator = is_followed(q, k, v, learnable_sink, *lengths.values()) or (
        is_followed(q, k, v, out, lse)
        if in_place
        else profiler._is_profiler_enabled and isinstance(q, torch.Tensor) and not is_e4m3
    )
    if by_operator and "key_blocks" in options:
        if is_followed(q, k, v, learnable_sink, *lengths.values()):
            call = q, k, v, learnable_sink, lengths, options, return_lse, out, lse
            return _attend_with_mods(None, None, None, function, *call)
        by_operator = False
    if is_grad_enabled() and ops.learns_slopes(lengths):
        given = {name: x for name, x in lengths.items() if x is not None}
        if not ops.has_lengths(given):  # a score_mod that captures slopes has their gradient
            call = q, k, v, learnable_sink, given, options, return_lse, out, lse
            return _attend_with_mods(None, None, None, function, *call)
    if not by_operator and _is_any_autocast_enabled():
        q, k, v = autograd.autocast(q, k, v, lengths.get("page_table"))
        if "attn_bias" in lengths:
            lengths["attn_bias"] = autograd.autocast_bias(lengths["attn_bias"])
    others = lengths.get("alibi_slopes"), lengths.get("attn_bias")
    by_autograd = (
        not by_operator
        and is_grad_enabled()
        and _any_requires_grad(q, k, v, learnable_sink, *others)
    )
    if is_e4m3 and (by_operator or by_autograd):
        raise NotImplementedError(
            f"{function} with k and v in float8_e4m3fn has no gradient, and is no operator that "
            "torch can follow yet (compile, func, modes, subclasses, lazy negation): use no_grad()"
        )
    if not (by_operator or by_autograd):
        results = _C.forward(
            q,
            k,
            v,
            learnable_sink=learnable_sink,
            return_lse=return_lse,
            out=out,
            lse=lse,
            **options,
            **lengths,
        )
        if in_place:
            autograd.written_in_place(out, lse)
        return results
    if in_place:
        raise RuntimeError(
            f"{function}(..., out=, lse=) does not support automatic differentiation, nor what "
            "torch follows by (compile, func, modes, subclasses, lazy negation): use no_grad()"
        )
    if not by_operator:
        return autograd.attend(q, k, v, learnable_sink, lengths, options, return_lse)
    return ops.attend(q, k, v, learnable_sink, lengths, options, return_lse)


def _any_requires_grad(
    q: Any, k: Any, v: Any, learnable_sink: Any, alibi_slopes: Any, attn_bias: Any = None
) -> bool:
    return (
        getattr(q, "requires_grad", None) is True
        or getattr(k, "requires_grad", None) is True
        or getattr(v, "requires_grad", None) is True
        or getattr(learnable_sink, "requires_grad", None) is True
        or getattr(alibi_slopes, "requires_grad", None) is True
        or getattr(attn_bias, "requires_grad", None) is True
    )


# Parameters of FlashAttention-2, -3 and -4 that are not supported yet, and what asks for nothing.
_NOT_YET = {
    **dict.fromkeys(("qv", "gather_kv_indices", "score_mod_bwd", "aux_scalars")),
    **dict.fromkeys(("attn_bias",)),
    **dict.fromkeys(("block_sparse_tensors", "block_sparse_tensors_bwd")),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "seqused_q")),
    **dict.fromkeys(("block_table", "cache_seqlens")),
    **dict.fromkeys(("min_seqlen_k", "scheduler_metadata", "seqlen_k_per_split")),
    "return_attn_probs": False,
}


def _reject_unsupported(function: str, **arguments: Any) -> None:
    for name in arguments:
        if name not in _NOT_YET:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    for name in ("qv", "gather_kv_indices"):
        if isinstance(arguments[name], (bool, int, float)):
            raise TypeError(
                f"{function}() got {arguments[name]!r:.40} for {name}: FlashAttention-2's and "
                "-3's parameters after q, k, v come in another order; pass them by keyword"
            )
    asked = [
        name
        for name, value in arguments.items()
        if value is not _NOT_YET[name]
        and not (isinstance(value, (bool, int, float)) and value == _NOT_YET[name])
    ]
    if asked:
        raise NotImplementedError(f"{function} does not support {', '.join(asked)} yet")
