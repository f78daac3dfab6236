"""The name ``flash_attn``, for programs that import it: modules that hold this package's functions.

They are complete modules, with specs, as importlib.util.find_spec() wants them. What is no part of
a module cannot be given: the metadata of a distribution, and FlashAttention-2's own C++ functions
(``flash_attn_gpu``, ``flash_attn_2_cuda``), for whose arguments there is nothing here.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from flash_attn_sm120 import __version__, fa2
from flash_attn_sm120.fa2 import bert_padding, private, rotary

NAME = "flash_attn"
VERSION = "2.8.3"  # whose signatures these are: programs compare it with what they need


class Handle:
    """The alias; :meth:`remove` takes it back."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self._modules = modules

    def remove(self) -> None:
        """Takes the modules out of ``sys.modules``; who has imported them keeps what it has.

        A second time it does nothing, and a module that is no longer the alias stays.
        """
        with _installing:
            for name, module in self._modules.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]


def install_as_flash_attn() -> Handle:
    """Lets ``import flash_attn`` find these functions, until the handle's ``remove()``.

    Call it before the programs that look for ``flash_attn`` are imported. They find the modules
    ``flash_attn``, ``flash_attn.flash_attn_interface``, ``flash_attn.bert_padding`` and
    ``flash_attn.layers.rotary``, in this process alone. docs/integrations.md says which programs
    that is enough for, and what the others need.

    Returns:
        The handle; the same one while the alias is installed.

    Raises:
        RuntimeError: the real ``flash_attn`` is installed or imported. Nothing is changed then.
    """
    global _handle
    with _installing:
        if installed():
            assert _handle is not None
            return _handle
        modules = {name: _module(name, contents) for name, contents in _contents().items()}
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, module)
        sys.modules.update(modules)
        _handle = Handle(modules)
        return _handle


def installed() -> bool:
    """Whether ``flash_attn`` is the alias in this process.

    Raises:
        RuntimeError: it cannot be, as :func:`install_as_flash_attn`.
    """
    if _handle is not None and sys.modules.get(NAME) is _handle._modules[NAME]:
        return True
    _refuse_beside_the_real_one()
    return False


_installing = threading.Lock()
_handle: Handle | None = None  # of the last installation


def _refuse_beside_the_real_one() -> None:
    imported = [name for name in sys.modules if name == NAME or name.startswith(f"{NAME}.")]
    if imported:
        raise RuntimeError(
            f"install_as_flash_attn(): {imported[0]} is imported already, from "
            f"{getattr(sys.modules[imported[0]], '__file__', None)}"
        )
    spec = importlib.util.find_spec(NAME)
    if spec is not None:
        where = spec.origin or ", ".join(spec.submodule_search_locations or ())
        raise RuntimeError(
            f"install_as_flash_attn(): {NAME} is installed, at {where}; uninstall it, or import "
            "flash_attn_sm120.fa2 by its own name"
        )


def _contents() -> dict[str, dict[str, Any]]:
    """What is in each module, a package before what is in it."""
    public = {name: getattr(fa2, name) for name in fa2.__all__ if name.startswith(NAME)}
    interface = {name: getattr(private, name) for name in private.__all__}
    return {
        NAME: {"__version__": VERSION, "__doc__": _DOC, **public},
        f"{NAME}.flash_attn_interface": {**public, **interface},
        f"{NAME}.bert_padding": {
            name: getattr(bert_padding, name) for name in bert_padding.__all__
        },
        f"{NAME}.layers": {},
        f"{NAME}.layers.rotary": {name: getattr(rotary, name) for name in rotary.__all__},
    }


_PACKAGES = (NAME, f"{NAME}.layers")
_DOC = f"An alias of flash_attn_sm120.fa2, of flash_attn_sm120 {__version__}."


class _Loader(Loader):
    """Fills a module that importlib has made."""

    def __init__(self, contents: dict[str, Any]) -> None:
        self._contents = contents

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._contents)


def _module(name: str, contents: dict[str, Any]) -> ModuleType:
    spec = ModuleSpec(
        name, _Loader(contents), origin="flash_attn_sm120.fa2", is_package=name in _PACKAGES
    )
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module
