"""Where do the benchmarks stand? Writes the table of NOTES.md from the records in results/.

    python benchmarks/where_it_stands.py            # after a file in results/ has changed
    python benchmarks/where_it_stands.py --check    # exit status 1 if the table is not current

A ratio is the peer's time over ours. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOTES = HERE / "NOTES.md"
BEGIN = "<!-- begin: benchmarks/where_it_stands.py writes this -->"
END = "<!-- end -->"

OURS, DETERMINISTIC, FLASH, CUDNN = "ours", "ours-deterministic", "sdpa-flash", "sdpa-cudnn"

Record = dict  # a line of a results file
Cell = dict[str, Record]  # contestant -> its record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    text = NOTES.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    current = f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END, 1)[1]}"
    if not args.check:
        NOTES.write_text(current, encoding="utf-8")
    elif current != text:
        print(f"the table of {NOTES} is not current: run python benchmarks/where_it_stands.py")
        return 1
    return 0


def tables() -> str:
    files = {path.stem: load(path) for path in sorted(HERE.glob("results/*.jsonl"))}
    grids, beside, decoding, host = [], [], [], []
    for name, (header, records) in files.items():
        if header["benchmark"] == "overhead":
            host += host_rows(records)
        elif header["benchmark"] == "decode":
            decoding.append(decoding_row(name, cells(records, ("preset", "batch", "seqlen_k"))))
        else:
            measured = cells(records, ("presets", "seqlen", "causal"))
            grids += grid_rows(name, measured)
            beside += beside_128(name, measured)
    grid_head = ("results/", "cells", "all", "full, causal", "by head dim", "least", "spread")
    decoding_head = ("results/", "cells", "geomean", "least", "most", "gain by splits", "GB/s")
    parts = [
        "Ratio to SDPA flash. The spread of a cell is the larger one of the two contestants'",
        "(interquartile range over median); here the median and the largest of all cells.\n",
        markdown(grid_head, grids),
        *beside,
        "\nDecoding, one query: ratio to the faster of SDPA flash and SDPA cuDNN.\n",
        markdown(decoding_head, decoding),
        "\nHost and first calls:\n",
        markdown(("what", "median", "low to high", "unit"), host),
        "\nWhat made them:\n",
        *(f"- `{name}`: {origin(header)}" for name, (header, _) in files.items()),
    ]
    return "\n".join(parts)


def load(path: Path) -> tuple[Record, list[Record]]:
    header, *records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return header, records


def origin(header: Record) -> str:
    """What made a file, in one line."""
    settings = " ".join(f"{name}={value}" for name, value in sorted(header["environment"].items()))
    command = header["command"].replace(" --output", "\n--output").splitlines()[0]
    machine = f"{header['gpu']}, torch {header['torch']}, cuDNN {header['cudnn']}"
    return f"{machine}, {header['date'][:10]}, {header['commit'][:7]}\n  `{settings} {command}`"


def cells(records: Iterable[Record], key: tuple[str, ...]) -> list[Cell]:
    """The records of each cell by contestant, in the order in which they were measured."""
    found: dict[str, Cell] = {}
    for record in records:
        where = json.dumps([record[name] for name in key])
        found.setdefault(where, {})[record["contestant"]] = record
    return list(found.values())


def ratio(cell: Cell, peers: tuple[str, ...] = (FLASH,), name: str = OURS) -> float | None:
    """The time of the fastest of the peers that can run the cell over a contestant's."""
    times = [cell[peer]["ms"] for peer in peers if "ms" in cell[peer]]
    return min(times) / cell[name]["ms"] if times else None


# ---------------------------------------------------------------------------------------- tables


def grid_rows(file: str, every: list[Cell]) -> list[tuple[str, ...]]:
    """A file of forward.py or backward.py; and its deterministic backward over the default."""
    measured = [cell for cell in every if ratio(cell)]
    rows = [(f"`{file}`", *grid_columns(measured, (FLASH,), OURS))]
    if DETERMINISTIC in every[0]:
        columns = grid_columns(every, (OURS,), DETERMINISTIC)
        rows.append(("its `deterministic` beside the default", *columns))
    return rows


def beside_128(file: str, every: list[Cell]) -> list[str]:
    """Our TFLOPS of other head dims beside those of 128, where a grid is made for that."""
    tflops = {(head_dims(c[OURS]), c[OURS]["causal"]): c[OURS]["tflops"] for c in every}
    if len(tflops) < len(every):  # a grid of several lengths
        return []
    ranked = sorted((t / tflops["128", causal], d, causal) for (d, causal), t in tflops.items())
    least, most = (
        f"{value:.3f} (D {d}, {mask(causal)})" for value, d, causal in (ranked[0], ranked[-1])
    )
    return [f"\n`{file}`, our TFLOPS beside those of D 128: {least} to {most}."]


def grid_columns(measured: list[Cell], peers: tuple[str, ...], name: str) -> tuple[str, ...]:
    ratios = [ratio(cell, peers, name) for cell in measured]
    by_mask = [
        mean(r for r, cell in zip(ratios, measured, strict=True) if cell[OURS]["causal"] == causal)
        for causal in (False, True)
    ]
    by_dims: dict[str, list[float]] = {}
    for r, cell in zip(ratios, measured, strict=True):
        by_dims.setdefault(head_dims(cell[OURS]), []).append(r)
    dims = ", ".join(f"{d} {statistics.geometric_mean(rs):.2f}" for d, rs in by_dims.items())
    least, where = min(zip(ratios, map(place, measured), strict=True))
    spreads = [max(cell[c]["spread"] for c in (name, *peers)) for cell in measured]
    spread = f"{statistics.median(spreads):.1%}, {max(spreads):.1%}"
    return (
        str(len(measured)),
        mean(ratios),
        ", ".join(by_mask),
        dims,
        f"{least:.3f} ({where})",
        spread,
    )


def decoding_row(file: str, measured: list[Cell]) -> tuple[str, ...]:
    measured = [cell for cell in measured if ratio(cell, (FLASH, CUDNN))]
    ratios = [ratio(cell, (FLASH, CUDNN)) for cell in measured]
    places = [
        f"{r['preset']}, {r['seqlen_k']} keys, batch {r['batch']}"
        for r in (cell[OURS] for cell in measured)
    ]
    ranked = sorted(zip(ratios, places, strict=True))
    least, most = (f"{value:.2f} ({where})" for value, where in (ranked[0], ranked[-1]))
    gains = [cell["unsplit"]["ms"] / cell[OURS]["ms"] for cell in measured if "unsplit" in cell]
    gain = f"up to {max(gains):.1f}" if gains else ""
    rate = max(cell[OURS]["gb_per_s"] for cell in measured)
    numbers = (str(len(measured)), mean(ratios), least, most)
    return (f"`{file}`", *numbers, gain, f"up to {rate:.0f}")


def host_rows(records: list[Record]) -> list[tuple[str, ...]]:
    def number(x: float) -> str:
        return f"{x:.3g}"

    return [
        (r["what"], number(r["median"]), f"{number(r['low'])} to {number(r['high'])}", r["unit"])
        for r in records
    ]


def head_dims(record: Record) -> str:
    d, d_v = record["head_dim"], record["head_dim_v"]
    return f"{d}" if d == d_v else f"{d}, {d_v}"


def mask(causal: bool) -> str:
    return "causal" if causal else "full"


def place(cell: Cell) -> str:
    record = cell[OURS]
    return f"{record['presets'][0]}, S {record['seqlen']}, {mask(record['causal'])}"


def mean(ratios: Iterable[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.3f}"


def markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
