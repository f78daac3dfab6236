"""The operators flash_attn_sm120::mods_forward and ::mods_backward, which torch can follow: calls
with mods, or with lists of blocks.

As those of ops.py, with more arguments: each mod as text (program.py) and the tensors that it
captures, and the tensors of the lists. The backward has the gradients of what a score_mod captures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd.function import _SingleLevelFunction

from flash_attn_sm120 import _C, autograd, block_mask, ops
from flash_attn_sm120.imports import when_imported
from flash_attn_sm120.mods.call import Call
from flash_attn_sm120.mods.capture import refuse_dtensors

# ---- schemas -------------------------------------------------------------------------------------

# In this order: q, k, v, sink; four lists of tensors; lengths, slopes, seed, some of them None.
_GIVEN = 4
_LISTS = ("score_captured", "mask_captured", "key_blocks", "query_blocks")
_OTHERS = (
    f"{''.join(f', Tensor[] {name}' for name in _LISTS)}"
    f"{''.join(f', Tensor? {name}' for name in (*ops.LENGTHS, ops.SLOPES, ops.SEED))}"
)
TENSORS = f"{ops._INPUTS}{_OTHERS}"
# Blocks have so many queries and keys, first those of key_blocks.
_MODS = 'str score_mod="", str mask_mod="", SymInt[] block_sizes=[]'
CALL = f"{_MODS}, {ops._BOUNDS}, {ops._OPTIONS}"

ops.LIBRARY.define(f"mods_forward({TENSORS}, *, {CALL}) -> (Tensor out, Tensor lse)")
ops.LIBRARY.define(
    f"mods_backward(Tensor dout, Tensor? dlse, {ops._INPUTS}, Tensor out, Tensor lse{_OTHERS}, *, "
    f"bool[] wanted, {CALL}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink, Tensor[] captured)"
)
FORWARD = getattr(torch.ops, ops.NAMESPACE).mods_forward.default
BACKWARD = getattr(torch.ops, ops.NAMESPACE).mods_backward.default


def attend(mods: dict[str, Callable[..., Any]], call: Call) -> tuple[Any, Any]:
    """``(out, lse)`` by the operator, which torch follows."""
    refuse_dtensors(*call[:4], *call.tensors.values())
    lists, options = _arguments(mods, call)
    results: tuple[Any, Any] = FORWARD(
        *call[:4], *lists, *lengths_in_order(call.tensors), **options
    )
    return results


def backward(
    mods: dict[str, Callable[..., Any]],
    call: Call,
    dout: Any,
    dlse: Any,
    out: Any,
    lse: Any,
    captured: Any = (),
    wanted: Any = (),
) -> tuple[Any, list[Any]]:
    """``((dq, dk, dv, dsink), gradients of captured)`` by the operator, of a call whose forward
    torch did not follow."""
    if any(isinstance(x, torch.Tensor) and is_legacy_batchedtensor(x) for x in (dout, dlse)):
        raise NotImplementedError(
            "gradients of mods and of block_sparse_tensors take no is_grads_batched=True: use "
            "torch.func.vmap, or a call for each"
        )
    lists, options = _arguments(mods, call)
    wanted_ids = [id(x) for x, w in zip(captured, wanted, strict=True) if w]
    *gradients, found = BACKWARD(
        *(dout, dlse, *call[:4], out, lse, *lists, *lengths_in_order(call.tensors)),
        wanted=[id(x) in wanted_ids for x in lists[0]],
        **options,
    )
    by_id = dict(zip(map(id, lists[0]), found, strict=True))
    return gradients, [
        by_id.get(id(x)) if w else None for x, w in zip(captured, wanted, strict=True)
    ]


def _arguments(mods: dict[str, Callable[..., Any]], call: Call) -> tuple[list[Any], dict[str, Any]]:
    """The operators' four lists of tensors, and their options."""
    programs = {}
    if mods:
        from flash_attn_sm120.mods.program import program_of

        programs = {name: program_of(name, mod) for name, mod in mods.items()}
    if isinstance(call.q, torch.Tensor):
        for name, (_, captured) in programs.items():
            check_devices(name, captured, call.q)
    blocks, sizes, options = without_blocks(call.options)
    lists = [programs[name][1] if name in programs else [] for name in ("score_mod", "mask_mod")]
    texts = {name: text for name, (text, _) in programs.items()}
    return [*lists, *blocks], {**texts, "block_sizes": sizes, **ops.to_schema(**options)}


