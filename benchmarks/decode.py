"""How fast is decoding, a few queries against many keys, beside PyTorch's own kernels?

    FA_SM120_LIMITS=120 python benchmarks/decode.py --output decode.jsonl   # about a minute
    FA_SM120_LIMITS=120 python benchmarks/decode.py --sweep                 # what splits cost
    FA_SM120_LIMITS=120 python benchmarks/decode.py --alone                 # a call by itself
    FA_SM120_LIMITS=120 python benchmarks/decode.py --kv e4m3               # e4m3 beside bf16
    FA_SM120_LIMITS=120 python benchmarks/decode.py --kv e4m3 \\
        --presets llama3-8b d64 --queries 4096 --seqlens 4096 --batches 1   # the same of prefill

A step of a model goes through as many K and V as it has layers, which no L2 holds: a CUDA graph has
a call for each of them. Such a call reads K and V once and computes little, so the figure is the
bandwidth at which it does, as a share of what a plain read of memory reaches in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import CUDNN, FLASH, OURS, PRESETS, Contestant, Preset, by_backend

from flash_attn_sm120 import _C, _measure, explain, flash_attn_func, jit

NAMES = (OURS, FLASH, CUDNN)
E4M3 = f"{OURS}, e4m3"
SWEPT = (1, 2, 4, 8, 16, 32, 64, 128)  # numbers of parts
COLD_BYTES = {"cuda": 1 << 30, "cpu": 1 << 16}  # of K and V in turn: several times any L2
MOST_LAYERS = 512
READ_BYTES = {"cuda": 2 << 30, "cpu": 1 << 20}
GRAIN_KEYS, MOST_BLOCKS = 64, 2048  # a sweep has no shorter parts, and no larger grids


# --------------------------------------------------------------------------------------- the calls


@dataclasses.dataclass(frozen=True)
class Call:
    """What a layer computes: `queries` of each sequence, the last of its `keys`."""

    name: str
    preset: Preset
    batch: int
    keys: int
    queries: int = 1
    window: int | None = None  # so many last keys are seen
    sink: bool = False

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}, {self.keys} keys"

    @property
    def window_size(self) -> tuple[int | None, int | None]:
        return (None, None) if self.window is None else (self.window - 1, 0)

    @property
    def keys_read(self) -> int:
        return min(self.keys, self.window or self.keys)

    @property
    def row_elements(self) -> int:
        """Of K, or of V: one key, all heads."""
        return self.preset.heads_kv * self.preset.head_dim

    @property
    def bytes_read(self) -> int:
        return self.batch * self.keys_read * self.row_elements * 2 * 2

    def layers(self, device: str) -> int:
        """So many K and V, one after the other, are no longer in the L2 when their turn comes."""
        wanted = min(math.ceil(COLD_BYTES[device] / self.bytes_read), MOST_LAYERS)
        # What windows see of one sequence, layer by layer, ends where the next one begins.
        room = self.keys // self.keys_read if self.window and self.batch > 1 else wanted
        return max(1, min(wanted, room))

    def bytes(self, device: str) -> int:
        """Of all K and V."""
        rows = self.batch * self.keys + self.layers(device) * self.layer_rows
        return rows * self.row_elements * 2 * 2

    @property
    def layer_rows(self) -> int:
        """From the K of a layer to the next: where a window hides keys, they overlap in these."""
        return self.keys_read if self.window else self.batch * self.keys

    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Of q and of k, which v is like."""
        heads_q, heads_kv, dim = self.preset.heads_q, self.preset.heads_kv, self.preset.head_dim
        return [
            (self.batch, self.queries, heads_q, dim),
            (self.batch, self.keys, heads_kv, dim),
        ]

    def fields(self) -> dict[str, Any]:
        """What its records say of it."""
        return {
            "preset": self.name,
            "heads_q": self.preset.heads_q,
            "heads_kv": self.preset.heads_kv,
            "head_dim": self.preset.head_dim,
            "batch": self.batch,
            "seqlen_q": self.queries,
            "seqlen_k": self.keys,
            "window": self.window,
            "sink": self.sink,
        }


