"""Every opcode of the emulator's arithmetic.c and lanes.c against Python: exact numbers, rounded once."""

import ctypes
import functools
import itertools
import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from emulator import EmulatorError, emulator, ptx_module, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

LANES = 32
ALL_LANES = 0xFFFFFFFF
NAN, INF = math.nan, math.inf


# ---- numbers -------------------------------------------------------------------------------------


def signed(bits: int, width: int) -> int:
    bits &= (1 << width) - 1
    return bits - (1 << width) if bits >> (width - 1) else bits


def rounded(value: Any, precision: int, least_exponent: int, rounding=round) -> float:
    """A number with so many bits; below 2^least_exponent they get fewer. `round` is to even."""
    if not isinstance(value, Fraction) and (value == 0 or not math.isfinite(value)):
        return float(value)
    exact = Fraction(value)
    if exact == 0:
        return 0.0
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    last = Fraction(2) ** (max(exponent, least_exponent) - precision + 1)
    return math.copysign(rounding(exact / last) * last, exact)


def flush(value: float) -> float:
    return math.copysign(0.0, value) if abs(value) < 2.0**-126 else value


def to_f32(value: Any, rounding=round) -> int:
    if value != value:
        return 0x7FFFFFFF
    with np.errstate(over="ignore"):
        return int(np.float32(rounded(value, 24, -126, rounding)).view(np.uint32))


def from_f32(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def to_f16(value: Any) -> int:
    if value != value:
        return 0x7FFF
    with np.errstate(over="ignore"):
        return int(np.float16(rounded(value, 11, -14)).view(np.uint16))


def from_f16(bits: int) -> float:
    return float(np.uint16(bits & 0xFFFF).view(np.float16))


def to_bf16(value: Any) -> int:
    return 0x7FFF if value != value else to_f32(rounded(value, 8, -126)) >> 16


def from_bf16(bits: int) -> float:
    return from_f32((bits & 0xFFFF) << 16)


FP8 = {
    name: torch.arange(256, dtype=torch.uint8).view(dtype).double().tolist()
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2))
}


def to_fp4(value: float) -> int:
    """With .satfinite: there is no NaN."""
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    if value != value:
        return 7
    magnitude = min(rounded(abs(value), 2, 0), 6)
    return numbers.index(magnitude) | (8 if math.copysign(1, value) < 0 else 0)


def from_fp4(nibble: int) -> float:
    return [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][nibble & 7] * (-1 if nibble & 8 else 1)


def to_ue8m0(value: float, is_up: bool, is_finite: bool) -> int:
    """The exponent of a power of two not above (not below) a magnitude; of NaN 255."""
    if not math.isfinite(value):
        return 254 if is_finite and value == value else 255
    mantissa, exponent = math.frexp(abs(value))
    power = exponent - (0 if is_up and mantissa > 0.5 else 1) + 127 if value else 0
    return min(max(power, 0), 254 if is_finite else 255)


def from_ue8m0(power: int) -> float:
    return NAN if power == 255 else 2.0 ** (power - 127)


def to_fp8(name: str, value: float) -> int:
    """With .satfinite."""
    if value != value:
        return 0x7F
    precision, least_exponent = (4, -6) if name == "e4m3" else (3, -14)
    largest = max(number for number in FP8[name] if math.isfinite(number))
    number = min(rounded(abs(value), precision, least_exponent), largest)
    return FP8[name].index(number) | (0x80 if math.copysign(1, value) < 0 else 0)


def relu(value: float) -> float:
    return 0.0 if value <= 0 else value


# ---- kinds of operands ---------------------------------------------------------------------------


class Kind(NamedTuple):
    letter: str  # of its register in opcode.operands
    dtype: Any  # of an element
    per_lane: int
    decode: Callable[[int], Any]
    encode: Callable[[Any], int]
    edges: list[int]


def integer(width: int, is_signed: bool, register: int = 0) -> Kind:
    register = register or width
    low, high = (1 << width) - 1, (1 << (width - 1))
    numbers = [0, 1, 2, 3, 5, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 100, 127, 128, 255]
    numbers += [high, high - 1, high + 1, low, low - 1, low - 31, 0x5A5A5A5A5A5A5A5A & low]
    return Kind(
        "hwd"[(register > 16) + (register > 32)],
        f"u{register // 8}",
        1,
        lambda bits: signed(bits, width) if is_signed else bits & low,
        lambda value: (signed(value, width) if is_signed else value & low) & ((1 << register) - 1),
        sorted(set(numbers)),
    )


def floating(letter, dtype, per_lane, decode, encode, numbers) -> Kind:
    edges = {encode(sign * number) for number in numbers for sign in (1, -1)}
    return Kind(letter, dtype, per_lane, decode, encode, sorted(edges))


SMALL = [0.0, 1.0, 1.5, 2.0, 0.5, 2.5, 3.5, 0.1, 3.0, 7.75, 100.25, 2.0**-8, 2.0**-14, 2.0**-24]
SMALL += [1.25 * 2.0**-24, 65504.0, 6e-6, 1023.0, 1e-5, INF, NAN]
SINGLE = [*SMALL, 2.0**-126, 2.0**-127, 2.0**-149, 1e-40, 3.4028234e38, 1e30, 1e-30, 2.0**24 + 2]
SINGLE += [2.0**31, 2.0**32, 2.0**63, 2.0**64, 2147483520.0, 1.5 * 2.0**126, 127.5, -149.5, 13.7]
SINGLE += [448.0, 463.9, 464.0, 480.0, 57344.0, 61440.0, 1e6, 65519.0, 65520.0, 2.0**-10, 2.0**-17]
SINGLE += [0.25, 0.75, 1.25, 1.75, 5.0, 6.5, 0.2500001, 4.9999995, 1.00001 * 2.0**-127]
SINGLE += [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 3 * 2.0**-25, 2.0**-25]

