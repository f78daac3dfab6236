"""The tuned tile table: rows that ``tune`` measured on this machine, loaded at import.

The file is ``$FA_SM120_TILES`` (empty: none), else ``tune/tiles.json`` in the cache directory::

    {"tables": [{"gpu": "NVIDIA GeForce RTX 5090", "arch": 120, ..., "rows": [
        {"row": {"arch": 120, "head_dim": 128, ...}, "above": {"rows_per_sm": 64, ...}, ...}]}]}

``row`` has the fields of csrc/tiles.h by name. It serves the calls up to its bounds that are
``above`` others: what was measured, and no more. A file that cannot be used never fails an import:
one RuntimeWarning says what is wrong with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flash_attn_sm120 import _C, cache

ANY = -1  # FA_ANY of csrc/tiles.h: a bound that is none
HEAD_DIMS = ("head_dim", "head_dim_v")
BOUNDS = (*HEAD_DIMS, "heads_per_kv", "seqlen_q", "rows_per_sm")
MASKS = ("mask_right", "mask_left")

Row = dict[str, int]  # the fields of csrc/tiles.h
Table = dict[str, Any]  # of one GPU: what it is, and "rows"

_in_use: list[tuple[int, ...]] = []


def path() -> Path | None:
    """The file of the table in use, which need not exist; None where there shall be none."""
    chosen = os.environ.get("FA_SM120_TILES")
    if chosen is None:
        return cache.directory() / "tune" / "tiles.json"
    return Path(os.path.expanduser(chosen)) if chosen else None


def load() -> None:
    """Uses the table from now on; without one, or with one that is broken, csrc/tiles.c alone."""
    file = path()
    rows: list[tuple[int, ...]] = []
    problem = ""
    if file and (os.path.exists(file) or "FA_SM120_TILES" in os.environ):
        try:
            entries, problem = usable(entry for table in read(file) for entry in table["rows"])
            rows = in_order(entries)
            _C.use_tiles(rows)
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            rows, problem = [], f"{error}; no row of it is used"
    _in_use[:] = rows
    _C.use_tiles(rows)
    if problem:
        warnings.warn(
            f"the tuned tiles in {file}: {problem} (python -m flash_attn_sm120 tune makes them "
            "anew, tune --reset removes them)",
            RuntimeWarning,
            stacklevel=2,
        )


def in_use() -> bool:
    """Whether there are rows that come before those of csrc/tiles.c."""
    return bool(_in_use)


@contextlib.contextmanager
def using(rows: Iterable[tuple[int, ...]]) -> Iterator[None]:
    """Other rows in place of the table's for a while."""
    _C.use_tiles(list(rows))
    try:
        yield
    finally:
        _C.use_tiles(_in_use)


# ---- the file ------------------------------------------------------------------------------------


def read(file: Path) -> list[Table]:
    """The tables of a file, one for each GPU.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none of ours; the message says why.
    """
    content = json.loads(file.read_text())
    tables = content.get("tables") if isinstance(content, dict) else None
    if not isinstance(tables, list):
        raise ValueError("it is no table of tiles: it has no list of tables")
    for table in tables:
        if not isinstance(table, dict) or not isinstance(table.get("rows"), list):
            raise ValueError("it has a table without a list of rows")
        if not isinstance(table.get("arch"), int):
            raise ValueError("it has a table that does not say for which arch it is")
        for entry in table["rows"]:
            parts = [entry.get("row"), entry.get("above")] if isinstance(entry, dict) else []
            fields = [n for part in parts if isinstance(part, dict) for n in part.items()]
            if not fields or not all(isinstance(part, dict) for part in parts):
                raise ValueError(f"a row consists of row and above, got {entry!r:.200}")
            if not all(type(n) is int for _, n in fields):
                raise ValueError(f"all fields of a row are whole numbers, got {entry!r:.200}")
    return tables


