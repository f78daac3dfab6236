"""``python -m flash_attn_sm120 tune``: the tile table of the GPU at hand, measured.

A cell is what one row of the table can tell apart: head dims, causal or full, and a bucket of query
rows per multiprocessor. In each cell every tile that might do is compiled, run once and compared
with what csrc/tiles.c would choose, the fallback. Those that are right are timed beside it:

- Round-robin, so that drifting clocks hit all alike; what counts is each candidate's ratio to the
  fallback in the same round. A soak goes before. A sample is one call whose L2 was overwritten: of
  calls in a row all but the first find K and V there, which flatters the TMA.
- In rounds of elimination: few samples of many candidates, then many of few. Tiles compete with K
  and V brought by cp.async; the best of them then also by the TMA, where there is one.
- A candidate is accepted at MIN_GAIN over the calls of the cell, if it makes none of them slower
  and its ratios scatter by no more than MAX_SPREAD.

Tiles that spill registers are not sought out: they compile, and lose against the clock.

Every cell is appended to ``<gpu>-<arch>.jsonl`` as soon as it is done. ``tiles.json`` is made of
all cells in that file, those of earlier runs included, and is loaded at import from then on.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from flash_attn_sm120 import _C, cache, common_kernels, jit, tuned_tiles
from flash_attn_sm120.interface import flash_attn_func
from flash_attn_sm120.plan import Plan, explain
from flash_attn_sm120.tuned_tiles import ANY, Row

MIN_GAIN = 1.02  # fallback's time over candidate's, geometric mean over the calls of a cell
MIN_GAIN_OF_A_CALL = 0.99
MAX_SPREAD = 0.10  # interquartile range of the ratios, as a part of their median

ELIMINATION = ((5, 12), (15, 4))  # rounds, and how many candidates stay
ELIMINATION_OF_FEEDS = ((15, 3),)
FINAL_ROUNDS = 80

# Two outputs in bf16 may differ by a unit in the last place, 2^-7 of a number; and here and there
# by more, because other tiles round p beside another maximum.
TOLERANCE = 2**-5  # of the largest element of an output row


# ---- what is tuned -------------------------------------------------------------------------------


class Bucket(NamedTuple):
    """Calls with `above` < query rows per multiprocessor <= `upto`."""

    above: int
    upto: int
    seqlens: tuple[int, ...]  # of the calls that are measured

    def heads(self, seqlen: int, sms: int) -> tuple[int, int]:
        """(seqlen, heads) of a call in the bucket: as many heads as there is room for."""
        rows = (UNBOUNDED_ROWS_PER_SM if self.upto == ANY else self.upto) * sms
        seqlen = min(seqlen, rows)
        return seqlen, rows // seqlen


BUCKETS = (
    Bucket(0, 64, (512, 2048)),
    Bucket(64, 128, (512, 2048)),
    Bucket(128, 256, (1024, 4096)),
    Bucket(256, ANY, (4096, 8192)),
)
UNBOUNDED_ROWS_PER_SM = 1024


class Cell(NamedTuple):
    """Calls that one row of the table serves."""

    head_dim: int
    head_dim_v: int
    causal: bool
    bucket: Bucket

    def __str__(self) -> str:
        dims = f"{self.head_dim}" + f",{self.head_dim_v}" * (self.head_dim != self.head_dim_v)
        rows = f"> {self.bucket.above}" if self.bucket.upto == ANY else f"<= {self.bucket.upto}"
        return f"head_dim {dims} {'causal' if self.causal else 'full'} rows/SM {rows}"

    def key(self, arch: int) -> Row:
        """The fields of a row that say which calls it serves; those not named are of any."""
        return {
            "arch": arch,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "heads_per_kv": ANY,
            "seqlen_q": ANY,
            "rows_per_sm": self.bucket.upto,
            "mask_right": int(self.causal),
            "mask_left": 0,
        }

    def above(self) -> Row:
        """The largest calls below those of the cell, in each direction."""
        bounds = {
            "head_dim": self.head_dim - 8,
            "head_dim_v": self.head_dim_v - 8,
            "rows_per_sm": self.bucket.above,
        }
        return {bound: value for bound, value in bounds.items() if value}


def cells(head_dims: Iterable[tuple[int, int]]) -> list[Cell]:
    return [Cell(*d, c, b) for d, c, b in itertools.product(head_dims, (False, True), BUCKETS)]


# Fields of csrc/tiles.h and what to try in them; all others stay as the fallback has them.
CANDIDATES = {
    "tile_n": (16, 32, 64, 128),
    "sub_n": (16, 32, 64),
    "warps": (2, 4, 8),
    "warp_m": (16, 32),
    "stages": (2, 3, 4, 6),
}
QUICK_CANDIDATES = {
    "tile_n": (32, 64),
    "sub_n": (16, 32, 64),
    "warps": (4, 8),
    "warp_m": (16, 32),
    "stages": (2, 3),
}


# How K and V come to shared memory, by the names that csrc/tiles.c has for it.
CP_ASYNC = {"kernel": 0, "producer": 0}
FEEDS = {
    "CP_ASYNC": CP_ASYNC,
    "TMA_BARRIER": {"kernel": 1, "producer": 0},
    "TMA_THREAD": {"kernel": 1, "producer": 1},
    "TMA_WARP": {"kernel": 1, "producer": 2},
}


def candidates(cell: Cell, fallback: Row, arch: int, choices: dict[str, Any]) -> Iterator[Row]:
    """Rows for a cell that may be worth compiling; whether they fit the device is not asked yet."""
    for values in itertools.product(*choices.values()):
        row = fallback | cell.key(arch) | CP_ASYNC | dict(zip(choices, values, strict=True))
        if _promising(row, cell):
            yield row


def _promising(row: Row, cell: Cell) -> bool:
    """Sorts out, without a compiler, what cannot run or would be slow on every GPU."""
    tile_m, ring = row["warps"] * row["warp_m"], row["stages"] * row["tile_n"]
    # Registers that a thread holds throughout: O, Q, the scores in fp32 and again in 16 bits.
    held = row["warp_m"] * (
        cell.head_dim_v / 32 + cell.head_dim / 64 + row["sub_n"] / 32 + row["sub_n"] / 64
    )
    return (
        row["tile_n"] % row["sub_n"] == 0
        and 64 <= ring <= 256  # fewer keys do not hide the latency of memory, more hide nothing
        and held <= 224  # of 255
        and row["warp_m"] * row["sub_n"] >= 512  # fewer mma at a time leave the tensor cores idle
        and (row["warps"] > 2 or cell.bucket.upto == BUCKETS[0].upto)
        and (cell.bucket.upto == ANY or tile_m <= 2 * cell.bucket.upto)
    )


# ---- contenders ----------------------------------------------------------------------------------


class Call(NamedTuple):
    """The inputs of a measured call."""

    q: Any
    k: Any
    v: Any
    causal: bool

    def plan(self, rows: Sequence[tuple[int, ...]]) -> Plan:
        """How the call is carried out where ``rows`` come before csrc/tiles.c."""
        _C.use_tiles(rows)
        return explain(self.q, self.k, self.v, causal=self.causal, num_splits=1)

    def takes(self, row: tuple[int, ...]) -> Plan | None:
        """The plan with ``row``; None where the row does not serve the call, or does not fit."""
        try:
            plan = self.plan([row])
        except ValueError:  # a tile that no kernel has
            return None
        return plan if "use_tiles" in plan.reasons["tile"] else None


class Contender(NamedTuple):
    """A tile on a call; the fallback has no rows of its own."""

    call: Call
    rows: tuple[tuple[int, ...], ...]
    plan: Plan

    def run(self) -> Any:
        _C.use_tiles(self.rows)
        call = self.call
        return flash_attn_func(call.q, call.k, call.v, causal=call.causal, num_splits=1)[0]


class Machine:
    """The GPU: makes tensors, compiles, and tells the time.

    Raises:
        RuntimeError: there is none, or none that can be tuned.
    """

    SOAK_S = 0.15  # clocks and caches of code settle before anything counts
    MIN_FLUSH_BYTES = 256 << 20  # so that a flush takes longer than the host needs for a call

    def __init__(self) -> None:
        if os.environ.get("FA_SM120_PLAN_AS"):
            raise RuntimeError("tune measures a GPU by its own rules: unset FA_SM120_PLAN_AS")
        try:
            self.driver_version, devices = _C.devices()
        except RuntimeError as error:
            raise RuntimeError(f"tune measures on a GPU, and finds none: {error}") from error
        if not devices:
            raise RuntimeError("tune measures on a GPU, and the driver has none")
        self.device = devices[0]
        self.arch = self.device["arch"]

    # ---- what it is

    def identity(self) -> dict[str, Any]:
        """What measurements must have in common to stand in one table."""
        from flash_attn_sm120 import __version__

        kernels = hashlib.sha256(repr(_C.tile_fields()).encode())
        for file in sorted(jit.kernel_directory().glob("*.*")):
            kernels.update(file.read_bytes())
        return {
            "gpu": self.device["name"],
            "arch": self.arch,
            "sms": self.device["sms"],
            "flash_attn_sm120": __version__,
            "kernels": kernels.hexdigest()[:12],
            "limits": os.environ.get("FA_SM120_LIMITS") or None,
            "samples": "single calls, cold L2",
        }

    def facts(self) -> dict[str, Any]:
        """What else a reader of the measurements wants to know; None where it is not known."""
        wanted = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
        gpu = "0"
        if torch.cuda.is_available():  # CUDA_VISIBLE_DEVICES means nothing to nvidia-smi
            gpu = f"GPU-{getattr(torch.cuda.get_device_properties(0), 'uuid', '')}"
        query = ["nvidia-smi", f"--query-gpu={','.join(wanted)}", "--format=csv,noheader"]
        try:
            done = subprocess.run(
                [*query, f"--id={gpu}"], capture_output=True, text=True, timeout=20
            )
            values = done.stdout.strip().split(", ") if done.returncode == 0 else []
        except (OSError, subprocess.TimeoutExpired):
            values = []
        return {
            **dict(itertools.zip_longest(wanted, values[: len(wanted)])),
            "driver_cuda": self.driver_version,
            "torch": torch.__version__,
            "nvrtc": ".".join(map(str, jit.nvrtc_version())),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }

    # ---- what it does

    def tensor(self, *shape: int) -> Any:
        """Random: zeros would draw less power and run faster than real data."""
        if not torch.cuda.is_available():
            raise RuntimeError("tune needs a torch that can use the GPU: torch.cuda says it cannot")
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    def compile(self, plan: Plan) -> None:
        """Has the kernel of a plan compiled into the cache.

        Raises:
            RuntimeError: it does not compile.
        """
        name = str(plan.variant)
        jit.compile(plan.kernel, name, plan.options, self.arch, self.driver_version)

    def samples(self, contenders: Sequence[Contender], rounds: int) -> list[list[float]]:
        """Milliseconds of a call with a cold L2, for each contender and round, round-robin."""
        self._soak(contenders)
        flush_bytes = max(self.MIN_FLUSH_BYTES, 4 * self.device["l2_bytes"])
        flush = torch.empty(flush_bytes, dtype=torch.int8, device="cuda")
        events = [[(_event(), _event()) for _ in range(rounds)] for _ in contenders]
        flush.zero_()  # a head start for the host, which stays ahead from then on
        for i in range(rounds):
            for contender, (start, end) in zip(contenders, (own[i] for own in events), strict=True):
                flush.zero_()
                start.record()
                contender.run()
                end.record()
        torch.cuda.synchronize()
        return [[start.elapsed_time(end) for start, end in own] for own in events]

    def _soak(self, contenders: Sequence[Contender]) -> None:
        """Runs all in turn for a while."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        while time.perf_counter() - begin < self.SOAK_S:
            for contender in contenders:
                contender.run()
            torch.cuda.synchronize()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


