"""The tuned tile table: rows that ``tune`` measured on this machine, loaded at import.

The file is ``$FA_SM120_TILES`` (empty: none), else ``tune/tiles.json`` in the cache directory::

    {"tables": [{"gpu": "NVIDIA GeForce RTX 5090", "arch": 120, ..., "rows": [
        {"row": {"arch": 120, "head_dim": 128, ...}, "above": {"rows_per_sm": 64, ...}, ...}]}]}

``row`` has the fields of csrc/tiles.h by name. It serves the calls up to its bounds that are
``above`` others: what was measured, and no more. ``backward_rows`` are those of the backward,
``recipe_rows`` those of quantised attention (``recipe_tiles.py``). A
file that cannot be used never fails an import: one RuntimeWarning says what is wrong with it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from math import inf
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from flash_attn_sm120 import _C, cache, files, recipe_tiles

GEFORCE, PRO = "GeForce-like", "PRO-like"
KINDS = ("", GEFORCE, PRO)  # enum fa_card_kind of csrc/device.h: classes of 12.x cards
ANY = -1  # FA_ANY of csrc/tiles.h: a bound that is none

Row = dict[str, int]  # the fields of csrc/tiles.h
Table = dict[str, Any]  # of one GPU: what it is, and "rows" and "backward_rows"


class Direction(NamedTuple):
    """The rows of a direction, as csrc/tiles.h has them."""

    rows: str  # what a table calls them
    key: tuple[str, ...]  # which calls a row serves
    tile: tuple[str, ...]  # what they get
    bounds: tuple[str, ...]  # of which `above` has some
    order: tuple[str, ...]  # by which rows are sorted, the smallest calls first
    use: Callable[[Any], None]

    @property
    def fields(self) -> tuple[str, ...]:
        return self.key + self.tile


def _split(fields: tuple[str, ...], first_of_tile: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    first = fields.index(first_of_tile)
    return fields[:first], fields[first:]


_DIMS = ("head_dim", "head_dim_v")
FORWARD = Direction(
    "rows",
    *_split(_C.tile_fields(), "tile_n"),
    (*_DIMS, "heads_per_kv", "seqlen_q", "rows_per_sm"),
    (*_DIMS, "mask_right", "rows_per_sm"),
    _C.use_tiles,
)
BACKWARD = Direction(
    "backward_rows",
    *_split(_C.backward_tile_fields(), "warps"),
    ("head_dim", "keys_per_sm"),
    ("head_dim", "mask_right", "keys_per_sm"),
    _C.use_backward_tiles,
)
RECIPE = Direction(
    "recipe_rows",
    recipe_tiles.Key._fields,
    recipe_tiles.Tile._fields,
    recipe_tiles.BOUNDS,
    (*_DIMS, "mask_right", "rows_per_sm"),
    recipe_tiles.use,
)
DIRECTIONS = (FORWARD, BACKWARD, RECIPE)

_in_use: dict[Direction, list[tuple[int, ...]]] = {direction: [] for direction in DIRECTIONS}


def path() -> Path | None:
    """The file of the table in use, which need not exist; None where there shall be none."""
    chosen = os.environ.get("FA_SM120_TILES")
    if chosen is None:
        return cache.directory() / "tune" / "tiles.json"
    return Path(os.path.expanduser(chosen)) if chosen else None


def load() -> None:
    """Uses the table from now on; without one, or with one that is broken, csrc/tiles.c alone."""
    file = path()
    problems: list[str] = []
    _use({})
    if file and (os.path.exists(file) or "FA_SM120_TILES" in os.environ):
        try:
            tables, found = read(file), {}
            for direction in DIRECTIONS:
                rows = (entry for table in tables for entry in table.get(direction.rows, ()))
                entries, problem = usable(rows, direction)
                found[direction] = in_order(entries, direction)
                problems += [problem] * bool(problem)
            _use(found)
            use_cards(tables)
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            problems = [str(getattr(error, "strerror", None) or error)]
            _use({})
    if problems:
        which = "some" if in_use() else "all"
        files.warn(
            f"{which} tuned tiles are left out: {files.one_line(problems[0], 100)}, in {file} "
            "(tune makes it anew, tune --reset removes it)"
        )


def _use(rows: dict[Direction, list[tuple[int, ...]]]) -> None:
    for direction in DIRECTIONS:
        own = rows.get(direction, [])
        direction.use(own)
        _in_use[direction][:] = own


def use_cards(tables: Iterable[Table]) -> None:
    """Has cards of unknown names count as what tune measured them to be."""
    for table in tables:
        if table.get("gpu") and table.get("kind") in KINDS[1:]:
            _C.use_card(str(table["gpu"]), KINDS.index(table["kind"]))


def in_use() -> bool:
    """Whether there are rows that come before those of csrc/tiles.c."""
    return any(_in_use.values())


@contextlib.contextmanager
def using(rows: Iterable[tuple[int, ...]]) -> Iterator[None]:
    """Other rows in place of the table's for a while, of the forward; none of the others."""
    FORWARD.use(list(rows))
    BACKWARD.use(())
    RECIPE.use(())
    try:
        yield
    finally:
        for direction, own in _in_use.items():
            direction.use(own)


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
        for entry in itertools.chain(*(table.get(own.rows, ()) for own in DIRECTIONS)):
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


def usable(
    entries: Iterable[dict[str, Any]], direction: Direction = FORWARD
) -> tuple[list[dict[str, Any]], str]:
    """The entries whose fields are those of this version, and what is wrong with the others."""
    fields, good, odd = set(direction.fields), [], set()
    for entry in entries:
        difference = fields ^ set(entry["row"]) | set(entry["above"]) - set(direction.bounds)
        odd |= difference
        if not difference:
            good.append(entry)
    names = ", ".join(sorted(odd))
    return good, f"rows of another version, which differ in {names}" if odd else ""


# ---- the rows as csrc/tile_rows.c reads them -----------------------------------------------------


def in_order(
    entries: Iterable[dict[str, Any]], direction: Direction = FORWARD
) -> list[tuple[int, ...]]:
    """The entries as rows for use_tiles(), of which the first that serves a call is taken."""
    numbers, nothing = itemgetter(*direction.fields), dict.fromkeys(direction.bounds, 0)
    return [
        (*numbers(entry["row"]), *(nothing | entry["above"]).values())
        for entry in sorted(entries, key=lambda entry: _smallest_first(entry["row"], direction))
    ]


def as_tuple(row: Row, direction: Direction = FORWARD) -> tuple[int, ...]:
    """A row as the extension takes it."""
    return tuple(row[field] for field in direction.fields)


def _smallest_first(row: Row, direction: Direction) -> list[float]:
    return [inf if row[key] == ANY else row[key] for key in direction.order]
