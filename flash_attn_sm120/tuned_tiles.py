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
from collections.abc import Iterable, Iterator
from math import inf
from operator import itemgetter
from pathlib import Path
from typing import Any

from flash_attn_sm120 import _C, cache, files

GEFORCE, PRO = "GeForce-like", "PRO-like"
KINDS = ("", GEFORCE, PRO)  # enum fa_card_kind of csrc/device.h: classes of 12.x cards
ANY = -1  # FA_ANY of csrc/tiles.h: a bound that is none
HEAD_DIMS = ("head_dim", "head_dim_v")
BOUNDS = (*HEAD_DIMS, "heads_per_kv", "seqlen_q", "rows_per_sm")

_ORDER = (*HEAD_DIMS, "mask_right", "rows_per_sm")

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
            use_cards(read(file))
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            rows, problem = [], str(getattr(error, "strerror", None) or error)
            _C.use_tiles(rows)
    _in_use[:] = rows
    if problem:
        which = "some" if rows else "all"
        files.warn(
            f"{which} tuned tiles are left out: {files.one_line(problem, 100)}, in {file} "
            "(tune makes it anew, tune --reset removes it)"
        )


def use_cards(tables: Iterable[Table]) -> None:
    """Has cards of unknown names count as what tune measured them to be."""
    for table in tables:
        if table.get("gpu") and table.get("kind") in KINDS[1:]:
            _C.use_card(str(table["gpu"]), KINDS.index(table["kind"]))


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
    content = json.loads(_bytes_of(file))
    tables = content.get("tables") if isinstance(content, dict) else None
    if not isinstance(tables, list):
        raise ValueError("a table of tiles has a list of tables, and this has none")
    for table in tables:
        if not isinstance(table, dict) or not isinstance(table.get("rows"), list):
            raise ValueError(f"a table has a list of rows, got {table!r:.40}")
        if not isinstance(table.get("arch"), int):
            raise ValueError(f"a table says for which arch it is, got {table.get('arch')!r:.40}")
        for entry in table["rows"]:
            parts = [entry.get("row"), entry.get("above")] if isinstance(entry, dict) else [None]
            for part in parts:
                if not isinstance(part, dict):
                    raise ValueError(f"a row consists of row and above, got {entry!r:.40}")
                if not {*map(type, part.values())} <= {int}:
                    raise ValueError(f"the fields of a row are whole numbers, got {part!r:.40}")
    return tables


def _bytes_of(file: Path) -> bytes:
    """A file that the user named is taken as it is; that of the cache directory must be trusted."""
    if os.environ.get("FA_SM120_TILES") or file != path():
        return files.read(file)
    with files.open_trusted(file.parent) as where:
        return files.read_trusted(file.name, where)


def write(file: Path, table: Table) -> None:
    """Puts one GPU's table into a file, in place of that of the same major version: rows serve it.

    Raises:
        OSError: the file cannot be written; it is as it was then.
    """
    others: list[Table] = []
    with contextlib.suppress(OSError, ValueError, RecursionError):  # a broken one is replaced
        others = [t for t in read(file) if t["arch"] // 10 != table["arch"] // 10]
    files.make_directory(file.parent)
    with files.Directory(file.parent) as where:
        content = json.dumps({"tables": [*others, table]}, indent=1)
        files.write(file.name, content.encode(), where)


def usable(entries: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The entries whose fields are those of this version, and what is wrong with the others."""
    fields, good, odd = set(_C.tile_fields()), [], set()
    for entry in entries:
        difference = fields ^ set(entry["row"]) | set(entry["above"]) - set(BOUNDS)
        odd |= difference
        if not difference:
            good.append(entry)
    names = ", ".join(sorted(odd))
    return good, f"rows of another version, which differ in {names}" if odd else ""


# ---- the rows as csrc/plan.c reads them ----------------------------------------------------------


def in_order(entries: Iterable[dict[str, Any]]) -> list[tuple[int, ...]]:
    """The entries as rows for use_tiles(), of which the first that serves a call is taken."""
    numbers, nothing = itemgetter(*_C.tile_fields()), dict.fromkeys(BOUNDS, 0)
    return [
        (*numbers(entry["row"]), *(nothing | entry["above"]).values())
        for entry in sorted(entries, key=lambda entry: _smallest_first(entry["row"]))
    ]


def as_tuple(row: Row) -> tuple[int, ...]:
    """A row as the extension takes it."""
    return tuple(row[field] for field in _C.tile_fields())


def _smallest_first(row: Row) -> list[float]:
    return [inf if row[key] == ANY else row[key] for key in _ORDER]
