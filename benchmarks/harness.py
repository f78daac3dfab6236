"""What the benchmarks share: presets, cells, FLOPs, checks, interleaved timing, records.

Calls are timed by the rules of flash_attn_sm120/_measure.py: in one process, round-robin, after a
soak, behind a write of the L2. Here is what benchmarks add:

- Nothing is timed before it has been found right, on the very inputs that are timed.
- Where a contestant cannot run, or runs out of memory, its record says so: absent, and why. That
  holds for ours as for its peers, and for cells that do not fit the free memory at all.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from flash_attn_sm120 import _measure
from flash_attn_sm120._measure import Timed, Timing, synchronize

OURS, FLASH, CUDNN = "ours", "sdpa-flash", "sdpa-cudnn"
BACKENDS = {FLASH: SDPBackend.FLASH_ATTENTION, CUDNN: SDPBackend.CUDNN_ATTENTION}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

SOAK_S = 0.3
TIMED_S = 0.6  # about how long the timed rounds of one cell take
ROUNDS = (10, 60)  # fewest and most rounds of a cell
GRAPH_MS, GRAPH_CALLS = 2.0, 50  # a graph holds calls worth this long, and at most so many
# Several times the largest L2 (128 MB). The write takes some 100 us or more: time for the host to
# enqueue the timed call behind it.
FLUSH_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}


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
    "mha-d128-64": Preset(32, 32, 128, 64),
    "mha-d192-128": Preset(32, 32, 192, 128),
    "mha-d256-128": Preset(32, 32, 256, 128),
    "qwen3-0.6b": Preset(16, 8, 128),
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


def with_padded_v(problem: Problem) -> Problem:
    """V with zeros up to the head dim of K, for peers that ask for one head dim; not timed."""
    missing = problem.k.shape[3] - problem.v.shape[3]
    v = F.pad(problem.v, (0, missing)) if missing > 0 else problem.v
    return Problem(problem.q, problem.k, v, problem.causal)


@dataclass(frozen=True)
class Cell:
    """One call that is measured; `fields` is what its records say of it."""

    preset: Preset
    seqlen: int  # keys, and queries if `queries` is None
    causal: bool
    batch: int
    dtype: torch.dtype
    queries: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        heads, dims = f"{self.preset.heads_q}/{self.preset.heads_kv}", self.preset.head_dim
        mask = " causal" if self.causal else ""
        return f"{heads} heads, D {dims}, B {self.batch}, S {self.seqlen}{mask}"

    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Of q, k, v and out."""
        preset, queries = self.preset, self.seqlen if self.queries is None else self.queries
        head_dim_v = preset.head_dim_v or preset.head_dim
        return [
            (self.batch, queries, preset.heads_q, preset.head_dim),
            (self.batch, self.seqlen, preset.heads_kv, preset.head_dim),
            (self.batch, self.seqlen, preset.heads_kv, head_dim_v),
            (self.batch, queries, preset.heads_q, head_dim_v),
        ]

    def bytes(self) -> int:
        """Of q, k, v and out."""
        return sum(math.prod(shape) for shape in self.shapes()) * self.dtype.itemsize

    def problem(self, device: str) -> Problem:
        """Random inputs: zeros would draw less power and run faster than real data."""
        generator = torch.Generator(device).manual_seed(self.seqlen + self.causal)
        q, k, v = (
            torch.randn(shape, dtype=self.dtype, device=device, generator=generator)
            for shape in self.shapes()[:3]
        )
        return Problem(q, k, v, self.causal)


FLOPS = {"forward": 1.0, "backward": 2.5}  # of a forward's


def call_of(
    attend: Callable[[], torch.Tensor],
    direction: str,
    inputs: Sequence[torch.Tensor],
    dout: torch.Tensor,
) -> Callable[[], Sequence[torch.Tensor]]:
    """The forward without autograd, or the gradients of one that the first call runs."""
    if direction == "forward":
        return torch.no_grad()(lambda: [attend()])
    kept = functools.cache(attend)  # in the context that the first call needs
    return lambda: torch.autograd.grad(kept(), inputs, dout, retain_graph=True)


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
class Contestant(Timed):
    """One implementation, bound to the inputs of one cell.

    `call` returns what the check of the cell looks at, of a forward out (B, Sq, Hq, Dv). Exceptions
    in `cannot` mean that the contestant does not support the cell.
    """

    cannot: tuple[type[Exception], ...] = (NotImplementedError,)


C = TypeVar("C", bound=Contestant)
T = TypeVar("T")