# ---- one cell ------------------------------------------------------------------------------------


class Entrant(NamedTuple):
    """A candidate row, and the contender that it is on each call of the cell."""

    row: Row
    on: tuple[Contender, ...]


class Score(NamedTuple):
    """How a candidate did beside the fallback, on each call."""

    ms: list[float]
    gains: list[float]  # median of fallback's time over its own in the same round
    spreads: list[float]  # interquartile range of those, as a part of the median

    @property
    def gain(self) -> float:
        return math.exp(statistics.fmean(map(math.log, self.gains)))

    @property
    def verdict(self) -> str:
        if max(self.spreads) > MAX_SPREAD:
            return "noisy"
        good = self.gain >= MIN_GAIN and min(self.gains) >= MIN_GAIN_OF_A_CALL
        return "accepted" if good else "no faster"


class Contest:
    """The candidates of a cell, on their way from the drawing board to a winner."""

    def __init__(self, machine: Machine, cell: Cell, choices: dict[str, Any]) -> None:
        self.machine, self.cell = machine, cell
        self.calls = tuple(self._call(seqlen) for seqlen in cell.bucket.seqlens)
        self.fallbacks = tuple(Contender(call, (), call.plan(())) for call in self.calls)
        self.fallback = self._fallback_row()
        rows = candidates(cell, self.fallback, machine.arch, choices)
        self.entrants = [entrant for row in rows if (entrant := self._entrant(row))]
        self.outcome: dict[str, str] = {}  # of the candidates that were stopped, by variant

    def _call(self, seqlen: int) -> Call:
        seqlen, heads = self.cell.bucket.heads(seqlen, self.machine.device["sms"])
        dims = (self.cell.head_dim, self.cell.head_dim, self.cell.head_dim_v)
        q, k, v = (self.machine.tensor(1, seqlen, heads, dim) for dim in dims)
        return Call(q, k, v, self.cell.causal)

    def _fallback_row(self) -> Row:
        """The row of csrc/tiles.c that serves the first call: the first one that alone would."""
        row = next(row for row in _C.tiles() if self.calls[0].takes(row))
        return dict(zip(_C.tile_fields(), row, strict=True))

    def _entrant(self, row: Row) -> Entrant | None:
        """None for a row that does not serve all calls, or is the fallback by another name."""
        own = tuned_tiles.as_tuple(row)
        plans = [call.takes(own) for call in self.calls]
        if all(
            p and p.variant == f.plan.variant for p, f in zip(plans, self.fallbacks, strict=True)
        ):
            return None
        pairs = zip(self.calls, plans, strict=True)
        on = tuple(Contender(call, (own,), plan) for call, plan in pairs if plan)
        return Entrant(row, on) if len(on) == len(self.calls) else None

    def compile(self, progress: Callable[[str], None]) -> None:
        """Compiles all, over all cores; drops what does not compile."""

        def attempt(plan: Plan) -> str:
            try:
                self.machine.compile(plan)
            except RuntimeError as error:
                return str(error)
            return ""

        plans = {str(c.plan.variant): c.plan for entrant in self.entrants for c in entrant.on}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                for i, why in enumerate(pool.map(attempt, plans.values())):
                    progress(f"compiled {i + 1} of {len(plans)}")
                    if why:
                        self._stop(list(plans)[i], f"does not compile: {why}")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self._drop_stopped()

    def check(self) -> None:
        """Runs all once; drops what fails, or differs from the fallback by more than rounding."""
        for i, fallback in enumerate(self.fallbacks):
            expected = fallback.run().float()
            allowed = TOLERANCE * expected.abs().amax(-1)
            for entrant in self.entrants:
                try:
                    error = (entrant.on[i].run().float() - expected).abs().amax(-1)
                    right = bool((error <= allowed).all())  # NaN is wrong, too
                except RuntimeError as failure:
                    self._stop(_name(entrant), f"does not run: {failure}")
                    fallback.run().sum().item()  # raises if the GPU does nothing any more
                    continue
                if not right:
                    worst = error.max().item()
                    self._stop(_name(entrant), f"WRONG: differs from the fallback by {worst:.3g}")
        self._drop_stopped()

    def _stop(self, variant: str, why: str) -> None:
        self.outcome[variant] = why
        if "WRONG" in why:
            tqdm.write(f"{variant} {why}: it is not used; please report it", file=sys.stderr)

    def _drop_stopped(self) -> None:
        self.entrants = [e for e in self.entrants if _name(e) not in self.outcome]

    def measure(self, entrants: Sequence[Entrant], rounds: int) -> list[Score]:
        """The scores of some candidates, in samples that they and the fallback take in turn."""
        scores = [Score([], [], []) for _ in entrants]
        for i, fallback in enumerate(self.fallbacks):
            contenders = [fallback, *(entrant.on[i] for entrant in entrants)]
            base, *samples = self.machine.samples(contenders, rounds)
            for score, own in zip(scores, samples, strict=True):
                ratios = [b / o for b, o in zip(base, own, strict=True)]
                q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
                score.ms.append(statistics.median(own))
                score.gains.append(median)
                score.spreads.append((q3 - q1) / median)
        return scores

    def compete(self, progress: Callable[[str], None]) -> list[tuple[Entrant, Score]]:
        """The candidates that came to the last round, the best one first."""
        finalists = self._eliminate(self.entrants, ELIMINATION, progress)
        finalists += self._fed_by_the_tma(finalists, progress)
        finalists = self._eliminate(finalists, ELIMINATION_OF_FEEDS, progress)
        progress(f"measuring {len(finalists)} tiles")
        scored = zip(finalists, self.measure(finalists, FINAL_ROUNDS), strict=True)
        return sorted(scored, key=lambda pair: -pair[1].gain)

    def _eliminate(
        self,
        entrants: Sequence[Entrant],
        elimination: Iterable[tuple[int, int]],
        progress: Callable[[str], None],
    ) -> list[Entrant]:
        left = list(entrants)
        for rounds, keep in elimination:
            if len(left) > keep:
                progress(f"screening {len(left)} tiles")
                scored = zip(left, self.measure(left, rounds), strict=True)
                ranked = sorted(scored, key=lambda pair: -pair[1].gain)
                left = [entrant for entrant, _ in ranked[:keep]]
        return left

    def _fed_by_the_tma(
        self, entrants: Sequence[Entrant], progress: Callable[[str], None]
    ) -> list[Entrant]:
        """The same tiles with the other feeds, as far as the GPU has them: compiled and right."""
        rows = (entrant.row | feed for entrant in entrants for feed in FEEDS.values())
        twins = {_name(twin): twin for row in rows if (twin := self._entrant(row))}
        known = {_name(entrant) for entrant in entrants}  # what a row without a TMA comes down to
        self.entrants = [twin for name, twin in twins.items() if name not in known]
        self.compile(progress)
        self.check()
        return self.entrants


