"""A kernel that no plan has, loaded from Python: of quantised attention, measurements, probes."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch

from flash_attn_sm120 import _C, jit

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum fa_dtype


class Strides(ctypes.Structure):
    """``fa_strides``."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "seqlen", "head")]


class LoadedKernel:
    """A kernel on torch's current CUDA device; a call launches it on torch's stream.

    Args:
        kernel: ``kernels/<kernel>.cu`` and its function.
        name: of the variant, for messages.
        options: its ``-D`` options.
        shared_bytes: of dynamic shared memory of a block.

    Raises:
        RuntimeError: it cannot be compiled or loaded.
    """

    def __init__(
        self, kernel: str, name: str, options: tuple[str, ...], shared_bytes: int = 0
    ) -> None:
        version, devices = _C.devices()
        device = devices[torch.cuda.current_device()]
        self.multiprocessors = device["sms"]
        code = jit.compile(kernel, name, options, device["arch"], version)
        self._driver: Any = importlib.import_module("cuda.bindings.driver")
        self._library = self._call("cuLibraryLoadData", code, [], [], 0, [], [], 0)
        self._kernel = self._call("cuLibraryGetKernel", self._library, kernel.encode())

        if shared_bytes:
            attributes = self._driver.CUfunction_attribute
            attribute = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            place = self._call("cuDeviceGet", torch.cuda.current_device())
            self._call("cuKernelSetAttribute", attribute, shared_bytes, self._kernel, place)
        self._shared_bytes = shared_bytes

    def __call__(
        self,
        grid: tuple[int, int],
        threads: int,
        *arguments: torch.Tensor | int | ctypes.Structure,
    ) -> None:
        """Tensors are passed as pointers, numbers as C's int, structs as they are."""
        values = [_c_value(x) for x in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = torch.cuda.current_stream().cuda_stream
        function = self._driver.CUfunction(int(self._kernel))
        shape = (*grid, 1, threads, 1, 1)
        launch = (function, *shape, self._shared_bytes, stream, ctypes.addressof(pointers), 0)
        self._call("cuLaunchKernel", *launch)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} failed: {status.name}")
        return values[0] if values else None


def _c_value(x: torch.Tensor | int | ctypes.Structure) -> Any:
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return ctypes.c_int(x) if isinstance(x, int) else x