KINDS = {
    **{f"{'us'[s]}{width}": integer(width, bool(s)) for width in (16, 32, 64) for s in (0, 1)},
    **{f"{'us'[s]}8": integer(8, bool(s), register=16) for s in (0, 1)},
    "b8": integer(8, False, register=16)._replace(letter="b", edges=list(range(256))),
    "pred": Kind("p", "u4", 1, bool, int, [0, 1]),
    "f32": floating("w", "u4", 1, from_f32, to_f32, SINGLE),
    "ftz": floating(
        "w",
        "u4",
        1,
        lambda bits: flush(from_f32(bits)),
        lambda value: to_f32(flush(rounded(value, 24, -126))),
        SINGLE,
    )._replace(edges=sorted({to_f32(sign * x) for x in SINGLE for sign in (1, -1)})),
    "f32x2": floating("d", "u4", 2, from_f32, to_f32, SINGLE),
    "f16": floating("h", "u2", 1, from_f16, to_f16, SMALL),
    "f16x2": floating("w", "u2", 2, from_f16, to_f16, SMALL),
    "bf16": floating("h", "u2", 1, from_bf16, to_bf16, [*SMALL, 1e-40, 3e38]),
    "bf16x2": floating("w", "u2", 2, from_bf16, to_bf16, [*SMALL, 1e-40, 3e38]),
}


@dataclass
class Case:
    """name dest, sources...: the destination's value is function(*sources)."""

    name: str
    kinds: list[str]  # the destination's first
    function: Callable
    within: float = 0  # relative error
    is_valid: Callable = lambda *values: True
    tail: str = ""  # an operand more, a constant

    @property
    def operands(self) -> str:
        """As in the opcode table."""
        letters = [KINDS[kind].letter for kind in self.kinds]
        return " ".join([letters[0].upper(), *letters[1:], *(["i"] if self.tail else [])])


# ---- what the opcodes do -------------------------------------------------------------------------

CASES: list[Case] = []


def case(name: str, kinds: str, function: Callable, **options: Any) -> None:
    CASES.append(Case(name, kinds.split(), function, **options))


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def divides(width: int, is_signed: bool) -> Callable:
    return lambda a, b: b != 0 and not (is_signed and b == -1 and a == -1 << (width - 1))


def shift_right(a: int, b: int) -> int:
    return a >> min(b, 64)


def field(a: int, position: int, length: int, width: int, is_signed: bool) -> int:
    position, length = position & 255, length & 255
    bits = [a >> min(position + i, width - 1) & 1 for i in range(length)]
    sign = bits[-1] if is_signed and bits else 0
    return sum(
        (bits[i] if i < length and position + i < width else sign) << i for i in range(width)
    )


def inserted(a: int, into: int, position: int, length: int, width: int) -> int:
    position, length = position & 255, length & 255
    for i in range(min(length, max(width - position, 0))):
        into = into & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return into


def permuted(a: int, b: int, selector: int) -> int:
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picks = [selector >> 4 * i & 15 for i in range(4)]
    picked = [source[pick & 7] for pick in picks]
    signs = [0xFF if byte >> 7 else 0 for byte in picked]
    return int.from_bytes(
        [sign if pick & 8 else byte for pick, byte, sign in zip(picks, picked, signs, strict=True)],
        "little",
    )


def looked_up(table: int) -> Callable:
    def function(a: int, b: int, c: int) -> int:
        index = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32)]
        return sum((table >> row & 1) << i for i, row in enumerate(index))

    return function


def highest(a: int) -> int:
    """The highest bit that is not the sign's."""
    return (~a if a < 0 else a).bit_length() - 1


for width, sign in itertools.product((16, 32, 64), "su"):
    t = f"{sign}{width}"
    valid = divides(width, sign == "s")
    case(f"add.{t}", f"{t} {t} {t}", lambda a, b: a + b)
    case(f"sub.{t}", f"{t} {t} {t}", lambda a, b: a - b)
    case(f"mul.lo.{t}", f"{t} {t} {t}", lambda a, b: a * b)
    case(f"mul.hi.{t}", f"{t} {t} {t}", lambda a, b, width=width: a * b >> width)
    case(f"mad.lo.{t}", f"{t} {t} {t} {t}", lambda a, b, c: a * b + c)
    case(f"min.{t}", f"{t} {t} {t}", min)
    case(f"max.{t}", f"{t} {t} {t}", max)
    case(f"div.{t}", f"{t} {t} {t}", quotient, is_valid=valid)
    case(f"rem.{t}", f"{t} {t} {t}", lambda a, b: a - b * quotient(a, b), is_valid=valid)
    case(f"shr.{t}", f"{t} {t} u32", shift_right)
    if width < 64:
        wide = f"{sign}{2 * width}"
        case(f"mul.wide.{t}", f"{wide} {t} {t}", lambda a, b: a * b)
        case(f"mad.wide.{t}", f"{wide} {t} {t} {wide}", lambda a, b, c: a * b + c)
    if width > 16:
        case(f"bfind.{t}", f"u32 {t}", highest)
        case(
            f"bfe.{t}",
            f"{t} {t} u32 u32",
            lambda a, b, c, width=width, s=sign == "s": field(a, b, c, width, s),
        )