GQA16, MQA, GPT_OSS = Preset(64, 4, 128), Preset(16, 1, 128), Preset(64, 8, 64)
LLAMA, QWEN = PRESETS["llama3-8b"], PRESETS["qwen2.5-7b"]

MODELS = [
    Call(name, PRESETS[name], batch, keys)
    for name in ("llama3-8b", "qwen2.5-7b")
    for batch in (1, 16, 64)
    for keys in (4096, 8192, 16384, 32768)
]
OTHERS = [
    Call("llama3-8b", LLAMA, 4, 8192),
    Call("llama2-7b", PRESETS["llama2-7b"], 1, 8192),
    *(Call(f"llama3-8b, {n} queries", LLAMA, b, 8192, n) for n in (4, 16) for b in (1, 16)),
    Call("qwen2.5-7b, 4 queries", QWEN, 1, 8192, 4),
    Call("qwen2.5-7b, 16 queries", QWEN, 1, 8192, 16),
    *(Call(d, PRESETS[d], b, 8192) for d in ("d64", "d192", "d256") for b in (1, 16)),
    *(Call("64/4", GQA16, b, 8192) for b in (1, 16)),
    Call("16/1", MQA, 1, 32768),
    Call("16/1", MQA, 16, 8192),
    Call("16/1, 4 queries", MQA, 1, 32768, 4),
    *(Call("64/8 d64 sink", GPT_OSS, b, 8192, sink=True) for b in (1, 16)),
    *(Call("64/8 d64 sink window 128", GPT_OSS, b, 8192, 1, 128, True) for b in (1, 16)),
    *(Call("d256 window 1024", PRESETS["d256"], b, 8192, 1, 1024) for b in (1, 16)),
    Call("llama3-8b window 1024", LLAMA, 1, 8192, 1, 1024),
]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A call's q, sink, and K and V of every layer."""

    call: Call
    q: torch.Tensor
    sink: torch.Tensor | None
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def of(cls, call: Call, device: str) -> Inputs:
        """Random: zeros would draw less power and run faster than real data."""
        q_shape, k_shape = call.shapes()
        random = functools.partial(torch.randn, dtype=torch.bfloat16, device=device)
        step = call.layer_rows * call.row_elements
        layers, size = call.layers(device), math.prod(k_shape)
        strides = torch.empty(k_shape, device="meta").stride()
        pools = [random(size + (layers - 1) * step) for _ in range(2)]
        keys, values = (
            [pool.as_strided(k_shape, strides, i * step) for i in range(layers)] for pool in pools
        )
        sink = torch.randn(q_shape[2], device=device) if call.sink else None
        return cls(call, random(q_shape), sink, keys, values)

    def in_turn(self, attend: Callable[[Any, Any], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """A call that takes the K and V of the next layer each time."""
        layers = itertools.cycle(zip(self.keys, self.values, strict=True))
        return lambda: attend(*next(layers))

    def ours(self, num_splits: int = 0) -> Callable[[], torch.Tensor]:
        options = {"window_size": self.call.window_size, "learnable_sink": self.sink}
        return self.in_turn(
            lambda k, v: flash_attn_func(self.q, k, v, num_splits=num_splits, **options)[0]
        )

    def peer(self, name: str) -> Contestant:
        """SDPA; of a window it is given the keys that are seen, and it has no sinks."""
        if self.sink is not None or (self.call.window and self.call.queries > 1):
            return Contestant(name, self._absent)
        q, seen = self.q.transpose(1, 2), self.call.keys_read

        def sdpa(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k, v = (x[:, -seen:].transpose(1, 2) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

        return Contestant(name, self.in_turn(sdpa), **by_backend(name))

    @staticmethod
    def _absent() -> torch.Tensor:
        raise NotImplementedError("SDPA has no sinks, nor windows of several queries")

    def plan(self, num_splits: int = 0) -> Any:
        return plan_of(self.call, self.q, self.keys[0], num_splits)


def e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn)


def plan_of(
    call: Call, q: torch.Tensor, k: torch.Tensor, num_splits: int = 0, arch: int | None = None
) -> Any:
    sink = torch.empty(call.preset.heads_q, device=q.device) if call.sink else None
    options = {"window_size": call.window_size, "learnable_sink": sink, "num_splits": num_splits}
    return explain(q, k, k, arch=arch, **options)


def compile_ahead(calls: list[Call], splits: tuple[int, ...], kv: str) -> None:
    """All kernels, over all cores: one after the other they would take longer than the run."""
    driver_version, devices = _C.devices()
    arch = devices[0]["arch"]
    kernels: dict[Any, None] = {}
    for call in calls:
        q, k = (torch.empty(shape, dtype=torch.bfloat16) for shape in call.shapes())
        for num_splits, keys in itertools.product(splits, (k, e4m3(k)) if kv == "e4m3" else (k,)):
            kernels.update(dict.fromkeys(plan_of(call, q, keys, num_splits, arch).kernels))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda kernel: jit.compile(*kernel, arch, driver_version), kernels))


# ----------------------------------------------------------------------------------- correctness


class Check:
    """Compares the output of the first layer with an fp32 reference; raises WrongResult."""

    def __init__(self, inputs: Inputs) -> None:
        self.entries = sorted({0, inputs.call.batch - 1})
        self.shape = tuple(inputs.q.shape)
        self.expected = [reference(inputs, entry) for entry in self.entries]

    def __call__(self, name: str, out: torch.Tensor) -> None:
        if tuple(out.shape) != self.shape:
            raise harness.WrongResult(f"{name}: expected {self.shape}, got {tuple(out.shape)}")
        for entry, (expected, allowed) in zip(self.entries, self.expected, strict=True):
            error = _measure.max_error(out[entry], expected)
            if not error <= allowed:  # NaN is wrong too
                raise harness.WrongResult(
                    f"{name}: batch {entry}: largest error {error:.3g}, allowed {allowed:.3g}"
                )


def reference(inputs: Inputs, entry: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[queries, heads_q, head_dim] of the first layer in fp32, and the largest error allowed."""
    call = inputs.call
    heads_kv, dim = call.preset.heads_kv, call.preset.head_dim
    k, v = (x[0][entry].transpose(0, 1) for x in (inputs.keys, inputs.values))
    q = inputs.q[entry].transpose(0, 1).reshape(heads_kv, -1, dim)  # rows: heads, then queries
    query = torch.arange(call.queries, device=q.device).repeat(q.shape[1] // call.queries)
    ends = query + call.keys - call.queries if call.window else torch.full_like(query, call.keys)
    places = torch.arange(call.keys, device=q.device)
    left = ends - (call.window or call.keys)
    visible = (places <= ends[:, None]) & (places > left[:, None] if call.window else True)
    wide = _measure.plain_attention(q.float(), k.float(), v.float(), visible)
    plain = _measure.plain_attention(q, k, v, visible).float()
    if inputs.sink is not None:
        scores = (q.float() @ k.float().transpose(1, 2)) * dim**-0.5
        lse = scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
        sink = inputs.sink.reshape(heads_kv, -1).repeat_interleave(call.queries, 1)
        share = torch.sigmoid(lse - sink)[..., None]
        wide, plain = wide * share, plain * share
    wide, plain = (x.reshape(-1, call.queries, dim).transpose(0, 1) for x in (wide, plain))
    return wide, _measure.allowed_error(wide, plain.to(q.dtype))


# ----------------------------------------------------------------------------------- measurement


def read_bandwidth(device: str) -> float:
    """Bytes per millisecond of a plain read of memory: the fastest of some ways to do it."""
    x = torch.randn(READ_BYTES[device] // 4, device=device)
    matrix = x.view(torch.bfloat16).nan_to_num_().view(-1, 8192)
    vector = torch.ones(8192, dtype=torch.bfloat16, device=device)
    reads = [
        Contestant("sum", lambda: x.sum()),
        Contestant("amax", lambda: x.amax()),
        Contestant("mv", lambda: matrix @ vector),
    ]
    timings, _ = harness.time_interleaved(reads, device, 10)
    return x.nbytes / min(timing.ms for timing in timings.values())


def measure(
    call: Call, contestants: Callable[[Inputs], list[Contestant]], args: argparse.Namespace
) -> dict[str, dict]:
    """What the records of a call say of each contestant."""
    inputs = Inputs.of(call, args.device)
    entrants, absent = harness.admit(contestants(inputs), Check(inputs), [inputs.q])
    timings, exhausted = harness.time_interleaved(
        entrants,
        args.device,
        args.rounds,
        graph=args.device == "cuda",
        graph_calls=1 if args.alone else len(inputs.keys),
    )
    gb = call.bytes_read / 1e9
    fields = {
        name: {
            "num_splits": inputs.plan(parts_of(name)).num_splits,
            "gb_per_s": gb / timing.ms * 1e3,
            **harness.timing_fields(timing, flops(call)),
        }
        for name, timing in timings.items()
    }
    return fields | harness.absent_fields(absent | exhausted)


def flops(call: Call) -> float:
    preset = call.preset
    return 4.0 * call.batch * preset.heads_q * call.queries * call.keys_read * preset.head_dim


def beside_peers(inputs: Inputs) -> list[Contestant]:
    return [Contestant(OURS, inputs.ours()), *(inputs.peer(name) for name in (FLASH, CUDNN))]


def in_both_types(inputs: Inputs) -> list[Contestant]:
    """K and V in bf16, rounded to numbers that e4m3 has, and in e4m3."""
    for x in (*inputs.keys, *inputs.values):
        x.copy_(e4m3(x))
    keys, values = ([e4m3(x) for x in layers] for layers in (inputs.keys, inputs.values))
    narrow = dataclasses.replace(inputs, keys=keys, values=values)
    return [Contestant(OURS, inputs.ours()), Contestant(E4M3, narrow.ours())]


def in_parts(inputs: Inputs) -> list[Contestant]:
    """Ours in all numbers of parts that are not beyond reason, and that the plan does not bound."""
    most = max(1, inputs.call.keys_read // GRAIN_KEYS)
    plans = {n: inputs.plan(n) for n in SWEPT if n <= most}
    numbers = [n for n, plan in plans.items() if plan.num_splits == n]
    numbers = [n for n in numbers if n <= 2 or (plans[n].blocks or 0) <= MOST_BLOCKS]
    return [Contestant(f"{n}", inputs.ours(n)) for n in numbers] + [Contestant(OURS, inputs.ours())]


def parts_of(name: str) -> int:
    return int(name) if name.isdigit() else 0


def measure_all(
    calls: list[Call],
    contestants: Callable[[Inputs], list[Contestant]],
    names: tuple[str, ...],
    records: harness.Records,
    args: argparse.Namespace,
) -> Iterator[dict[str, dict]]:
    """The records of each call by contestant."""
    for call in harness.progress(calls):
        needed = call.bytes(args.device) + harness.FLUSH_BYTES[args.device]
        run = functools.partial(measure, call, contestants, args)
        found = harness.within_memory(run, names, needed, args.device)
        yield {
            name: records.add(**call.fields(), contestant=name, **fields)
            for name, fields in found.items()
        }


# ---------------------------------------------------------------------------------------- tables


def us(cell: dict[str, dict], name: str) -> str:
    record = cell.get(name, {})
    return f"{record['ms'] * 1e3:.1f}" if "ms" in record else "absent" if record else ""


def label(record: dict) -> list[object]:
    return [record["preset"], record["batch"], record["seqlen_k"]]


def table_row(bandwidth: float, cell: dict[str, dict]) -> list[object]:
    """A cell's line of the table beside peers."""
    ours, peers = cell[OURS], [cell[name]["ms"] for name in (FLASH, CUDNN) if "ms" in cell[name]]
    key = [*label(ours), ours.get("num_splits") or "", *(us(cell, name) for name in NAMES)]
    if "ms" not in ours:
        return [*key, "", "", ""]
    ratio = f"{min(peers) / ours['ms']:.2f}" if peers else ""
    share = ours["gb_per_s"] * 1e6 / bandwidth
    return [*key, ratio, f"{ours['gb_per_s'] * 1e-3:.2f}", f"{share:.3f}"]


def types_row(bandwidth: float, cell: dict[str, dict]) -> list[object]:
    """The times of both types, and the bandwidth of the half of the bytes that e4m3 has."""
    wide, narrow = cell[OURS], cell[E4M3]
    key = [*label(wide), us(cell, OURS), us(cell, E4M3)]
    if "ms" not in wide or "ms" not in narrow:
        return [*key, "", "", ""]
    gb_per_s = narrow["gb_per_s"] / 2
    share = gb_per_s * 1e6 / bandwidth
    return [*key, f"{wide['ms'] / narrow['ms']:.2f}", f"{gb_per_s * 1e-3:.2f}", f"{share:.3f}"]


def sweep_row(cell: dict[str, dict]) -> list[object]:
    """The time of each number of parts, the best of them, and what the plan's costs beside it."""
    ours = cell[OURS]
    times = {int(name): record["ms"] for name, record in cell.items() if name.isdigit()}
    columns = [us(cell, f"{n}") for n in SWEPT]
    if "ms" not in ours or not times:
        return [*label(ours), *columns, "", "", ""]
    best = min(times, key=times.__getitem__)
    loss = ours["ms"] / times[best]
    return [*label(ours), *columns, best, ours["num_splits"], f"{loss:.3f}"]


# ------------------------------------------------------------------------------------------- main


def chosen(args: argparse.Namespace) -> list[Call]:
    calls = MODELS + OTHERS
    if args.presets:
        axes = itertools.product(args.presets, args.queries, args.batches, args.seqlens)
        calls = [Call(name, PRESETS[name], batch, keys, n) for name, n, batch, keys in axes]
    if args.kv == "e4m3":  # windows of layers share memory, which would be rounded again
        calls = [call for call in calls if call.window is None]
    return [call for call in calls if re.search(args.only, str(call))]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, help="these, and not the grid")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 16, 64), help="of presets")
    parser.add_argument("--seqlens", nargs="+", type=int, default=(4096, 8192, 32768))
    parser.add_argument("--queries", nargs="+", type=int, default=(1,))
    parser.add_argument("--only", default="", metavar="REGEX", help="calls whose name has it")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sweep", action="store_true", help="ours in 1, 2, 4, ... 128 parts")
    mode.add_argument("--alone", action="store_true", help="one call between events, L2 cold")
    parser.add_argument("--kv", choices=("bf16", "e4m3"), default="bf16", help="e4m3 beside bf16")
    harness.add_arguments(parser)
    return harness.parse(parser)


