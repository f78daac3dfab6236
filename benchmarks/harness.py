"""What the benchmarks share: presets, FLOPs, checks, interleaved timing, records.

The rules, and why they exist:

- Contestants are timed in one process, round-robin (A B C, A B C, ...). Clocks, power and the
  other tenants of a machine drift by more than the differences of interest; neighbours in time
  see the same drift, so their ratio survives it.
- Nothing is timed before it has been found right, on the very inputs that are timed.
- L2 is overwritten before each timed call, so that no contestant starts with its inputs cached.
- Medians and quartiles are reported, never a best.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

OURS = "ours"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

SOAK_S = 0.3  # clocks and caches of code settle before anything counts
TIMED_S = 0.6  # about how long the timed rounds of one cell take
ROUNDS = (10, 60)  # fewest and most rounds of a cell
GRAPH_MS, GRAPH_CALLS = 2.0, 50  # a graph holds calls worth this long, and at most so many
# Several times the largest L2 (128 MB). The write takes some 100 us or more: time for the host to
# enqueue the timed call behind it, so that launch overhead stays outside the events.
FLUSH_BYTES = 512 << 20


# ---------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Preset:
    """The attention of a model: what its shape depends on besides batch and length."""

    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int | None = None  # None: head_dim


PRESETS = {
    "llama3-8b": Preset(32, 8, 128),
    "qwen2.5-7b": Preset(28, 4, 128),
    "mistral-7b": Preset(32, 8, 128),
    "llama2-7b": Preset(32, 32, 128),
    "mixtral-8x7b": Preset(32, 8, 128),
    "hd64": Preset(16, 16, 64),
    "hd64-gqa": Preset(16, 4, 64),
    # No model in particular: what one head dim costs beside another.
    "d64": Preset(16, 4, 64),
    "d80": Preset(16, 4, 80),
    "d96": Preset(16, 4, 96),
    "d128": Preset(16, 4, 128),
    "d192": Preset(16, 4, 192),
    "d256": Preset(16, 4, 256),
    "d64-128": Preset(16, 4, 64, 128),
    "d128-64": Preset(16, 4, 128, 64),
    "d192-128": Preset(16, 4, 192, 128),
}


def distinct(names: Iterable[str]) -> dict[Preset, list[str]]:
    """Presets by shape: those that share one are measured once and carry all their names."""
    shapes: dict[Preset, list[str]] = {}
    for name in names:
        shapes.setdefault(PRESETS[name], []).append(name)
    return shapes


@dataclass(frozen=True)
class Problem:
    """One call's inputs. q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    causal: bool

    @property
    def out_shape(self) -> tuple[int, ...]:
        """(B, Sq, Hq, Dv)"""
        return (*self.q.shape[:3], self.v.shape[3])


def make_problem(
    preset: Preset,
    seqlen: int,
    causal: bool,
    batch: int,
    dtype: torch.dtype,
    device: str,
    queries: int | None = None,
) -> Problem:
    """Random inputs: zeros would draw less power and run faster than real data.

    As many queries as keys, `seqlen`, if not told otherwise.
    """
    generator = torch.Generator(device).manual_seed(seqlen + causal)

    def randn(length: int, heads: int, head_dim: int) -> torch.Tensor:
        shape = (batch, length, heads, head_dim)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    q = randn(seqlen if queries is None else queries, preset.heads_q, preset.head_dim)
    k = randn(seqlen, preset.heads_kv, preset.head_dim)
    v = randn(seqlen, preset.heads_kv, preset.head_dim_v or preset.head_dim)
    return Problem(q, k, v, bool(causal))


