"""What would bound the kernels on sm_120? Counts the instructions of their main loops in SASS.

    python benchmarks/sass_report.py               # the common kernels, forward and backward
    python benchmarks/sass_report.py 128 192,128   # these head dims (or head_dim,head_dim_v)

Static figures: nothing here has run on the card. Each kernel is compiled for the architecture,
disassembled by nvdisasm (`pip install nvidia-cuda-nvdisasm`), and the main loop's instructions are
priced by the table below. Left out are stalls (latencies, barriers, bank conflicts) and what works
outside the SM's pipes: the TMA's writes to shared memory, and atomic additions in the L2. So the
figures say which pipe a kernel cannot be faster than, not how fast it is.

How the main loop is found. A loop is a branch back to an instruction that dominates it (divergent
warps branch back, too, but not to such an instruction); its body is the instructions that lead to
that branch. A *tile loop* holds tensor instructions, waits for its tile at a barrier or an
mbarrier, and holds no other such loop. The forward has two: masked iterations, which update the row
max, and unmasked ones; with masks, the second pass has masked iterations as well. A loop inside
that holds tensor instructions runs once per sub-tile (TILE_N / SUB_N times), any other (polling an
mbarrier) counts once; branches that skip code, such as the copies of tiles beyond the end, are not
taken. The main loop is the tile loop that issues the fewest instructions for each tensor
instruction.

The backward has one tile loop, with several paths in its body: the warps that hold K, with a mask
and without; the warps that hold V; then all warps for a part of dQ. A *path* is everything before
and after the tensor instructions that only it has, up to the next tile. Exponentials show which
group of warps a path belongs to. Of each group, the path with the fewest instructions for each
tensor instruction counts: the one of unmasked iterations. What one thread does for all, asking the
TMA for the next tile, counts in both.

A bound is not a prediction: warps wait. `--shares` predicts the share of the mma.sync peak for the
calls of balance.py and for the common head dims, by the model of static_model.py: for both classes
of 12.x cards, and for an H100 at TENSOR_REPEAT 1, 2 and 4. Beside the latter stands what balance.py
measured (`--proxy FILE`, its output, or the table that static_model.py keeps) and how far off the
prediction is: that is the error bar of the figures for 12.x. A second table says what part of the
time each cause takes.

The unit of the forward is one tile of keys of one warp, that of the backward one tile of queries of
two warps, one of each group, which share a sub-partition. Cycles are those of the SM sub-partition
of these warps, all warps (or pairs) of a sub-partition needing the same. The bound is the slowest
pipe or the issue slots (one instruction per cycle, as on all GPUs since 7.0); the tensor share is
the tensor pipe's part of the bound, tensor / max(pipes, issue slots): 100% where the tensor pipe
itself is the bound.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import balance
import harness
import lowp
import static_model
import torch
from harness import Cell, Preset
from static_model import DEVICES, Device, Prediction

from flash_attn_sm120 import common_kernels, jit
from flash_attn_sm120.plan import Kernel, Plan, explain, explain_backward
from flash_attn_sm120.quantized import RECIPES

# ----------------------------------------------------------------------------------------- rates

CHIPS = ("GeForce", "PRO", "GB10")  # RTX 50; RTX PRO Blackwell; DGX Spark (12.1)

# Cycles for which one warp instruction occupies its pipe in its SM sub-partition, one figure, or
# one per chip: (opcode, a regular expression; pipe; cycles). The first row that matches counts.
# [published] NVIDIA's documents, or measurements that others have published; [derived] from these;
# [assumed] nothing is published for 12.x. Pipes without cycles cost issue slots alone.
RATES = (
    # FLOP / clock / SM over 4 sub-partitions, from the peak figures [derived]: fp32 accumulation
    # 512 on GeForce (209.5 TFLOPS, RTX 5090) and 1024 on PRO (503.8, RTX PRO 6000); 4096 FLOP
    # each. GB10 [derived]: FlashAttention-2 reached some 95 TFLOPS on its 48 SMs, which at 512
    # would take 3.9 GHz; so it is 1024.
    (r"HMMA\.16816\.F32.*", "tensor", (32, 16, 16)),
    (r"HMMA\.1688\.F32.*", "tensor", (16, 8, 8)),
    (r"HMMA\.16816\.F16.*", "tensor", 16),  # 1024 everywhere [derived]
    # 8192 FLOP: block-scaled and with fp16 accumulation 2048 everywhere, fp32 half on GeForce
    # [derived]; of GB10 nothing is published, here and below as PRO [assumed]
    (r"QMMA\.SF\.16832.*|QMMA\.16832\.F16.*", "tensor", 16),
    (r"QMMA\.16832\.F32.*", "tensor", (32, 16, 16)),
    (r"OMMA.*16864.*", "tensor", 16),  # 16384 FLOP, 4096 everywhere; 4095 measured [published]
    # Shared memory, and the L1 beside it, move 128 B / clock / SM (Chips and Cheese on GB202
    # [published]; for ldmatrix and cp.async [assumed]): 512 B take 4, 4 sub-partitions take turns.
    (r"(LDSM|STSM).*\.4", "shared", 16),
    (r"(LDSM|STSM).*\.2", "shared", 8),
    (r"(LDGSTS|LDS|STS|LDG|STG)\b.*\.128", "shared", 16),
    (r"(LDGSTS|LDS|STS|LDG|STG)\b.*\.64", "shared", 8),
    (r"(LDSM|STSM|LDGSTS|LDS|STS|LDG|STG)\b.*", "shared", 4),
    # Reductions in memory leave by the same way as stores [assumed].
    (r"(RED|REDG)\b.*\.F32x4\b.*", "shared", 16),
    (r"(RED|REDG)\b.*\.F32x2\b.*", "shared", 8),
    (r"(RED|REDG)\b.*", "shared", 4),
    (r"(LDL|STL)\b.*", "spills", 4),  # through the same memory; on their own, to be seen
    (r"(SHFL|MOVM)\b.*", "shared", 4),  # 32 lanes / clock / SM, as on 8.x and 9.0 [assumed]
    # 16 lanes / clock / SM: measured on 10.0 [published], on 12.x [assumed]
    (r"(MUFU|I2F|F2I|F2F|I2I|POPC|FLO)\b.*", "mufu", 8),
    # 128 lanes / clock / SM [published]: one pipe of 32 lanes in each sub-partition.
    (r"(FFMA|FMUL|FADD)\b.*", "fma", 1),
    # Integer products 64 (Chips and Cheese on GB202 [published]); packed halves as on 8.9 [assumed]
    (r"(IMAD|HFMA2|HADD2|HMUL2)\b.*", "fma", 2),
    # 64 lanes / clock / SM, as on 8.x and 9.0 [assumed]: the slower reading. The lanes of fp32 take
    # integers, too (NVIDIA on the RTX 50 series [published]), so some of these may run at 128.
    (r"(LOP3|IADD|IADD3|VIADD|LEA|SHF|PRMT|SEL|ISETP|VIMNMX|IMNMX|IABS|VOTE)\b.*", "alu", 2),
    (r"(FMNMX|FMNMX3|FSEL|FSETP|HMNMX2|HSETP2|F2FP|MOV|PLOP3|P2R|R2P)\b.*", "alu", 2),
    # The uniform datapath: one lane per sub-partition, a result every other clock [assumed].
    (r"(U(?!TMA|BLK)[A-Z0-9]+|LDCU|R2UR|S2UR)\b.*", "uniform", 2),
    (r"(BRA|BSSY|BSYNC|WARPSYNC|EXIT|CALL|RET)\b.*", "control", 0),
    (r"(BAR|DEPBAR|LDGDEPBAR|SYNCS|NANOSLEEP|YIELD|ELECT)\b.*", "control", 0),
    # One warp asks, and the TMA works: an issue slot is all that is known to be taken [assumed].
    (r"(UTMALDG|UTMASTG|UBLKCP)\b.*", "control", 0),
    (r"NOP", "nop", 0),  # between HMMAs where nothing else is ready; and predicated off for good
    (r"[A-Z]MMA\b.*", "unknown", 0),  # a tensor instruction without a rate: an error, see price()
    (r".*", "other", 0),  # listed by name
)  # fmt: skip
PIPES = tuple(dict.fromkeys(pipe for _, pipe, _ in RATES if pipe != "unknown"))

REGISTERS_PER_SM, REGISTER_UNIT = 64 * 1024, 256  # given out to a warp in units [published]


@functools.cache
def price(opcode: str) -> tuple[str, tuple[float, ...]]:
    """(pipe, cycles on each chip) of one instruction.

    Raises:
        ValueError: a tensor instruction that the table does not know.
    """
    pipe, cycles = next((p, c) for pattern, p, c in RATES if re.fullmatch(pattern, opcode))
    if pipe == "unknown":
        raise ValueError(f"the table of rates has no row for {opcode}")
    return pipe, cycles if isinstance(cycles, tuple) else (cycles,) * len(CHIPS)


# ------------------------------------------------------------------------------------ disassembly


def find_nvdisasm() -> str:
    """The nvdisasm of $PATH, of NVIDIA's Python packages, of conda, or of a CUDA toolkit.

    Raises:
        RuntimeError: there is none; the message says what to install.
    """
    found = shutil.which("nvdisasm")
    if not found:
        with contextlib.suppress(ImportError):  # absent, or from before it looked for programs
            from cuda.pathfinder import find_nvidia_binary_utility

            found = find_nvidia_binary_utility("nvdisasm")
    if not found:
        raise RuntimeError(
            "nvdisasm was not found in PATH, in Python's packages or in a CUDA toolkit: "
            "pip install --upgrade nvidia-cuda-nvdisasm cuda-pathfinder"
        )
    return found


def disassemble(cubin: bytes) -> str:
    """The listing of a cubin's code.

    Raises:
        RuntimeError: there is no nvdisasm, or it is too old for the cubin.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [find_nvdisasm(), "--print-code", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    guard: str  # for example @!P1, or empty
    opcode: str  # with its modifiers, for example LDSM.16.M88.4
    operands: str
    target: int | None  # index of the instruction that it may branch to

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        name = self.opcode.split(".")[0]
        if name == "BRA":  # a condition is a guard, or an operand before the label
            return bool(self.guard) or not self.operands.startswith("`")
        return bool(self.guard) or name not in ("EXIT", "RET", "BRX", "JMX", "JMP")

    @property
    def is_tensor(self) -> bool:
        return re.match(r"[A-Z]MMA\b", self.opcode) is not None

    @property
    def waits_for_tile(self) -> bool:
        return self.opcode.startswith(("BAR.SYNC", "BAR.RED", "SYNCS.PHASECHK"))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.guard.rjust(5), self.opcode, self.operands)))


