"""Measure this GPU for others: results, speed beside SDPA, clocks. It takes up to ten minutes.

Writes a Markdown file to paste into an issue, and the same as JSON. Nothing in them is personal.
Other programs should leave the GPU alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from flash_attn_sm120 import report
from flash_attn_sm120.quantized import RECIPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("flash_attn_sm120_report"),
        help="the files, without .md and .json (default: %(default)s)",
    )
    parser.add_argument("--part", choices=[*report.LIMITS_S, *RECIPES], help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise RuntimeError("a report is of a GPU, and torch finds none")
    if arguments.part:
        for record in report.records_of(arguments.part):
            print(json.dumps(record), flush=True)
        return 0
    made = report.make()
    text = report.markdown(made)
    for suffix, content in ((".md", text), (".json", json.dumps(made, indent=1))):
        arguments.output.with_suffix(suffix).write_text(content, encoding="utf-8")
    print(text)
    return 0 if report.passed(made) else 1
