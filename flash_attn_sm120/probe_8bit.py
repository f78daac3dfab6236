"""Do the matrix instructions of 8 and 4 bits do here what kernels count on? (kernels/probe_8bit.cu)

Where a fragment's elements and factors are, and every bit of the sums: all terms and C are aligned
to the largest exponent among them, cut toward zero to so many bits below it, added exactly, and the
sum is cut toward zero to fp32. A term is a product of e4m3, or the exact sum of 16 products of
e2m1. Nothing of this was measured by this project: it comes from public models and code.
"""

from __future__ import annotations

import itertools
import math
import random
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from flash_attn_sm120.loaded_kernel import LoadedKernel

OPTIONS = ("-DDTYPE=2",)
MAJOR = 12  # of the compute capabilities that have all of them
REPEATS = 8
LANES, OPERANDS, RESULTS = 32, 12, 4

Words = list[list[int]]  # [register][lane]
Term = tuple[float, int]  # significand, exponent


class Probe(NamedTuple):
    """A row per probe, in the kernel's order."""

    name: str
    k: int = 0  # of the product; 0: no product
    factor: str = ""  # their type
    byte_a: int = 0
    thread_a: int = 0
    byte_b: int = 0
    thread_b: int = 0


PROBES = (
    Probe("mma e4m3", 32),
    Probe("mma mxf8f6f4", 32, "ue8m0"),
    Probe("mma mxf8f6f4, other selectors", 32, "ue8m0", 2, 1, 1, 3),
    Probe("mma mxf4nvf4", 64, "ue4m3"),
    Probe("mma mxf4nvf4, other selectors", 64, "ue4m3", 0, 1, 0, 2),
    Probe("ldmatrix m16n16.trans.b8"),
)


def run() -> Iterator[tuple[str, int]]:
    """Name, and how many words of the result differ, of each probe on the current CUDA device.

    Raises:
        RuntimeError: the kernel cannot be compiled or loaded.
    """
    words = operands()
    results = torch.empty(*words.shape[:2], RESULTS, LANES, dtype=torch.int32, device="cuda")
    kernel = LoadedKernel("probe_8bit", "probe_8bit", OPTIONS)
    kernel((REPEATS, len(PROBES)), LANES, words.cuda(), results)
    return differences(words, results.cpu())


def differences(words: torch.Tensor, results: torch.Tensor) -> Iterator[tuple[str, int]]:
    """Name, and how many words of the result differ, of each probe."""
    for probe, given, got in zip(PROBES, words, results, strict=True):
        wanted = torch.tensor([_result(probe, x.tolist()) for x in given], dtype=torch.int64)
        yield probe.name, int((wanted != got.long() % 2**32).sum())


# ---- operands ------------------------------------------------------------------------------------


def operands() -> torch.Tensor:
    """Words (probe, repeat, operand, lane) of the kernel, the same ones every time."""
    numbers = random.Random(0)
    words = [[_drawn(numbers, probe) for _ in range(REPEATS)] for probe in PROBES]
    return torch.tensor(words, dtype=torch.int64).int()


def _drawn(numbers: random.Random, probe: Probe) -> Words:
    def byte() -> int:
        code = numbers.randrange(256)
        return code if probe.k != 32 or code & 0x7F != 0x7F else 0  # e4m3's NaN

    def factor() -> int:
        return (
            numbers.randrange(1, 0x7F) if probe.factor == "ue4m3" else numbers.randrange(110, 140)
        )

    def word(of_byte: Callable[[], int]) -> int:
        return int.from_bytes(bytes(of_byte() for _ in range(4)), "little")

    def c() -> int:
        return _bits(numbers.choice((0.0, numbers.gauss(0, 1))) * 2.0 ** numbers.randrange(-9, 18))

    ab = [[word(byte) for _ in range(LANES)] for _ in range(6)]
    sums = [[c() for _ in range(LANES)] for _ in range(4)]
    return ab + sums + [[word(factor) for _ in range(LANES)] for _ in range(2)]


def _bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits % 2**32))[0])


def _byte(words: list[int], lane: int, byte: int) -> int:
    return words[lane] >> 8 * byte & 0xFF


# ---- what has to come out ------------------------------------------------------------------------