LABEL = re.compile(r"(\.L\w+):")
LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\S*?)(?:\s+(.*?))?\s*;")


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing by nvdisasm."""
    lines, labels = [], {}
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(lines)
        elif match := LINE.match(line):
            guard, opcode, operands = match[1] or "", match[2], match[3] or ""
            if guard in ("@!PT", "@!UPT"):
                guard, opcode, operands = "", "NOP", str(match[2])  # never runs
            lines.append((guard, opcode, operands))

    def target(opcode: str, operands: str) -> int | None:
        label = re.search(r"`\((\.L\w+)\)", operands)
        jumps = opcode.startswith(("BRA", "WARPSYNC"))  # BSSY names where paths meet again
        return labels.get(label[1]) if label and jumps else None

    return [Instruction(*line, target(*line[1:])) for line in lines]


# ------------------------------------------------------------------------------------------ loops


@dataclass(frozen=True)
class Loop:
    """A natural loop: the indices of its instructions, in order."""

    body: tuple[int, ...]

    def holds(self, other: Loop) -> bool:
        return self != other and set(other.body) <= set(self.body)


def reached(start: int, edges: list[list[int]], without: int | None = None) -> set[int]:
    """Everything that `edges` lead to from `start` without passing `without`."""
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        i = waiting.pop()
        if i not in seen and i != without:
            seen.add(i)
            waiting += edges[i]
    return seen


def neighbours(code: list[Instruction]) -> tuple[list[list[int]], list[list[int]]]:
    """Of each instruction those that may run after it, and those that may before it."""
    after: list[list[int]] = [[] for _ in code]
    before: list[list[int]] = [[] for _ in code]
    for i, instruction in enumerate(code):
        following = [i + 1] if instruction.falls_through and i + 1 < len(code) else []
        for j in {*following, *([] if instruction.target is None else [instruction.target])}:
            after[i].append(j)
            before[j].append(i)
    return after, before


def find_loops(code: list[Instruction]) -> list[Loop]:
    """The natural loops, by where they begin. Blocks laid out beyond a loop's end are left out."""
    after, before = neighbours(code)
    ends: dict[int, list[int]] = {}  # by head: the branches back to it that it dominates
    for end in reached(0, after):
        head = code[end].target
        if head is not None and head <= end and end not in reached(0, after, head):
            ends.setdefault(head, []).append(end)
    loops = []
    for head, branches in sorted(ends.items()):
        inside = {head}.union(*(reached(end, before, head) for end in branches))
        loops.append(Loop(tuple(sorted(i for i in inside if head <= i <= max(branches)))))
    return loops


