"""Callable -> ATen graph of one element, by torch's own tracer."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from flash_attn_sm120.mods.capture import refuse_dtensors

T = TypeVar("T")
COORDS = ("b", "h", "q_idx", "kv_idx")
_SIZES = ("size", "stride", "numel", "nelement", "__len__")
_SHAPE = torch.Tensor.shape


class _ReadsSizes(Exception):
    """A mod asks for a size that torch takes to be dynamic."""


class _Captures(TorchFunctionMode):
    """Puts stand-ins in the place of captured tensors, and counts them; an index that is a tensor
    stays one.

    Torch may take sizes to be dynamic, which a kernel reads as they are. Those that a mod asks for
    are constants of it: with ``fixes_sizes`` they become numbers, for which torch keeps a guard.
    """

    def __init__(self, fake: FakeTensorMode, fixes_sizes: bool) -> None:
        super().__init__()
        self.captured: list[torch.Tensor] = []
        self.stand_ins: list[torch.Tensor] = []
        self.own: set[int] = set()  # ids of stand-ins and arguments
        self._fake = fake
        self._fixes_sizes = fixes_sizes

    def again(self, stand_ins: list[torch.Tensor]) -> _Captures:
        """For the same tensors, with other stand-ins."""
        given = _Captures(self._fake, self._fixes_sizes)
        given.captured, given.stand_ins = list(self.captured), stand_ins
        given.own = {id(x) for x in stand_ins}
        return given

    def of(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or self.of_trace(x):
            return x
        for known, stand_in in zip(self.captured, self.stand_ins, strict=True):
            if known is x:
                return stand_in
        refuse_dtensors(x)
        with self._fake:
            stand_in = torch.empty(self._shape_of(x), dtype=x.dtype)
        self.captured.append(x)
        self.stand_ins.append(stand_in)
        self.own.add(id(stand_in))
        return stand_in

    def of_trace(self, x: torch.Tensor) -> bool:
        if isinstance(x, torch._subclasses.FakeTensor):
            return x.fake_mode is self._fake
        return id(x) in self.own

    def _shape_of(self, x: torch.Tensor) -> list[int]:
        unknown = int if self._fixes_sizes else lambda _: 2
        return [n if isinstance(n, int) else unknown(n) for n in x.shape]

    def _size(self, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Of a captured tensor its own, as a number."""
        if self.of_trace(x):
            sizes = [n for captured in self.captured for n in captured.shape]
            if not self._fixes_sizes and not all(isinstance(n, int) for n in sizes):
                raise _ReadsSizes
        return pytree.tree_map_only(torch.SymInt, int, func(x, *args, **kwargs))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _SIZES or getattr(func, "__self__", None) is _SHAPE:
            return self._size(func, *args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "__get__":  # .dtype: that of the tensor itself
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(self.of, (tuple(args), kwargs or {}))
        return call_with_indices(func, args, kwargs)


def call_with_indices(func: Any, args: Any, kwargs: Any) -> Any:
    """A function of torch, where an index that is a tensor stays one."""
    if func is not torch.Tensor.__getitem__:
        return func(*args, **kwargs)
    indices = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not all(isinstance(x, (torch.Tensor, int)) and not isinstance(x, bool) for x in indices):
        return func(*args, **kwargs)
    tensors = [
        x if isinstance(x, torch.Tensor) else torch.full((), x, dtype=torch.int64) for x in indices
    ]
    return torch.ops.aten.index.Tensor(args[0], tensors)


class Trace:
    """What a mod computes of one element.

    Attributes:
        graph: of the mod, or of the gradients of a score_mod: inputs, then captured tensors, then
            the gradient of the result.
        captured: the tensors, in the order of the graph's inputs.
    """

    def __init__(self, graph: fx.Graph, captured: list[torch.Tensor], inputs: int) -> None:
        self.graph = graph
        self.captured = captured
        self.inputs = inputs


def trace(name: str, mod: Callable[..., Any], *, gradient: bool = False) -> Trace:
    """The graph of a ``"score_mod"`` or ``"mask_mod"``.

    Raises:
        TypeError: it returns what it must not, or needs a value in Python.
        ValueError: what it returns is not one number.
        RuntimeError: torch cannot trace it, for reasons of the callable.
    """
    return aside(_trace_with_sizes, name, mod, gradient)


def aside(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a function in the thread that traces, which is one for all.

    There torch has no mode, no transform, no hooks for what it saves, and no keys that operators
    have excluded; no backward of another call comes in between, as one may where autograd's own
    thread waits; and torch's tracer, which replaces functions for all threads, runs once at a time.
    The thread stays: torch 2.11 may crash where the first one with a fake mode has ended.
    """
    if hasattr(_of_thread, "traces"):
        return function(*arguments)
    return _tracer.submit(function, *arguments).result()


_of_thread = threading.local()
_tracer: ThreadPoolExecutor


def _start() -> None:
    global _tracer
    _tracer = ThreadPoolExecutor(1, initializer=lambda: setattr(_of_thread, "traces", True))


_start()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start)  # which has no threads of its parent


def _trace_with_sizes(name: str, mod: Callable[..., Any], gradient: bool) -> Trace:
    try:
        return _trace(name, mod, gradient, fixes_sizes=False)
    except _ReadsSizes:
        return _trace(name, mod, gradient, fixes_sizes=True)


def _trace(name: str, mod: Callable[..., Any], gradient: bool, fixes_sizes: bool) -> Trace:
    is_score = name == "score_mod"
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        score = [torch.empty((), dtype=torch.float32)] if is_score else []
        coords = [torch.empty((), dtype=torch.int32) for _ in COORDS]

    captures = _Captures(fake, fixes_sizes)
    inputs = [*score, *coords]
    _run(name, mod, captures, inputs, fake)
    captured = list(captures.captured)
    _check_result(name, _run(name, mod, captures, inputs, fake))

    def body(*arguments: torch.Tensor) -> Any:
        count = len(inputs)
        own, tensors = list(arguments[:count]), list(arguments[count : count + len(captured)])
        wanted = []
        if gradient:
            own[0] = own[0].detach().requires_grad_()
            tensors = [
                x.detach().requires_grad_(real.requires_grad)
                for x, real in zip(tensors, captured, strict=True)
            ]
            wanted = [own[0], *(x for x in tensors if x.requires_grad)]
        with captures.again(tensors), torch.enable_grad() if gradient else nullcontext():
            result = mod(*own)
        if not gradient:
            return result
        return torch.autograd.grad(
            result, wanted, arguments[-1].to(result.dtype), allow_unused=True
        )

    with fake:
        dout = [torch.empty((), dtype=torch.float32)] if gradient else []
        graph = make_fx(body, tracing_mode="real")(*inputs, *captures.stand_ins, *dout).graph
    _functionalize(graph)
    graph.eliminate_dead_code()
    return Trace(graph, captured, len(inputs))


def _functionalize(graph: fx.Graph) -> None:
    """What changes a number in place (torch's derivatives do, that of ``minimum`` for one) makes
    another one, which all later operations take. No number here is a view of another."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        operator = node.target
        if not isinstance(operator, torch._ops.OpOverload) or not operator._schema.is_mutable:
            continue
        changed = node.args[0]
        name = operator._schema.name.removeprefix("aten::").removesuffix("_")
        other = getattr(getattr(torch.ops.aten, name, None), operator._overloadname, operator)
        if other is operator:
            continue  # translate.py refuses it by its name
        node.target = other
        changed.replace_all_uses_with(node, lambda user, after=order[node]: order[user] > after)


def _run(
    name: str, mod: Callable[..., Any], captures: _Captures, inputs: list[Any], fake: Any
) -> Any:
    before = [x._version for x in captures.stand_ins]
    try:
        with torch.no_grad(), fake, captures:
            result = mod(*inputs)
    except torch._subclasses.fake_tensor.DataDependentOutputException as error:
        raise TypeError(
            f"{name} needs the value of a tensor in Python (if, while, and, or, int(), .item()): "
            "it is one number of many, so use torch.where, & and |"
        ) from error
    changed = [x._version for x in captures.stand_ins]
    if changed[: len(before)] != before or any(changed[len(before) :]):
        raise ValueError(f"{name} changes a captured tensor in place: mods may only read")
    return result


def _check_result(name: str, result: Any) -> None:
    is_score = name == "score_mod"
    kind = "floating-point" if is_score else "bool"
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"{name} must return a {kind} tensor, got {type(result).__name__}")
    is_right = result.is_floating_point() if is_score else result.dtype is torch.bool
    if not is_right:
        raise TypeError(f"{name} must return a {kind} tensor, got {result.dtype}")
    if result.dim():
        raise ValueError(f"{name} must return one number, got the shape {tuple(result.shape)}")