for width in (16, 32, 64):
    s, u, b = f"s{width}", f"u{width}", f"b{width}"
    case(f"neg.{s}", f"{s} {s}", lambda a: -a)
    case(f"abs.{s}", f"{s} {s}", abs)
    case(f"not.{b}", f"{u} {u}", lambda a: ~a)
    case(f"and.{b}", f"{u} {u} {u}", lambda a, b: a & b)
    case(f"or.{b}", f"{u} {u} {u}", lambda a, b: a | b)
    case(f"xor.{b}", f"{u} {u} {u}", lambda a, b: a ^ b)
    case(f"shl.{b}", f"{u} {u} u32", lambda a, b: a << min(b, 64))
    case(f"shr.{b}", f"{u} {u} u32", shift_right)
    for move in (b, s, u, *([f"f{width}"] if width > 16 else [])):
        case(f"mov.{move}", f"{u} {u}", lambda a: a)
        case(f"selp.{move}", f"{u} {u} {u} pred", lambda a, b, p: a if p else b)
for width in (32, 64):
    u, b = f"u{width}", f"b{width}"
    case(f"popc.{b}", f"u32 {u}", lambda a: a.bit_count())
    case(f"clz.{b}", f"u32 {u}", lambda a, width=width: width - a.bit_length())
    case(f"brev.{b}", f"{u} {u}", lambda a, width=width: int(f"{a:0{width}b}"[::-1], 2))
    case(
        f"bfind.shiftamt.{u}",
        f"u32 {u}",
        lambda a, width=width: width - a.bit_length() if a else -1,
    )
    case(
        f"bfi.{b}",
        f"{u} {u} {u} u32 u32",
        lambda a, b, c, d, width=width: inserted(a, b, c, d, width),
    )
case("cvta.global.u64", "u64 u64", lambda a: a)
case("cvta.to.global.u64", "u64 u64", lambda a: a)
case("prmt.b32", "u32 u32 u32 u32", permuted)
for results in (0xE8, 0x96, 0x80, 0x3A):
    case("lop3.b32", "u32 u32 u32 u32", looked_up(results), tail=f"{results:#x}")
for mode, amount in (("wrap", lambda c: c & 31), ("clamp", lambda c: min(c, 32))):
    case(
        f"shf.l.{mode}.b32",
        "u32 u32 u32 u32",
        lambda a, b, c, amount=amount: (b << 32 | a) << amount(c) >> 32,
    )
    case(
        f"shf.r.{mode}.b32",
        "u32 u32 u32 u32",
        lambda a, b, c, amount=amount: (b << 32 | a) >> amount(c),
    )

case("mov.pred", "pred pred", lambda a: a)
case("not.pred", "pred pred", lambda a: not a)
case("and.pred", "pred pred pred", lambda a, b: a and b)
case("or.pred", "pred pred pred", lambda a, b: a or b)
case("xor.pred", "pred pred pred", lambda a, b: a != b)


def compare(op: str, type_name: str, kind: str, function: Callable) -> None:
    case(f"setp.{op}.{type_name}", f"pred {kind} {kind}", function)
    booleans = {"and": lambda x, q: x and q, "or": lambda x, q: x or q, "xor": lambda x, q: x != q}
    for name, boolean in booleans.items():
        case(
            f"setp.{op}.{name}.{type_name}",
            f"pred {kind} {kind} pred",
            lambda a, b, q, boolean=boolean: boolean(function(a, b), q),
        )


ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b and a == a and b == b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
COMPARED_FLOATS = (("f32", "f32"), ("ftz.f32", "ftz"), ("f16", "f16"), ("bf16", "bf16"))
for op, function in ORDERED.items():
    for width in (16, 32, 64):
        if op in ("eq", "ne"):
            compare(op, f"b{width}", f"u{width}", function)
        for sign in "su":
            compare(op, f"{sign}{width}", f"{sign}{width}", function)
        if op not in ("eq", "ne"):
            unsigned = {"lt": "lo", "le": "ls", "gt": "hi", "ge": "hs"}[op]
            compare(unsigned, f"u{width}", f"u{width}", function)
    for type_name, kind in COMPARED_FLOATS:
        compare(op, type_name, kind, function)
        compare(
            f"{op}u",
            type_name,
            kind,
            lambda a, b, function=function: a != a or b != b or function(a, b),
        )
for type_name, kind in COMPARED_FLOATS:
    compare("num", type_name, kind, lambda a, b: a == a and b == b)
    compare("nan", type_name, kind, lambda a, b: a != a or b != b)


def fused(a: float, b: float, c: float) -> Any:
    if all(map(math.isfinite, (a, b, c))):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        return exact if exact != 0 else a * b + c
    return float(np.float64(a) * np.float64(b) + np.float64(c))


def least(a: float, b: float) -> float:
    if a != a or b != b:
        return b if a != a else a
    return min(a, b, key=lambda x: (x, math.copysign(1, x)))


def greatest(a: float, b: float) -> float:
    return -least(-a, -b)


def or_nan(function: Callable) -> Callable:
    return lambda a, b: NAN if a != a or b != b else function(a, b)


def by_numpy(function: Callable) -> Callable:
    return lambda *values: float(function(*map(np.float64, values)))


def approximate_quotient(a: float, b: float) -> float:
    if 2.0**126 < abs(b) < INF:
        return a * math.copysign(0.0, b)
    return float(np.float64(a) / np.float64(b))