Runs = list[tuple[Instruction, int]]  # instructions, and how often each runs per tile


def effort(runs: Runs) -> float:
    """Instructions issued for each tensor instruction."""
    return sum(n for _, n in runs) / sum(n for instruction, n in runs if instruction.is_tensor)


def find_tile_loops(code: list[Instruction]) -> tuple[list[Loop], list[Loop]]:
    """The tile loops, and all loops that multiply.

    Raises:
        ValueError: no loop waits for tiles and multiplies them.
    """
    multiplying = [loop for loop in find_loops(code) if any(code[i].is_tensor for i in loop.body)]
    tiles = [loop for loop in multiplying if any(code[i].waits_for_tile for i in loop.body)]
    innermost = [loop for loop in tiles if not any(loop.holds(other) for other in tiles)]
    if not innermost:
        raise ValueError("no loop waits for tiles and multiplies them")
    return innermost, multiplying


def find_main_loop(code: list[Instruction], sub_tiles: int) -> Runs:
    """The main loop of the forward.

    Raises:
        ValueError: no loop waits for tiles and multiplies them.
    """
    tiles, multiplying = find_tile_loops(code)

    def runs(loop: Loop) -> Runs:
        inner = set().union(*(other.body for other in multiplying if loop.holds(other)))
        seldom = skipped_by_vote(code, loop)
        return [(code[i], sub_tiles if i in inner else 1) for i in loop.body if i not in seldom]

    return min(map(runs, tiles), key=effort)


def skipped_by_vote(code: list[Instruction], loop: Loop) -> set[int]:
    """What a warp skips unless one of its lanes wants it: O is scaled where a row max rises, which
    it does in the first tiles of a row and seldom after them."""
    skipped: set[int] = set()
    for i in loop.body[1:]:
        end = code[i].target
        votes = code[i].guard and code[i - 1].opcode == "VOTE.ANY" and end is not None
        if votes and i < end <= loop.body[-1]:
            skipped |= set(range(i + 1, end))
    return skipped