def forward_flops(problem: Problem) -> float:
    """2 * B * Hq * pairs * (D + Dv): a multiply and an add for q.k and for p.v of each pair.

    The count of FlashAttention's own benchmarks (FA2 `benchmark_flash_attention.py`:
    4*B*S*S*H*D, halved for causal; FA4 `bench_utils.py` for Sq != Sk and D != Dv): the
    causal triangle is half of the square, its diagonal not counted. Skipped or repeated work
    is never counted, so figures compare across kernels.
    """
    batch, seqlen_q, heads_q, head_dim = problem.q.shape
    seqlen_k, head_dim_v = problem.k.shape[1], problem.v.shape[3]
    pairs: float = seqlen_q * seqlen_k
    if problem.causal:  # bottom right: with Sq > Sk, only the last Sk rows see any key
        keys = (max(0, seqlen_k - seqlen_q) + seqlen_k) / 2
        pairs = min(seqlen_q, seqlen_k) * keys
    return 2.0 * batch * heads_q * pairs * (head_dim + head_dim_v)


# ----------------------------------------------------------------------------------- contestants


@dataclass(frozen=True)
class Contestant:
    """One implementation, bound to the inputs of one cell.

    `call` returns what the check of the cell looks at, of a forward out (B, Sq, Hq, Dv). `context`
    is entered outside the timed region (selecting an SDPA backend costs host time); exceptions in
    `cannot` mean that the contestant does not support the cell.
    """

    name: str
    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager] = nullcontext
    cannot: tuple[type[Exception], ...] = (NotImplementedError,)


C = TypeVar("C", bound=Contestant)


def admit(
    contestants: Sequence[C],
    check: Callable[[str, Any], None],
    outputs: Sequence[torch.Tensor],
) -> tuple[list[C], dict[str, str]]:
    """Calls each contestant once. Those found right, and for each that cannot run, the reason.

    A contestant is right where `check(name, result)` raises nothing; WrongResult ends the run, as
    its time would mean nothing. `outputs` are tensors like those of a result.
    """
    entrants, absent = [], {}
    for contestant in contestants:
        # An output is memory that a right contestant before may have filled: one that writes
        # nothing would pass. NaN there (the allocator hands the block out again) makes it fail.
        poison = [torch.full_like(output, torch.nan) for output in outputs]
        del poison
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            try:
                with contestant.context():
                    result = contestant.call()
            except contestant.cannot as error:
                absent[contestant.name] = " ".join([str(error), *(str(n.message) for n in notes)])
                continue
        for note in notes:
            warnings.warn(f"{contestant.name}: {note.message}", stacklevel=2)
        check(contestant.name, result)
        entrants.append(contestant)
    return entrants, absent


# ----------------------------------------------------------------------------------- correctness


class WrongResult(AssertionError):
    """A contestant's output is not attention of its inputs."""


CHECK_ROWS = 32  # consecutive query rows of one block; a tolerance holds for a block


