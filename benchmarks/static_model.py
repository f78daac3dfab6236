"""What share of the mma.sync peak should a kernel reach? The model behind sass_report.py --shares.

Not a program. From the main loop's instructions (sass_report.py counts them), the tile, the grid
and a table of devices it predicts how long a call takes, part by part:

- *tensor*: the cycles of the tensor instructions that count: the share;
- *issue*: the issue slots of all other instructions. The warps of a sub-partition run alike from
  barrier to barrier: all multiply, then all compute, so little of one hides behind the other. That
  is what the proxy shows: a tile takes r t + x at repeat r, with the same x at each;
- *latency*: of each sub-tile, a chain of loads, two products and exponentials;
- *handover*: in the backward, what the two groups of warps wait for each other and for the next
  queries, of each tile;
- *pipes*: what the slowest other pipe (shared memory, exponentials, fp32) takes beyond all that;
- *ends*: what a block takes before its first and after its last tile, masked iterations included;
- *idle*: multiprocessors that have no block left, and key tiles above the diagonal;
- *others*: launches, and the kernels before and after the backward's, by their bytes.

Not in it: what the L2 and the memory give a multiprocessor, and bank conflicts. Held against what
it is not fitted to, D 80 to 256 at S 4096 (S05 in NOTES.md, older kernels), it is off by 4%
(forward) and 5% (backward) at repeat 4, by 7 and 8% at repeat 2, root mean square: within 4% where
warps have 32 rows, mostly too high where they have 16. So it ranks tiles by how they fill a card,
not by a few percent.

Two constants are fitted to PROXY, ENDS and HANDOVER; all others are counted, published or assumed,
as said beside them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What is predicted for."""

    arch: str  # whose SASS is counted
    rows: int  # compute capability whose tile rows it takes: 121 for those of PRO-like cards
    sms: int
    repeat: int  # of the tensor instructions of an H100; 0: a card of 12.x, whose rates are known
    ghz: float
    gb_per_s: float  # that a plain read reaches
    l2_mb: int


# Cycles of HMMA.16816.F32 on an H100, measured: 2495 FLOP / clock / SM.
H100_HMMA = 4 * 4096 / 2495
# The clocks are those under load (H100, measured) or at which the peaks are published.
DEVICES = {
    "H100 x1": Device("sm_90a", 90, 132, 1, 1.75, 3050, 50),
    "H100 x2": Device("sm_90a", 121, 132, 2, 1.75, 3050, 50),
    "H100 x4": Device("sm_90a", 120, 132, 4, 1.75, 3050, 50),
    "GeForce": Device("sm_120f", 120, 170, 0, 2.41, 1509, 96),  # RTX 5090
    "PRO": Device("sm_120f", 121, 188, 0, 2.62, 1535, 128),  # RTX PRO 6000
}
PLANNED_SMS = {90: 132, 120: 170, 121: 48}  # that a plan for a compute capability counts with

# Cycles from an instruction to what needs its result. HMMA and LDSM were measured on a 5070 Ti
# (sass-king [published]); of ex2 nothing is published for 12.x [assumed].
LATENCY = {"tensor": 35, "shared": 33, "mufu": 20}
CHAIN = LATENCY["shared"] + 2 * LATENCY["tensor"] + LATENCY["mufu"]
LAUNCH_S = 3e-6  # of a kernel, behind another [assumed]

ENDS = 9000.0  # cycles of a block [fitted]
HANDOVER = 800.0  # cycles of a tile of queries [fitted]

# Shares that balance.py measured on one H100 ("The balance of sm_120" in NOTES.md, S09 and S10),
# by call and repeat. `--proxy FILE` puts a newer run in their place.
PROXY = {
    ("forward D 128, 32/8, S 4096 full", 4): 0.898,
    ("forward D 128, 32/8, S 4096 full", 2): 0.804,
    ("forward D 128, 32/8, S 4096 causal", 4): 0.876,
    ("forward D 128, 32/8, S 4096 causal", 2): 0.757,
    ("forward D 128, 32/8, S 8192 full", 4): 0.908,
    ("forward D 128, 32/8, S 8192 full", 2): 0.818,
    ("forward D 128, 32/8, S 8192 causal", 4): 0.908,
    ("forward D 128, 32/8, S 8192 causal", 2): 0.806,
    ("forward D 128, 32/8, S 1024 full", 4): 0.810,
    ("forward D 128, 32/8, S 1024 full", 2): 0.674,
    ("forward D 128, 32/8, S 1024 causal", 4): 0.685,
    ("forward D 128, 32/8, S 1024 causal", 2): 0.531,
    ("forward D 64, 32/8, S 8192 full", 4): 0.872,
    ("forward D 64, 32/8, S 8192 full", 2): 0.798,
    ("forward D 64, 32/8, S 8192 causal", 4): 0.882,
    ("forward D 64, 32/8, S 8192 causal", 2): 0.782,
    ("backward D 128, 32/32, S 4096 full", 4): 0.833,
    ("backward D 128, 32/32, S 4096 full", 2): 0.705,
    ("backward D 128, 32/32, S 4096 causal", 4): 0.810,
    ("backward D 128, 32/32, S 4096 causal", 2): 0.672,
    ("backward D 64, 16/16, S 8192 full", 4): 0.855,
    ("backward D 64, 16/16, S 8192 causal", 4): 0.838,
}


