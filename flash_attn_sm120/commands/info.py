"""Show what this machine has (GPU, driver, compiler, cache) and what common calls run on it."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
from typing import Any

import torch

from flash_attn_sm120 import _C, __version__, cache, common_kernels, explain, explain_backward, jit
from flash_attn_sm120.plan import Plan
from flash_attn_sm120.tune import table

HEADS_Q, HEADS_KV, SEQLEN = 32, 8, 4096  # of the common calls shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernels", action="store_true", help="name every kernel that `warmup` compiles"
    )


def run(arguments: argparse.Namespace) -> int:
    print_machine()
    for arch in sorted({device["arch"] for device in _devices()[1]} or {120}):
        _print_common_calls(arch)
        if arguments.kernels:
            _print_kernels(arch)
    return 0


def print_machine() -> None:
    """What stands above the output of ``check``, too."""
    version, devices, problem = _devices()
    print(f"flash_attn_sm120 {__version__}, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}, {platform.platform()}")
    print(f"driver: {f'CUDA {version // 1000}.{version % 1000 // 10}' if version else problem}")
    for i, device in enumerate(devices):
        arch, sms, smem = device["arch"], device["sms"], device["smem_per_block"] >> 10
        print(f"cuda:{i}: {device['name']}, {dotted(arch)}, {sms} SMs, {smem} KB per block")
    print(f"compiler: {_compiler()}")
    print(f"kernel cache: {_cache()}")
    print(f"tuned tiles: {table.describe()}")
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("FA_SM120_")]
    print(f"environment: {' '.join(settings) or 'no FA_SM120_ variable is set'}")


def dotted(arch: int) -> str:
    return f"compute capability {arch // 10}.{arch % 10}"


def _devices() -> tuple[int, list[Any], str]:
    """The driver's version and devices, or none of them and the reason."""
    try:
        version, devices = _C.devices()
        return version, list(devices), "" if devices else "the driver has no device"
    except RuntimeError as error:
        return 0, [], str(error)


def _compiler() -> str:
    """NVRTC's version, or why there is none."""
    try:
        return "NVRTC {}.{}".format(*jit.nvrtc_version())
    except RuntimeError as error:
        return str(error)


def _cache() -> str:
    """Where compiled kernels are kept, and how many."""
    where = cache.directory()
    sizes = []
    for path in where.rglob("*.cubin"):
        with contextlib.suppress(FileNotFoundError):  # other processes drop the oldest
            sizes.append(path.stat().st_size)
    return f"{where}, {len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB"


def _print_common_calls(arch: int) -> None:
    """A line for each pair of head dims: tile and feed of prefill, decoding and backward."""
    print(f"\ntiles (queries x keys) of common calls on {dotted(arch)}, bf16, causal,")
    print(f"{HEADS_Q} query heads, {HEADS_KV} KV heads, {SEQLEN} keys:")
    print(f"  {'head_dim':>8}  {'forward':16}  {'decoding':26}  gradients")
    for head_dim, head_dim_v in common_kernels.COMMON_HEAD_DIMS:
        dims = f"{head_dim}" if head_dim == head_dim_v else f"{head_dim},{head_dim_v}"
        q, k, v = _qkv(SEQLEN, head_dim, head_dim_v)
        forward = explain(q, k, v, causal=True, arch=arch)
        decoding = explain(q[:, :1], k, v, causal=True, arch=arch)
        backward = explain_backward(q, k, v, causal=True, arch=arch)
        splits = f"{_tile(decoding)}, {decoding.num_splits} splits"
        print(f"  {dims:>8}  {_tile(forward):16}  {splits:26}  {_tile(backward)}")


def _qkv(seqlen: int, head_dim: int, head_dim_v: int) -> list[torch.Tensor]:
    # Memory that is never touched: plans look at shapes and strides alone.
    shapes = (HEADS_Q, head_dim), (HEADS_KV, head_dim), (HEADS_KV, head_dim_v)
    return [torch.empty(1, seqlen, heads, dim, dtype=torch.bfloat16) for heads, dim in shapes]


def _tile(plan: Plan) -> str:
    return f"{plan.tile_m} x {plan.tile_n}{', TMA' if plan.tma else ''}"


def _print_kernels(arch: int) -> None:
    print(f"\nkernels of common calls on {dotted(arch)}:")
    for kernel in common_kernels.common_kernels(arch):
        print(f"  {kernel.variant}")