def by_backend(name: str) -> dict[str, Any]:
    """The context in which SDPA takes a backend, and the exceptions by which that says no.

    A backend that cannot run a call is a RuntimeError, its reasons are warnings.
    """
    context = functools.partial(sdpa_kernel, BACKENDS[name])
    return {"context": context, "cannot": (RuntimeError,)}


def attempt(contestant: Timed, step: Callable[[], T]) -> tuple[T | None, str]:
    """What `step` returns; or None, and why the contestant is absent from the cell."""
    cannot = getattr(contestant, "cannot", ())
    result, reason = None, ""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            with contestant.context():
                result = step()
        except Exception as error:
            reason = out_of_memory(error)
            if not reason and not isinstance(error, cannot):
                raise
            # The first line: others list dispatch keys.
            said = next(iter(str(error).splitlines()), "") or repr(error)
            reason = reason or " ".join([said, *(str(note.message) for note in notes)])
    if reason:
        release_memory()  # what the call held, now that its frames are gone
    else:
        for note in notes:
            warnings.warn(f"{contestant.name}: {note.message}", stacklevel=2)
    return result, reason


def admit(
    contestants: Sequence[C],
    check: Callable[[str, Any], None],
    outputs: Sequence[torch.Tensor],
) -> tuple[list[C], dict[str, str]]:
    """Calls each contestant once. Those found right, and for each that cannot run, the reason.

    A contestant is right where `check(name, result)` raises nothing; WrongResult ends the run, as
    its time would mean nothing, unless it is among what the contestant cannot. `outputs` are
    tensors like those of a result.
    """
    entrants, absent = [], {}
    for contestant in contestants:
        # An output is memory that a right contestant before may have filled: one that writes
        # nothing would pass. NaN there (the allocator hands the block out again) makes it fail.
        poison = [torch.full_like(output, torch.nan) for output in outputs]
        del poison
        result, reason = attempt(contestant, contestant.call)
        if reason:
            absent[contestant.name] = reason
        else:
            try:
                check(contestant.name, result)
                entrants.append(contestant)
            except WrongResult as error:
                if WrongResult not in contestant.cannot:
                    raise
                absent[contestant.name] = f"wrong: {error}"
        del result  # the next one may need its memory
    return entrants, absent


# ---------------------------------------------------------------------------------------- memory


def out_of_memory(error: BaseException | None) -> str:
    """In a few words, that memory ran out; "" if the error, and what led to it, says nothing so.

    What led to it: a graph capture in which memory runs out ends with an error that hides that.
    """
    if not isinstance(error, RuntimeError):
        return ""
    text = str(error)
    if not re.search("out of memory|can't allocate memory|ALLOC_FAILED", text, re.I):
        return out_of_memory(error.__context__)
    tried = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.I)
    return f"out of memory (a tensor of {tried[1]})" if tried else "out of memory"


def release_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: str) -> float:
    """What can be allocated, with what torch keeps for itself."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0] + (
            torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        )
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not on this system
        return math.inf


# ----------------------------------------------------------------------------------- correctness


class WrongResult(AssertionError):
    """A contestant's output is not attention of its inputs."""


CHECK_ROWS = 32  # consecutive query rows of one block; a tolerance holds for a block


