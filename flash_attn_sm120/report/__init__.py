"""``python -m flash_attn_sm120 report``: what an owner of a card can paste.

Every part runs in a child process within a time limit, correctness first: a hang, or a fault
that breaks the GPU, costs the part, and what it had found by then stands. A part prints a JSON
record a line. Nothing in the report names a person, a machine or a folder.
"""

from __future__ import annotations

import itertools
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from flash_attn_sm120 import __version__, files, tuned_tiles
from flash_attn_sm120.quantized import RECIPES

Record = dict[str, Any]
# Less than ten minutes in all. Recipes run in a child process each, side by side.
LIMITS_S = {"check": 150, "correctness": 150, "recipes": 55, "speed": 240}
CORRECTNESS = ("check", "correctness", "recipes")
WIN = 1.05  # times as fast as the fastest other; a tie within its inverse


def records_of(part: str) -> Iterable[Record]:
    """What a part finds, in the process that runs it alone."""
    from flash_attn_sm120.report import correctness, recipes, speed

    if part == "speed":
        return speed.run()
    if part in RECIPES:
        return recipes.run(part, lambda x: x.cuda())
    return correctness.run(lambda x: x.cuda())


def command_of(part: str) -> list[str]:
    if part == "check":
        return [sys.executable, "-m", "flash_attn_sm120", "check", "--without-recipes"]
    return [sys.executable, "-m", "flash_attn_sm120", "report", "--part", part]


def run_part(part: str, command: list[str], limit_s: float) -> tuple[list[Record], str]:
    """The records of a part, and how it ended: "" if well."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        printed, ended = done.stdout, ""
        if done.returncode:
            last = next(reversed(done.stderr.strip().splitlines()), "")
            ended = f"ended with {done.returncode}: {_impersonal(last)}".rstrip(": ")
    except subprocess.TimeoutExpired as expired:
        partial = expired.stdout or b""
        printed = partial if isinstance(partial, str) else partial.decode(errors="replace")
        ended = f"did not end within {limit_s:.0f} s"
    lines = printed.splitlines()
    if part == "check":
        failed = [line for line in lines if line.endswith("FAILED")]
        return [{"check": line.split("  ")[0], "passed": False, "said": line} for line in failed], (
            "" if "all passed" in lines else ended or "failed"
        )
    return [record for line in lines if (record := _read(line))], ended


def run_recipes(limit_s: float) -> list[Record]:
    """The records of all recipes; how one ended is a record, too, if not well."""
    with ThreadPoolExecutor(len(RECIPES)) as pool:
        found = pool.map(lambda name: run_part(name, command_of(name), limit_s), RECIPES)
        records = []
        for name, (own, ended) in zip(RECIPES, found, strict=True):
            records += own
            if ended:
                records.append({"check": name, "passed": False, "said": ended})
    return records


def _read(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # the last line of a part that was stopped, or another's print
        return None
    return record if isinstance(record, dict) else None


def _impersonal(text: str) -> str:
    return text.replace(str(Path.home()), "~")


def make() -> Record:
    """Runs all parts."""
    report: Record = {
        "flash_attn_sm120": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "tuned_tiles": tuned_tiles.in_use(),
        "parts": {},
    }
    for part, limit_s in LIMITS_S.items():
        print(f"{part}: up to {limit_s} s", file=sys.stderr)
        if part == "recipes":
            records, ended = run_recipes(limit_s), ""
        else:
            records, ended = run_part(part, command_of(part), limit_s)
        for record in records:
            for field in ("said", "absent"):
                if record.get(field):
                    record[field] = files.one_line(_impersonal(record[field]), 160)
        report["parts"][part] = {"ended": ended, "records": records}
    return report


def passed(report: Record) -> bool:
    """Whether nothing is wrong, and every part of correctness came to its end."""
    parts = [report["parts"][part] for part in CORRECTNESS]
    records = [record for part in parts for record in part["records"]]
    return not any(p["ended"] for p in parts) and all(r["passed"] is not False for r in records)


def markdown(report: Record) -> str:
    """The report as text to paste."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Record) -> Iterator[str]:
    parts = report["parts"]
    facts = [f"{k} {report[k]}" for k in ("flash_attn_sm120", "torch", "cuda", "system")]
    yield f"# flash_attn_sm120 report\n\n{', '.join(facts)}"
    yield f"tuned tiles: {'yes' if report['tuned_tiles'] else 'no'}\n"
    for record in parts["speed"]["records"]:
        if "card" in record:
            yield from _card_lines(record)
    yield f"\n## Correctness: {'right' if passed(report) else 'WRONG OR UNFINISHED'}\n"
    for part in CORRECTNESS:
        yield f"{part}: {parts[part]['ended'] or 'came to its end'}"
    yield "\n| check | result |\n|---|---|"
    for record in itertools.chain(*(parts[part]["records"] for part in CORRECTNESS)):
        word = {True: "right", False: "WRONG", None: "left out"}[record["passed"]]
        yield f"| {record['check']} | {word}{': ' * bool(record['said'])}{record['said']} |"
    yield f"\n## Speed\n\n{parts['speed']['ended'] or 'came to its end'}\n"
    yield from _speed_lines([r for r in parts["speed"]["records"] if "cell" in r])


def _card_lines(record: Record) -> Iterator[str]:
    card, running = record["card"], record["while_running"]
    yield (
        f"{card['name']}: compute capability {card['arch'] / 10}, {card['sms']} SMs, "
        f"{card['l2_bytes'] >> 20} MB of L2"
    )
    yield f"class: {record['kind'] or 'none'}, {record['why']} ({record['half_rate']:.2f})"
    yield ", ".join(f"{name} {value}" for name, value in running.items() if value)
    if record["others"]:
        yield ", ".join(f"{name} {version}" for name, version in record["others"].items())


def _speed_lines(records: list[Record]) -> Iterator[str]:
    yield "| cell | ours, TF | of the peak | predicted | fastest other | ours / other | |"
    yield "|---|---|---|---|---|---|---|"
    verdicts: dict[str, int] = {}
    for cell in dict.fromkeys(record["cell"] for record in records):
        own = [r for r in records if r["cell"] == cell and "ms" in r]
        ours = next((r for r in own if r["contestant"] == "ours"), None)
        if not ours:
            yield f"| {cell} | absent | | | | | |"
            continue
        low = "low clocks" if ours["low_clocks"] else ""
        predicted = f"{ours['predicted']:.2f}" if ours["predicted"] else ""
        shown = f"| {cell} | {ours['tflops']:.1f} | {ours['share']:.3f} | {predicted} |"
        others = [r for r in own if r is not ours]
        if not others:
            yield f"{shown} none | | {low} |"
            continue
        best = min(others, key=lambda r: float(r["ms"]))
        ratio = best["ms"] / ours["ms"]
        verdict = "win" if ratio >= WIN else "loss" if ratio <= 1 / WIN else "tie"
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
        name = f"{best['contestant']} {best['tflops']:.1f}"
        yield f"{shown} {name} | {ratio:.2f} | {' '.join((verdict, low)).strip()} |"
    yield f"\n{', '.join(f'{count} x {verdict}' for verdict, count in verdicts.items())}"
    absent = dict.fromkeys((r["contestant"], r["absent"]) for r in records if "absent" in r)
    yield "\n".join(f"absent: {name}: {why}" for name, why in absent)