divide, reciprocal = by_numpy(np.divide), by_numpy(np.reciprocal)
for kind, ftz, type_name in (
    ("f32", "", ".f32"),
    ("ftz", ".ftz", ".f32"),
    ("f32x2", "", ".f32x2"),
    *((kind, "", f".{kind}") for kind in ("f16", "bf16", "f16x2", "bf16x2")),
):
    one, two, three = f"{kind} {kind}", f"{kind} {kind} {kind}", f"{kind} {kind} {kind} {kind}"
    for rn in ("", ".rn"):
        case(f"add{rn}{ftz}{type_name}", two, lambda a, b: a + b)
        case(f"sub{rn}{ftz}{type_name}", two, lambda a, b: a - b)
        case(f"mul{rn}{ftz}{type_name}", two, lambda a, b: a * b)
    case(f"fma.rn{ftz}{type_name}", three, fused)
    if kind == "f32x2":
        continue
    case(f"neg{ftz}{type_name}", one, lambda a: -a)
    case(f"abs{ftz}{type_name}", one, abs)
    case(f"min{ftz}{type_name}", two, least)
    case(f"max{ftz}{type_name}", two, greatest)
    case(f"min{ftz}.NaN{type_name}", two, or_nan(least))
    case(f"max{ftz}.NaN{type_name}", two, or_nan(greatest))
    if type_name != ".f32":
        case(f"fma.rn.relu{type_name}", three, lambda a, b, c: relu(fused(a, b, c)))
        case(f"tanh.approx{type_name}", one, by_numpy(np.tanh), within=2.0**-7)
        ftz = ".ftz" if kind.startswith("b") else ""
        case(
            f"ex2.approx{ftz}{type_name}",
            one,
            lambda a, f=flush if ftz else float: f(by_numpy(np.exp2)(f(a))),
            within=2.0**-7,
        )
        continue
    case(f"min{ftz}.f32", three, lambda a, b, c: least(least(a, b), c))
    case(f"max{ftz}.f32", three, lambda a, b, c: greatest(greatest(a, b), c))
    case(f"div.rn{ftz}.f32", two, divide)
    case(f"div.full{ftz}.f32", two, divide, within=2.0**-22)
    case(f"div.approx{ftz}.f32", two, approximate_quotient, within=2.0**-22)
    case(f"rcp.rn{ftz}.f32", one, reciprocal)
    case(f"rcp.approx{ftz}.f32", one, reciprocal, within=2.0**-23)
    case(f"sqrt.rn{ftz}.f32", one, by_numpy(np.sqrt))
    case(f"sqrt.approx{ftz}.f32", one, by_numpy(np.sqrt), within=2.0**-23)
    case(f"rsqrt.approx{ftz}.f32", one, lambda a: reciprocal(by_numpy(np.sqrt)(a)), within=2.0**-22)
    case(f"ex2.approx{ftz}.f32", one, by_numpy(np.exp2), within=2.0**-22)
    case(f"lg2.approx{ftz}.f32", one, by_numpy(np.log2), within=2.0**-22)
    case(f"sin.approx{ftz}.f32", one, by_numpy(np.sin), within=2.0**-20)
    case(f"cos.approx{ftz}.f32", one, by_numpy(np.cos), within=2.0**-20)
case("tanh.approx.f32", "f32 f32", by_numpy(np.tanh), within=2.0**-11)
case("copysign.f32", "u32 u32 u32", lambda a, b: a & 0x80000000 | b & 0x7FFFFFFF)

for source, dest in itertools.product((f"{s}{w}" for w in (8, 16, 32, 64) for s in "su"), repeat=2):
    case(f"cvt.{dest}.{source}", f"{dest} {source}", lambda a: a)
    width, register = int(source[1:]), int(dest[1:])
    if width < register > 16:  # the low bits of a register as wide as the destination
        case(
            f"cvt.{dest}.{source}",
            f"{dest} u{register}",
            lambda a, decode=KINDS[source].decode: decode(a),
        )


def converted(rounding: Callable, width: int, is_signed: bool) -> Callable:
    """To the nearest integer that there is; NaN is 0 in 32 bits, in 64 the highest bit alone."""
    bounds = (-1 << (width - 1), (1 << (width - 1)) - 1) if is_signed else (0, (1 << width) - 1)

    def function(a: float) -> int:
        if a != a:
            return 0 if width < 64 else 1 << 63
        if math.isinf(a):
            return bounds[a > 0]
        return max(bounds[0], min(bounds[1], rounding(a)))

    return function


ROUNDINGS = {"n": round, "z": math.trunc, "m": math.floor, "p": math.ceil}
for letter, rounding in ROUNDINGS.items():
    for dest, sat in itertools.product(("s32", "u32", "s64", "u64"), ("", ".sat")):
        function = converted(rounding, int(dest[1:]), dest[0] == "s")
        case(f"cvt.r{letter}i{sat}.{dest}.f32", f"{dest} f32", function)
        case(f"cvt.r{letter}i.ftz{sat}.{dest}.f32", f"{dest} ftz", function)
    for source in (f"{s}{w}" for w in (8, 16, 32, 64) for s in "su"):
        case(
            f"cvt.r{letter}.f32.{source}",
            f"u32 {source}",
            lambda a, rounding=rounding: to_f32(Fraction(a), rounding),
        )

    def integral(a: float, rounding=rounding) -> float:
        return math.copysign(rounding(a), a) if math.isfinite(a) else a

    case(f"cvt.r{letter}i.f32.f32", "f32 f32", integral)
    case(f"cvt.r{letter}i.ftz.f32.f32", "ftz ftz", integral)
case("cvt.ftz.f32.f32", "ftz ftz", lambda a: a)
case("cvt.sat.f32.f32", "f32 f32", lambda a: min(1.0, a) if a > 0 else 0.0)
case("cvt.ftz.sat.f32.f32", "ftz ftz", lambda a: min(1.0, a) if a > 0 else 0.0)

for small, encode in (("f16", to_f16), ("bf16", to_bf16)):
    case(f"cvt.f32.{small}", f"f32 {small}", lambda a: a)
    for name, clamp in (("", float), (".relu", relu)):
        case(f"cvt.rn{name}.{small}.f32", f"{small} f32", clamp)
        case(
            f"cvt.rn{name}.{small}x2.f32",
            "u32 f32 f32",
            lambda a, b, e=encode, f=clamp: e(f(a)) << 16 | e(f(b)),
        )
