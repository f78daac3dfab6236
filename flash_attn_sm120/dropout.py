"""Seeds of dropout: kernels read them from memory, so that a CUDA graph draws new ones."""

from __future__ import annotations

from typing import Any

import torch


def draw_seed(like: Any) -> torch.Tensor:
    """``[seed, offset]`` from torch's generator of the device of ``like``: every call drops anew.

    torch advances that generator at every replay of a CUDA graph, as for its own dropout.
    """
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=_device_of(like))


def _device_of(x: Any) -> torch.device:
    if isinstance(x, torch.Tensor):
        return x.device
    kind, index = x.__dlpack_device__() if hasattr(x, "__dlpack_device__") else (1, 0)
    return torch.device("cuda", index) if kind in (2, 13) else torch.device("cpu")
