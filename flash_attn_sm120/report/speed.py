"""How fast calls are beside SDPA's kernels and FlashAttention's, and as a share of the peak.

The mma.sync peak is measured in turn with every cell. Where it is lower than before, clocks have
not recovered: a cell waits for them, and is marked if they do not.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_sm120 import _C, _measure, flash_attn_func
from flash_attn_sm120._measure import Timed
from flash_attn_sm120.cards import kind_of, measured_half_rate
from flash_attn_sm120.mma_peak import MmaPeak
from flash_attn_sm120.tuned_tiles import GEFORCE, PRO

OURS, DEFAULT = "ours", "sdpa (its choice)"
BACKENDS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
OTHERS = ("flash_attn", "flash_attn.cute")
ROUNDS, SOAK_S = 15, 0.1
BUSY_S = 1.5  # while nvidia-smi is asked, which takes up to a second
RECOVERED, RECOVERY_S = 0.95, 3.0  # of the best peak so far
FLUSH_BYTES = 512 << 20


# Shares of the peak that a 5090 and a PRO 6000 should reach, by the model of benchmarks/ that an
# H100 with repeated products was held against: `sass_report.py --shares`, 3% off there.
PREDICTED = {
    "forward B 1, 32/8 x 128, S 1024, full": {GEFORCE: 0.66, PRO: 0.53},
    "forward B 1, 32/8 x 128, S 4096, full": {GEFORCE: 0.69, PRO: 0.77},
    "forward B 1, 32/8 x 128, S 8192, full": {GEFORCE: 0.79, PRO: 0.77},
    "forward B 1, 16/16 x 64, S 4096, full": {GEFORCE: 0.67, PRO: 0.55},
    "forward B 1, 16/4 x 256, S 4096, full": {GEFORCE: 0.71, PRO: 0.80},
    "forward B 1, 32/8 x 128, S 1024, causal": {GEFORCE: 0.63, PRO: 0.48},
    "forward B 1, 32/8 x 128, S 4096, causal": {GEFORCE: 0.86, PRO: 0.72},
    "forward B 1, 32/8 x 128, S 8192, causal": {GEFORCE: 0.89, PRO: 0.82},
    "forward B 1, 16/16 x 64, S 4096, causal": {GEFORCE: 0.77, PRO: 0.65},
    "forward B 1, 16/4 x 256, S 4096, causal": {GEFORCE: 0.83, PRO: 0.76},
    "backward B 1, 32/32 x 128, S 1024, full": {GEFORCE: 0.61, PRO: 0.46},
    "backward B 1, 32/32 x 128, S 4096, full": {GEFORCE: 0.75, PRO: 0.70},
    "backward B 1, 16/16 x 64, S 4096, full": {GEFORCE: 0.64, PRO: 0.67},
    "backward B 1, 32/32 x 128, S 1024, causal": {GEFORCE: 0.57, PRO: 0.40},
    "backward B 1, 32/32 x 128, S 4096, causal": {GEFORCE: 0.82, PRO: 0.71},
    "backward B 1, 16/16 x 64, S 4096, causal": {GEFORCE: 0.73, PRO: 0.60},
}


class Cell(NamedTuple):
    """A call that is timed."""

    kind: str  # forward, backward, decoding
    batch: int
    heads: tuple[int, int]
    head_dim: int
    queries: int
    keys: int
    causal: bool

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        heads = f"{self.heads[0]}/{self.heads[1]}"
        return f"{self.kind} B {self.batch}, {heads} x {self.head_dim}, S {self.keys}, {mask}"

    @property
    def flops(self) -> float:
        pairs = self.queries * self.keys / (2 if self.causal else 1)
        products = 5 if self.kind == "backward" else 2
        return 2.0 * products * self.batch * self.heads[0] * pairs * self.head_dim


def cells() -> Iterator[Cell]:
    for causal in (False, True):
        for seqlen in (1024, 4096, 8192):
            yield Cell("forward", 1, (32, 8), 128, seqlen, seqlen, causal)
        yield Cell("forward", 1, (16, 16), 64, 4096, 4096, causal)
        yield Cell("forward", 1, (16, 4), 256, 4096, 4096, causal)
    for causal in (False, True):
        for seqlen in (1024, 4096):
            yield Cell("backward", 1, (32, 32), 128, seqlen, seqlen, causal)
        yield Cell("backward", 1, (16, 16), 64, 4096, 4096, causal)
    for batch, keys in ((1, 8192), (16, 8192), (1, 32768)):
        yield Cell("decoding", batch, (32, 8), 128, 1, keys, False)


def run() -> Iterator[dict[str, Any]]:
    """Records: of the card, then one for each cell and contestant."""
    card = _card()
    yield card
    yield from measure(cells(), "cuda", card["kind"])


def measure(every: Iterable[Cell], device: str, kind: str = "") -> Iterator[dict[str, Any]]:
    """A record for each cell and contestant, on a card of a class."""
    best = 0.0
    peak_now = 1.0
    for cell in every:
        if peak_now < RECOVERED * best:
            time.sleep(RECOVERY_S)
        records = list(_cell(cell, device))
        peak_now = max((r["peak_tflops"] for r in records if "ms" in r), default=peak_now)
        best = max(best, peak_now)
        for record in records:
            if "ms" in record:
                record["low_clocks"] = peak_now < RECOVERED * best
            if record["contestant"] == OURS:
                record["predicted"] = PREDICTED.get(record["cell"], {}).get(kind)
            yield record


def _card() -> dict[str, Any]:
    """The device, its class, its clock and power while it multiplies matrices."""
    device = _C.devices()[1][torch.cuda.current_device()]
    rate = measured_half_rate()
    kind = kind_of(device["name"], device["arch"], rate)
    peak = MmaPeak()
    peak_ms = _measure.soak([peak.timed()], "cuda", 0.2)
    for _ in range(min(900, int(BUSY_S * 1e3 / peak_ms))):  # 1024 launches may wait
        peak()
    running = _measure.nvidia_smi("clocks.sm", "clocks.max.sm", "power.draw", "power.limit")
    torch.cuda.synchronize()
    known = {name: device[name] for name in ("name", "arch", "sms", "l2_bytes")}
    others = {name: getattr(found, "__version__", "?") for name, found in _other_packages()}
    return {
        "card": known,
        "half_rate": rate,
        **kind._asdict(),
        "while_running": running,
        "others": others,
    }


def _other_packages() -> Iterator[tuple[str, ModuleType]]:
    for name in OTHERS:
        try:
            yield name, importlib.import_module(name)
        except Exception:  # not installed, or not for this machine
            continue


# ---- a cell --------------------------------------------------------------------------------------


def _cell(cell: Cell, device: str) -> Iterator[dict[str, Any]]:
    entrants, absent = [], {}
    for timed in _contestants(cell, device):
        try:
            with timed.context():
                timed.call()
            _measure.synchronize(device)
            entrants.append(timed)
        except Exception as error:  # others raise what they like
            absent[timed.name] = _first_line(error)
    peak = MmaPeak()
    try:
        peak_ms, *samples = _samples([peak.timed(), *entrants], device)
    except RuntimeError as error:  # beside each other they ran out of memory, or one broke the GPU
        absent |= dict.fromkeys((timed.name for timed in entrants), _first_line(error))
        peak_ms, samples, entrants = [], [], []
    for name, why in absent.items():
        yield {"cell": str(cell), "contestant": name, "absent": why}
    if not entrants:
        return
    peak_tflops = peak.flops / statistics.median(peak_ms) * 1e-9
    for timed, own in zip(entrants, samples, strict=True):
        tflops = cell.flops / statistics.median(own) * 1e-9
        yield {
            "cell": str(cell),
            "contestant": timed.name,
            "ms": statistics.median(own),
            "tflops": tflops,
            "peak_tflops": peak_tflops,
            "share": tflops / peak_tflops,
        }


def _samples(every: list[Timed], device: str) -> list[list[float]]:
    _measure.soak(every, device, SOAK_S)
    flush = _measure.flush_buffer(device, FLUSH_BYTES)
    return _measure.round_robin(every, device, ROUNDS, flush)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or repr(error)


def _contestants(cell: Cell, device: str) -> Iterator[Timed]:
    heads_q, heads_kv = cell.heads
    shapes = (cell.queries, heads_q), (cell.keys, heads_kv), (cell.keys, heads_kv)
    q, k, v = (
        torch.randn(cell.batch, *s, cell.head_dim, dtype=torch.bfloat16, device=device)
        for s in shapes
    )
    if cell.kind == "backward":
        for x in (q, k, v):
            x.requires_grad_()

    def ours() -> Tensor:
        out: Tensor = flash_attn_func(q, k, v, causal=cell.causal)[0]
        return out

    def sdpa() -> Tensor:
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(qt, kt, vt, is_causal=cell.causal, enable_gqa=True)
        return out.transpose(1, 2)

    def of_package(function: Callable[..., Any]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            result = function(q, k, v, causal=cell.causal)
            out: Tensor = result[0] if isinstance(result, tuple) else result
            return out

        return call

    forwards: list[tuple[str, Callable[[], Tensor], Any]] = [(OURS, ours, None)]
    forwards += [(name, sdpa, backend) for name, backend in BACKENDS.items()]
    forwards.append((DEFAULT, sdpa, None))
    for name, package in _other_packages():
        if hasattr(package, "flash_attn_func"):
            forwards.append((name, of_package(package.flash_attn_func), None))
    for name, forward, backend in forwards:
        context = {"context": lambda b=backend: sdpa_kernel(b)} if backend else {}
        call = _gradients(forward, (q, k, v)) if cell.kind == "backward" else forward
        yield Timed(name, call, **context)


def _gradients(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """The backward of a forward that runs once, at the first call."""
    kept: list[Tensor] = []

    def call() -> Any:
        if not kept:
            out = forward()
            kept.extend((out, torch.randn_like(out)))
        return torch.autograd.grad(kept[0], inputs, kept[1], retain_graph=True)

    return call
