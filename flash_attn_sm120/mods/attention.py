"""Calls with a score_mod or a mask_mod."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from flash_attn_sm120 import _C, autograd, ops
from flash_attn_sm120.following import is_followed
from flash_attn_sm120.mods import headers, operators, reference
from flash_attn_sm120.mods.call import Call
from flash_attn_sm120.mods.capture import captured_by
from flash_attn_sm120.mods.trace import trace
from flash_attn_sm120.mods.translate import check_captured, mask_text, score_text

MOST_TRACES = 512
_NOT_BESIDE = {
    "attn_bias": ": let score_mod add it",
    **dict.fromkeys(("q_descale", "k_descale", "v_descale"), ""),
}

Mod = Callable[..., Any]
# (number of the text, captured tensors, their gradients), as _C takes it
Translated = tuple[int, tuple[Any, ...], tuple[Any, ...]]


def attend(
    score_mod: Mod | None,
    mask_mod: Mod | None,
    aux_tensors: Any,
    function: str,
    q: Any,
    k: Any,
    v: Any,
    learnable_sink: Any,
    tensors: dict[str, Any],
    options: dict[str, Any],
    return_lse: bool,
    out: Any,
    lse: Any,
) -> tuple[Any, Any]:
    """``(out, lse)`` of a call of ``function`` with one of the mods, or both."""
    given_mods = {"score_mod": score_mod, "mask_mod": mask_mod}
    mods = {name: mod for name, mod in given_mods.items() if mod is not None}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    beside = (
        "a mod"
        if mods
        else "alibi_slopes that require a gradient"
        if ops.learns_slopes(tensors)
        else "block_sparse_tensors"
    )
    if getattr(k, "dtype", None) is torch.float8_e4m3fn:
        raise NotImplementedError(f"{function} with {beside} takes no k and v in float8_e4m3fn yet")
    for name, hint in _NOT_BESIDE.items():
        if name in tensors:
            raise NotImplementedError(f"{function} with {name} and {beside} is not supported{hint}")
    given = (q, k, v, learnable_sink, *tensors.values())
    ops.check_tensors("a mod is given", q, k, v, learnable_sink, **tensors)
    followed = is_followed(*given)
    if followed and (out is not None or lse is not None):
        raise RuntimeError(
            f"{function}(..., out=, lse=) does not support what torch follows by (compile, func, "
            "modes, subclasses)"
        )
    q, k, v = autograd.autocast(q, k, v, tensors.get("page_table"))
    called = {name: _with_aux(name, mod, aux_tensors) for name, mod in mods.items()}
    if torch.is_grad_enabled() and ops.learns_slopes(tensors):
        called["score_mod"] = _with_learned_alibi(called.get("score_mod"), q, k, tensors)
        tensors = {name: x for name, x in tensors.items() if name != ops.SLOPES}
    call = Call(q, k, v, learnable_sink, tensors, options)
    if followed:
        attend_followed = operators.attend
        if is_dynamo_compiling():
            from flash_attn_sm120.mods.dynamo import attend as attend_followed
        results = attend_followed(called, call)
        return results[0], results[1] if return_lse else None
    is_cpu = q.__dlpack_device__()[0] == 1
    found = {name: captured_by(mod, aux_tensors) for name, mod in called.items()}
    translated: dict[str, Any] = {
        name: translate(name, mod, *found[name]) for name, mod in called.items()
    }
    for name, (_, read, _) in translated.items():
        operators.check_devices(name, read, q)
    captured = [x for _, read, _ in translated.values() for x in read]
    wants_gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*given, *captured)
    )
    if wants_gradient:
        autograd.refuse_pages(tensors.get("page_table"), *given, *captured)
    if wants_gradient and (out is not None or lse is not None):
        raise RuntimeError(
            f"{function}(..., out=, lse=) does not support automatic differentiation: use no_grad()"
        )
    if is_cpu:
        _check(call)
        graphs = {name: trace(name, mod) for name, mod in called.items()}
        return _into(reference.attend(graphs, call), return_lse, out, lse)
    if wants_gradient:
        joint = {name: translate(name, mod, *found[name], True) for name, mod in called.items()}
        return _record(called, translated, joint, call, return_lse)
    results = _C.forward(
        q, k, v, learnable_sink=learnable_sink, return_lse=return_lse, out=out, lse=lse,
        **tensors, **options, **translated,
    )  # fmt: skip
    autograd.written_in_place(out, lse)
    return results


def _with_aux(name: str, mod: Mod, aux_tensors: Any) -> Mod:
    """The callable of five or four numbers; with ``aux_tensors`` they come last, as in
    FlashAttention-4, where it takes one argument more."""
    if not callable(mod):
        raise TypeError(f"{name} must be callable, got {type(mod).__name__}")
    if aux_tensors is None:
        return mod
    if not _takes(mod, 6 if name == "score_mod" else 5):
        return mod

    def with_aux(*numbers: Any) -> Any:
        return mod(*numbers, aux_tensors)

    return with_aux


def _takes(mod: Mod, count: int) -> bool:
    """Whether a callable takes so many arguments."""
    if is_dynamo_compiling():  # which knows no signatures of functions inside functions
        code = getattr(mod, "__func__", mod).__code__
        return code.co_argcount - hasattr(mod, "__self__") >= count
    try:
        inspect.signature(mod).bind(*range(count))
    except TypeError:
        return False
    return True


def _with_learned_alibi(score_mod: Mod | None, q: Any, k: Any, tensors: dict[str, Any]) -> Mod:
    """A score_mod that adds ALiBi after another: what a score_mod captures gets a gradient."""
    if ops.has_lengths({name: x for name, x in tensors.items() if x is not None}):
        raise NotImplementedError(
            "alibi_slopes has no gradient in calls with lengths: detach() it, or use no_grad()"
        )
    slopes = tensors[ops.SLOPES]
    ops._check_slopes(slopes, q, {})
    diagonal = k.shape[1] - q.shape[1]
    has_batch = slopes.dim() == 2

    def with_alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if score_mod is not None:
            score = score_mod(score, b, h, q_idx, kv_idx)
        slope = slopes[b, h] if has_batch else slopes[h]
        return score - slope * (q_idx + diagonal - kv_idx).abs()

    return with_alibi


def _check(call: Call) -> None:
    """What C checks of a call without mods, of no data: by the operators' rules for shapes."""
    lengths = {name: x for name, x in call.tensors.items() if name != ops.SEED}
    ops._check(*call[:4], lengths)