SMALLER = {fp8: ("u16", 8, functools.partial(to_fp8, fp8), FP8[fp8].__getitem__) for fp8 in FP8} | {
    "e2m1": ("b8", 4, to_fp4, from_fp4)
}
for small, (kind, bits, encode, decode) in SMALLER.items():
    for name, clamp in (("", float), (".relu", relu)):

        def narrowed(a, b, bits=bits, encode=encode, clamp=clamp):
            return encode(clamp(a)) << bits | encode(clamp(b))

        case(f"cvt.rn.satfinite{name}.{small}x2.f32", f"{kind} f32 f32", narrowed)
        case(
            f"cvt.rn.satfinite{name}.{small}x2.f16x2",
            f"{kind} u32",
            lambda a, narrowed=narrowed: narrowed(from_f16(a >> 16), from_f16(a)),
        )
        case(
            f"cvt.rn{name}.f16x2.{small}x2",
            f"u32 {kind}",
            lambda a, bits=bits, decode=decode, clamp=clamp: (
                to_f16(clamp(decode(a >> bits))) << 16 | to_f16(clamp(decode(a & (1 << bits) - 1)))
            ),
        )
for (mode, is_up), is_finite in itertools.product((("rz", False), ("rp", True)), (False, True)):
    name = f"cvt.{mode}{'.satfinite' * is_finite}.ue8m0x2"

    def powers(a, b, is_up=is_up, is_finite=is_finite):
        return to_ue8m0(a, is_up, is_finite) << 8 | to_ue8m0(b, is_up, is_finite)

    case(f"{name}.f32", "u16 f32 f32", powers)
    case(
        f"{name}.bf16x2",
        "u16 u32",
        lambda a, powers=powers: powers(from_bf16(a >> 16), from_bf16(a)),
    )
case(
    "cvt.rn.bf16x2.ue8m0x2",
    "u32 u16",
    lambda a: to_bf16(from_ue8m0(a >> 8)) << 16 | to_bf16(from_ue8m0(a & 255)),
)
case("cvt.u16.u8", "u16 b8", lambda a: a)
case("cvt.u32.u8", "u32 b8", lambda a: a)


# ---- PTX -----------------------------------------------------------------------------------------

REGISTERS = {"p": ".pred", "b": ".b8", "h": ".b16", "w": ".b32", "d": ".b64"}
BYTES = {"p": 4, "b": 2, "h": 2, "w": 4, "d": 8}  # in memory: a .b8 is unpacked from two bytes


def kernel(letters: str, body: str) -> str:
    """%out and %in0, %in1 ... of the types that the letters name; one of each per thread."""
    names = ["out", *(f"in{i}" for i in range(len(letters) - 1))]
    lines, params = [], [f".param .u64 {name}_param" for name in names]
    for name, letter in zip(names, letters, strict=True):
        lines.append(f".reg {REGISTERS[letter]} %{name};")
        lines.append(f".reg .b64 %{name}_at;")
        lines.append(f"ld.param.u64 %{name}_at, [{name}_param];")
        lines.append(f"mad.wide.u32 %{name}_at, %thread, {BYTES[letter]}, %{name}_at;")
        if name == "out":
            continue
        register = {"p": "%word", "b": "%half"}.get(letter, f"%{name}")
        lines.append(f"ld.global.u{8 * BYTES[letter]} {register}, [%{name}_at];")
        if letter == "p":
            lines.append(f"setp.ne.u32 %{name}, %word, 0;")
        if letter == "b":
            lines.append(f"mov.b16 {{%{name}, _}}, %half;")
    lines.append(body)
    if letters[0] == "p":
        lines.append("selp.u32 %word, 1, 0, %out;")
    if letters[0] == "b":
        lines.append("mov.b16 %half, {%out, 0};")
    register = {"p": "%word", "b": "%half"}.get(letters[0], "%out")
    lines.append(f"st.global.u{8 * BYTES[letters[0]]} [%out_at], {register};")
    preamble = f"""
    .reg .b32 %thread, %block, %word, %lane;
    .reg .b16 %half;
    mov.u32 %lane, %tid.x;
    mov.u32 %block, %ctaid.x;
    mad.lo.u32 %thread, %block, {LANES}, %lane;
"""
    return ptx_module(params, preamble + "\n".join(lines))