def find_paths(code: list[Instruction], loop: Loop) -> list[list[int]]:
    """The paths through a loop's body that multiply differently: indices of instructions.

    Two instructions are on one path where one leads to the other before the loop starts again. Of
    a tensor instruction that several paths share, that makes all of these; so the smallest such
    sets are the paths.
    """
    body, head = set(loop.body), loop.body[0]
    after, before = neighbours(code)
    onward = [[j for j in following if j in body and j != head] for following in after]
    backward = [[j for j in leading if j in body] for leading in before]
    backward[head] = []
    sets = {frozenset(reached(i, onward) | reached(i, backward)) for i in body if code[i].is_tensor}
    return [sorted(path) for path in sets if not any(other < path for other in sets)]


def find_pair_loop(code: list[Instruction]) -> Runs:
    """The main loop of the backward: the paths of two warps, one of each group.

    Raises:
        ValueError: no loop waits for tiles and multiplies them, for both groups.
    """
    paths = [
        [(code[i], 1) for i in path]
        for loop in find_tile_loops(code)[0]
        for path in find_paths(code, loop)
    ]
    groups: dict[bool, list[Runs]] = {}
    for path in paths:
        has_exponentials = any(instruction.opcode == "MUFU.EX2" for instruction, _ in path)
        groups.setdefault(has_exponentials, []).append(path)
    if len(groups) != 2:
        raise ValueError("no loop has paths of both groups of warps")
    return [run for group in groups.values() for run in min(group, key=effort)]


# ---------------------------------------------------------------------------------------- figures


def constants(kernel: Kernel) -> dict[str, int]:
    """The compile-time constants of a kernel: TILE_N and so on."""
    pairs = (option.removeprefix("-D").split("=") for option in kernel.options)
    return {name: int(value) for name, value in pairs}


def forward_products(c: dict[str, int]) -> int:
    """How many m16n8k16, or of 8 bits m16n8k32, a tile takes of a warp: Q K^T, then P V."""
    depth = 32 if c.get("Q_E4M3") else 16
    scores = c["TILE_N"] // 8 * -(-c["HEAD_DIM"] // depth)
    values = c["HEAD_DIM_V"] // 8 * (c["TILE_N"] // depth)
    return c["WARP_M"] // 16 * (scores + values)


