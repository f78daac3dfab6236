"""Find the fastest tiles for this GPU by timing them; they are used from then on.

Takes minutes per head dim. An interrupted run resumes where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flash_attn_sm120 import cache, common_kernels
from flash_attn_sm120.quantized import RECIPES
from flash_attn_sm120.quantized.device import why_not
from flash_attn_sm120.tune import table, trial, tune
from flash_attn_sm120.tune.candidates import (
    BACKWARD_CHOICES,
    CHOICES,
    QUICK_BACKWARD_CHOICES,
    QUICK_CHOICES,
)
from flash_attn_sm120.tune.grid import cells
from flash_attn_sm120.tune.machine import Machine
from flash_attn_sm120.tuned_tiles import BACKWARD, FORWARD, RECIPE

DIRECTIONS = {"forward": FORWARD, "backward": BACKWARD, "recipes": RECIPE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--head-dims",
        nargs="+",
        type=_head_dims,
        metavar="D[,DV]",
        help="for example 128 192,128; default: the common ones",
    )
    parser.add_argument(
        "--direction",
        choices=DIRECTIONS,
        help="tune the tiles of the forward, of the backward, or of quantised attention alone, of "
        "all recipes that the GPU runs; default: forward and backward",
    )
    parser.add_argument("--quick", action="store_true", help="try fewer tiles")
    parser.add_argument(
        "--output", type=Path, help="directory of measurements and table; default: in the cache"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--show", action="store_true", help="print the table in use, and how to contribute it"
    )
    instead.add_argument("--reset", action="store_true", help="remove the table in use")


def _head_dims(text: str) -> tuple[int, int]:
    """ "192,128" -> (192, 128), "128" -> (128, 128)."""
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) > 2 or any(n % 8 or not 8 <= n <= 256 for n in numbers):
        raise argparse.ArgumentTypeError(f"head dims are multiples of 8 from 8 to 256, got {text}")
    return numbers[0], numbers[-1]


def run(arguments: argparse.Namespace) -> int:
    if arguments.show:
        return table.show()
    if arguments.reset:
        return table.reset()
    choices = (CHOICES, BACKWARD_CHOICES)
    if arguments.quick:
        choices = (QUICK_CHOICES, QUICK_BACKWARD_CHOICES)
    where = arguments.output.absolute() if arguments.output else cache.directory() / "tune"
    directions = [arguments.direction] if arguments.direction else ["forward", "backward"]
    machine = Machine()
    wanted = cells(
        arguments.head_dims or common_kernels.COMMON_HEAD_DIMS,
        [DIRECTIONS[name] for name in directions],
        [name for name in RECIPES if not why_not(name, machine.arch)],
    )
    return tune(machine, wanted, choices[0], where, trial.in_child, choices[1])