def write(file: Path, table: Table) -> None:
    """Puts one GPU's table into a file, in place of that of the same major version: rows serve it.

    Raises:
        OSError: the file cannot be written; it is as it was then.
    """
    others: list[Table] = []
    with contextlib.suppress(OSError, ValueError, RecursionError):  # a broken one is replaced
        others = [t for t in read(file) if t["arch"] // 10 != table["arch"] // 10]
    file.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(".tmp", f"{file.stem}.", file.parent)
    try:
        with open(fd, "w") as out:
            json.dump({"tables": [*others, table]}, out, indent=1)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def usable(entries: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The entries whose fields are those of this version, and what is wrong with the others."""
    fields, good, odd = set(_C.tile_fields()), [], set()
    for entry in entries:
        difference = fields ^ set(entry["row"]) | set(entry["above"]) - set(BOUNDS)
        odd |= difference
        if not difference:
            good.append(entry)
    names = ", ".join(sorted(odd))
    return good, f"they are of another version, rows that differ in {names} are left out" * bool(
        odd
    )


# ---- the rows as csrc/plan.c reads them ----------------------------------------------------------


def in_order(entries: Iterable[dict[str, Any]]) -> list[tuple[int, ...]]:
    """The entries as rows for use_tiles(), of which the first that serves a call is taken.

    A row serves all calls up to its bounds. So before each stand the rows of csrc/tiles.c, cut to
    the calls that it is not for: those get what they get without a table.
    """
    built_in = [dict(zip(_C.tile_fields(), row, strict=True)) for row in _C.tiles()]
    rows: dict[tuple[int, ...], None] = {}  # in order, each once
    done: set[tuple[int, ...]] = set()
    for entry in sorted(entries, key=lambda entry: _smallest_first(entry["row"])):
        for bound, above in entry["above"].items():
            region = {**entry["row"], bound: above}
            if bound in HEAD_DIMS:  # one region for all rows of these head dims
                region.update(rows_per_sm=ANY, mask_right=ANY, mask_left=ANY)
            key = tuple(region[name] for name in ("arch", *BOUNDS, *MASKS))
            if key not in done:
                rows.update((as_tuple(row), None) for row in _rows_of(region, built_in))
                done.add(key)
        rows[as_tuple(entry["row"])] = None
    return list(rows)


def _rows_of(region: Row, rows: Iterable[Row]) -> list[Row]:
    """Those of some rows that serve calls of a region which none before them serves, cut to it."""
    cuts: list[Row] = []
    for row in rows:
        cut = _cut(row, region)
        if cut and not any(_covers(earlier, cut) for earlier in cuts):
            cuts.append(cut)
            if _covers(cut, region):
                break
    return cuts


def as_tuple(row: Row) -> tuple[int, ...]:
    """A row as the extension takes it."""
    return tuple(row[field] for field in _C.tile_fields())


def _smallest_first(row: Row) -> list[float]:
    return [_bound(row[key]) for key in (*HEAD_DIMS, "mask_right", "rows_per_sm")]


def _bound(value: int) -> float:
    return float("inf") if value == ANY else value


def _covers(row: Row, other: Row) -> bool:
    """Whether ``row`` serves all calls that ``other`` serves, of the same architecture."""
    return all(_bound(row[key]) >= _bound(other[key]) for key in BOUNDS) and all(
        row[key] in (ANY, other[key]) for key in MASKS
    )


def _cut(row: Row, region: Row) -> Row | None:
    """``row`` for the calls of ``region`` alone; None where it serves none of them."""
    if row["arch"] != ANY and row["arch"] // 10 != region["arch"] // 10:
        return None
    cut = {**row, "arch": region["arch"]}
    for key in BOUNDS:
        cut[key] = min(row[key], region[key], key=_bound)
    for key in MASKS:
        if ANY not in (row[key], region[key]) and row[key] != region[key]:
            return None
        cut[key] = max(row[key], region[key])
    return cut