def check_forward(problem: Problem, name: str, out: torch.Tensor) -> None:
    """Compares rows of `out` with an fp32 reference; raises WrongResult.

    The rule: max|out - ref| <= 2 * max|pt - ref| + 2 * max|ref + 0.3 - 0.3 - ref|, pt being plain
    PyTorch in the input type. It is applied to each block of rows alone: the first rows of a
    causal problem average few keys, and the errors of their large values would hide the rest.
    Heads are checked one at a time, so that the reference never needs the whole score matrix.
    """
    if tuple(out.shape) != problem.out_shape or out.dtype != problem.q.dtype:
        raise WrongResult(
            f"{name}: expected {problem.out_shape} {problem.q.dtype}, "
            f"got {tuple(out.shape)} {out.dtype}"
        )
    batch, seqlen_q, heads_q, _ = problem.q.shape
    starts = sorted({0, seqlen_q // 3, max(0, seqlen_q - CHECK_ROWS)})
    for b in sorted({0, batch - 1}):
        for head in sorted({0, heads_q // 2, heads_q - 1}):
            for start in starts:
                rows = slice(start, min(start + CHECK_ROWS, seqlen_q))
                error, allowed = block_error(out, problem, b, head, rows)
                if not error <= allowed:  # NaN is wrong too
                    raise WrongResult(
                        f"{name}: batch {b}, head {head}, rows {rows.start}..{rows.stop - 1}: "
                        f"largest error {error:.3g}, allowed {allowed:.3g} ({describe(problem)})"
                    )


def block_error(
    out: torch.Tensor, problem: Problem, b: int, head: int, rows: slice
) -> tuple[float, float]:
    """The largest error of one block of rows, and the largest allowed."""
    kv_head = head // (problem.q.shape[2] // problem.k.shape[2])
    q, k, v = problem.q[b, rows, head], problem.k[b, :, kv_head], problem.v[b, :, kv_head]
    seqlen_q, seqlen_k = problem.q.shape[1], problem.k.shape[1]
    visible = torch.ones(len(q), seqlen_k, dtype=torch.bool, device=q.device)
    if problem.causal:
        visible = visible.tril(rows.start + seqlen_k - seqlen_q)
    ref = plain_attention(q.float(), k.float(), v.float(), visible)
    pt = plain_attention(q, k, v, visible).float()
    allowed = 2 * (pt - ref).abs().max() + 2 * (ref + 0.3 - 0.3 - ref).abs().max()
    return (out[b, rows, head].float() - ref).abs().max().item(), allowed.item()


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """Attention of some rows of one head, in the type of its inputs; rows without keys give 0."""
    scores = (q @ k.T) * q.shape[-1] ** -0.5  # [rows, Sk]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.masked_fill(~visible, 0) @ v  # [rows, Dv]


def describe(problem: Problem) -> str:
    """The shape of a problem, for messages."""
    shapes = ", ".join(str(tuple(t.shape)) for t in (problem.q, problem.k, problem.v))
    return f"q, k, v {shapes} {problem.q.dtype}, causal={problem.causal}"


# ---------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the rounds: the median, and the quartiles around it."""

    ms: float
    ms_q1: float
    ms_q3: float
    rounds: int
    graph_calls: int  # calls in one timed graph; 0: the call was timed as it is

    @property
    def spread(self) -> float:
        """The interquartile range as a part of the median."""
        return (self.ms_q3 - self.ms_q1) / self.ms


class HostEvent:
    """torch.cuda.Event for a CPU: dry runs take the path that measurements take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.seconds - self.seconds) * 1e3


def make_event(device: str):
    return HostEvent() if device == "cpu" else torch.cuda.Event(enable_timing=True)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


@functools.cache
def flush_buffer(device: str) -> torch.Tensor:
    size = FLUSH_BYTES if device != "cpu" else FLUSH_BYTES // 8
    return torch.empty(size, dtype=torch.int8, device=device)


def time_interleaved(
    contestants: Sequence[Contestant], device: str, rounds: int | None = None, graph: bool = False
) -> dict[str, Timing]:
    """Times the contestants round-robin; `rounds` None: as many as fit about TIMED_S.

    With `graph`, a timed call is the replay of a CUDA graph of several calls, so host time does
    not count at all; L2 is then cold for the first of them only.
    """
    if not contestants:
        return {}
    round_ms = soak(contestants, device)
    graph_calls = 0
    if graph:
        graph_calls = clamp(GRAPH_MS * len(contestants) / round_ms, 1, GRAPH_CALLS)
        contestants = [captured(contestant, graph_calls) for contestant in contestants]
        round_ms *= graph_calls
    if rounds is None:
        rounds = clamp(TIMED_S * 1e3 / round_ms, *ROUNDS)
    samples = timed_rounds(contestants, device, rounds)
    return {name: summarize(times, graph_calls) for name, times in samples.items()}


def clamp(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))


def soak(contestants: Sequence[Contestant], device: str) -> float:
    """Runs the contestants in turn for SOAK_S; milliseconds of a round, host time included."""
    rounds, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < SOAK_S or rounds == 0:
        for contestant in contestants:
            with contestant.context():
                contestant.call()
        synchronize(device)
        rounds += 1
    return elapsed * 1e3 / rounds


def captured(contestant: Contestant, calls: int) -> Contestant:
    """The contestant as the replay of a CUDA graph of `calls` calls."""
    graph = torch.cuda.CUDAGraph()
    with contestant.context(), torch.cuda.graph(graph):
        for _ in range(calls):
            contestant.call()
    return replace(contestant, call=graph.replay, context=nullcontext)


def timed_rounds(
    contestants: Sequence[Contestant], device: str, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of every round of every contestant, in the order A B C, A B C, ..."""
    flush = flush_buffer(device)
    events = {
        c.name: [(make_event(device), make_event(device)) for _ in range(rounds)]
        for c in contestants
    }
    synchronize(device)
    flush.zero_()  # a head start for the host: it then stays ahead of the GPU
    for i in range(rounds):
        for contestant in contestants:
            start, end = events[contestant.name][i]
            with contestant.context():
                flush.zero_()
                start.record()
                contestant.call()
                end.record()
    synchronize(device)
    return {
        name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()
    }


def summarize(times: Sequence[float], graph_calls: int) -> Timing:
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    calls = max(1, graph_calls)
    return Timing(median / calls, q1 / calls, q3 / calls, len(times), graph_calls)


# --------------------------------------------------------------------------------------- records


class Records:
    """JSON lines: a header, then one record per cell and contestant, kept in `cells` too.

    Each line is flushed when it is written: a run that is cut short keeps what it measured.
    """

    def __init__(self, path: Path | None, benchmark: str, device: str) -> None:
        self.header = header(benchmark, device)
        self.cells: list[dict] = []
        self._file = path.open("w") if path else None
        self._write(self.header)

    def add(self, **fields) -> None:
        record = {"record": "cell", **fields}
        self.cells.append(record)
        self._write(record)

    def _write(self, record: dict) -> None:
        if self._file:
            print(json.dumps(record), file=self._file, flush=True)


def read_records(path: Path) -> tuple[dict, list[dict]]:
    """The header and the cells of a file that Records wrote."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines[0], lines[1:]


def timing_fields(timing: Timing, flops: float) -> dict:
    """What a record says about a timing."""
    tflops = flops / timing.ms * 1e-9
    return {**asdict(timing), "spread": timing.spread, "tflops": tflops}


def header(benchmark: str, device: str) -> dict:
    """What a reader needs to judge the figures, and to take them again."""
    import flash_attn_sm120

    return {
        "record": "header",
        "benchmark": benchmark,
        **device_facts(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "flash_attn_sm120": getattr(flash_attn_sm120, "__version__", None),
        "environment": {k: v for k, v in os.environ.items() if k.startswith("FA_SM120_")},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        # --exclude: the commit itself, whatever tags there are
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
    }


def device_facts(device: str) -> dict:
    """Name, size and clocks of the device; facts that cannot be found are None."""
    if device == "cpu":
        return {"gpu": None, "device": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    fields = ("clocks.sm", "clocks.max.sm", "power.limit", "driver_version")
    busy()  # an idle GPU would report its idle clock
    answer = output_of(
        "nvidia-smi",
        f"--id=GPU-{properties.uuid}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader",
    )
    values = answer.split(", ") if answer else [None] * len(fields)
    synchronize(device)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        **dict(zip(fields, values, strict=False)),
    }


def busy(seconds: float = 1.0) -> None:
    """Enqueues matrix products worth some seconds, and returns while they run."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    start, end = make_event("cuda"), make_event("cuda")
    a @ a  # loads the library
    start.record()
    product = a @ a
    end.record()
    torch.cuda.synchronize()
    for _ in range(min(900, int(seconds * 1e3 / start.elapsed_time(end)))):
        torch.mm(a, a, out=product)


def output_of(*command: str) -> str | None:
    """What a command printed; None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def headline(header: dict) -> str:
    """One line: what was measured on, under which limits."""
    if not header["gpu"]:
        return f"CPU {header['device']}: a dry run, no measurement of a GPU"
    limits = header["environment"].get("FA_SM120_LIMITS")
    enforced = f"ours within sm_{limits}'s limits, peers not" if limits else "no limits set"
    return f"{header['gpu']}, {enforced}; torch {header['torch']}, CUDA {header['cuda']}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table that is aligned as plain text too."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, " | ".join("-" * w for w in widths))
    return "\n".join(f"| {line} |" for line in lines)


def require_device(device: str) -> None:
    if device != "cpu" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --device cpu is a dry run of the same path")