def run(letters: str, body: str, *inputs: np.ndarray) -> np.ndarray:
    """%out of every thread; the arrays have one element per thread, or two halves of one."""
    out_bytes = BYTES[letters[0]]
    threads = inputs[0].nbytes // BYTES[letters[1]]
    out = np.full(threads, 0x55, dtype=f"u{out_bytes}")
    emulator().run(kernel(letters, body), out, *inputs, grid=threads // LANES, block=LANES)
    return out


def draw(kinds: list[Kind], is_valid: Callable) -> list[np.ndarray]:
    """Whole warps of operands: pairs of edges, then random bits and random edges."""
    rng = random.Random(zlib.crc32(repr([kind.letter for kind in kinds]).encode()))

    def element(kind: Kind) -> int:
        width = 1 if kind.letter == "p" else 8 * np.dtype(kind.dtype).itemsize
        return rng.choice(kind.edges) if rng.random() < 0.5 else rng.getrandbits(width)

    edges = list(itertools.product(*(kind.edges for kind in kinds))) if len(kinds) < 3 else []
    rows = edges if len(edges) <= 768 else rng.sample(edges, 768)
    rows += [tuple(map(element, kinds)) for _ in range(256 if edges else 768)]
    rows = [
        row
        for row in rows
        if is_valid(*(kind.decode(x) for kind, x in zip(kinds, row, strict=True)))
    ]
    rows += rows[: -len(rows) % (2 * LANES)]
    return [
        np.array(column, dtype=kind.dtype)
        for kind, column in zip(kinds, zip(*rows, strict=True), strict=True)
    ]


def is_close(got: float, expected: float, within: float) -> bool:
    if got != got or expected != expected or math.isinf(expected) or expected == 0:
        return repr(got) == repr(expected)
    return abs(got - expected) <= within * abs(expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.operands} {case.tail}")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_opcode(case):
    dest, *sources = (KINDS[kind] for kind in case.kinds)
    inputs = draw(sources, case.is_valid)
    names = ["%out", *(f"%in{i}" for i in range(len(sources))), *([case.tail] if case.tail else [])]
    letters = "".join(kind.letter for kind in (dest, *sources))
    got = run(letters, f"{case.name} {', '.join(names)};", *inputs).view(dest.dtype).tolist()
    wrong = []
    for i, row in enumerate(zip(*(array.tolist() for array in inputs), strict=True)):
        values = [kind.decode(bits) for kind, bits in zip(sources, row, strict=True)]
        expected = dest.encode(case.function(*values))
        if got[i] != expected and not (
            case.within and is_close(dest.decode(got[i]), dest.decode(expected), case.within)
        ):
            wrong.append(f"{values} -> {got[i]:#x}, not {expected:#x}")
    assert not wrong, f"{len(wrong)} of {len(got)}: " + "; ".join(wrong[:5])


# ---- what is the same for all of them ------------------------------------------------------------


class _Row(ctypes.Structure):
    """struct opcode"""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("operands", ctypes.c_char_p),
        ("execute", ctypes.c_void_p),
        ("kind", ctypes.c_int),
        ("detail", ctypes.c_int),
    ]


def table(symbol: str) -> list[tuple[str, str]]:
    """Name and operands of every row of an opcode table."""
    rows = (_Row * 4096).in_dll(emulator().driver, symbol)
    named = itertools.takewhile(lambda row: row.name, rows)
    return [(row.name.decode(), row.operands.decode()) for row in named]


PACKS = {
    "mov.b16": ["H b2", "B2 h"],
    "mov.b32": ["W h2", "H2 w", "W b4", "B4 w"],
    "mov.b64": ["D w2", "W2 d", "D h4", "H4 d"],
}


def test_every_row_is_tested_once():
    rows = table("ARITHMETIC_OPCODES")
    packs = {(name, operands) for name, all_operands in PACKS.items() for operands in all_operands}
    assert len(rows) == len(set(rows))
    assert set(rows) == {(case.name, case.operands) for case in CASES} | packs


@pytest.mark.parametrize(
    ("whole", "part"), [("h", "b"), ("w", "b"), ("w", "h"), ("d", "w"), ("d", "h")]
)
def test_packs(whole, part):
    part_bytes = 1 if part == "b" else BYTES[part]
    count = BYTES[whole] // part_bytes
    rng = np.random.default_rng(0)
    words = rng.integers(0, 256, LANES * BYTES[whole], dtype=np.uint8).view(f"u{BYTES[whole]}")
    bits = 8 * BYTES[whole]
    names = ", ".join(f"%part{i}" for i in range(count))
    reversed_names = ", ".join(f"%part{i}" for i in reversed(range(count)))
    body = f"""
    .reg {REGISTERS[part]} {names};
    mov.b{bits} {{{names}}}, %in0;
    mov.b{bits} %out, {{{reversed_names}}};
    """
    expected = words.view(f"u{part_bytes}").reshape(LANES, count)[:, ::-1]
    assert np.array_equal(run(whole * 2, body, words).view(expected.dtype), expected.ravel())


SOME_LANES = 0x0F35A7C1


@pytest.mark.parametrize("name", ["add.u32", "add.u64", "add.u16", "add.f16x2", "mov.b32"])
def test_only_active_lanes_change(name):
    """Of the destination, also where it is a source."""
    one = next(case for case in CASES if case.name == name)
    letter, is_sum = KINDS[one.kinds[0]].letter, len(one.kinds) == 3
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 1 << 14, (2, LANES), dtype=np.uint64).astype(f"u{BYTES[letter]}")
    active = np.array([SOME_LANES >> lane & 1 for lane in range(LANES)], np.uint32)
    bits = 8 * BYTES[letter]
    sources = "%out, %in1" if is_sum else "%in1"
    body = f"mov.b{bits} %out, %in0; @%in2 {name} %out, {sources};"
    got = run(f"{letter * 3}p", body, a, b, active)
    everywhere = run(letter * 3, f"{name} %out, {'%in0, ' * is_sum}%in1;", a, b)
    assert np.array_equal(got, np.where(active, everywhere, a))


@pytest.mark.parametrize("body", ["setp.lt.u32 %out, %in0, 50;", "not.pred %out, %out;"])
def test_only_active_lanes_of_a_predicate_change(body):
    a = np.arange(0, 2 * LANES, 2, dtype=np.uint32)
    active = np.array([SOME_LANES >> lane & 1 for lane in range(LANES)], np.uint32)
    got = run("pwp", f"setp.ge.u32 %out, %in0, 9; @!%in1 {body}", a, active)
    changed = a < 50 if body.startswith("setp") else a < 9
    assert np.array_equal(got, np.where(active, a >= 9, changed))


