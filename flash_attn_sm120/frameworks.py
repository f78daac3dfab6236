"""What the C extension asks of the frameworks that tensors come from, off its fast path.

torch tensors of PyTorch 2.10 and newer are read through DLPack's C exchange API without any of
this; older ones, numpy, CuPy, JAX and every other producer through the capsules of :func:`export`.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, NoReturn

import torch
import torch.utils.dlpack

_CUDA_DEVICE_TYPES = (2, 13)  # kDLCUDA, kDLCUDAManaged
_LEGACY_DEFAULT_STREAM = 1  # DLPack's name for CUDA's stream 0
_DTYPES = ("float32", "float16", "bfloat16")  # in the order of enum fa_dtype
_TORCH_DTYPES = tuple(getattr(torch, name) for name in _DTYPES)
_NO_DISPATCH = torch.Tensor.__torch_dispatch__  # of types that leave every operation to torch
_MESSAGE_SIZE = 200  # characters


def export(x: Any, name: str) -> Any:
    """A DLPack capsule of argument ``name``, ready on the stream that the kernels will use.

    Raises:
        TypeError: it has none; the exception of its framework is the cause.
    """
    if _is_numpy(x):
        _refuse_other_semantics(x, name)
    try:
        return _capsule(x)
    except (MemoryError, RecursionError):  # of no concern to the tensor
        raise
    except Exception as error:
        return refuse(x, name, error)


def reads_run_python(kind: type) -> bool:
    """Whether torch asks Python code for the sizes of tensors of this type, or may.

    Nothing that is borrowed outlives Python code: such tensors are read through capsules.
    """
    own = getattr(kind, "__torch_dispatch__", _NO_DISPATCH)
    return own is not _NO_DISPATCH


def empty_like(kind: type) -> Any:
    """The function that makes an uninitialised tensor like one of this type; None if unknown."""
    return torch.empty_like if issubclass(kind, torch.Tensor) else None


def own_copy(x: Any) -> Any:
    """A contiguous, aligned copy by torch or numpy; None of what is neither."""
    if isinstance(x, torch.Tensor):
        return x.clone(memory_format=torch.contiguous_format)
    return x.copy(order="C") if _is_numpy(x) else None


def copy_of_capsule(capsule: Any) -> torch.Tensor:
    """The same of a capsule that csrc/tensor.c made of a tensor which it has checked."""
    x = torch.utils.dlpack.from_dlpack(capsule)
    return x.clone(memory_format=torch.contiguous_format)


def empty(like: Any, shape: tuple[int, ...], dtype: int, device_type: int, device_id: int) -> Any:
    """An uninitialised array where ``like`` is: of numpy for numpy, else of torch.

    Args:
        like: what a tensor was read from; a bare capsule says nothing of its device any more.
        shape: sizes.
        dtype: its number in csrc.
        device_type: DLPack's number for the device of ``like``.
        device_id: its index.
    """
    if isinstance(like, torch.Tensor):
        wanted = _TORCH_DTYPES[dtype]
        if like.dtype is wanted:  # to say it again takes torch 0.2 us
            return like.new_empty(shape)
        return like.new_empty(shape, dtype=wanted)
    if _is_numpy(like):
        return sys.modules["numpy"].empty(shape, dtype=_DTYPES[dtype])
    kind = "cuda" if device_type in _CUDA_DEVICE_TYPES else "cpu"
    return torch.empty(shape, dtype=_TORCH_DTYPES[dtype], device=torch.device(kind, device_id))


def sums_of_heads(x: Any) -> Any:
    """``x (batch, heads, seqlen)`` summed up to ``(heads,)``; of numpy for numpy, else of torch."""
    if not isinstance(x, torch.Tensor) and not _is_numpy(x):
        x = torch.utils.dlpack.from_dlpack(x)
    return x.sum((0, 2))


def current_stream(device_id: int) -> int:
    """The handle of torch's current stream on CUDA device ``device_id``.

    It is the default one, 0, until torch uses CUDA, which a build for the CPU never does: CUDA
    arrays of other frameworks work beside it.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    return int(torch.cuda.current_stream(device_id).cuda_stream)


# ---- capsules ------------------------------------------------------------------------------------


def _capsule(x: Any) -> Any:
    """A versioned capsule, or a legacy one where the producer does not know of those."""
    if isinstance(x, torch.Tensor):
        x = x.detach()  # torch does not export what requires grad; interface.py has dealt with that
    arguments: dict[str, Any] = {"max_version": (1, 3)}
    device_type, device_id = x.__dlpack_device__()
    if device_type in _CUDA_DEVICE_TYPES:
        arguments["stream"] = current_stream(device_id) or _LEGACY_DEFAULT_STREAM
    try:
        return x.__dlpack__(**arguments)
    except TypeError as error:
        if _takes_versions(x.__dlpack__, error):
            raise
    del arguments["max_version"]
    return x.__dlpack__(**arguments)


