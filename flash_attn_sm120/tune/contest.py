"""The contest of a cell: its candidates are compiled, checked, and timed beside the fallback."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from tqdm import tqdm

from flash_attn_sm120.plan import Plan
from flash_attn_sm120.quantized import quantize, quantize_kv
from flash_attn_sm120.tune.candidates import FEEDS, Call, Candidate, Choices, candidate_rows
from flash_attn_sm120.tune.grid import Cell
from flash_attn_sm120.tune.machine import Machine
from flash_attn_sm120.tuned_tiles import BACKWARD, FORWARD, Row

MIN_GAIN = 1.02  # fallback's time over candidate's, geometric mean over the calls of a cell
MIN_GAIN_OF_A_CALL = 0.99
MAX_SPREAD = 0.10  # interquartile range of the ratios, as a fraction of their median

ELIMINATION = ((5, 12), (15, 4))  # rounds, and how many candidates stay
ELIMINATION_OF_FEEDS = ((15, 3),)
FINAL_ROUNDS = 80

# Two outputs in bf16 may differ by a unit in the last place, 2^-7 of a number; and here and there
# by more, because other tiles round p relative to another row max.
TOLERANCE = 2**-5  # of the largest element of an output row
LSE_TOLERANCE = 2**-8  # lse is in fp32, a sum of p before they are rounded
FRACTION = 2**-6  # of the largest element of a gradient, below which its rows count as one


class Score(NamedTuple):
    """How a candidate did beside the fallback, on each call."""

    ms: list[float]
    gains: list[float]  # median of fallback's time over its own in the same round
    spreads: list[float]  # interquartile range of those, as a fraction of the median

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
    """The candidates of a cell that are still in it, and why others are not."""

    def __init__(self, machine: Machine, cell: Cell, choices: Choices) -> None:
        self.machine, self.cell, self.choices = machine, cell, choices
        self.begin: Callable[[str], None] = lambda name: None  # told before a candidate's first run
        self.calls = tuple(self._call(seqlen) for seqlen in cell.bucket.seqlens)
        if cell.bucket.longest and not cell.recipe:
            self.calls += (self._packed_call(),)
        self.fallback = Candidate.fallback(self.calls)
        rows = candidate_rows(cell, self.fallback.row, machine.arch, choices)
        self.candidates = self._of_rows(rows)
        self.stopped: dict[str, str] = {}  # why, by the candidate's name

    def run(self, progress: Callable[[str], None]) -> dict[str, Any]:
        """Measures the cell; what the journal says of it."""
        tried = [candidate.row for candidate in self.candidates]
        self._drop_stopped()  # by the journal
        self.compile(progress)
        self.check()
        results = self.compete(progress) if self.candidates else []
        accepted = [(candidate, s) for candidate, s in results if s.verdict == "accepted"]
        winner, score = accepted[0] if accepted else (None, None)
        return {
            "fallback": self.fallback.row,
            "winner": winner.row if winner else None,
            "above": self.cell.above(),
            "gain": round(score.gain, 4) if score else 1.0,
            "calls": [call.shape for call in self.calls],
            "results": [
                {"row": c.row, **s._asdict(), "gain": s.gain, "verdict": s.verdict}
                for c, s in results
            ],
            "stopped": self.stopped,
            "tried": tried,
        }

    def compile(self, progress: Callable[[str], None]) -> None:
        """Compiles all, over all cores; drops what does not compile."""

        def attempt(plan: Plan) -> str:
            try:
                self.machine.compile(plan)
            except RuntimeError as error:
                return str(error)
            return ""

        plans = {str(plan.variant): plan for c in self.candidates for plan in c.plans}
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
        for i in range(len(self.calls)):
            expected = [result.float() for result in self.fallback.results(i)]
            bounds = self._allowed(expected)
            for candidate in self.candidates:
                self.begin(candidate.name)
                try:
                    pairs = zip(candidate.results(i), expected, strict=True)
                    errors = [(own.float() - result).abs() for own, result in pairs]
                    # NaN is wrong, too
                    right = all(
                        bool((error <= bound).all())
                        for error, bound in zip(errors, bounds, strict=True)
                    )
                except RuntimeError as failure:
                    self._stop(candidate.name, f"does not run: {failure}")
                    # raises if the GPU does nothing any more
                    self.fallback.results(i)[0].sum().item()
                    continue
                if not right:
                    names = ("dq", "dk", "dv") if self.is_backward else ("out", "lse")
                    worst = (error.max().item() for error in errors)
                    said = ", ".join(f"{n} {e:.3g}" for n, e in zip(names, worst, strict=True))
                    self._stop(candidate.name, f"WRONG: differs from the fallback by {said}")
            self.begin("")
        self._drop_stopped()

    @property
    def is_backward(self) -> bool:
        return self.cell.direction == BACKWARD

    def _allowed(self, expected: Sequence[Any]) -> list[Any]:
        """By how much an element of each result may differ."""
        if not self.is_backward:
            out, _ = expected
            return [TOLERANCE * out.abs().amax(-1, keepdim=True), LSE_TOLERANCE]
        rows = (result.abs().amax(-1, keepdim=True) for result in expected)
        return [TOLERANCE * row.clamp(min=FRACTION * row.max().item()) for row in rows]

    def measure(self, candidates: Sequence[Candidate], rounds: int) -> list[Score]:
        """The scores of some candidates, round-robin with the fallback."""
        scores = [Score([], [], []) for _ in candidates]
        for i in range(len(self.calls)):
            base, *samples = self.machine.samples([self.fallback, *candidates], i, rounds)
            for score, own in zip(scores, samples, strict=True):
                ratios = [b / o for b, o in zip(base, own, strict=True)]
                q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
                score.ms.append(statistics.median(own))
                score.gains.append(median)
                score.spreads.append((q3 - q1) / median)
        return scores

    def compete(self, progress: Callable[[str], None]) -> list[tuple[Candidate, Score]]:
        """The candidates that came to the last round, the best one first."""
        finalists = self._eliminate(self.candidates, ELIMINATION, progress)
        if self.cell.direction == FORWARD:
            finalists += self._fed_by_the_tma(finalists, progress)
            finalists = self._eliminate(finalists, ELIMINATION_OF_FEEDS, progress)
        progress(f"measuring {len(finalists)} tiles")
        return self._ranked(finalists, FINAL_ROUNDS)

    def _eliminate(
        self,
        candidates: Sequence[Candidate],
        elimination: Iterable[tuple[int, int]],
        progress: Callable[[str], None],
    ) -> list[Candidate]:
        left = list(candidates)
        for rounds, keep in elimination:
            if len(left) > keep:
                progress(f"screening {len(left)} tiles")
                left = [candidate for candidate, _ in self._ranked(left, rounds)[:keep]]
        return left

    def _ranked(
        self, candidates: Sequence[Candidate], rounds: int
    ) -> list[tuple[Candidate, Score]]:
        scored = zip(candidates, self.measure(candidates, rounds), strict=True)
        return sorted(scored, key=lambda pair: -pair[1].gain)

    def _fed_by_the_tma(
        self, candidates: Sequence[Candidate], progress: Callable[[str], None]
    ) -> list[Candidate]:
        """The same tiles with the other feeds, as far as the GPU has them: compiled and right."""
        rows = (candidate.row | feed for candidate in candidates for feed in FEEDS.values())
        twins = {twin.name: twin for twin in self._of_rows(rows)}
        known = {c.name for c in candidates}  # what a row without a TMA comes down to
        self.candidates = [twin for name, twin in twins.items() if name not in known]
        self.compile(progress)
        self.check()
        return self.candidates

    def _call(self, seqlen: int) -> Call:
        seqlen, heads = self.cell.bucket.heads(seqlen, self.machine.device["sms"])
        return self._of_shape((1, seqlen, heads), {})

    def _packed_call(self) -> Call:
        """Sequences of several lengths: a row of the table serves them, too."""
        bucket = self.cell.bucket
        lengths, heads = bucket.packed(self.machine.device["sms"])
        ends = self.machine.integers([0, *itertools.accumulate(lengths)])
        both = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        bounds = {"max_seqlen_q": bucket.longest, "max_seqlen_k": bucket.longest}
        return self._of_shape((sum(lengths), heads), {**both, **bounds})

    def _of_shape(self, shape: tuple[int, ...], lengths: dict[str, Any]) -> Call:
        cell, tensor = self.cell, self.machine.tensor
        q, k, v = (tensor(*shape, dim) for dim in (cell.head_dim, cell.head_dim, cell.head_dim_v))
        if cell.recipe:
            k, v = quantize_kv(k, v, cell.recipe)
            q = quantize(q, cell.recipe, "q")
            return Call(q, k, v, cell.causal, lengths, recipe=cell.recipe)
        call = Call(q, k, v, cell.causal, lengths)
        return call.with_gradients(tensor(*shape, cell.head_dim_v)) if self.is_backward else call

    def _of_rows(self, rows: Iterable[Row]) -> list[Candidate]:
        """Without those that do not serve all calls, or are the fallback by another name."""
        own = [plan.variant for plan in self.fallback.plans]
        return [
            candidate
            for row in rows
            if (candidate := Candidate.of_row(row, self.calls))
            and [plan.variant for plan in candidate.plans] != own
        ]

    def _stop(self, name: str, why: str) -> None:
        self.stopped[name] = why
        if "WRONG" in why:
            tqdm.write(f"{name} {why}: it is not used; please report it", file=sys.stderr)

    def _drop_stopped(self) -> None:
        self.candidates = [
            candidate
            for candidate in self.candidates
            if all(str(plan.variant) not in self.stopped for plan in candidate.plans)
        ]
