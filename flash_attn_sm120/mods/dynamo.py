"""Calls with mods under Dynamo, which runs Python symbolically: no mod is a callable there.

Dynamo captures the body of a higher-order operator as a graph, with all tensors that it reads as
inputs, and keeps guards for the numbers. The body here runs the mods of one element, and ends with
an operator that takes all of the call. Where the graph is run, its part that makes a mod's result
is a callable again, and the call is that of :func:`operators.attend`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from flash_attn_sm120 import ops
from flash_attn_sm120.mods import operators
from flash_attn_sm120.mods.call import Call
from flash_attn_sm120.mods.trace import COORDS

try:  # torch wants no subclasses of it elsewhere, and has no other way for callables
    from torch._higher_order_ops import BaseHOP
except ImportError as error:
    raise NotImplementedError(
        "score_mod and mask_mod under torch.compile need a PyTorch that has BaseHOP, as 2.13"
    ) from error

# The end of a body: coords are score, b, h, q_idx, kv_idx; score and seen what the mods return.
ops.LIBRARY.define(
    f"mods_body({operators.TENSORS}, Tensor[] coords, Tensor? score, Tensor? seen, *, "
    f"{operators.CALL}) -> (Tensor out, Tensor lse)"
)
_END: Any = getattr(torch.ops, ops.NAMESPACE).mods_body.default


def _end(q: Any, k: Any, v: Any, sink: Any, *others: Any, **options: Any) -> Any:
    """Shapes, and whether a gradient is wanted: a body is never run."""
    *lengths, _coords, score, _seen = others[len(operators._LISTS) :]
    options.pop("block_sizes", None)
    op = ops.VARLEN_FORWARD
    if all(x is None for x in lengths[: len(ops.LENGTHS)]):
        op, lengths = ops.FORWARD, lengths[len(ops.LENGTHS) :]
    out, lse = op(q, k, v, sink, *lengths, **options)
    if score is not None:
        out, lse = (x + 0 * score.sum().to(x.dtype) for x in (out, lse))
    return out, lse


ops.LIBRARY.impl(_END, _end, "CompositeImplicitAutograd")


def attend(mods: dict[str, Callable[..., Any]], call: Call) -> Any:
    """``(out, lse)``, in code that Dynamo traces."""
    q, k, v, sink, tensors, options = call
    (key_blocks, query_blocks), sizes, options = operators.without_blocks(options)
    schema = ops.to_schema(**options)
    lengths = operators.lengths_in_order(tensors)

    def body() -> Any:
        # One number each, but as a vector: as an index a number without dimensions would be read.
        score = q.new_empty((1,), dtype=torch.float32)
        coords = [q.new_empty((1,), dtype=torch.int32) for _ in COORDS]
        results = [
            mods[name](*own) if name in mods else None
            for name, own in (("score_mod", [score, *coords]), ("mask_mod", coords))
        ]
        return _END(
            *(q, k, v, sink, [], [], key_blocks, query_blocks, *lengths),
            *([score, *coords], *results),
            block_sizes=sizes,
            **schema,
        )

    return _attend(body)


class _Attend(BaseHOP):
    def __init__(self) -> None:
        super().__init__(f"{ops.NAMESPACE}_attend")

    def __call__(self, body: Any, *operands: Any) -> Any:
        """Of a graph of :func:`attend`'s body; or of the body itself, where Dynamo gave up."""
        if isinstance(body, fx.GraphModule):
            return _Graph(body, operands).attend()
        given = inspect.getclosurevars(body).nonlocals
        tensors = (given[name] for name in ("q", "k", "v", "sink"))
        blocks = (given[name] for name in ("key_blocks", "query_blocks"))
        call = *tensors, *blocks, given["lengths"], given["sizes"], given["schema"]
        return _call(given["mods"], *call)


_attend: Any = _Attend()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _call(
    mods: dict[str, Any], q: Any, k: Any, v: Any, sink: Any, key_blocks: Any, query_blocks: Any,
    lengths: Any, sizes: Any, schema: dict[str, Any],
) -> Any:  # fmt: skip
    from flash_attn_sm120.mods import attention

    options = operators.with_blocks(ops.from_schema(**schema), key_blocks, query_blocks, sizes)
    named = operators.by_name(lengths)
    function = "flash_attn_varlen_func" if ops.has_lengths(named) else "flash_attn_func"
    called = mods.get("score_mod"), mods.get("mask_mod"), None, function
    return attention.attend(*called, q, k, v, sink, named, options, True, None, None)


class _Graph:
    """Of a body, with the values of its inputs."""

    def __init__(self, body: fx.GraphModule, operands: tuple[Any, ...]) -> None:
        self._body = body
        placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
        self._given = dict(zip(placeholders, operands, strict=True))
        (self._end,) = (node for node in body.graph.nodes if node.target is _END)
        # Dynamo may have a float as a tensor of one number, whose value the body asks for.
        items = [node for node in body.graph.nodes if node.target == "item"]
        self._numbers = {node: _as_number(self._run(node, {})) for node in items}

    def attend(self) -> Any:
        *tensors, coords, score, seen = self._end.args
        results = {"score_mod": (coords, score), "mask_mod": (coords[1:], seen)}
        mods = {name: self._mod(*x) for name, x in results.items() if x[1] is not None}
        needed = fx.map_arg((tensors, self._end.kwargs), lambda node: self._run(node, {}))
        (*given, _, _, key_blocks, query_blocks), lengths = needed[0][:8], needed[0][8:]
        schema = dict(needed[1])
        sizes = schema.pop("block_sizes")
        return _call(mods, *given, key_blocks, query_blocks, lengths, sizes, schema)

    def _mod(self, coords: Any, result: fx.Node) -> Callable[..., Any]:
        """The callable that the body has called; numbers that torch takes to be dynamic are
        constants of it, for which torch keeps a guard."""

        def mod(*numbers: Any) -> Any:
            known = self._numbers | dict(zip(coords, numbers, strict=True))
            return self._run(result, known, _as_number)

        return mod

    def _run(
        self, result: fx.Node, values: dict[fx.Node, Any], of: Callable[[Any], Any] = lambda x: x
    ) -> Any:
        """The value of a node, where some have others than those of the graph."""
        interpreter = fx.Interpreter(self._body, garbage_collect_values=False)
        interpreter.env = values
        for node in self._needed(result, values):
            given = node in self._given
            values[node] = of(self._given[node]) if given else interpreter.run_node(node)
        return values[result]

    def _needed(self, result: fx.Node, values: dict[fx.Node, Any]) -> list[fx.Node]:
        """The nodes whose values make that of another, in order."""
        found, ahead = set(), [result]
        while ahead:
            node = ahead.pop()
            if node not in found and node not in values:
                found.add(node)
                ahead += node.all_input_nodes
        return [node for node in self._body.graph.nodes if node in found]


def _as_number(x: Any) -> Any:
    if isinstance(x, torch.SymInt):
        return int(x)
    return float(x) if isinstance(x, torch.SymFloat) else x
