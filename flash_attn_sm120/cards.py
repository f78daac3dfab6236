"""The two classes of 12.x cards: how fast mma.sync is beside the rest of a multiprocessor.

By name (csrc/device.c); where the name is unknown, by a measurement of a few milliseconds: products
with accumulators in fp16 take a GeForce card half as long as those in fp32, and other cards as
long.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

from flash_attn_sm120 import _C, _measure
from flash_attn_sm120.mma_peak import MmaPeak
from flash_attn_sm120.tuned_tiles import GEFORCE, KINDS, PRO

HALF_RATE = 1.4  # fp32's time over fp16's: 2 on a GeForce card, 1 on the others


class Card(NamedTuple):
    """What is known of a card, bytes per second in units of 10^9. Not its partitions or clocks."""

    pattern: str  # of its name
    sms: int
    l2_mb: int
    dram_gbs: int


# NVIDIA RTX Blackwell and RTX PRO Blackwell architecture whitepapers; DGX Spark's data sheet, whose
# L2 is not published and is what the driver reports.
CARDS = (
    Card(r"RTX 5090(?! D| Laptop)", 170, 96, 1792),
    Card(r"RTX PRO 6000", 188, 128, 1792),
    Card(r"GB10", 48, 24, 273),
)


class Kind(NamedTuple):
    """The class of a card, "" where there is none, and why."""

    kind: str
    why: str


def kind_of(name: str, arch: int, half_rate: float | None = None) -> Kind:
    """The class of a device.

    Args:
        name: as the driver has it.
        arch: compute capability, say 120. Classes are of 12.x.
        half_rate: what :func:`measured_half_rate` says, for a name that is unknown.
    """
    if arch // 10 != 12:
        return Kind("", "classes are of compute capability 12.x")
    by_name = _C.card_kind(name, arch)
    if by_name:
        return Kind(KINDS[by_name], "by its name")
    if half_rate is None:
        return Kind("", "its name is unknown, and its products have not been measured")
    kind = GEFORCE if half_rate > HALF_RATE else PRO
    return Kind(kind, f"products in fp32 take {half_rate:.2f} times as long as in fp16")


def measured_half_rate() -> float:
    """How many times as long products take with accumulators in fp32, on torch's device.

    Raises:
        RuntimeError: the GPU does not run them.
    """
    both = [MmaPeak().timed(), MmaPeak(fp16_sums=True).timed()]
    _measure.soak(both, "cuda", 0.02)
    fp32, fp16 = _measure.round_robin(both, "cuda", 5, _measure.flush_buffer("cuda", 1 << 20))
    return statistics.median(fp32) / statistics.median(fp16)