def backward_products(c: dict[str, int]) -> int:
    """And of two warps, one of each group: K Q^T and P^T dO; V dO^T and dS^T Q; both of dS K."""
    steps = -(-c["HEAD_DIM"] // 16) - (-c["HEAD_DIM_V"] // 16)
    own = c["WARP_N"] // 16 * (c["TILE_M"] // 8) * steps
    rows, group = c["TILE_M"] // 16, c["WARPS"] // 2
    dims = 2 * c["DQ_DIM_WARPS"] * -(-c["HEAD_DIM"] // (16 * c["DQ_DIM_WARPS"]))
    of_queries = rows * dims * (c["WARP_N"] * group // 16) // c["WARPS"]
    return 2 * (own + of_queries)


@dataclass(frozen=True)
class Figures:
    """The main loop of one kernel, per tile, and what the kernel takes of an SM."""

    variant: str
    arch: str
    warps: int  # of which the loop is: one, or the two of a pair
    instructions: dict[str, int]  # opcode -> how often it is issued
    products: int  # tensor instructions that the tile takes by its shape
    registers: int
    spill_bytes: int
    smem_bytes: int
    blocks_per_sm: int
    listing: str  # the main loop

    @property
    def issued(self) -> int:
        return sum(self.instructions.values())

    def counts(self) -> Counter[str]:
        """Instructions by pipe."""
        counts: Counter[str] = Counter()
        for opcode, count in self.instructions.items():
            counts[price(opcode)[0]] += count
        return counts

    def others(self) -> dict[str, int]:
        """The instructions of no pipe, by name."""
        return {o: n for o, n in self.instructions.items() if price(o)[0] == "other"}

    def cycles(self, chip: str) -> dict[str, float]:
        """Cycles of each pipe that has a rate, and of the issue slots."""
        cycles: dict[str, float] = {"issue": self.issued}
        for opcode, count in self.instructions.items():
            pipe, rates = price(opcode)
            if rate := rates[CHIPS.index(chip)]:
                cycles[pipe] = cycles.get(pipe, 0) + count * rate
        return dict(sorted(cycles.items(), key=lambda item: -item[1]))

    def bound(self, chip: str) -> str:
        """The slowest pipe, or "issue"."""
        return next(iter(self.cycles(chip)))

    def tensor_share(self, chip: str) -> float:
        """The tensor pipe's part of the bound."""
        cycles = self.cycles(chip)
        return cycles["tensor"] / max(cycles.values())


def analyse(plan: Plan, arch: str) -> Figures:
    """Compiles a plan's kernel for `arch`, such as "sm_120f", and counts its main loop.

    Raises:
        RuntimeError: NVRTC or nvdisasm is missing or fails.
        ValueError: the kernel has no main loop.
    """
    is_backward = plan.direction == "backward"
    kernel = plan.main
    build = jit.build(*kernel, arch)
    code, c = parse(disassemble(build.cubin)), constants(kernel)
    loop = find_pair_loop(code) if is_backward else find_main_loop(code, c["TILE_N"] // c["SUB_N"])
    instructions: Counter[str] = Counter()
    for instruction, runs in loop:
        instructions[instruction.opcode] += runs
    per_warp = -(-build.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    assert plan.blocks_per_sm and plan.warps and plan.smem_bytes is not None
    return Figures(
        variant=kernel.variant,
        arch=arch,
        warps=2 if is_backward else 1,
        instructions=dict(instructions.most_common()),
        products=backward_products(c) if is_backward else forward_products(c),
        registers=build.registers,
        spill_bytes=build.spill_bytes,
        smem_bytes=plan.smem_bytes + build.shared_bytes,
        blocks_per_sm=min(plan.blocks_per_sm, REGISTERS_PER_SM // (per_warp * plan.warps)),
        listing="\n".join(f"{runs:3}x {instruction}" for instruction, runs in loop),
    )


def analyse_all(plans: list[Plan], arch: str) -> list[Figures]:
    """analyse() of each plan, over all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(analyse, plans, [arch] * len(plans)))


# ----------------------------------------------------------------------------------------- report


def count_rows(figures: list[Figures]) -> Iterator[tuple]:
    for f in figures:
        counts = f.counts()
        resources = (f.registers, f.spill_bytes, f.smem_bytes, f.blocks_per_sm)
        yield (f.variant, *(counts[pipe] for pipe in PIPES), f.issued, f.products, *resources)


def cycle_rows(figures: list[Figures], pipes: list[str]) -> Iterator[tuple]:
    for f in figures:
        chips = [f.cycles(chip) for chip in CHIPS]
        columns = [each_chip(f"{cycles.get(pipe, 0):g}" for cycles in chips) for pipe in pipes]
        bounds = each_chip(map(f.bound, CHIPS))
        shares = each_chip(f"{f.tensor_share(chip):.0%}" for chip in CHIPS)
        runners_up = [(list(cycles)[1], sorted(cycles.values())[-2:]) for cycles in chips]
        behind = each_chip(f"{pipe} {low / high:.0%}" for pipe, (low, high) in runners_up)
        yield (f.variant, *columns, bounds, shares, behind)


def each_chip(values: Iterable[str]) -> str:
    """One value for each chip, or the one that all share."""
    each = list(values)
    return each[0] if len(set(each)) == 1 else " / ".join(each)


UNITS = {1: "forward, per tile of keys and warp", 2: "backward, per tile of queries and two warps"}


def report(figures: list[Figures]) -> None:
    """Prints the tables, of each direction its own."""
    has_rates = figures[0].arch.startswith("sm_12")
    for warps, unit in UNITS.items():
        if of_unit := [f for f in figures if f.warps == warps]:
            report_counts(unit, of_unit)
            if has_rates:
                report_cycles(unit, of_unit)
    if not has_rates:
        print(f"\nNo cycles: the rates are those of 12.x, not of {figures[0].arch}.")


def report_counts(unit: str, figures: list[Figures]) -> None:
    resources = ("registers", "spilled B", "shared B", "blocks/SM")
    print(f"\nInstructions of the main loop by pipe, {unit}:\n")
    print(harness.markdown(("kernel", *PIPES, "all", "products", *resources), count_rows(figures)))
    print("\nproducts: the tensor instructions that the tile takes by its shape.")
    others: Counter[str] = Counter()
    for f in figures:
        others.update(f.others())
    print("other, all kernels:", ", ".join(f"{o} {n}" for o, n in others.most_common()) or "none")


def report_cycles(unit: str, figures: list[Figures]) -> None:
    pipes = ["issue", *(p for p in PIPES if any(p in f.cycles(CHIPS[0]) for f in figures))]
    print(f"\nCycles of an SM sub-partition, {unit}; where they differ, {' / '.join(CHIPS)}:\n")
    head = ("kernel", *pipes, "bound", "tensor share", "next, of the bound")
    print(harness.markdown(head, cycle_rows(figures, pipes)))


# ----------------------------------------------------------------------------------------- shares


def calls_of_shares(only: str) -> list[balance.Call]:
    """Those of balance.py, and of the common head dims at S 4096."""
    calls = {str(call): call for call in balance.CALLS}
    for head_dim, head_dim_v in common_kernels.COMMON_HEAD_DIMS:
        preset = Preset(16, 16, head_dim, None if head_dim == head_dim_v else head_dim_v)
        for is_backward, causal in itertools.product((False, True), repeat=2):
            call = balance.Call(preset, 4096, causal, is_backward, {})
            calls.setdefault(str(call), call)
    return [call for name, call in calls.items() if re.search(only, name)]


def plan_on(
    device: Device, cell: Cell, is_backward: bool = False, kv_dtype: torch.dtype | None = None
) -> Plan:
    """What a call gets there; the memory is never touched.

    A plan counts with the multiprocessors of one card of each kind. So it is asked for as many
    heads for each of these as the device has.
    """
    preset, sms = cell.preset, static_model.PLANNED_SMS[device.rows]
    heads_kv = max(1, preset.heads_kv * sms // device.sms)
    heads_q = heads_kv * preset.heads_q // preset.heads_kv
    scaled = Preset(heads_q, heads_kv, preset.head_dim, preset.head_dim_v)
    shapes = dataclasses.replace(cell, preset=scaled).shapes()[:3]
    dtypes = (cell.dtype, kv_dtype or cell.dtype, kv_dtype or cell.dtype)
    q, k, v = (torch.empty(*x, dtype=dtype) for x, dtype in zip(shapes, dtypes, strict=True))
    if is_backward:
        return explain_backward(q, k, v, causal=cell.causal, arch=device.rows)
    return explain(q, k, v, causal=cell.causal, num_splits=1, arch=device.rows)


def predict(
    cell: Cell, plan: Plan, figures: Figures, chip: str, is_backward: bool = False
) -> Prediction:
    c, counts, device = constants(plan.main), figures.counts(), DEVICES[chip]
    assert plan.warps
    units = plan.warps * figures.blocks_per_sm / 4 / figures.warps  # of a sub-partition
    pipes = figures.cycles(chip if chip in CHIPS else "PRO")
    tensor = pipes.pop("tensor")
    if device.repeat:
        tensor = counts["tensor"] * static_model.H100_HMMA * device.repeat
    del pipes["issue"]
    loop = static_model.Loop(
        tensor=units * tensor,
        issue=units * (figures.issued - counts["tensor"] - counts["nop"]),
        slowest=units * max(pipes.values()),
        sub_tiles=c["TILE_M"] // c["SUB_M"] if is_backward else c["TILE_N"] // c["SUB_N"],
        is_backward=is_backward,
        blocks_per_sm=figures.blocks_per_sm,
    )
    grid = static_model.Grid(
        own=c["WARPS"] // 2 * c["WARP_N"] if is_backward else c["WARPS"] * c["WARP_M"],
        tile=c["TILE_M" if is_backward else "TILE_N"],
        seqlen=cell.seqlen,
        causal=cell.causal,
        heads=cell.batch * cell.preset.heads_q,
        head_dim=cell.preset.head_dim,
    )
    return static_model.predict(loop, grid, device)


Planned = dict[Any, tuple[Plan, str]]  # and the device, by name


def analyse_planned(planned: Planned) -> dict[Any, Figures]:
    """analyse() of each plan for its device, each kernel once."""
    kinds = {(plan.variant, DEVICES[chip].arch): plan for plan, chip in planned.values()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(analyse, kinds.values(), [arch for _, arch in kinds])
        figures = dict(zip(kinds, found, strict=True))
    return {key: figures[p.variant, DEVICES[chip].arch] for key, (p, chip) in planned.items()}


def predict_all(calls: list[balance.Call]) -> dict[tuple[str, str], Prediction]:
    """By call and device."""
    named = {str(call): call for call in calls}
    planned = {
        (name, chip): (plan_on(device, call.cell, call.is_backward), chip)
        for name, call in named.items()
        for chip, device in DEVICES.items()
    }
    figures = analyse_planned(planned)
    return {
        (name, chip): predict(
            named[name].cell, plan, figures[name, chip], chip, named[name].is_backward
        )
        for (name, _), (plan, chip) in planned.items()
    }


def measured_shares(file: Path | None) -> dict[tuple[str, int], float]:
    """By call and repeat."""
    if file is None:
        return static_model.PROXY
    return {
        (line["call"], line["repeat"]): line["share"]
        for line in harness.read_records(file)[1]
        if line.get("contestant") == harness.OURS and "share" in line
    }


def report_shares(calls: list[balance.Call], file: Path | None, json: Path | None) -> None:
    """Prints both tables and the error bar, and adds a record for each call and device."""
    measured, predicted = measured_shares(file), predict_all(calls)
    errors: dict[str, float] = {}
    rows = []
    for call in map(str, calls):
        row = [call, *(f"{predicted[call, chip].share:.2f}" for chip in CLASSES)]
        for repeat in (4, 2, 1):
            share, found = predicted[call, f"H100 x{repeat}"].share, measured.get((call, repeat))
            row += [f"{share:.3f}", f"{found:.3f}" if found else ""]
            row.append(f"{share / found - 1:+.1%}" if found else "")
            if found:
                errors[f"{call} x{repeat}"] = share / found - 1
        rows.append(row)
    columns = [f"{what} x{repeat}" for repeat in (4, 2, 1) for what in ("H100", "measured", "off")]
    print("\nPredicted share of the mma.sync peak; the H100 stands in for both classes:\n")
    print(harness.markdown(["call", "GeForce", "PRO", *columns], rows))
    print("", error_bar(errors), "", "Part of the time, GeForce / PRO:", "", sep="\n")
    print(harness.markdown(["call", *PARTS], part_rows(calls, predicted)))
    records = harness.Records(json, "sass_report", "cpu")
    for (name, device), prediction in predicted.items():
        found = measured.get((name, int(device[-1]))) if device.startswith("H100") else None
        fields = {**asdict(prediction), "share_measured": found, "measured": False}
        records.add(call=name, device=device, **fields)


CLASSES = ("GeForce", "PRO")
BEST = 3  # tiles that are named
PARTS = ("tensor", "issue", "latency", "handover", "pipes", "ends", "idle", "others")


def part_rows(
    calls: list[balance.Call], predicted: dict[tuple[str, str], Prediction]
) -> Iterator[list[str]]:
    for call in map(str, calls):
        both = [predicted[call, chip].parts for chip in CLASSES]
        yield [call, *(each_chip(f"{parts[name]:.3f}" for parts in both) for name in PARTS)]


def report_tiles(calls: list[balance.Call]) -> None:
    """Prints what the model says of every tile that is fed by cp.async, beside the plan's own: by
    which way K and V come changes no more than a few issue slots. It tells how blocks fill a card;
    of tiles a few percent apart a measurement has to decide."""
    groups: dict[tuple, list[balance.Call]] = {}
    for call in calls:
        groups.setdefault((call.is_backward, call.preset, call.causal), []).append(call)
    rows = []
    for group in groups.values():
        q, k, v = (torch.empty(*x, dtype=torch.bfloat16) for x in group[0].cell.shapes()[:3])
        problem = harness.Problem(q, k, v, group[0].causal)
        tiles = balance.first_tiles(group[0], problem, arch=120)
        figures = analyse_planned({name: (tile.plan, "PRO") for name, tile in tiles.items()})
        for call, chip in itertools.product(group, CLASSES):
            own = plan_on(DEVICES[chip], call.cell, call.is_backward)
            shares = {
                tile.label.split()[0]: predict(
                    call.cell, tile.plan, figures[name], chip, call.is_backward
                ).share
                for name, tile in tiles.items()
                if figures[name].counts()["spills"] <= figures[name].issued // 100
            }
            of_own = predict(
                call.cell, own, analyse(own, DEVICES[chip].arch), chip, call.is_backward
            ).share
            best = sorted(shares, key=lambda name: -shares[name])[:BEST]
            named = "; ".join(f"{name}: {shares[name]:.3f}" for name in best)
            rows.append([str(call), chip, str(own.variant), f"{of_own:.3f}", named])
    head = ("call", "card", "the plan's", "share", "the best")
    print("\nPredicted share of the mma.sync peak by tile, fields as in csrc/tiles.h:\n")
    print(harness.markdown(head, rows))


def error_bar(errors: dict[str, float]) -> str:
    """What the predictions for 12.x may be off by, as those for the H100 are."""
    if not errors:
        return "Nothing measured to compare with."
    worst = max(errors, key=lambda name: abs(errors[name]))
    root = statistics.fmean(error**2 for error in errors.values()) ** 0.5
    return (
        f"Off by {root:.1%} (root mean square of {len(errors)} cells), at most by "
        f"{errors[worst]:+.1%} ({worst}). ENDS and HANDOVER of static_model.py are fitted to such "
        "cells; of others it says how far off they are. A card whose memory or barriers differ "
        "from an H100's may be further off."
    )


# ---------------------------------------------------------------------------------- 8 and 4 bits

E4M3 = torch.float8_e4m3fn
PLAIN = "bf16"


def of_dtypes(q: torch.dtype, kv: torch.dtype) -> Callable[[Device, Cell], Plan]:
    return lambda device, cell: plan_on(device, dataclasses.replace(cell, dtype=q), kv_dtype=kv)


# What is multiplied, and the plan of a call. A recipe of quantised attention is a row, too, by its
# name, once it has a kernel.
KINDS = {
    PLAIN: of_dtypes(torch.bfloat16, torch.bfloat16),
    "e4m3 k, v": of_dtypes(torch.bfloat16, E4M3),
    "e4m3 q, k, v": of_dtypes(E4M3, E4M3),
}
LONG = 16384


def low_cells() -> list[Cell]:
    """Those of lowp.py, and one that is long."""
    return [*lowp.cells(), *lowp.cells(((1, LONG),))]


def step_row(kind: str, chip: str, plan: Plan, figures: Figures) -> list[object]:
    """Per 16 queries and 64 keys of a warp."""
    c, counts, cycles = constants(plan.main), figures.counts(), figures.cycles(chip)
    steps = c["WARP_M"] / 16 * c["TILE_N"] / 64
    loads = sum(n for opcode, n in figures.instructions.items() if opcode.startswith("LDSM"))
    moves = sum(n for opcode, n in figures.instructions.items() if opcode.startswith("SHFL"))
    issued = figures.issued - counts["nop"]
    per_step = (issued, cycles["tensor"], cycles["mufu"], cycles["shared"], loads, moves)
    resources = (figures.registers, figures.spill_bytes)
    return [kind, chip, *(f"{n / steps:g}" for n in per_step), *resources, figures.variant]


def report_low(json: Path | None) -> None:
    """Prints what a step of each kernel takes, and how fast calls are beside bf16."""
    planned = {
        (kind, str(cell), chip): (cell, plan_of_kind(DEVICES[chip], cell), chip)
        for kind, plan_of_kind in KINDS.items()
        for cell in low_cells()
        for chip in CLASSES
    }
    figures = analyse_planned({key: (plan, chip) for key, (_, plan, chip) in planned.items()})
    predicted = {
        key: predict(cell, plan, figures[key], chip) for key, (cell, plan, chip) in planned.items()
    }
    rows = [
        step_row(kind, chip, plan, figures[kind, name, chip])
        for (kind, name, chip), (cell, plan, _) in planned.items()
        if cell.seqlen == LONG
    ]
    head = ("operands", "card", "issued", "tensor", "MUFU", "shared", "LDSM", "SHFL", "registers")
    print("\nPer 16 x 64 step of a warp, in long calls. Issued: all instructions but NOPs, without")
    print("the block behind a vote; pipes in cycles; LDSM and SHFL: instructions.\n")
    print(harness.markdown((*head, "spilled B", "kernel"), rows))
    narrow = [kind for kind in KINDS if kind != PLAIN]
    head = ("call", *(f"{kind}, {chip}" for kind in narrow for chip in CLASSES))
    print("\nPredicted speed over bf16, without quantisation:\n")
    print(harness.markdown(head, speed_rows(predicted, narrow)))
    without = [name for name in RECIPES if name not in KINDS]
    print("", *(f"{name}: absent: computed on the CPU alone" for name in without), sep="\n")
    records = harness.Records(json, "sass_report", "cpu")
    for (kind, name, chip), prediction in predicted.items():
        variant = figures[kind, name, chip].variant
        fields = {"operands": kind, "call": name, "device": chip, "variant": variant}
        records.add(**fields, **asdict(prediction), measured=False)


def speed_rows(
    predicted: dict[tuple[str, str, str], Prediction], narrow: list[str]
) -> Iterator[list[str]]:
    for call in dict.fromkeys(name for _, name, _ in predicted):
        plain = {chip: predicted[PLAIN, call, chip].seconds for chip in CLASSES}
        speeds = [
            plain[chip] / predicted[kind, call, chip].seconds for kind in narrow for chip in CLASSES
        ]
        yield [call, *(f"{speed:.2f}" for speed in speeds)]


def record(records: harness.Records, figures: Figures) -> None:
    """One record for each kernel; cycles where the rates are those of its architecture."""
    fields = asdict(figures)
    del fields["listing"]
    chips = {
        chip: {
            "cycles": figures.cycles(chip),
            "bound": figures.bound(chip),
            "tensor_share": figures.tensor_share(chip),
        }
        for chip in (CHIPS if figures.arch.startswith("sm_12") else ())
    }
    records.add(**fields, counts=figures.counts(), chips=chips, measured=False)


def head_dims(text: str) -> tuple[int, int]:
    """(head_dim, head_dim_v) of "128" or "192,128"."""
    dims = [int(n) for n in text.split(",")]
    return dims[0], dims[-1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("head_dims", nargs="*", type=head_dims, metavar="D[,DV]")
    parser.add_argument("--arch", default="sm_120f", help="as NVRTC names it (default: sm_120f)")
    parser.add_argument("--listing", action="store_true", help="print each main loop, too")
    parser.add_argument("--shares", action="store_true", help="predict shares of the peak alone")
    parser.add_argument("--proxy", type=Path, metavar="FILE", help="of balance.py, beside shares")
    parser.add_argument("--only", default="", metavar="REGEX", help="shares of calls that have it")
    parser.add_argument("--tiles", action="store_true", help="every tile's share in these calls")
    parser.add_argument("--low", action="store_true", help="kernels of 8 and 4 bits beside bf16")
    parser.add_argument("--json", type=Path, metavar="FILE.jsonl")
    args = parser.parse_args()
    if not re.fullmatch(r"sm_\d+[af]?", args.arch):
        parser.error(f"an architecture is named like sm_120f, got {args.arch}")
    return args


def main() -> None:
    args = parse_args()
    if args.shares or args.proxy:
        report_shares(calls_of_shares(args.only), args.proxy, args.json)
        return
    if args.tiles:
        report_tiles(calls_of_shares(args.only))
        return
    if args.low:
        report_low(args.json)
        return
    compute_capability = int(re.sub(r"\D", "", args.arch))
    dims = args.head_dims or common_kernels.COMMON_HEAD_DIMS
    plans = [
        *common_kernels.common_plans(compute_capability, dims),
        *common_kernels.backward_plans(compute_capability, dims),
    ]
    try:
        figures = analyse_all(plans, args.arch)
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
    print(f"Static figures for {args.arch}: nothing here has run on the card.")
    if args.listing:
        for f in figures:
            print(f"\n{f.variant}, runs per tile and instruction:\n{f.listing}")
    report(figures)
    records = harness.Records(args.json, "sass_report", "cpu")
    for f in figures:
        record(records, f)


if __name__ == "__main__":
    main()
