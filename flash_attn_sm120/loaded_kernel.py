"""A kernel that is no call of attention's, loaded for measurements and probes."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch

from flash_attn_sm120 import _C, jit


class LoadedKernel:
    """A kernel on torch's current CUDA device; a call launches it on torch's stream.

    Args:
        kernel: ``kernels/<kernel>.cu`` and its function.
        name: of the variant, for messages.
        options: its ``-D`` options.

    Raises:
        RuntimeError: it cannot be compiled or loaded.
    """

    def __init__(self, kernel: str, name: str, options: tuple[str, ...]) -> None:
        version, devices = _C.devices()
        device = devices[torch.cuda.current_device()]
        self.multiprocessors = device["sms"]
        code = jit.compile(kernel, name, options, device["arch"], version)
        self._driver: Any = importlib.import_module("cuda.bindings.driver")
        self._library = self._call("cuLibraryLoadData", code, [], [], 0, [], [], 0)
        self._kernel = self._call("cuLibraryGetKernel", self._library, kernel.encode())

    def __call__(self, grid: tuple[int, int], threads: int, *arguments: torch.Tensor | int) -> None:
        """Tensors are passed as pointers, numbers as C's int."""
        are_tensors = [isinstance(x, torch.Tensor) for x in arguments]
        types = tuple(ctypes.c_void_p if is_tensor else ctypes.c_int for is_tensor in are_tensors)
        values = tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)
        stream = torch.cuda.current_stream().cuda_stream
        function = self._driver.CUfunction(int(self._kernel))
        shape = (*grid, 1, threads, 1, 1)
        self._call("cuLaunchKernel", function, *shape, 0, stream, (values, types), 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} failed: {status.name}")
        return values[0] if values else None
