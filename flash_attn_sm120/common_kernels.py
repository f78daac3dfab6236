"""The common kernels: what ``warmup`` compiles ahead, wheels ship, and CI gates."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from flash_attn_sm120 import _C, jit, tuned_tiles
from flash_attn_sm120.files import one_line
from flash_attn_sm120.plan import Kernel, Plan, explain, explain_backward

DTYPES = (torch.bfloat16, torch.float16)

# (head_dim, head_dim_v) of Llama, Qwen, Mistral, Gemma, Phi and DeepSeek (MLA).
COMMON_HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
HEADS = 8
PAGE_SIZE = 16  # of vLLM, unless told otherwise


def common_plans(arch: int, head_dims: Iterable[tuple[int, int]] | None = None) -> Iterator[Plan]:
    """The plans of the common forward calls on compute capability ``arch``; needs no GPU.

    Each kernel once: of calls that fill the machine, of short ones, and of those between.
    """
    seen = set()
    for dtype, dims, seqlen, causal in itertools.product(
        DTYPES, head_dims or COMMON_HEAD_DIMS, (16384, 2048, 512), (False, True)
    ):
        qkv = _qkv(dtype, dims, seqlen, seqlen)
        plan = explain(*qkv, causal=causal, num_splits=1, arch=arch)
        if plan.variant not in seen:
            seen.add(plan.variant)
            yield plan


def decoding_plans(arch: int) -> Iterator[Plan]:
    """The plans of common calls of one query, whose keys are split; needs no GPU."""
    for dtype, dims in itertools.product(DTYPES, COMMON_HEAD_DIMS):
        yield explain(*_qkv(dtype, dims, 1, 8192), arch=arch)


def packed_plans(arch: int) -> Iterator[Plan]:
    """The plans of the forward of packed sequences, long and short; needs no GPU.

    A plan holds no length: these kernels are those of any number of sequences.
    """
    for dtype, dims, longest in itertools.product(DTYPES, COMMON_HEAD_DIMS, (2048, 64)):
        for causal in (False, True):
            qkv, lengths = _packed(dtype, dims, longest)
            yield explain(*qkv, **lengths, causal=causal, num_splits=1, arch=arch)


def serving_plans(arch: int) -> Iterator[Plan]:
    """The plans of what serving engines call: K and V in pages, causal, GQA; needs no GPU.

    Prefill, the decoding of many sequences, and of few, whose keys are split.
    """
    for dtype, dims in itertools.product(DTYPES, COMMON_HEAD_DIMS):
        for batch, queries in ((8, 2048), (256, 1), (2, 1)):
            q = torch.empty(batch, queries, HEADS, dims[0], dtype=dtype)
            k, v = (torch.empty(16, PAGE_SIZE, HEADS // 4, dim, dtype=dtype) for dim in dims)
            table = torch.empty(batch, 8192 // PAGE_SIZE, dtype=torch.int32)
            used = torch.empty(batch, dtype=torch.int32)
            yield explain(q, k, v, page_table=table, seqused_k=used, causal=True, arch=arch)


def backward_plans(arch: int, head_dims: Iterable[tuple[int, int]] | None = None) -> Iterator[Plan]:
    """The plans of the gradients of common calls; needs no GPU.

    Of calls that need every step: those of few keys, which blocks share, and of a sink; and of
    those that fill the machine, where their tile is another. Not of ``deterministic=True``: few ask
    for it, and it would double the kernels.
    """
    seen = set()
    sink = torch.empty(HEADS)
    for dtype, dims, causal, seqlen in itertools.product(
        DTYPES, head_dims or COMMON_HEAD_DIMS, (False, True), (512, 16384)
    ):
        qkv = _qkv(dtype, dims, seqlen, seqlen)
        plan = explain_backward(*qkv, causal=causal, learnable_sink=sink, arch=arch)
        if plan.variant not in seen:
            seen.add(plan.variant)
            yield plan


def packed_backward_plans(arch: int) -> Iterator[Plan]:
    """The same of packed sequences."""
    sink = torch.empty(HEADS)
    for dtype, dims, causal in itertools.product(DTYPES, COMMON_HEAD_DIMS, (False, True)):
        qkv, lengths = _packed(dtype, dims, 2048)
        yield explain_backward(*qkv, **lengths, causal=causal, learnable_sink=sink, arch=arch)


def _qkv(
    dtype: torch.dtype, dims: tuple[int, int], seqlen_q: int, seqlen_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # This memory is never touched: plans look at shapes and strides alone.
    q = torch.empty(1, seqlen_q, HEADS, dims[0], dtype=dtype)
    k, v = (torch.empty(1, seqlen_k, HEADS, dim, dtype=dtype) for dim in dims)
    return q, k, v


def _packed(
    dtype: torch.dtype, dims: tuple[int, int], longest: int
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """q, k and v of packed sequences of at most ``longest`` queries, and their lengths."""
    ends = torch.empty(9, dtype=torch.int32)
    lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest}
    return tuple(x[0] for x in _qkv(dtype, dims, 8192, 8192)), lengths


def common_kernels(arch: int) -> list[Kernel]:
    """What the common calls launch on compute capability ``arch``, each kernel once.

    Those of the forward come first, so that a warm-up that is interrupted serves inference. Cards
    of 12.0 are of two classes, of which 12.1 stands for the other one.
    """
    makers: tuple[Callable[[int], Iterable[Plan]], ...] = (
        common_plans,
        decoding_plans,
        packed_plans,
        serving_plans,
        backward_plans,
        packed_backward_plans,
    )
    classes = (120, 121) if arch == 120 else (arch,)
    plans = (plan for make in makers for each in classes for plan in make(each))
    return list(dict.fromkeys(kernel for plan in plans for kernel in plan.kernels))


def warmup(
    arch: int | None = None, progress: Callable[[Iterable[Kernel]], Iterable[Kernel]] = iter
) -> int:
    """Compiles the common kernels of both directions into the disk cache, over all cores.

    Args:
        arch: compute capability; default that of the first CUDA device.
        progress: wraps the iterable of finished kernels, say ``tqdm``.

    Returns:
        How many kernels are ready.

    Raises:
        RuntimeError: no device, or a kernel that does not compile.
    """
    driver_version = 0
    if arch is None:
        driver_version, arch = _first_device()
    chosen: int = arch

    def ready(kernel: Kernel) -> Kernel:
        jit.compile(*kernel, chosen, driver_version)
        return kernel

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(1 for _ in progress(pool.map(ready, common_kernels(chosen))))


def _first_device() -> tuple[int, int]:
    """The driver's version and the compute capability of the first CUDA device."""
    try:
        driver_version, devices = _C.devices()
    except RuntimeError as error:
        raise RuntimeError(one_line(f"{error}: name an architecture to compile for")) from error
    if not devices:
        raise RuntimeError("there is no CUDA device to compile for: name an architecture")
    return driver_version, devices[0]["arch"]


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
        with tuned_tiles.using(()):  # a wheel is for others: without what was tuned here
            kernels = common_kernels(int(number[1]))
        jit.prebuild(directory, kernels, arch)