def _name(entrant: Entrant) -> str:
    return str(entrant.on[0].plan.variant)


def tune_cell(contest: Contest, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measures a cell; what the file says of it."""
    tried = [entrant.row for entrant in contest.entrants]
    contest.compile(progress)
    contest.check()
    results = contest.compete(progress) if contest.entrants else []
    accepted = [(entrant, s) for entrant, s in results if s.verdict == "accepted"]
    winner, score = accepted[0] if accepted else (None, None)
    return {
        "fallback": contest.fallback,
        "winner": winner.row if winner else None,
        "above": contest.cell.above(),
        "gain": round(score.gain, 4) if score else 1.0,
        "calls": [list(call.q.shape) for call in contest.calls],
        "results": [
            {"row": e.row, **s._asdict(), "gain": s.gain, "verdict": s.verdict} for e, s in results
        ],
        "stopped": contest.outcome,
        "tried": tried,
    }


# ---- the files -----------------------------------------------------------------------------------


class Journal:
    """The measurements of one kind of GPU, a line for each cell."""

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

    def has(self, contest: Contest) -> bool:
        """Whether all candidates of a cell have been tried, against the same fallback."""
        for record in self.cells:
            if record["cell"] == str(contest.cell) and record["fallback"] == contest.fallback:
                shapes = [list(call.q.shape) for call in contest.calls]
                rows = (entrant.row for entrant in contest.entrants)
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

    def table(self) -> tuned_tiles.Table:
        """The winners, as tiles.json has them."""
        rows = [
            {"row": cell["winner"], "above": cell["above"], "gain": cell["gain"]}
            for cell in self.cells
            if cell["winner"]
        ]
        return {**self.identity, "cells": len(self.cells), "rows": rows}

    def _append(self, record: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
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
            text = self.path.read_text(errors="replace")
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
                    self.KEYS.issubset(record) or "run" in record
                ):
                    raise ValueError("it is no record of a cell")
            except ValueError as error:
                warnings.warn(
                    f"{self.path}:{number} is ignored: {error}", RuntimeWarning, stacklevel=2
                )
            else:
                yield record


# ---- the command ---------------------------------------------------------------------------------


def tune(machine: Machine, wanted: Sequence[Cell], choices: dict[str, Any], where: Path) -> int:
    """Measures the cells that are not in the journal yet, and writes the table.

    Returns:
        An exit status: 0, 1 where a kernel was wrong, 130 if interrupted.

    Raises:
        RuntimeError: a file cannot be written, or the GPU fails.
    """
    name = re.sub(r"\W+", "-", machine.device["name"]).strip("-").lower()
    journal = Journal(where / f"{name}-{machine.arch}.jsonl", machine)
    status = 0
    with tuned_tiles.using(()), tqdm(wanted, unit="cell", dynamic_ncols=True) as bar:
        try:
            for cell in bar:
                bar.set_description(str(cell))
                contest = Contest(machine, cell, choices)
                if not journal.has(contest):
                    record = tune_cell(contest, bar.set_postfix_str)
                    journal.add(cell, record)
                    bar.write(_summary(cell, record))
                    if any("WRONG" in why for why in record["stopped"].values()):
                        status = 1
        except KeyboardInterrupt:
            bar.write(f"interrupted: {bar.n} of {len(wanted)} cells are done, and kept")
            status = 130
    if journal.cells:  # else the table of an older version stays
        _publish(where / "tiles.json", journal)
    return status


def _summary(cell: Cell, record: dict[str, Any]) -> str:
    if record["winner"]:
        winner, fallback = (_tile(record[which]) for which in ("winner", "fallback"))
        changed = {name: winner[name] for name in winner if winner[name] != fallback[name]}
        return f"{cell}: {record['gain']:.3f}x with {_spelled(changed)}"
    verdicts = {result["verdict"] for result in record["results"]} or {"no other tile fits"}
    return f"{cell}: as it is ({', '.join(sorted(verdicts))})"


def _tile(row: Row) -> dict[str, Any]:
    """What a row says of the tile, in words."""
    feeds = [name for name, feed in FEEDS.items() if feed.items() <= row.items()]
    return {**{name: row[name] for name in CANDIDATES}, "feed": feeds[0]}


def _spelled(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _publish(file: Path, journal: Journal) -> None:
    table = journal.table()
    try:
        tuned_tiles.write(file, table)
    except OSError as error:
        raise RuntimeError(
            f"the table cannot be written to {file}: {error.strerror or error}; the measurements "
            f"are in {journal.path}, and the same command makes the table of them"
        ) from error
    print(f"{len(table['rows'])} of {table['cells']} cells have a faster tile: {file}")
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
    rows = (f"{len(t['rows'])} rows of {t.get('gpu', 'an unknown GPU')}" for t in tables)
    return f"{', '.join(rows)}, from {file}"


def show() -> int:
    """Prints the table in use, and what to send to have it in csrc/tiles.c."""
    print(f"tuned tiles: {describe()}")
    file = tuned_tiles.path()
    if file is None or not tuned_tiles.in_use():
        return 0
    fields = _C.tile_fields()
    first = fields.index("tile_n")  # the key before it, the tile from it on
    for table in tuned_tiles.read(file):
        facts = {name: value for name, value in table.items() if name != "rows"}
        print(f"\n/* {_spelled(facts)}\n * {', '.join(fields)} */")
        for entry in tuned_tiles.usable(table["rows"])[0]:
            names = ["ANY" if n == ANY else str(n) for n in tuned_tiles.as_tuple(entry["row"])]
            tile = f"{{{', '.join(names[first:])}}}"
            gain = f"{entry['gain']:.2f}x" if "gain" in entry else ""
            print(f"    {{{', '.join([*names[:first], tile])}}}, /* {gain} */")
    print(
        f"\nTo contribute it, send these lines and the measurements, the .jsonl files in\n"
        f"{file.parent}.\nIn csrc/tiles.c each row goes before the others of its head dims."
    )
    return 0


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


def command(
    head_dims: list[tuple[int, int]] | None = None,
    quick: bool = False,
    output: Path | None = None,
    show_table: bool = False,
    remove_table: bool = False,
) -> int:
    """What ``python -m flash_attn_sm120 tune`` does; the exit status."""
    if show_table:
        return show()
    if remove_table:
        return reset()
    choices = QUICK_CANDIDATES if quick else CANDIDATES
    where = output.absolute() if output else cache.directory() / "tune"
    try:
        wanted = cells(head_dims or common_kernels.COMMON_HEAD_DIMS)
        return tune(Machine(), wanted, choices, where)
    except RuntimeError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
