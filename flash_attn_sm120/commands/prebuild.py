"""For packagers: compile the common kernels into a directory that a wheel ships."""

from __future__ import annotations

import argparse
from pathlib import Path

from flash_attn_sm120 import common_kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path)
    parser.add_argument("architectures", nargs="+", help="as NVRTC names them: sm_120f sm_90a")


def run(arguments: argparse.Namespace) -> int:
    common_kernels.prebuild(arguments.directory, arguments.architectures)
    return 0