def _takes_versions(method: Any, error: TypeError) -> bool:
    """Whether a producer that raised ``error`` knows of ``max_version``: it is not asked twice.

    Its signature says so, or, of a function in C that has none, the error.
    """
    try:
        parameters = inspect.signature(method).parameters.values()
    except (ValueError, TypeError):
        return "max_version" not in str(error) and "keyword" not in str(error)
    return any(p.name == "max_version" or p.kind is p.VAR_KEYWORD for p in parameters)


# ---- what cannot be read -------------------------------------------------------------------------


def refuse(x: Any, name: str, error: Exception | None) -> NoReturn:
    """Raises the exception for argument ``name``, which has no memory that can be read.

    Args:
        x: the argument.
        name: how callers know it.
        error: what its framework said; None where it exported a null pointer without a word.

    Raises:
        TypeError: not a tensor, one that has no memory of its own, one that cannot be exported.
        ValueError: a tensor without data.
    """
    with torch._C.DisableTorchFunctionSubclass():  # ask torch, not the subclass
        refusal = _refusal(x, name, error)
    raise refusal from error


def _refusal(x: Any, name: str, error: Exception | None) -> Exception:
    if not hasattr(type(x), "__dlpack__"):
        expected = "a tensor (torch.Tensor, or any object with __dlpack__)"
        return TypeError(_one_line(f"{name} must be {expected}, got {type(x).__name__}"))
    if isinstance(x, torch.Tensor):
        if why := _why_without_memory(x, name, error):
            return TypeError(_one_line(f"{name} is {why}"))
        if error is None and x.untyped_storage().nbytes() == 0:
            return ValueError(
                f"{name} has no data: its storage was freed, as FSDP frees that of parameters; "
                "gather it first"
            )
    if _is_numpy(x) and (narrow := x.dtype.name).startswith(("bfloat16", "float8", "float4")):
        if narrow != "bfloat16":
            return NotImplementedError(f"{name} is {narrow}, which is not supported yet")
        return TypeError(
            f"{name} is bfloat16 of ml_dtypes, which numpy does not export: pass "
            f"torch.from_numpy({name}.view('int16')).view(torch.bfloat16)"
        )
    if error is None:
        return ValueError(f"{name} has no data: its DLPack struct is malformed")
    return TypeError(_one_line(f"{name} cannot be read through DLPack: {_text_of(error)}"))


def _why_without_memory(x: torch.Tensor, name: str, error: Exception | None) -> str:
    """What kind of tensor ``x`` is, and what to do; empty where it may have memory of its own."""
    kind = type(x).__name__
    if hasattr(x, "to_local"):
        return f"a {kind}, without memory of its own: pass {name}.to_local() or .full_tensor()"
    if x.is_nested:
        return f"a nested tensor: pass {name}.to_padded_tensor(0.0), or a tensor per sequence"
    if x.layout != torch.strided:
        return f"of layout {x.layout}: pass {name}.to_dense()"
    if x.is_quantized:
        return f"quantized: pass {name}.dequantize()"
    if x.device.type == "meta" and type(x).__torch_dispatch__ is _NO_DISPATCH:
        return f"on the meta device, which has no data: pass torch.empty_like({name}, device=...)"
    if x._is_zerotensor():
        return f"zeros without memory, which autograd makes: pass {name}.clone()"
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "wrapped by a transform of torch.func, and has no memory of its own there"
    if torch._C._has_storage(x) and (error is not None or x.untyped_storage().nbytes() == 0):
        return ""
    return f"a torch.Tensor ({kind}) without memory of its own: pass the tensor that it stands for"


def _refuse_other_semantics(x: Any, name: str) -> None:
    """Raises TypeError for an array that is more than its numbers: they alone would be read."""
    numpy = sys.modules["numpy"]
    kind = type(x)
    if kind is numpy.ndarray:
        return
    if "numpy.ma" in sys.modules and isinstance(x, sys.modules["numpy.ma"].MaskedArray):
        raise TypeError(
            f"{name} is a numpy.ma.MaskedArray, whose mask would be ignored: pass "
            f"{name}.filled(0), or {name}.data to attend to what it masks"
        )
    protocols = ("__array_ufunc__", "__array_function__")
    if any(getattr(kind, p, None) is not getattr(numpy.ndarray, p) for p in protocols):
        raise TypeError(
            _one_line(
                f"{name} is a {kind.__name__}, a numpy.ndarray with arithmetic of its own, which "
                f"would be ignored: pass numpy.asarray({name})"
            )
        )


def _text_of(error: Exception) -> str:
    """The first line of what an exception says: C++ appends the frames that it was thrown in."""
    try:
        return next(iter(str(error).splitlines()), "") or type(error).__name__
    except Exception:
        return type(error).__name__


def _one_line(text: str) -> str:
    """As csrc/error.c has it."""
    line = " ".join(text.split())
    return line if len(line) <= _MESSAGE_SIZE else line[: _MESSAGE_SIZE - 3] + "..."


def _is_numpy(x: Any) -> bool:
    """Whether ``x`` is a numpy array, without importing numpy where it is not loaded."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, numpy.ndarray)
