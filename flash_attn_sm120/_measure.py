"""How results are judged and calls are timed, by ``check``, ``demo``, ``tune`` and benchmarks.

Numbers. A result may be twice as far from an fp32 reference as plain PyTorch in the input type is,
plus the rounding of numbers like those of the reference.

Times. The rules, and why they exist:

- All that are compared run in one process, round-robin (A B C, A B C, ...). Clocks, power and other
  users of the machine drift by more than the differences of interest; neighbours in time see the
  same drift, so their ratio survives it.
- They run for a while before anything counts, so that clocks and instruction caches settle.
- L2 is overwritten before each timed call: no call starts with its inputs cached.
- Medians and quartiles count, never a best.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

# ---- numbers -------------------------------------------------------------------------------------


def allowed_error(reference: Tensor, plain: Tensor, *, factor: float = 2) -> Tensor:
    """The tolerance rule: the largest error allowed, one number.

    ``factor * max|plain - reference| + 2 * max|reference + 0.3 - 0.3 - reference|``, the second
    term in fp32.

    Args:
        reference: the result computed at least in fp32.
        plain: plain PyTorch's, in the input type. Where it overflows, its error says nothing and
            counts for nothing.
        factor: 2; with softcap 3.
    """
    reference32 = reference.float()
    rounding = _max_finite(reference32 + 0.3 - 0.3 - reference32)
    return factor * _max_finite(plain.to(reference.dtype) - reference) + 2 * rounding


def max_error(result: Tensor, reference: Tensor) -> Tensor:
    """max|result - reference|, one number; NaN where there is a NaN, which no bound allows."""
    if not result.numel():
        return reference.new_zeros(())
    return (result.to(reference.dtype) - reference).abs().max()


def _max_finite(x: Tensor) -> Tensor:
    """max|x| over the elements that are neither NaN nor inf; 0 if there are none."""
    return torch.where(x.isfinite(), x, 0).abs().max() if x.numel() else x.new_zeros(())


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention in the type of its inputs, rounded at every step; rows without keys give 0.

    q ``[..., rows, D]``, k ``[..., keys, D]``, v ``[..., keys, Dv]``, visible ``[rows, keys]``;
    sink, a score without a value, of any shape that broadcasts to ``[..., rows]``.
    """
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink is not None:
        own = sink.to(scores)[..., None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, own], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[-2]]
    return weights.masked_fill(~visible, 0) @ v


# ---- times ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """A call that is timed beside others.

    ``context`` is entered outside the timed region: selecting an SDPA backend costs host time.
    """

    name: str
    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the rounds: the median, and the quartiles around it."""

    ms: float
    ms_q1: float
    ms_q3: float
    rounds: int
    graph_calls: int = 0  # calls in one timed graph; 0: the call was timed as it is

    @classmethod
    def of(cls, samples: Sequence[float], graph_calls: int = 0) -> Timing:
        """Of samples of single calls, or of graphs of ``graph_calls`` calls."""
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        calls = max(1, graph_calls)
        return cls(median / calls, q1 / calls, q3 / calls, len(samples), graph_calls)

    @property
    def spread(self) -> float:
        """The interquartile range as a fraction of the median."""
        return (self.ms_q3 - self.ms_q1) / self.ms


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def soak(contestants: Sequence[Timed], device: str, seconds: float) -> float:
    """Runs all in turn until clocks and caches have settled; milliseconds of a round."""
    rounds = 0
    synchronize(device)
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or rounds == 0:
        for contestant in contestants:
            with contestant.context():
                contestant.call()
        synchronize(device)
        rounds += 1
    return elapsed * 1e3 / rounds


def captured(contestant: Timed, calls: int) -> Timed:
    """The contestant as the replay of a CUDA graph of several calls: no host time is left in it."""
    graph = torch.cuda.CUDAGraph()
    with contestant.context(), torch.cuda.graph(graph):
        for _ in range(calls):
            contestant.call()
    return Timed(contestant.name, graph.replay)


def flush_buffer(device: str, size: int) -> Tensor:
    """Memory that :func:`round_robin` writes: ``size`` bytes, several times the L2.

    The write must take longer than the host needs to enqueue a call. The call then waits behind it,
    and launch overhead stays outside the events.
    """
    return torch.empty(size, dtype=torch.int8, device=device)


def round_robin(
    contestants: Sequence[Timed], device: str, rounds: int, flush: Tensor
) -> list[list[float]]:
    """Milliseconds of each contestant in each round, every call behind a write of ``flush``."""
    events = [[(event(device), event(device)) for _ in range(rounds)] for _ in contestants]
    synchronize(device)
    flush.zero_()  # a head start for the host: it then stays ahead of the GPU
    for i in range(rounds):
        for contestant, pairs in zip(contestants, events, strict=True):
            start, end = pairs[i]
            with contestant.context():
                flush.zero_()
                start.record()
                contestant.call()
                end.record()
    synchronize(device)
    return [[start.elapsed_time(end) for start, end in pairs] for pairs in events]


class _Event(Protocol):
    """What torch.cuda.Event and HostEvent have in common."""

    def record(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...


class HostEvent:
    """torch.cuda.Event for a CPU: dry runs take the path that measurements take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.seconds - self.seconds) * 1e3


def event(device: str) -> _Event:
    if device == "cpu":
        return HostEvent()
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


# ---- the machine ---------------------------------------------------------------------------------


def nvidia_smi(*fields: str) -> dict[str, str | None]:
    """What nvidia-smi says of torch's first GPU: clocks, power; None for what it does not say."""
    gpu = "0"
    if torch.cuda.is_available():  # CUDA_VISIBLE_DEVICES means nothing to nvidia-smi
        gpu = f"GPU-{getattr(torch.cuda.get_device_properties(0), 'uuid', '')}"
    query = ("nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}")
    answer = output_of(*query, "--format=csv,noheader")
    values = answer.split(", ") if answer else []
    return dict(zip_longest(fields, values[: len(fields)]))


def output_of(*command: str) -> str | None:
    """What a command printed; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
