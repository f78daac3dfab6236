"""Compile the common kernels now, so that no first call has to wait for the compiler."""

from __future__ import annotations

import argparse
from functools import partial

from tqdm import tqdm

from flash_attn_sm120 import cache, common_kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        type=int,
        help="compute capability to compile for, for example 120; default: that of the first GPU",
    )


def run(arguments: argparse.Namespace) -> int:
    total = len(common_kernels.common_kernels(arguments.arch or 120))
    ready = common_kernels.warmup(arguments.arch, partial(tqdm, total=total, unit="kernel"))
    print(f"{ready} kernels are ready in {cache.directory()}")
    return 0
