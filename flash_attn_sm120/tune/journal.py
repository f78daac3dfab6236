"""The journal: what was measured, a line for each cell, so that an interrupted run resumes."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flash_attn_sm120 import files
from flash_attn_sm120.tune.contest import Contest
from flash_attn_sm120.tune.grid import Cell
from flash_attn_sm120.tune.machine import Machine
from flash_attn_sm120.tuned_tiles import DIRECTIONS, Table


class Journal:
    """The measurements of one kind of GPU."""

    KEYS = frozenset(("cell", "machine", "fallback", "winner", "above", "gain", "calls", "tried"))

    def __init__(self, path: Path, machine: Machine) -> None:
        self.path, self.machine = path, machine
        self.identity = machine.identity()
        self.lines = list(self._read())
        self.begun = False

    @property
    def cells(self) -> list[dict[str, Any]]:
        """What was measured on such a machine with these kernels, of each cell the last."""
        own = (x for x in self.lines if x.get("cell") and x.get("machine") == self.identity)
        return list({record["cell"]: record for record in own}.values())

    def broken(self, cell: Cell) -> dict[str, str]:
        """Why candidates of a cell hang, or break their process, by name."""
        own = (x for x in self.lines if x.get("broken") and x.get("machine") == self.identity)
        return {x["broken"]: x["why"] for x in own if x["of"] == str(cell)}

    def add_broken(self, cell: Cell, name: str, why: str) -> None:
        """Appends a candidate that is not to be run again."""
        self._append({"broken": name, "why": why, "of": str(cell), "machine": self.identity})

    def has(self, contest: Contest) -> bool:
        """Whether all candidates of a cell have been tried, against the same fallback."""
        for record in self.cells:
            if record["cell"] == str(contest.cell) and record["fallback"] == contest.fallback.row:
                shapes = [call.shape for call in contest.calls]
                rows = (candidate.row for candidate in contest.candidates)
                return record["calls"] == shapes and all(row in record["tried"] for row in rows)
        return False

    def add(self, cell: Cell, record: dict[str, Any]) -> None:
        """Appends a cell, and before the first one what a reader needs to know of the run.

        Raises:
            RuntimeError: the file cannot be written.
        """
        if not self.begun:
            self._append({"run": {**self.identity, **self.machine.facts()}})
            self.begun = True
        self._append({"cell": str(cell), "machine": self.identity, **record})

    def table(self) -> Table:
        """The winners, as tiles.json has them."""
        rows: dict[str, list[Any]] = {direction.rows: [] for direction in DIRECTIONS}
        for cell in self.cells:
            if cell["winner"]:
                row = {"row": cell["winner"], "above": cell["above"], "gain": cell["gain"]}
                own = next(x for x in DIRECTIONS if set(x.fields) == set(cell["winner"]))
                rows[own.rows].append(row)
        kind = self.machine.kind()._asdict()
        return {**self.identity, **kind, "cells": len(self.cells), **rows}

    def _append(self, record: dict[str, Any]) -> None:
        try:
            files.make_directory(self.path.parent)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            with open(files.open_regular(self.path, flags), "a+b") as file:
                torn = file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
                file.write(b"\n" * bool(torn) + json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise RuntimeError(
                f"the measurements cannot be written to {self.path}: {error.strerror or error}; "
                "what stands there is kept, and --output names another directory"
            ) from error
        self.lines.append(record)

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            text = files.read(self.path).decode(errors="replace")
        except FileNotFoundError:
            return
        except OSError as error:
            raise RuntimeError(f"{self.path} cannot be read: {error.strerror or error}") from error
        for number, line in enumerate(text.splitlines(), 1):
            if not line:
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not (
                    self.KEYS.issubset(record) or "run" in record or "broken" in record
                ):
                    raise ValueError("it is no record of a cell")
            except ValueError as error:
                warnings.warn(
                    f"{self.path}:{number} is ignored: {error}", RuntimeWarning, stacklevel=2
                )
            else:
                yield record
