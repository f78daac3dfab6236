"""The common kernels: what ``warmup`` compiles ahead, wheels ship, and CI gates."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from flash_attn_sm120 import _C, jit, tiles
from flash_attn_sm120.interface import Plan, explain

# (head_dim, head_dim_v) of Llama, Qwen, Mistral, Gemma, Phi and DeepSeek (MLA).
COMMON_HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


def common_plans(arch: int, head_dims: Iterable[tuple[int, int]] | None = None) -> Iterator[Plan]:
    """The plans of the common forward calls on compute capability ``arch``; needs no GPU.

    Each kernel once: of calls that fill the machine, of short ones, and of those between.
    """
    seen = set()
    for dtype, (head_dim, head_dim_v), seqlen, causal in itertools.product(
        (torch.bfloat16, torch.float16),
        head_dims or COMMON_HEAD_DIMS,
        (16384, 2048, 512),
        (False, True),
    ):
        # Nobody touches this memory: explain() looks at shapes and strides alone.
        q = torch.empty(1, seqlen, 8, head_dim, dtype=dtype)
        v = torch.empty(1, seqlen, 8, head_dim_v, dtype=dtype)
        plan = explain(q, q, v, causal=causal, arch=arch)
        if plan.variant not in seen:
            seen.add(plan.variant)
            yield plan


def warmup(
    arch: int | None = None, progress: Callable[[Iterable[Plan]], Iterable[Plan]] = iter
) -> int:
    """Compiles the common kernels into the disk cache, over all cores.

    Args:
        arch: compute capability; default that of the first CUDA device.
        progress: wraps the iterable of finished plans, say ``tqdm``.

    Returns:
        How many kernels are ready.

    Raises:
        RuntimeError: no device, or a kernel that does not compile.
    """
    driver_version = 0
    if arch is None:
        driver_version, devices = _C.devices()
        if not devices:
            raise RuntimeError("there is no CUDA device to compile for: name an architecture")
        arch = devices[0]["arch"]
    chosen: int = arch

    def ready(plan: Plan) -> Plan:
        assert plan.variant is not None
        jit.compile(plan.kernel, plan.variant, plan.options, chosen, driver_version)
        return plan

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(1 for _ in progress(pool.map(ready, list(common_plans(chosen)))))


def prebuild(directory: Path, architectures: Iterable[str]) -> None:
    """Compiles the common kernels into ``directory`` for a wheel to ship.

    Args:
        directory: ``prebuilt/`` of the package that the wheel is made of.
        architectures: as NVRTC names them, say ``"sm_120f"``.

    Raises:
        RuntimeError: a name that is none, or a kernel that does not compile.
    """
    for arch in architectures:
        number = re.fullmatch(r"sm_(\d+)[af]?", arch)
        if not number:
            raise RuntimeError(f"an architecture is named like sm_120f, got {arch!r}")
        with tiles.using(()):  # a wheel is for others: without what was tuned here
            plans = list(common_plans(int(number[1])))
        jit.prebuild(directory, [(p.kernel, str(p.variant), p.options) for p in plans], arch)