def _into(results: Any, return_lse: bool, out: Any, lse: Any) -> tuple[Any, Any]:
    for given, result in zip((out, lse), results, strict=True):
        if given is not None:
            given.copy_(result)
    return (
        results[0] if out is None else out,
        lse if lse is not None else results[1] if return_lse else None,
    )


# ---- callable -> what _C takes -------------------------------------------------------------------

_traced: dict[Any, tuple[int, tuple[int, ...]]] = {}


def translate(
    name: str, mod: Mod, key: Any, tensors: list[torch.Tensor], gradient: bool = False
) -> Translated:
    """Traces a mod, unless an equal one has been; ``tensors``: those that it captures."""
    is_joint = gradient and name == "score_mod"
    kept = _traced.get((name, key, is_joint)) if key is not None else None
    if kept is not None:
        number, order = kept
        return number, tuple([tensors[i] for i in order]), ()
    graph = trace(name, mod)
    check_captured(name, graph.captured)
    if name == "mask_mod":
        text = mask_text(graph)
    else:
        text = score_text(graph, trace(name, mod, gradient=True) if is_joint else None)
    number = headers.register(text)
    places = [next((i for i, t in enumerate(tensors) if t is x), -1) for x in graph.captured]
    if key is not None and -1 not in places:
        if len(_traced) >= MOST_TRACES:
            _traced.clear()
        _traced[name, key, is_joint] = number, tuple(places)
    return number, tuple(graph.captured), ()


def is_translated(name: str, key: Any, gradient: bool) -> bool:
    return (name, key, gradient and name == "score_mod") in _traced


def explain_mod(name: str, mod: Mod, aux_tensors: Any, gradient: bool) -> tuple[Translated, str]:
    """What _C takes, and what was traced: the statements of the kernel."""
    called = _with_aux(name, mod, aux_tensors)
    translated = translate(name, called, *captured_by(called, aux_tensors), gradient)
    text = headers.text(translated[0])
    statements = [line.strip() for line in text.split("\n}\n")[0].splitlines()[2:]]
    count = len(translated[1])
    captured = f"{count} captured tensor{'s' * (count != 1)}"
    return translated, f"traced, with {captured}: {' '.join(statements)}"


# ---- gradients -----------------------------------------------------------------------------------


def _record(
    called: dict[str, Mod],
    translated: dict[str, Any],
    joint: dict[str, Translated],
    call: Call,
    return_lse: bool,
) -> tuple[Any, Any]:
    """A call that autograd is to record; ``joint``: with the derivatives."""
    captured = joint["score_mod"][1] if "score_mod" in joint else ()
    tensors, options = call[4:]

    def forward(q: Any, k: Any, v: Any, sink: Any, *_: Any) -> Any:
        return _C.forward(
            q, k, v, learnable_sink=sink, return_lse=True, **tensors, **options, **translated
        )

    def backward(dout: Any, dlse: Any, out: Any, lse: Any, saved: Any, wanted: Any) -> Any:
        q, k, v, sink, *_ = saved
        given = Call(q, k, v, sink, tensors, options), dout, dlse, out, lse
        # A gradient that is to be differentiated again comes from the operator, which refuses.
        if torch.is_grad_enabled() or is_followed(q, k, v, sink, dout, dlse):
            return operators.backward(called, *given, captured, wanted[4:])
        return run_backward(joint, *given, wanted[4:])

    results = operators.record(forward, backward, return_lse, *call[:4], *captured)
    return results if return_lse else (results, None)


def run_backward(
    joint: dict[str, Translated],
    call: Call,
    dout: Any,
    dlse: Any,
    out: Any,
    lse: Any,
    wanted: Sequence[bool],
) -> tuple[Any, list[Any]]:
    """``((dq, dk, dv, dsink), gradients of what score_mod captured)``, straight from C."""
    mods: dict[str, Any] = dict(joint)
    captured: tuple[Any, ...] = ()
    sums: tuple[Any, ...] = ()
    q, k, v, sink, tensors, options = call
    if torch.are_deterministic_algorithms_enabled():
        options = {**options, "deterministic": True}
    if any(wanted):
        number, captured, _ = joint["score_mod"]
        sums = tuple(
            q.new_empty(x.shape, dtype=torch.float32).zero_() if w else None
            for x, w in zip(captured, wanted, strict=True)
        )
        mods["score_mod"] = number, captured, sums
    gradients = _C.backward(
        dout, q, k, v, out, lse, dlse, learnable_sink=sink, **tensors, **options, **mods
    )
    of_captured = [
        None if s is None else s.to(x.dtype) for x, s in zip(captured, sums, strict=True)
    ]
    return gradients, of_captured or [None] * len(wanted)
