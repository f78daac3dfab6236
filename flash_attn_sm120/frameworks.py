"""What the C extension asks of the frameworks that tensors come from, off its fast path.

torch tensors of PyTorch 2.10 and newer are read through DLPack's C exchange API without any of
this; older ones, numpy, CuPy, JAX and every other producer through the capsules of :func:`export`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.utils.dlpack

_CUDA_DEVICE_TYPES = (2, 13)  # kDLCUDA, kDLCUDAManaged
_LEGACY_DEFAULT_STREAM = 1  # DLPack's name for CUDA's stream 0


def export(x: Any) -> Any:
    """A DLPack capsule of ``x``, ready on the stream that the kernels will use.

    Asks for a versioned capsule, and for a legacy one where the producer does not know of those.
    """
    if isinstance(x, torch.Tensor):
        x = x.detach()  # torch does not export what requires grad; interface.py has dealt with that
    arguments: dict[str, Any] = {"max_version": (1, 3)}
    device_type, device_id = x.__dlpack_device__()
    if device_type in _CUDA_DEVICE_TYPES:
        arguments["stream"] = current_stream(device_id) or _LEGACY_DEFAULT_STREAM
    try:
        return x.__dlpack__(**arguments)
    except TypeError:
        del arguments["max_version"]
        return x.__dlpack__(**arguments)


def contiguous(x: Any) -> Any:
    """A contiguous, aligned copy of ``x``, in its own framework where that is torch or numpy."""
    if _is_numpy(x):
        return x.copy(order="C")
    if not isinstance(x, torch.Tensor):
        if not hasattr(x, "__dlpack_device__"):
            raise ValueError(
                "a bare DLPack capsule must be contiguous in its last dimension, "
                "with rows aligned to 16 bytes"
            )
        x = torch.utils.dlpack.from_dlpack(x)
    return x.clone(memory_format=torch.contiguous_format)


def empty(like: Any, shape: tuple[int, ...], dtype: str, device_type: int, device_id: int) -> Any:
    """An uninitialised array where ``like`` is: of numpy for numpy, else of torch.

    Args:
        like: what a tensor was read from; a bare capsule says nothing of its device any more.
        shape: sizes.
        dtype: as torch and numpy name it.
        device_type: DLPack's number for the device of ``like``.
        device_id: its index.
    """
    if isinstance(like, torch.Tensor):
        return like.new_empty(shape, dtype=getattr(torch, dtype))
    if _is_numpy(like):
        return sys.modules["numpy"].empty(shape, dtype=dtype)
    kind = "cuda" if device_type in _CUDA_DEVICE_TYPES else "cpu"
    return torch.empty(shape, dtype=getattr(torch, dtype), device=torch.device(kind, device_id))


def zeros(like: Any, shape: tuple[int, ...], dtype: str, device_type: int, device_id: int) -> Any:
    """An array of zeros; the arguments are those of :func:`empty`."""
    array = empty(like, shape, dtype, device_type, device_id)
    array[...] = 0
    return array


def sums_of_heads(x: Any) -> Any:
    """``x (batch, heads, seqlen)`` summed up to ``(heads,)``; of numpy for numpy, else of torch."""
    if not isinstance(x, torch.Tensor) and not _is_numpy(x):
        x = torch.utils.dlpack.from_dlpack(x)
    return x.sum((0, 2))


def current_stream(device_id: int) -> int:
    """The handle of torch's current stream on CUDA device ``device_id``.

    Nobody can have set another than the default one, 0, before torch uses CUDA, which a build for
    the CPU never does: CUDA arrays of other frameworks work beside it.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    return int(torch.cuda.current_stream(device_id).cuda_stream)


def _is_numpy(x: Any) -> bool:
    """Whether ``x`` is a numpy array, without importing numpy where nobody has."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, numpy.ndarray)