def check_devices(name: str, captured: Any, q: Any) -> None:
    for x in captured:
        if x.device != q.device:
            raise ValueError(
                f"a tensor that {name} captures must be on q's device, {q.device}, got {x.device}"
            )


def lengths_in_order(tensors: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(map(tensors.get, (*ops.LENGTHS, ops.SLOPES, ops.SEED)))


def without_blocks(options: dict[str, Any]) -> tuple[list[Any], list[int], dict[str, Any]]:
    """The tensors of both kinds of lists, their blocks' sizes, and the other options."""
    options = dict(options)
    blocks: list[Any] = []
    sizes: list[int] = []
    for name in ("key_blocks", "query_blocks"):
        lists = options.pop(name, None)
        blocks.append([] if lists is None else [x for x in lists[2:] if x is not None])
        sizes += [] if lists is None else lists[:2]
    return blocks, sizes, options


def with_blocks(
    options: Any, key_blocks: list[Any], query_blocks: list[Any], sizes: list[int]
) -> dict[str, Any]:
    """The inverse."""
    blocks: dict[str, Any] = {}
    if key_blocks:
        blocks["key_blocks"] = block_mask.BlockLists(sizes[0], sizes[1], *key_blocks)
    if query_blocks:
        blocks["query_blocks"] = block_mask.BlockLists(sizes[2], sizes[3], *query_blocks)
    return {**options, **blocks}


# ---- what computes them --------------------------------------------------------------------------


def _forward(
    q: Any, k: Any, v: Any, sink: Any,
    score_captured: Any, mask_captured: Any, key_blocks: Any, query_blocks: Any, *lengths: Any,
    score_mod: str = "", mask_mod: str = "", block_sizes: Any = (), **schema: Any,
) -> Any:  # fmt: skip
    mods = _by_mod(score_mod, score_captured, mask_mod, mask_captured)
    tensors = by_name(lengths)
    options = with_blocks(ops.from_schema(**schema), key_blocks, query_blocks, block_sizes)
    if mods and q.__dlpack_device__()[0] == 1:  # the CPU
        from flash_attn_sm120.mods import reference

        return reference.attend(_graphs(mods), Call(q, k, v, sink, tensors, options))
    return _C.forward(
        q, k, v, learnable_sink=sink, return_lse=True, **tensors, **options, **_translated(mods)
    )  # fmt: skip


def _backward(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, sink: Any, out: Any, lse: Any,
    score_captured: Any, mask_captured: Any, key_blocks: Any, query_blocks: Any, *lengths: Any,
    wanted: Any, score_mod: str = "", mask_mod: str = "", block_sizes: Any = (), **schema: Any,
) -> Any:  # fmt: skip
    learned = [x.detach().requires_grad_(w) for x, w in zip(score_captured, wanted, strict=True)]
    mods = _by_mod(score_mod, learned, mask_mod, mask_captured)
    tensors = by_name(lengths)
    options = with_blocks(ops.from_schema(**schema), key_blocks, query_blocks, block_sizes)
    call = Call(q, k, v, sink, tensors, options)
    if mods and q.__dlpack_device__()[0] == 1:  # the CPU
        gradients = _by_autograd(mods, call, dout, dlse, learned)
    else:
        from flash_attn_sm120.mods.attention import run_backward

        if key_blocks and not query_blocks:
            options["query_blocks"] = block_mask.transposed(options["key_blocks"], k.shape[1])
        translated = _translated(mods, gradient=True)
        gradients = run_backward(translated, call, dout, dlse, out, lse, wanted)
    (dq, dk, dv, dsink), of_captured = gradients
    return (
        *(dq, dk, dv, ops._no_sink(q) if dsink is None else dsink),
        [_nothing(x) if g is None else g for x, g in zip(score_captured, of_captured, strict=True)],
    )


def _by_autograd(mods: Any, call: Call, dout: Any, dlse: Any, learned: Any) -> Any:
    """As :func:`attention.run_backward` returns them, on the CPU."""
    from flash_attn_sm120.mods import reference
    from flash_attn_sm120.mods.trace import aside

    graphs = _graphs(mods)

    def gradients() -> Any:
        leaves = [None if x is None else x.detach().requires_grad_() for x in call[:4]]
        out, lse = reference.attend(graphs, Call._make((*leaves, *call[4:])))
        given = [x for x in (*leaves, *learned) if x is not None and x.requires_grad]
        results, slopes = (out,) if dlse is None else (out, lse), (dout, dlse)
        found = torch.autograd.grad(
            results, given, slopes[: len(results)], allow_unused=True, materialize_grads=True
        )
        by_leaf = {id(x): g.contiguous() for x, g in zip(given, found, strict=True)}
        dq, dk, dv, dsink = (by_leaf.get(id(x)) for x in leaves)
        dsink = None if dsink is None else dsink.float()
        return (dq, dk, dv, dsink), [by_leaf.get(id(x)) for x in learned]

    return aside(gradients)


def by_name(lengths: Any) -> dict[str, Any]:
    names = (*ops.LENGTHS, ops.SLOPES, ops.SEED)
    return {name: x for name, x in zip(names, lengths, strict=False) if x is not None}


def _by_mod(score_mod: str, score: Any, mask_mod: str, mask: Any) -> dict[str, Any]:
    mods = {"score_mod": (score_mod, score), "mask_mod": (mask_mod, mask)}
    return {name: mod for name, mod in mods.items() if mod[0]}


def _graphs(mods: dict[str, Any]) -> Any:
    from flash_attn_sm120.mods.program import graph_of

    return {name: graph_of(name, *mod) for name, mod in mods.items()}


def _translated(mods: dict[str, Any], gradient: bool = False) -> dict[str, Any]:
    from flash_attn_sm120.mods.program import translated

    return {
        name: translated(name, text, captured, gradient) for name, (text, captured) in mods.items()
    }


def _nothing(like: Any) -> Any:
    return like.new_empty((0,))


for _device in ("CPU", "CUDA"):
    ops.LIBRARY.impl(FORWARD, _forward, _device)
    ops.LIBRARY.impl(BACKWARD, _backward, _device)


# ---- shapes without data -------------------------------------------------------------------------


def _fake_forward(q: Any, k: Any, v: Any, sink: Any, *others: Any, **options: Any) -> Any:
    lengths = others[len(_LISTS) :]
    return ops._fake_forward(q, k, v, sink, *lengths, dropout_p=options.get("dropout_p", 0.0))


def _fake_backward(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, sink: Any, out: Any, lse: Any, captured: Any,
    *_: Any, wanted: Any, **__: Any,
) -> Any:  # fmt: skip
    gradients = ops._fake_backward(dout, dlse, q, k, v, sink)
    of_captured = [
        x.new_empty(x.shape) if w else _nothing(x) for x, w in zip(captured, wanted, strict=True)
    ]
    return *gradients, of_captured


torch.library.register_fake(FORWARD, _fake_forward, lib=ops.LIBRARY)
torch.library.register_fake(BACKWARD, _fake_backward, lib=ops.LIBRARY)


# ---- derivatives ---------------------------------------------------------------------------------


def _flat(tensors: tuple[Any, ...], start: int) -> tuple[list[Any], tuple[int, ...]]:
    """Without the lists, whose first is at ``start``, and how long they were: a Function takes
    tensors alone."""
    lists = tensors[start : start + len(_LISTS)]
    given = [*tensors[:start], *(x for xs in lists for x in xs), *tensors[start + len(_LISTS) :]]
    return given, tuple(map(len, lists))


def _nested(tensors: Any, start: int, counts: tuple[int, ...]) -> list[Any]:
    """The inverse."""
    nested = list(tensors[:start])
    for count in counts:
        nested.append(list(tensors[start : start + count]))
        start += count
    return [*nested, *tensors[start:]]


class _Attention(_SingleLevelFunction):
    """As autograd.py's, for calls with mods or lists: around the operator, or what takes half the
    time. Of ``tensors`` the first are q, k, v, sink, then those that a score_mod captures.

    ``backward(dout, dlse, out, lse, tensors, wanted)`` returns the gradients of these, of captured
    ones as a list.
    """

    @staticmethod
    def forward(ctx, forward: Any, backward: Any, return_lse: bool, *tensors: Any) -> Any:  # type: ignore[no-untyped-def]
        out, lse = forward(*tensors)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.set_materialize_grads(False)
        ctx.gradients = backward
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx, dout: Any, dlse: Any = None) -> Any:  # type: ignore[no-untyped-def]
        out, lse, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        dout = torch.zeros_like(out) if dout is None else dout
        (dq, dk, dv, dsink), of_captured = ctx.gradients(dout, dlse, out, lse, tensors, wanted)
        sink = tensors[3]
        dsink = None if sink is None else dsink.to(sink.dtype)
        given = (dq, dk, dv, dsink, *of_captured)
        others = [None] * (len(tensors) - len(given))
        of_tensors = [g if w else None for g, w in zip(given, wanted, strict=False)]
        return None, None, None, *of_tensors, *others

    jvp = autograd._Attention.jvp