def test_constants():
    a = np.arange(LANES, dtype=np.uint32)
    body = """
    .reg .f32 %x;
    .reg .b64 %wide;
    .reg .b16 %short;
    mov.f32 %x, 0f40490FDB;
    add.f32 %x, %x, 0fC0490FDB;
    mov.b64 %wide, 0x123456789A;
    cvt.u32.u64 %word, %wide;
    add.s32 %word, %word, -0x3456789A;
    mov.u16 %short, -1;
    cvt.u32.u16 %out, %short;
    xor.b32 %out, %out, 0xFFF0;
    add.u32 %out, %out, %word;
    xor.b32 %out, %out, %x;
    mad.lo.s32 %out, %in0, -3, %out;
    """
    assert np.array_equal(run("ww", body, a), (15 - 3 * a.astype(np.int64)).astype(np.uint32))


# ---- lanes ---------------------------------------------------------------------------------------

HALF = 0xFFFF0000  # of a warp's lanes
WORDS = np.random.default_rng(1).integers(0, 1 << 32, LANES, dtype=np.uint64).astype(np.uint32)
LANE = np.arange(LANES)


def among(members: int, body: str) -> str:
    """Only these lanes execute the body, the others leave %out 7."""
    return f"""
    .reg .pred %here;
    .reg .b32 %bit;
    mov.u32 %out, 7;
    shl.b32 %bit, 1, %lane;
    and.b32 %bit, %bit, {members:#x};
    setp.eq.u32 %here, %bit, 0;
    @%here bra $AWAY;
    {body}
$AWAY:
    """


def members_of(members: int) -> np.ndarray:
    return (members >> LANE & 1).astype(bool)


