"""Whether torch follows a call: then it goes through the operators of ops.py, else straight to C.

Every call pays for this test, so each question is the cheapest one that torch answers, and C asks
most of them: _C.forward_if_plain() computes a call that is surely not followed, and leaves all
others to is_followed().
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_function_stack_at,
    _is_torch_function_mode_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from flash_attn_sm120 import _C

_C.follow(
    (Tensor, torch.nn.Parameter),
    (
        _len_torch_dispatch_stack,
        _are_functorch_transforms_active,
        _is_tracing,
        _is_torch_function_mode_enabled,
    ),
    vars(forward_ad),
)


def is_followed(q: Any, k: Any, v: Any, other: Any = None, *others: Any) -> bool:
    """Whether torch must see the operation itself, not only its results; ``others`` may be None.

    It must under torch.compile, a dispatch or function mode (make_fx, FakeTensorMode, FLOP
    counters, selective checkpointing), a functorch transform, torch.jit.trace and a level of
    forward-mode AD; and where a tensor is a subclass that takes part in dispatch, has no memory
    (meta), or is a lazy negation. Never where no argument is a torch tensor.
    """
    if is_dynamo_compiling():
        return True
    if (
        _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or _is_tracing()
        or (_is_torch_function_mode_enabled() and not _is_default_device_alone())
        or forward_ad._current_level >= 0
    ):
        return any(isinstance(x, Tensor) for x in (q, k, v, other, *others))
    if other is None and not others and type(q) is type(k) is type(v) is Tensor:
        return q.is_meta or q.is_neg() or k.is_neg() or v.is_neg()
    return any(x is not None and _is_special(x) for x in (q, k, v, other, *others))


def _is_special(x: Any) -> bool:
    """Whether calls with this tensor are never as those with a plain one."""
    if type(x) is not Tensor:
        if not isinstance(x, Tensor):
            return hasattr(type(x), "__torch_function__")  # as torch.fx.Proxy has
        if _takes_part_in_dispatch(type(x)):
            return True
    return x.is_meta or x.is_neg() or is_legacy_batchedtensor(x)


def _takes_part_in_dispatch(cls: type[Tensor]) -> bool:
    """Whether it overrides what torch does, as DTensor and FakeTensor; Parameter does not."""
    function = getattr(cls.__torch_function__, "__func__", cls.__torch_function__)
    return (
        cls.__torch_dispatch__ is not Tensor.__torch_dispatch__
        or function not in _FUNCTIONS_OF_TORCH
    )


# The first is a class method; the second leaves all to torch.
_FUNCTIONS_OF_TORCH: tuple[Any, ...] = (
    getattr(Tensor.__torch_function__, "__func__", None),
    torch._C._disabled_torch_function_impl,
)


def _is_default_device_alone() -> bool:
    """torch.set_default_device() is a mode, too, which concerns functions that make tensors."""
    from torch.utils._device import DeviceContext  # imported by whatever made such a mode

    count = _len_torch_function_stack()
    return all(type(_get_function_stack_at(i)) is DeviceContext for i in range(count))