# torch.autograd.Function's own apply() asks first for what the dispatcher has answered.
record: Any = _Attention.apply  # type: ignore[attr-defined]


def _record_forward(keyset: Any, *tensors: Any, **options: Any) -> Any:
    flat, counts = _flat(tensors, _GIVEN)
    learned = slice(_GIVEN, _GIVEN + counts[0])

    def forward(*flat: Any) -> Any:
        return autograd._redispatch(FORWARD, keyset, *_nested(flat, _GIVEN, counts), **options)

    def backward(dout: Any, dlse: Any, out: Any, lse: Any, flat: Any, wanted: Any) -> Any:
        nested = _nested(flat, _GIVEN, counts)
        given = dout, dlse, *nested[:_GIVEN], out, lse, *nested[_GIVEN:]
        *gradients, of_captured = BACKWARD(*given, wanted=list(wanted[learned]), **options)
        return gradients, of_captured

    if torch.is_grad_enabled():
        lengths = tensors[_GIVEN + len(_LISTS) :]
        autograd._refuse_gradients((*tensors[:_GIVEN], *lengths))
        autograd.refuse_pages(by_name(lengths).get("page_table"), *flat)
    with autograd._one_level():
        return record(forward, backward, True, *flat)


def _record_backward(keyset: Any, *tensors: Any, **options: Any) -> Any:
    start = _GIVEN + 4  # with dout, dlse, out, lse
    flat, counts = _flat(tensors, start)

    def below(*tensors: Any) -> Any:
        nested = _nested(tensors, start, counts)
        *gradients, of_captured = autograd._redispatch(BACKWARD, keyset, *nested, **options)
        return *gradients, *of_captured

    with autograd._one_level():
        results = autograd._record_gradients(below, *flat)
    return *results[:4], list(results[4:])  # dq, dk, dv, dsink