@dataclass(frozen=True)
class Loop:
    """A kernel's tile, in cycles of a sub-partition, all its warps together."""

    tensor: float
    issue: float  # slots of other instructions
    slowest: float  # of the other pipes
    sub_tiles: int
    is_backward: bool
    blocks_per_sm: int

    def parts(self) -> dict[str, float]:
        handover = HANDOVER if self.is_backward else 0.0
        latency = float(CHAIN * self.sub_tiles)
        serial = self.tensor + self.issue + latency + handover
        return {
            "tensor": self.tensor,
            "issue": self.issue,
            "latency": latency,
            "handover": handover,
            "pipes": max(0.0, self.slowest - serial),
        }


@dataclass(frozen=True)
class Grid:
    """The tiles that blocks go through."""

    own: int  # rows of a block: queries of the forward, keys of the backward
    tile: int  # rows of a tile of the others
    seqlen: int
    causal: bool
    heads: int
    head_dim: int

    def tiles(self) -> list[int]:
        """Of each block, those with most first, as blocks are numbered."""
        blocks = -(-self.seqlen // self.own)
        if not self.causal:
            return [-(-self.seqlen // self.tile)] * (blocks * self.heads)
        counts = [-(-(block + 1) * self.own // self.tile) for block in reversed(range(blocks))]
        return [count for count in counts for _ in range(self.heads)]

    @property
    def useful(self) -> float:
        """Tiles' worth of FLOPs that count: of a causal call half of the square."""
        return self.seqlen**2 / (2 if self.causal else 1) * self.heads / (self.own * self.tile)


@dataclass(frozen=True)
class Prediction:
    """A call's share of the peak, its time, and what part of that each cause takes."""

    share: float
    seconds: float
    parts: dict[str, float]


def predict(loop: Loop, grid: Grid, device: Device) -> Prediction:
    of_tile = loop.parts()
    # The blocks of a multiprocessor share it: a tile of one takes its part of all their tiles.
    cycles = sum(of_tile.values()) / loop.blocks_per_sm
    blocks = grid.tiles()
    ends = ENDS / loop.blocks_per_sm
    busy = makespan([n * cycles + ends for n in blocks], device.sms, loop.blocks_per_sm)
    others = others_s(loop, grid, device) * device.ghz * 1e9
    total = busy + others
    share = grid.useful * loop.tensor / loop.blocks_per_sm / device.sms / total
    tiles = sum(blocks) / loop.blocks_per_sm / device.sms
    parts = {name: tiles * part / total for name, part in of_tile.items()}
    parts["ends"] = len(blocks) * ends / device.sms / total
    parts["others"] = others / total
    parts["idle"] = 1 - sum(parts.values()) + parts["tensor"] - share
    parts["tensor"] = share
    return Prediction(share, total / (device.ghz * 1e9), parts)


def others_s(loop: Loop, grid: Grid, device: Device) -> float:
    """Seconds beside the main kernel's: of the backward, the kernel that reads out and dout and
    writes zeros to dQ's accumulator, and the one that makes dq of it. An accumulator that fits the
    L2 stays there [assumed]."""
    if not loop.is_backward:
        return LAUNCH_S
    elements = grid.heads * grid.seqlen * grid.head_dim
    accumulator = 4 * elements
    moved = (2 + 2 + 2) * elements
    if accumulator > device.l2_mb << 20:
        moved += 2 * accumulator  # zeros out, sums in
    return 3 * LAUNCH_S + moved / (device.gb_per_s * 1e9)


def makespan(blocks: Sequence[float], sms: int, blocks_per_sm: int) -> float:
    """When the last block ends. Each starts on the multiprocessor where a place gets free first;
    the blocks of one share its speed equally, and `blocks` are the cycles of each alone."""
    waiting = iter(blocks)
    resident: list[list[float]] = [[] for _ in range(sms)]
    for _ in range(blocks_per_sm):
        for own, block in zip(resident, waiting, strict=False):
            own.append(block)
    events = [(min(own) * len(own), sm) for sm, own in enumerate(resident) if own]
    heapq.heapify(events)
    now = 0.0
    while events:
        now, sm = heapq.heappop(events)
        ended = min(resident[sm])
        left = [block - ended for block in resident[sm]]
        left.remove(0.0)
        left += next_of(waiting)
        resident[sm] = left
        if left:
            heapq.heappush(events, (now + min(left) * len(left), sm))
    return now


def next_of(waiting: Iterable[float]) -> list[float]:
    for block in waiting:
        return [block]
    return []