@torch.no_grad()
def main() -> None:
    args = parse_args()
    calls = chosen(args)
    is_e4m3 = args.kv == "e4m3" and not args.sweep
    names = (OURS,) if args.sweep else (OURS, E4M3) if is_e4m3 else NAMES
    records = harness.Records(args.output, "decode", args.device)
    if args.device == "cuda":
        compile_ahead(calls, (0, *SWEPT[:2]) if args.sweep else (0,), args.kv)
    contestants = in_parts if args.sweep else in_both_types if is_e4m3 else beside_peers
    before = read_bandwidth(args.device)
    found = list(measure_all(calls, contestants, names, records, args))
    bandwidth = max(before, read_bandwidth(args.device))
    title = "a call alone" if args.alone else "layers in turn"
    print(f"Decoding, bf16, {title}, a cold L2, microseconds per call")
    print(harness.headline(records.header))
    print(f"a plain read: {bandwidth * 1e-9:.2f} TB/s")
    if args.sweep:
        head = ("call", "batch", "keys", *map(str, SWEPT), "best", "plan", "plan/best")
        print(harness.markdown(head, map(sweep_row, found)))
    elif is_e4m3:
        head = ("call", "batch", "keys", *names, "bf16/e4m3", "TB/s of e4m3", "of a read")
        print(harness.markdown(head, map(functools.partial(types_row, bandwidth), found)))
    else:
        head = ("call", "batch", "keys", "parts", *NAMES, "ours/best peer", "TB/s", "of a read")
        print(harness.markdown(head, map(functools.partial(table_row, bandwidth), found)))
    print(harness.why_absent(found))


if __name__ == "__main__":
    main()