ops.LIBRARY.impl(FORWARD, _record_forward, "Autograd", with_keyset=True)
ops.LIBRARY.impl(BACKWARD, _record_backward, "Autograd", with_keyset=True)


# ---- vmap: a call for each element, as mods see the number of the batch --------------------------


def _vmap(op: Any, info: Any, in_dims: Any, *tensors: Any, **options: Any) -> Any:
    if options.get("dropout_p"):  # each call would drop what the first one does
        raise NotImplementedError("vmap with dropout_p is not supported yet")

    def element(x: Any, dim: Any, i: int) -> Any:
        if isinstance(x, (list, tuple)):
            return [element(y, d, i) for y, d in zip(x, dim, strict=True)]
        return x if x is None or dim is None else x.select(dim, i)

    def stacked(*results: Any) -> Any:
        if isinstance(results[0], (list, tuple)):
            return [stacked(*xs) for xs in zip(*results, strict=True)]
        return torch.stack(results)

    calls = [
        op(*(element(x, dim, i) for x, dim in zip(tensors, in_dims, strict=True)), **options)
        for i in range(info.batch_size)
    ]
    results = tuple(stacked(*xs) for xs in zip(*calls, strict=True))
    return results, tuple([0] * len(x) if isinstance(x, list) else 0 for x in results)


if hasattr(torch.library, "register_vmap"):  # PyTorch 2.5
    for _op in (FORWARD, BACKWARD):
        torch.library.register_vmap(_op, partial(_vmap, _op), lib=ops.LIBRARY)


# ---- FLOPs: those of SDPA, which count hidden scores, too ----------------------------------------


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    def forward(q: Any, k: Any, v: Any, sink: Any, *others: Any, **options: Any) -> Any:
        return ops.forward_flops(q, k, v, sink, *others[len(_LISTS) :], **options)

    def backward(*tensors: Any, **options: Any) -> Any:
        given, lengths = tensors[: _GIVEN + 4], tensors[_GIVEN + 4 + len(_LISTS) :]
        return ops.backward_flops(*given, *lengths, **options)

    register_flop_formula(FORWARD.overloadpacket)(forward)
    register_flop_formula(BACKWARD.overloadpacket)(backward)


when_imported("torch.utils.flop_counter", _register_flops)
