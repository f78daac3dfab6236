"""A traced mod as text, which an operator takes: torch keeps it in graphs, files and caches.

One line for each operation of torch's ATen graph, and one for the result:

    v0 = index.Tensor(captured0, [h])
    v1 = add.Tensor(score, v0)
    return v1
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import fx

from flash_attn_sm120.mods.attention import MOST_TRACES, Translated, is_translated, translate
from flash_attn_sm120.mods.trace import COORDS, Trace, aside, trace
from flash_attn_sm120.mods.translate import SUPPORTED, check_captured, mask_text, score_text

_PLACES = ("device", "layout", "pin_memory", "memory_format")  # of one number: no matter


def program_of(name: str, mod: Callable[..., Any]) -> tuple[str, list[torch.Tensor]]:
    """The text of a mod, and the tensors that it captures, where torch follows the call.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`trace`.
        NotImplementedError: kernels have not got an operation of it.
    """
    traced = aside(_checked, name, mod)
    return _Writer(traced).text_of()


def _checked(name: str, mod: Callable[..., Any]) -> Trace:
    traced = trace(name, mod)
    check_captured(name, traced.captured)
    (mask_text if name == "mask_mod" else lambda x: score_text(x, None))(traced)
    return traced


class _Writer:
    def __init__(self, traced: Trace) -> None:
        self._graph = traced.graph
        self._captured: list[torch.Tensor] = []  # in the order in which the text reads them
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        own = placeholders[: traced.inputs]
        names = ("score", *COORDS)[-traced.inputs :]
        self._names: dict[fx.Node, str] = dict(zip(own, names, strict=True))
        self._tensors = dict(zip(placeholders[traced.inputs :], traced.captured, strict=True))

    def text_of(self) -> tuple[str, list[torch.Tensor]]:
        lines = []
        for node in self._graph.nodes:
            if node.op == "output":
                lines.append(f"return {self._text(node.args[0])}")
            elif node.op != "placeholder":
                right = self._constant(node) if node.op == "get_attr" else self._call(node)
                self._names[node] = f"v{len(lines)}"
                lines.append(f"{self._names[node]} = {right}")
        return "\n".join(lines), self._captured

    def _call(self, node: fx.Node) -> str:
        kwargs = {name: x for name, x in node.kwargs.items() if name not in _PLACES}
        if not node.all_input_nodes:  # torch.get_default_dtype() may be another when it is read
            kwargs["dtype"] = node.meta["val"].dtype
        arguments = [self._text(x) for x in node.args]
        arguments += [f"{name}={self._text(x)}" for name, x in kwargs.items()]
        return f"{str(node.target).removeprefix('aten.')}({', '.join(arguments)})"

    def _constant(self, node: fx.Node) -> str:
        x = getattr(self._graph.owning_module, str(node.target))
        return f"full.default([], {x.item()!r}, dtype={x.dtype})"

    def _text(self, x: Any) -> str:
        if isinstance(x, (list, tuple)):
            return f"[{', '.join(self._text(item) for item in x)}]"
        if not isinstance(x, fx.Node):
            return repr(x)
        if x not in self._names:
            self._names[x] = f"captured{len(self._captured)}"
            self._captured.append(self._tensors[x])
        return self._names[x]


# ---- text -> callable ----------------------------------------------------------------------------


def mod_of(name: str, text: str, captured: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """The callable of a text, over these tensors.

    Raises:
        ValueError: it is no such text.
    """
    *lines, last = _statements(text)
    coords = ("score", *COORDS) if name == "score_mod" else COORDS

    def mod(*numbers: torch.Tensor) -> Any:
        values: dict[str, Any] = dict(zip(coords, numbers, strict=True))
        values.update((f"captured{i}", x) for i, x in enumerate(captured))
        for target, operation, args, kwargs in lines:
            values[target] = operation(
                *(_value(x, values) for x in args),
                **{x.arg: _value(x.value, values) for x in kwargs},
            )
        return _value(last, values)

    return mod


def graph_of(name: str, text: str, captured: Sequence[torch.Tensor]) -> Trace:
    """What :func:`trace` makes of the callable of a text; once for all tensors of these types."""
    key = name, *_key_of(text, captured)
    if key not in _graphs:
        if len(_graphs) >= MOST_TRACES:
            _graphs.clear()
        given = [x.detach() for x in captured]  # objects of this call alone
        traced = trace(name, mod_of(name, text, given))
        _graphs[key] = traced.graph, traced.inputs
    graph, inputs = _graphs[key]
    return Trace(graph, list(captured), inputs)


def translated(
    name: str, text: str, captured: Sequence[torch.Tensor], gradient: bool
) -> Translated:
    """What _C takes of a text, and with ``gradient`` of its derivative, too."""
    key = _key_of(text, captured)
    given = [x.detach().requires_grad_(x.requires_grad) for x in captured]
    translation = partial(translate, name, mod_of(name, text, given), key, given, gradient)
    return translation() if is_translated(name, key, gradient) else aside(translation)


def _key_of(text: str, captured: Sequence[torch.Tensor]) -> Any:
    return text, *((x.dtype, x.dim(), x.requires_grad) for x in captured)


_graphs: dict[Any, tuple[fx.Graph, int]] = {}


@lru_cache
def _statements(text: str) -> list[Any]:
    """(name, operation, arguments, keywords) of each line, and the result at last."""
    try:
        *lines, last = ast.parse(text).body
        assert isinstance(last, ast.Return) and last.value is not None
        return [*map(_statement, lines), last.value]
    except (SyntaxError, AssertionError, AttributeError, ValueError) as error:
        raise ValueError(f"not the text of a mod: {text!r:.80}") from error


def _statement(line: Any) -> tuple[str, Any, Any, Any]:
    packet, overload = line.value.func.value.id, line.value.func.attr
    assert packet in SUPPORTED
    operation = getattr(getattr(torch.ops.aten, packet), overload)
    return line.targets[0].id, operation, line.value.args, line.value.keywords


def _value(x: Any, values: dict[str, Any]) -> Any:
    match x:
        case ast.Constant():
            return x.value
        case ast.Name(id="inf" | "nan"):
            return math.inf if x.id == "inf" else math.nan
        case ast.Name():
            return values[x.id]
        case ast.List():
            return [_value(item, values) for item in x.elts]
        case ast.UnaryOp(op=ast.USub()):
            return -_value(x.operand, values)
        case ast.Attribute(value=ast.Name(id="torch")):
            dtype = getattr(torch, x.attr)
            assert isinstance(dtype, torch.dtype)
            return dtype
    raise ValueError(f"not a value of a mod: {ast.dump(x):.80}")