def check_forward(problem: Problem, name: str, out: torch.Tensor) -> None:
    """Compares rows of `out` with an fp32 reference; raises WrongResult.

    The tolerance rule is applied to each block of rows alone: the first rows of a causal problem
    average few keys, and the errors of their large values would hide the rest. Heads are checked
    one at a time, so that the reference never needs the whole score matrix.
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
    ref = _measure.plain_attention(q.float(), k.float(), v.float(), visible)
    plain = _measure.plain_attention(q, k, v, visible)
    error = _measure.max_error(out[b, rows, head], ref)
    return error.item(), _measure.allowed_error(ref, plain).item()


def describe(problem: Problem) -> str:
    """The shape of a problem, for messages."""
    shapes = ", ".join(str(tuple(t.shape)) for t in (problem.q, problem.k, problem.v))
    return f"q, k, v {shapes} {problem.q.dtype}, causal={problem.causal}"


# ---------------------------------------------------------------------------------------- timing


@functools.cache
def flush_buffer(device: str) -> torch.Tensor:
    return _measure.flush_buffer(device, FLUSH_BYTES[device])


def time_interleaved(
    contestants: Sequence[Timed],
    device: str,
    rounds: int | None = None,
    graph: bool = False,
    graph_calls: int = 0,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times the contestants round-robin; and why some are absent: beside the others they ran out
    of memory. `rounds` None: as many as fit about TIMED_S.

    With `graph`, a timed call is the replay of a CUDA graph of several calls, so host time does
    not count at all; L2 is then cold for the first of them only. `graph_calls` says how many; 0: as
    many as are worth GRAPH_MS.
    """
    flush = flush_buffer(device)
    contestants, absent = prepared(contestants, once_more)
    if contestants:
        round_ms = _measure.soak(contestants, device, SOAK_S)
    if contestants and graph:
        worth = clamp(GRAPH_MS * len(contestants) / round_ms, 1, GRAPH_CALLS)
        graph_calls = graph_calls or worth
        capture = functools.partial(_measure.captured, calls=graph_calls)
        contestants, exhausted = prepared(contestants, capture)
        absent |= exhausted
        round_ms *= graph_calls
    if not contestants:
        return {}, absent
    if rounds is None:
        rounds = clamp(TIMED_S * 1e3 / round_ms, *ROUNDS)
    samples = _measure.round_robin(contestants, device, rounds, flush)
    timings = (Timing.of(own, graph_calls if graph else 0) for own in samples)
    return {c.name: t for c, t in zip(contestants, timings, strict=True)}, absent


def add_wall_times(
    fields: dict[str, dict], contestants: Iterable[Timed], device: str, rounds: int | None = None
) -> None:
    """Adds to what the records say: how long it is from the call to the end of its work, for a
    caller who waits for the result. The device is idle before, and the L2 warm."""
    timed = [contestant for contestant in contestants if contestant.name in fields]
    samples: dict[str, list[float]] = {contestant.name: [] for contestant in timed}
    for _ in range(rounds or ROUNDS[1]):
        for contestant in timed:
            with contestant.context():
                synchronize(device)
                begin = time.perf_counter()
                contestant.call()
                synchronize(device)
                samples[contestant.name].append(time.perf_counter() - begin)
    for name, own in samples.items():
        fields[name]["wall_ms"] = statistics.median(own) * 1e3


def prepared(
    contestants: Sequence[Timed], step: Callable[[Timed], Timed]
) -> tuple[list[Timed], dict[str, str]]:
    """What a step makes of each contestant, and why some are absent from then on."""
    ready, absent = [], {}
    for contestant in contestants:
        made, reason = attempt(contestant, functools.partial(step, contestant))
        if made:
            ready.append(made)
        else:
            absent[contestant.name] = reason
    return ready, absent


def once_more(contestant: Timed) -> Timed:
    """The contestant, after a call in the memory that the others have left."""
    contestant.call()
    return contestant


def clamp(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))


# --------------------------------------------------------------------------------------- records


class Records:
    """JSON lines: a header, then one record per cell and contestant.

    Each line is flushed when it is written: a run that is cut short keeps what it measured.
    """

    def __init__(self, path: Path | None, benchmark: str, device: str) -> None:
        self.header = header(benchmark, device)
        self._file = path.open("w") if path else None
        self._write(self.header)

    def add(self, **fields) -> dict:
        record = {"record": "cell", **fields}
        self._write(record)
        return record

    def _write(self, record: dict) -> None:
        if self._file:
            print(json.dumps(record), file=self._file, flush=True)


