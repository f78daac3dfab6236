"""How long a kernel takes on a card, by the instructions of its main loop.

From these, the tile, the grid and a table of devices it predicts how long a call takes, part by
part:

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

Not in it: what the L2 and the memory give a multiprocessor, and bank conflicts. Two constants are
fitted to shares that were measured on an H100 (benchmarks/static_model.py, which says how far off
it is); all others are counted, published or assumed, as said beside them.
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


# The clocks are those at which the peaks are published; bytes are 84% of what data sheets say.
GEFORCE = Device("sm_120f", 120, 170, 0, 2.41, 1509, 96)  # RTX 5090
PRO = Device("sm_120f", 121, 188, 0, 2.62, 1535, 128)  # RTX PRO 6000
GB10 = Device("sm_120f", 121, 48, 0, 2.42, 230, 24)  # DGX Spark

# Cycles from an instruction to what needs its result. HMMA and LDSM were measured on a 5070 Ti
# (sass-king [published]); of ex2 nothing is published for 12.x [assumed].
LATENCY = {"tensor": 35, "shared": 33, "mufu": 20}
CHAIN = LATENCY["shared"] + 2 * LATENCY["tensor"] + LATENCY["mufu"]
LAUNCH_S = 3e-6  # of a kernel, behind another [assumed]

ENDS = 9000.0  # cycles of a block [fitted]
HANDOVER = 800.0  # cycles of a tile of queries [fitted]


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
    keys: int | None = None  # as many as queries
    parts: int = 1  # blocks that share the tiles of the same rows

    def tiles(self) -> list[int]:
        """Of each block, those with most first, as blocks are numbered."""
        rows, keys = range(self.own, self.seqlen + self.own, self.own), self.keys or self.seqlen
        seen = [
            max(0, keys - self.seqlen + min(end, self.seqlen)) if self.causal else keys
            for end in reversed(rows)
        ]
        counts = [-(-n // self.tile) for n in seen]
        return [-(-n // self.parts) for n in counts for _ in range(self.heads * self.parts)]

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
