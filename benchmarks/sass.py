"""The main loops of kernels in SASS: their instructions, counted and priced.

Not a program, but what sass_report.py and the gates of tests/ ask. Each kernel is compiled for an
architecture, disassembled by nvdisasm (`pip install nvidia-cuda-nvdisasm`), and the main loop's
instructions are priced by a table of rates.

How the main loop is found. A loop is a branch back to an instruction that dominates it (divergent
warps branch back, too, but not to such an instruction); its body is the instructions that lead to
that branch. A *tile loop* holds tensor instructions, waits for its tile at a barrier or an
mbarrier, and holds no other such loop. The forward has two: masked iterations, which update the row
max, and unmasked ones; with masks, the second pass has masked iterations as well. A loop inside
that holds tensor instructions runs once per sub-tile (TILE_N / SUB_N times), any other (polling an
mbarrier) counts once; branches that skip code, such as the copies of tiles beyond the end, are not
taken, but those behind a vote are. The main loop is the tile loop that issues the fewest
instructions for each tensor instruction.

The backward has one tile loop, with several paths in its body: the warps that hold K, with a mask
and without; the warps that hold V; then all warps for a part of dQ. A *path* is everything before
and after the tensor instructions that only it has, up to the next tile. Exponentials show which
group of warps a path belongs to. Of each group, the path with the fewest instructions for each
tensor instruction counts: the one of unmasked iterations. What one thread does for all, asking the
TMA for the next tile, counts in both.

The kernel of recipes has one tile loop, too, whose tiles with a mask and without share their
products. Of it the shortest way counts that copies and multiplies all of a tile: it goes around
masks, around what is done where a row max rises, and around values that are not finite.

The unit of the forward is one tile of keys of one warp, that of the backward one tile of queries of
two warps, one of each group, which share a sub-partition. Cycles are those of the SM sub-partition
of these warps, all warps (or pairs) of a sub-partition needing the same. The bound is the slowest
pipe or the issue slots (one instruction per cycle, as on all GPUs since 7.0); the tensor share is
the tensor pipe's part of the bound, tensor / max(pipes, issue slots): 100% where the tensor pipe
itself is the bound.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flash_attn_sm120 import jit, recipe_tiles
from flash_attn_sm120.plan import Kernel, Plan
from flash_attn_sm120.quantized import kernel as quantized_kernel

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
    (r"IMMA\.16832\.S8\.S8.*", "tensor", 16),  # 838 TOPS on an RTX 5090: 2048 [derived]
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


def find_shortest_way(code: list[Instruction]) -> Runs:
    """The main loop of the kernel of recipes.

    Raises:
        ValueError: no loop waits for tiles and multiplies them, or no way through it does all.
    """
    loop = min(find_tile_loops(code)[0], key=lambda loop: len(loop.body))
    body, head = set(loop.body), loop.body[0]
    after, _ = neighbours(code)
    onward = [[j for j in following if j in body and j != head] for following in after]
    work = {i for i in body if code[i].is_tensor or code[i].opcode.startswith(("LDGSTS", "LDSM"))}
    order = sorted(work, key=lambda i: -len(work & reached(i, onward)))
    way = [head]
    for stop in (*order, max(i for i in body if code[i].target == head)):
        way += shortest(way[-1], stop, onward)
    return [(code[i], 1) for i in way]


def shortest(start: int, stop: int, edges: list[list[int]]) -> list[int]:
    """The shortest way from `start`, which it leaves out, to `stop`."""
    came_from, last = {start: start}, [start]
    while last and stop not in came_from:
        reached_now = {j: i for i in last for j in edges[i] if j not in came_from}
        came_from |= reached_now
        last = list(reached_now)
    if stop not in came_from:
        raise ValueError(f"no way leads from instruction {start} to {stop}")
    way = []
    while stop != start:
        way.append(stop)
        stop = came_from[stop]
    return way[::-1]


# ---------------------------------------------------------------------------------------- figures


def constants(kernel: Kernel) -> dict[str, int]:
    """The compile-time constants of a kernel: TILE_N and so on."""
    pairs = (option.removeprefix("-D").split("=") for option in kernel.options)
    fixed = OF_RECIPES if kernel.kernel == quantized_kernel.KERNEL else {}
    return fixed | {name: int(value) for name, value in pairs}


# What the kernel of recipes has without an option.
OF_RECIPES = {
    "WARP_M": recipe_tiles.WARP_M,
    "TILE_N": quantized_kernel.TILE_N,
    "SUB_N": quantized_kernel.TILE_N,
}


def recipe_products(c: dict[str, int]) -> int:
    """How many instructions of any format a tile takes of a warp."""
    names = {number: name for name, number in quantized_kernel.FORMATS.items()}
    formats, dims = (names[c["QK_FORMAT"]], names[c["PV_FORMAT"]]), (c["HEAD_DIM"], c["HEAD_DIM_V"])
    return sum(quantized_kernel.products_of(*formats, *dims))


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
    if is_backward:
        loop, products = find_pair_loop(code), backward_products(c)
    elif kernel.kernel == quantized_kernel.KERNEL:
        loop, products = find_shortest_way(code), recipe_products(c)
    else:
        loop, products = find_main_loop(code, c["TILE_N"] // c["SUB_N"]), forward_products(c)
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
        products=products,
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