def _result(probe: Probe, words: Words) -> Words:
    if not probe.k:
        return _transposed(words)
    a, b = words[:4], words[4:6]
    per_word, result = probe.k // 8, [[0] * LANES for _ in range(RESULTS)]
    for r in range(RESULTS):
        for lane in range(LANES):
            g, t = divmod(lane, 4)
            row, column = g + 8 * (r // 2), 2 * t + r % 2
            # of A register 2 * step + row // 8, of B register step; lane 4 * (row or column) + word
            pairs = [
                (
                    _element(a[2 * step + row // 8][4 * (row % 8) + word], per_word, i),
                    _element(b[step][4 * column + word], per_word, i),
                )
                for step, word, i in itertools.product(range(2), range(4), range(per_word))
            ]
            factors = _factors(probe, words, row, column)
            result[r][lane] = _bits(_sum(probe, pairs, _float(words[6 + r][lane]), factors))
    return result


def _transposed(words: Words) -> Words:
    """Of ldmatrix: row p in order is that of lane 5 p + 3."""
    rows = [
        [_byte(words[i // 4], (5 * p + 3) % 32, i % 4) for i in range(16)] for p in range(LANES)
    ]
    result = [[0] * LANES for _ in range(RESULTS)]
    for r in range(RESULTS):
        for lane in range(LANES):
            g, t = divmod(lane, 4)
            column = [rows[16 * (r // 2) + 4 * t + i][8 * (r % 2) + g] for i in range(4)]
            result[r][lane] = int.from_bytes(bytes(column), "little")
    return result


def _element(word: int, per_word: int, i: int) -> float:
    if per_word == 4:
        return _e4m3(word >> 8 * i & 0xFF)
    nibble = word >> 4 * i & 0xF
    return (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)[nibble & 7] * (-1 if nibble & 8 else 1)


def _e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 0xF, code & 7
    magnitude = math.ldexp(mantissa + (8 if exponent else 0), max(exponent, 1) - 10)
    return -magnitude if code & 0x80 else magnitude


def _factors(probe: Probe, words: Words, row: int, column: int) -> list[tuple[float, float]]:
    """Of A's row and B's column: one, or four."""
    lane_a, lane_b = 4 * (row % 8) + 2 * probe.thread_a + row // 8, 4 * column + probe.thread_b
    if probe.factor == "ue4m3":
        return [
            (_e4m3(_byte(words[10], lane_a, i) & 0x7F), _e4m3(_byte(words[11], lane_b, i) & 0x7F))
            for i in range(4)
        ]
    if not probe.factor:
        return [(1.0, 1.0)]
    codes = _byte(words[10], lane_a, probe.byte_a), _byte(words[11], lane_b, probe.byte_b)
    return [(math.ldexp(1.0, codes[0] - 127), math.ldexp(1.0, codes[1] - 127))]


def _split(value: float, least: int) -> Term:
    """Subnormals keep the least exponent of their type."""
    exponent = max(math.frexp(value)[1] - 1, least)
    return math.ldexp(value, -exponent), exponent


def _sum(
    probe: Probe,
    pairs: list[tuple[float, float]],
    c: float,
    factors: list[tuple[float, float]],
) -> float:
    keep, exponent_of_zero = (25, -133) if probe.k == 32 else (35, -139)
    least = -6  # of e4m3, and of ue4m3
    terms = [_split(c, -126) if c else (0.0, exponent_of_zero)]
    if probe.k == 32:
        scale = sum(_split(factor, -127)[1] for factor in factors[0])
        for x, y in pairs:
            (sx, ex), (sy, ey) = _split(x, least), _split(y, least)
            if x and y:
                terms.append((sx * sy, ex + ey + scale))
    else:
        for group, (x, y) in enumerate(factors):
            products = [p * q for p, q in pairs[16 * group : 16 * group + 16]]
            (sx, ex), (sy, ey) = _split(x, least), _split(y, least)
            if any(products):
                terms.append((sum(products) * sx * sy, ex + ey))
    top = max(exponent for _, exponent in terms)
    total = sum(math.trunc(math.ldexp(s, keep + exponent - top)) for s, exponent in terms)
    return _cut(math.ldexp(total, top - keep))


def _cut(value: float) -> float:
    """Toward zero to fp32."""
    last = max(math.frexp(value)[1] - 1, -126) - 23
    return math.ldexp(math.trunc(math.ldexp(value, -last)), last)
