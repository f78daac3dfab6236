"""The table that tuning makes: published, described, shown as rows to contribute, removed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flash_attn_sm120 import tuned_tiles
from flash_attn_sm120.tune.candidates import describe_tile
from flash_attn_sm120.tune.grid import Cell
from flash_attn_sm120.tune.journal import Journal
from flash_attn_sm120.tuned_tiles import ANY, Direction, Table


def summary(cell: Cell, record: dict[str, Any]) -> str:
    """What became of a cell, in a line."""
    if record["winner"]:
        winner, fallback = (describe_tile(record[which]) for which in ("winner", "fallback"))
        changed = {name: winner[name] for name in winner if winner[name] != fallback[name]}
        return f"{cell}: {record['gain']:.3f}x with {_spelled(changed)}"
    verdicts = {result["verdict"] for result in record["results"]} or {"no other tile fits"}
    return f"{cell}: as it is ({', '.join(sorted(verdicts))})"


def _spelled(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def publish(file: Path, journal: Journal) -> None:
    """Writes the table of a journal, uses it from now on if it is in its usual place, and says so.

    Raises:
        RuntimeError: it cannot be written.
    """
    table = journal.table()
    try:
        tuned_tiles.write(file, table)
    except OSError as error:
        raise RuntimeError(
            f"the table cannot be written to {file}: {error.strerror or error}; the measurements "
            f"are in {journal.path}, and the same command makes the table of them"
        ) from error
    print(f"{count_rows(table)} of {table['cells']} cells have a faster tile: {file}")
    print(f"measurements: {journal.path}")
    if file == tuned_tiles.path():
        tuned_tiles.load()
        print("The table is used from now on. tune --show prints it, and how to contribute it.")
    else:
        print(f"To use it: export FA_SM120_TILES={file}")


def describe() -> str:
    """The table in use, in a line."""
    file = tuned_tiles.path()
    if file is None:
        return "none: FA_SM120_TILES is empty"
    if not os.path.exists(file):
        return "none: python -m flash_attn_sm120 tune measures them"
    try:
        tables = tuned_tiles.read(file)
    except (OSError, ValueError) as error:
        return f"none: {file}: {error}"
    rows = (f"{count_rows(t)} rows of {t.get('gpu', 'an unknown GPU')}" for t in tables)
    return f"{', '.join(rows)}, from {file}"


def show() -> int:
    """Prints the table in use, and what to send to have it in csrc/tiles.c."""
    print(f"tuned tiles: {describe()}")
    file = tuned_tiles.path()
    if file is None or not tuned_tiles.in_use():
        return 0
    for table in tuned_tiles.read(file):
        for direction in tuned_tiles.DIRECTIONS:
            if table.get(direction.rows):
                _show_rows(table, direction)
    print(
        f"\nTo contribute it, send these lines and the measurements, the .jsonl files in\n"
        f"{file.parent}.\nIn csrc/tiles.c each row goes before the others of its head dims."
    )
    return 0


def _show_rows(table: Table, direction: Direction) -> None:
    kinds = [each.rows for each in tuned_tiles.DIRECTIONS]
    facts = {name: value for name, value in table.items() if name not in kinds}
    print(f"\n/* {_spelled(facts)}\n * {', '.join(direction.fields)} */")
    for entry in tuned_tiles.usable(table[direction.rows], direction)[0]:
        row = entry["row"]
        key, tile = (
            ["ANY" if row[name] == ANY else str(row[name]) for name in names]
            for names in (direction.key, direction.tile)
        )
        gain = f"{entry['gain']:.2f}x" if "gain" in entry else ""
        print(f"    {{{', '.join(key)}, {{{', '.join(tile)}}}}}, /* {gain} */")


def count_rows(table: Table) -> int:
    return sum(len(table.get(direction.rows, ())) for direction in tuned_tiles.DIRECTIONS)


def reset() -> int:
    """Removes the table in use; the measurements stay."""
    file = tuned_tiles.path()
    if file is None or not os.path.exists(file):
        print("there is no table of tuned tiles")
        return 0
    file.unlink()
    print(f"{file} is removed. The measurements beside it stay: tune would make the table of them;")
    print("delete the .jsonl files, too, to measure anew.")
    return 0