def shuffled(mode: str, amount: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The lane that each lane reads, and whether that is in its segment of `width` lanes."""
    first = LANE // width * width
    source = {
        "idx": first + amount % width,
        "bfly": LANE ^ amount,
        "up": LANE - amount,
        "down": LANE + amount,
    }[mode]
    inside = source >= first if mode == "up" else source < first + width
    return np.where(inside, source, LANE), inside


@pytest.mark.parametrize("members", [ALL_LANES, HALF])
@pytest.mark.parametrize("width", [32, 16, 8, 4])
@pytest.mark.parametrize("mode", ["idx", "bfly", "up", "down"])
def test_shuffle(mode, width, members):
    here = members_of(members)
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    for amount in (0, 1, 2, 3, 5, 8, 16, 17, 31):
        source, inside = shuffled(mode, amount, width)
        if not here[source[here]].all():
            continue
        operands = f"%in0, {amount}, {clamp}, {members:#x};"
        plain = run("ww", among(members, f"shfl.sync.{mode}.b32 %out, {operands}"), WORDS)
        assert np.array_equal(plain, np.where(here, WORDS[source], 7))
        body = f".reg .pred %p; shfl.sync.{mode}.b32 %word|%p, {operands} selp.u32 %out, 1, 0, %p;"
        assert np.array_equal(run("ww", among(members, body), WORDS), np.where(here, inside, 7))


def test_shuffle_by_an_amount_per_lane():
    amounts = np.random.default_rng(2).integers(0, 32, LANES).astype(np.uint32)
    body = f"mov.b32 %out, %in0; shfl.sync.idx.b32 %out, %out, %in1, 31, {ALL_LANES:#x};"
    assert np.array_equal(run("www", body, WORDS, amounts), WORDS[amounts])


@pytest.mark.parametrize("members", [ALL_LANES, HALF])
@pytest.mark.parametrize("set_lanes", [0, ALL_LANES, 0x00010000, 0xFFFF0001, 0x0000FFFF])
def test_vote(set_lanes, members):
    here, chosen = members_of(members), members_of(set_lanes)
    votes = {"all": chosen[here].all(), "any": chosen[here].any()}
    votes["uni"] = votes["all"] or not votes["any"]
    values = chosen.astype(np.uint32)
    for mode, expected in votes.items():
        body = (
            f".reg .pred %p; vote.sync.{mode}.pred %p, %in0, {members:#x}; selp.u32 %out, 1, 0, %p;"
        )
        assert np.array_equal(run("wp", among(members, body), values), np.where(here, expected, 7))
    body = f"vote.sync.ballot.b32 %out, %in0, {members:#x};"
    ballot = set_lanes & members
    assert np.array_equal(run("wp", among(members, body), values), np.where(here, ballot, 7))


@pytest.mark.parametrize("members", [ALL_LANES, HALF, 0x00100000])
def test_active_lanes(members):
    here, first = members_of(members), (members & -members).bit_length() - 1
    got = run("ww", among(members, "activemask.b32 %out;"), WORDS)
    assert np.array_equal(got, np.where(here, members, 7))
    got = run("ww", among(members, f".reg .pred %p; elect.sync %out|%p, {members:#x};"), WORDS)
    assert np.array_equal(got, np.where(here, first, 7))
    body = f".reg .pred %p; elect.sync _|%p, {members:#x}; selp.u32 %out, 1, 0, %p;"
    assert np.array_equal(run("ww", among(members, body), WORDS), np.where(here, first == LANE, 7))


REDUCTIONS = {
    "add.s32": (np.add, np.int32),
    "add.u32": (np.add, np.uint32),
    "min.s32": (np.minimum, np.int32),
    "max.s32": (np.maximum, np.int32),
    "min.u32": (np.minimum, np.uint32),
    "max.u32": (np.maximum, np.uint32),
    "and.b32": (np.bitwise_and, np.uint32),
    "or.b32": (np.bitwise_or, np.uint32),
    "xor.b32": (np.bitwise_xor, np.uint32),
}


@pytest.mark.parametrize("members", [ALL_LANES, HALF, 0x00100000])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name, members):
    function, dtype = REDUCTIONS[name]
    here = members_of(members)
    values = WORDS | 0x00010000 if name == "and.b32" else WORDS
    expected = function.reduce(values[here].view(dtype), dtype=dtype).astype(np.uint32)
    body = f"redux.sync.{name} %out, %in0, {members:#x};"
    assert np.array_equal(run("ww", among(members, body), values), np.where(here, expected, 7))


def test_every_row_of_lanes_is_known_here():
    names = {f"shfl.sync.{mode}.b32" for mode in ("idx", "bfly", "up", "down")}
    names |= {f"vote.sync.{mode}" for mode in ("all.pred", "any.pred", "uni.pred", "ballot.b32")}
    names |= {f"redux.sync.{name}" for name in REDUCTIONS}
    names |= {"activemask.b32", "elect.sync", "bar.warp.sync"}
    assert {name for name, _ in table("LANE_OPCODES")} == names


EXCHANGE = """
    .shared .align 4 .b8 words[128];
    .reg .b32 %own, %other;
    shl.b32 %own, %lane, 2;
    xor.b32 %other, %own, 4;
    mov.u32 %word, words;
    add.s32 %own, %own, %word;
    add.s32 %other, %other, %word;
    st.shared.u32 [%own], %in0;
    BARRIER
    ld.shared.u32 %out, [%other];
"""


def test_warp_barrier():
    body = EXCHANGE.replace("BARRIER", f"bar.warp.sync {ALL_LANES:#x};")
    assert np.array_equal(run("ww", body, WORDS), WORDS[LANE ^ 1])


def test_a_shuffle_is_no_barrier():
    body = EXCHANGE.replace("BARRIER", f"shfl.sync.idx.b32 %out, %in0, 0, 31, {ALL_LANES:#x};")
    fails(body, "no bar.warp.sync between")


def test_warp_barrier_after_others_have_exited():
    body = f"""
    .reg .pred %early;
    setp.lt.u32 %early, %lane, 16;
    @%early exit;
    bar.warp.sync {HALF:#x};
    mov.b32 %out, %in0;
    """
    got = run("ww", body, WORDS)
    assert np.array_equal(got[16:], WORDS[16:])
    assert (got[:16] == 0x55).all()


# ---- faults --------------------------------------------------------------------------------------


def fails(body: str, match: str, letters: str = "ww", *inputs: np.ndarray) -> None:
    with pytest.raises(EmulatorError, match=match):
        run(letters, body, *(inputs or (WORDS,)))


@pytest.mark.parametrize("name", ["div.s32", "div.u32", "rem.s32", "rem.u32"])
def test_division_by_zero(name):
    divisors = np.where(LANE == 9, 0, 3).astype(np.uint32)
    fails(f"{name} %out, %in0, %in1;", "division by zero.*lane 9", "www", WORDS, divisors)
    body = f"mov.b32 %out, 7; @%in2 {name} %out, %in0, %in1;"
    assert run("wwwp", body, WORDS, divisors, divisors)[9] == 7  # this lane does not divide


@pytest.mark.parametrize("name", ["div.s32", "rem.s32"])
def test_quotient_out_of_range(name):
    fails(f"{name} %out, 0x80000000, -1;", "the quotient is out of range")


@pytest.mark.parametrize(
    "body",
    [
        f"shfl.sync.bfly.b32 %out, %in0, 1, 31, {ALL_LANES:#x};",
        f"redux.sync.add.s32 %out, %in0, {ALL_LANES:#x};",
        f".reg .pred %p; elect.sync %out|%p, {ALL_LANES:#x};",
        f"bar.warp.sync {ALL_LANES:#x};",
        f"vote.sync.ballot.b32 %out, %here, {ALL_LANES:#x};",
        f"vote.sync.any.pred %here, %here, {ALL_LANES:#x};",
    ],
    ids=lambda body: body.split()[0 if "elect" not in body else 3],
)
def test_in_a_diverged_warp(body):
    fails(
        among(HALF, body),
        "the mask has the lanes ffffffff, but ffff0000 are here: the warp has div",
    )


def test_mask_with_lanes_that_have_exited():
    body = f"""
    .reg .pred %early;
    setp.lt.u32 %early, %lane, 16;
    @%early exit;
    redux.sync.add.s32 %out, %in0, {ALL_LANES:#x};
    """
    fails(body, "the mask has the lanes ffffffff, but ffff0000 are here: some have exited")


def test_masks_that_differ():
    masks = np.where(LANE == 3, 0xFFFF, ALL_LANES).astype(np.uint32)
    fails("redux.sync.add.s32 %out, %in0, %in0;", "the lanes 0000ffff, .*lane 3", "ww", masks)


def test_shuffle_from_a_lane_that_is_not_here():
    body = f"shfl.sync.idx.b32 %out, %in0, 3, 31, {HALF:#x};"
    fails(among(HALF, body), "the shuffle reads a lane that is not here")


def test_barrier_of_some_lanes():
    fails(among(HALF, f"bar.warp.sync {HALF:#x};"), "a barrier of some lanes .* is not supported")


@pytest.mark.parametrize(
    "body",
    [
        "add.sat.s32 %out, %in0, %in0;",
        "add.rz.f32 %out, %in0, %in0;",
        "mov.f16 %out, %in0;",
        "cvt.f16.f32 %out, %in0;",
        "min.f32x2 %out, %in0, %in0;",
        "shfl.sync.idx.b64 %out, %in0, 0, 31, -1;",
        "shfl.idx.b32 %out, %in0, 0, 31;",
    ],
    ids=lambda body: body.split()[0],
)
def test_unknown_instruction(body):
    fails(body, f"unknown instruction {body.split()[0]}")


@pytest.mark.parametrize(
    "body",
    ["add.u32 %out, %in0;", "add.u64 %out, %in0, %in0;", "lop3.b32 %out, %in0, %in0, %in0, %in0;"],
)
def test_unknown_operands(body):
    fails(body, f"unknown operands: {body.split()[0]}")