def read_records(path: Path) -> tuple[dict, list[dict]]:
    """The header and the cells of a file that Records wrote."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines[0], lines[1:]


def measure_cells(
    cells: Iterable[Cell],
    measure: Callable[[Problem], dict[str, dict]],
    names: Sequence[str],
    records: Records,
    device: str,
    copies: int = 1,
) -> list[dict[str, dict]]:
    """Adds a record for each cell and contestant: what `measure` returns for it.

    Where a cell as a whole does not fit into memory, all `names` are absent from it.

    Args:
        copies: how many times q, k, v and out are needed at once; with gradients, twice.

    Returns:
        The records of each cell by contestant.
    """
    measured = []
    for cell in progress(cells):
        needed = copies * cell.bytes() + FLUSH_BYTES[device]
        found = within_memory(
            lambda cell=cell: measure(cell.problem(device)), names, needed, device
        )
        measured.append(
            {
                name: records.add(**cell.fields, contestant=name, **fields)
                for name, fields in found.items()
            }
        )
    return measured


def progress(cells: Iterable[T]) -> Iterator[T]:
    """The cells, with a bar that names them, unless the output is a log."""
    with tqdm(list(cells), unit="cell", disable=None) as bar:
        for cell in bar:
            bar.set_postfix_str(str(cell))
            yield cell


def within_memory(
    measure: Callable[[], dict[str, dict]], names: Sequence[str], needed: int, device: str
) -> dict[str, dict]:
    """What `measure` returns; or that all are absent, as memory does not do for what is needed."""
    free = free_bytes(device)
    if needed > free:
        reason = f"does not fit: it takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        return {name: {"absent": reason} for name in names}
    try:
        return measure()
    except RuntimeError as error:
        if not (reason := out_of_memory(error)):
            raise
    release_memory()
    return {name: {"absent": reason} for name in names}


def timing_fields(timing: Timing, flops: float) -> dict:
    """What a record says about a timing."""
    tflops = flops / timing.ms * 1e-9
    return {**asdict(timing), "spread": timing.spread, "tflops": tflops}


def absent_fields(absent: dict[str, str]) -> dict[str, dict]:
    """What the records of those say that are absent."""
    return {name: {"absent": reason} for name, reason in absent.items()}


# --exclude: the commit itself, whatever tags there are
DESCRIBE = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


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
        "commit": _measure.output_of("git", "-C", str(Path(__file__).parent), *DESCRIBE),
    }


def device_facts(device: str) -> dict:
    """Name, size and clocks of the device; facts that cannot be found are None."""
    if device == "cpu":
        return {"gpu": None, "device": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    busy()  # an idle GPU would report its idle clock
    clocks = ("clocks.sm", "clocks.max.sm", "power.limit", "driver_version")
    facts = _measure.nvidia_smi(*clocks)
    synchronize(device)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        **facts,
    }


def busy(seconds: float = 1.0) -> None:
    """Enqueues matrix products worth some seconds, and returns while they run."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = a @ a
    round_ms = _measure.soak([Timed("product", lambda: torch.mm(a, a, out=product))], "cuda", 0.0)
    for _ in range(min(900, int(seconds * 1e3 / round_ms))):
        torch.mm(a, a, out=product)


def headline(header: dict) -> str:
    """One line: what was measured on, under which limits."""
    if not header["gpu"]:
        return f"CPU {header['device']}: a dry run, no measurement of a GPU"
    limits = header["environment"].get("FA_SM120_LIMITS")
    enforced = f"ours within sm_{limits}'s limits, peers not" if limits else "no limits set"
    return f"{header['gpu']}, {enforced}; torch {header['torch']}, CUDA {header['cuda']}"


def why_absent(measured: Iterable[dict[str, dict]]) -> str:
    """A line for each contestant and reason, with the number of cells."""
    reasons = Counter(
        (name, record["absent"])
        for cell in measured
        for name, record in cell.items()
        if "absent" in record
    )
    return "\n".join(
        f"absent in {n} cells: {name}: {reason}" for (name, reason), n in reasons.items()
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table that is aligned as plain text too."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, " | ".join("-" * w for w in widths))
    return "\n".join(f"| {line} |" for line in lines)


# ------------------------------------------------------------------------------------- arguments


def add_arguments(parser: argparse.ArgumentParser, rounds: int | None = None) -> None:
    """The arguments that all benchmarks of cells share; `rounds` is the default of theirs."""
    default = rounds or "as many as fit 0.6 s, 10 to 60"
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {default}")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl")


def add_choices(parser: argparse.ArgumentParser, what: str, peer: str) -> None:
    """The arguments by which a run measures less: some cells alone, and ours without its peer."""
    parser.add_argument("--only", default="", metavar="REGEX", help=f"{what} whose name has it")
    parser.add_argument(
        "--peers", choices=(peer, "none"), default=peer, help=f"beside ours (default: {peer})"
    )


def is_chosen(name: str, args: argparse.Namespace) -> bool:
    return re.search(args.only, name) is not None


def without_peers(
    contestants: Iterable[C], peers: Iterable[str], args: argparse.Namespace
) -> tuple[list[C], dict[str, str]]:
    """The contestants, with `--peers none` without those named; and why these are absent."""
    left_out = dict.fromkeys(peers, "--peers none") if args.peers == "none" else {}
    return [c for c in contestants if c.name not in left_out], left_out


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, on a device that is there."""
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 2:
        parser.error("--rounds: a spread needs at least 2")
    require_device(args.device)
    return args


def require_device(device: str) -> None:
    if device != "cpu" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --device cpu is a dry run of the same path")
