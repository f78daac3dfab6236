"""What a callable captures: the tensors, and all else that its trace depends on, as a key.

Two callables with equal keys have equal traces, whatever tensors they captured: so a lambda that is
made anew in every step, over other document ids, is traced once.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch

Key = tuple[Any, ...]
_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_DEPTH = 8  # of functions that functions call


class _Opaque(Exception):
    """An object whose contents no key can hold."""


class _Walk:
    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def key_of(self, x: Any, depth: int = 0) -> Any:
        if isinstance(x, torch.Tensor):
            return self._key_of_tensor(x)
        if isinstance(x, _NUMBERS):
            return type(x), x
        if isinstance(x, (tuple, list)):
            return type(x), tuple([self.key_of(item, depth) for item in x])
        if isinstance(x, types.FunctionType) and depth < _DEPTH:
            return self._key_of_function(x, depth)
        if isinstance(x, (types.ModuleType, types.BuiltinFunctionType, type)):
            return x
        raise _Opaque

    def _key_of_tensor(self, x: torch.Tensor) -> Key:
        for i, other in enumerate(self.tensors):
            if other is x:
                return ("again", i)
        self.tensors.append(x)
        return ("tensor", x.dtype, tuple(x.shape), x.device, x.requires_grad)

    def _key_of_function(self, f: types.FunctionType, depth: int) -> Key:
        if f.__module__ is not None and f.__module__.partition(".")[0] == "torch":
            return (f,)
        code = f.__code__
        found = [code]
        for cell in f.__closure__ or ():
            found.append(self.key_of(cell.cell_contents, depth + 1))
        if f.__defaults__:
            found.append(self.key_of(f.__defaults__, depth + 1))
        if f.__kwdefaults__:
            found.append(self.key_of(tuple(f.__kwdefaults__.values()), depth + 1))
        names = f.__globals__
        for name in _names_of(code):
            if name in names:
                found.append(self.key_of(names[name], depth + 1))
        return tuple(found)


def _names_of(code: types.CodeType) -> tuple[str, ...]:
    """The globals that a code object, or one inside it, may read."""
    names = _names.get(code)
    if names is None:
        inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
        names = (*code.co_names, *(n for c in inner for n in _names_of(c)))
        _names[code] = names
    return names


_names: dict[types.CodeType, tuple[str, ...]] = {}


def captured_by(mod: Callable[..., Any], aux: Any) -> tuple[Key | None, list[torch.Tensor]]:
    """``(key, tensors)``; the key is None where a callable has a state that no key can hold, such
    as the attributes of an object: then it is traced in every call."""
    walk = _Walk()
    try:
        key = walk.key_of((mod, aux))
    except (_Opaque, ValueError, TypeError):  # a cell may be empty
        return None, walk.tensors
    return key, walk.tensors


def refuse_dtensors(*tensors: Any) -> None:
    """Raises NotImplementedError where one is a DTensor: in each shard, heads and sequences count
    from 0, and mods and lists would take them for the first ones of the call."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and any(isinstance(x, module.DTensor) for x in tensors):
        raise NotImplementedError(
            "mods and block_sparse_tensors take no DTensor, in whose shards heads and sequences "
            "count from 0: call them with to_local() of each"
        )
