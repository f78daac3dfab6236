"""mma of FP8 and FP4 against models of the sums that sm_120 makes, to the bit.

The models: all terms and C are aligned to the largest exponent among them, cut toward zero to so
many bits below it, added exactly, and the sum is cut toward zero to a float.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from one_warp import LANES, kernel, load, refusal, store, vector

from emulator import emulator, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

CODES = torch.arange(256, dtype=torch.uint8)
NIBBLES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
POWERS = np.ldexp(1.0, np.arange(-127, 129))
VALUES = {  # of every code, as doubles
    "e4m3": CODES.view(torch.float8_e4m3fn).double().numpy(),
    "e5m2": CODES.view(torch.float8_e5m2).double().numpy(),
    "e2m1": np.concatenate([NIBBLES, -NIBBLES]),
    "ue8m0": np.where(np.arange(256) == 255, np.nan, POWERS),
    "ue4m3": (CODES & 0x7F).view(torch.float8_e4m3fn).double().numpy(),
}
LEAST_EXPONENT = {"e4m3": -6, "ue4m3": -6, "e5m2": -14, "ue8m0": -127, "f32": -126}
LOWEST = -10000  # an exponent that never is the largest


# ---- the models ----------------------------------------------------------------------------------


def split(values, least_exponent, of_zero=LOWEST):
    """Significands and exponents: those of subnormals stay at the least one."""
    exponents = np.maximum(np.frexp(values)[1] - 1, least_exponent)
    significands = np.ldexp(values, -exponents)
    return significands, np.where(values == 0, of_zero, exponents)


def cut_to_float(values):
    last = np.maximum(np.frexp(values)[1] - 1, -126) - 23
    with np.errstate(over="ignore"):
        return np.ldexp(np.trunc(np.ldexp(values, -last)), last).astype(np.float32) + np.float32(0)


def fused(terms, c, keep, of_zero):
    """The sum of (significands, exponents) [..., terms] and of C [...], as a double."""
    significand_c, exponent_c = split(c, LEAST_EXPONENT["f32"], of_zero)
    significands = np.concatenate([terms[0], significand_c[..., None]], axis=-1)
    exponents = np.concatenate([terms[1], exponent_c[..., None]], axis=-1)
    top = exponents.max(-1)
    shifts = np.maximum(keep + exponents - top[..., None], -2000)
    return np.ldexp(np.trunc(np.ldexp(significands, shifts)).sum(-1), top - keep)


def sum_of_bytes(mma, a, b, c, scale_a, scale_b):
    """Terms are products, their exponents added, not normalised."""
    (sa, ea), (sb, eb) = (split(x, LEAST_EXPONENT[t]) for x, t in ((a, mma.a), (b, mma.b)))
    factors = np.log2(scale_a[..., 0]).astype(int)[:, :, None, None]
    factors = factors + np.log2(scale_b[..., 0]).astype(int)[:, None, :, None]
    significands = sa[:, :, None, :] * sb.swapaxes(1, 2)[:, None]
    exponents = ea[:, :, None, :] + eb.swapaxes(1, 2)[:, None] + factors
    exponents = np.where(significands == 0, LOWEST, exponents)
    return fused((significands, exponents), c, 25, -133)


def sum_of_nibbles(mma, a, b, c, scale_a, scale_b):
    """Terms are exact sums of 16 products, their exponents those of the factors alone."""
    products = a[:, :, None, :] * b.swapaxes(1, 2)[:, None]
    groups = products.reshape(*products.shape[:-1], 4, 16)
    repeats = 4 // scale_a.shape[-1]
    scale_a, scale_b = scale_a.repeat(repeats, -1), scale_b.repeat(repeats, -1)
    (sa, ea), (sb, eb) = (split(scale, LEAST_EXPONENT[mma.scale]) for scale in (scale_a, scale_b))
    significands = groups.sum(-1) * sa[:, :, None] * sb[:, None]
    exponents = ea[:, :, None] + eb[:, None]
    is_absent = ~groups.any(-1) | (sa[:, :, None] * sb[:, None] == 0)
    exponents = np.where(is_absent, LOWEST, exponents)
    return fused((np.where(is_absent, 0, significands), exponents), c, 35, -139)


def special_sum(a, b, c, scale_a, scale_b):
    """What infinities and NaNs make of a sum; finite where there are none."""
    with np.errstate(invalid="ignore"):
        factors = scale_a.sum(-1)[:, :, None] + scale_b.sum(-1)[:, None]
        return np.einsum("nmk,nkc->nmc", a, b) + np.where(np.isfinite(c), 0, c) + 0 * factors


def expected_bits(mma, a, b, c, scale_a, scale_b):
    special = special_sum(a, b, c, scale_a, scale_b)
    tame = [np.nan_to_num(x, nan=1.0, posinf=1.0, neginf=1.0) for x in (a, b, c, scale_a, scale_b)]
    model = sum_of_nibbles if mma.a == "e2m1" else sum_of_bytes
    exact = np.where(np.isfinite(special), model(mma, *tame), special)
    if mma.c == "f16":
        with np.errstate(over="ignore"):
            return np.where(np.isnan(exact), 0x7FFF, exact.astype(np.float16).view(np.uint16))
    finite = cut_to_float(np.where(np.isfinite(exact), exact, 0))
    bits = np.where(np.isfinite(special), finite, special.astype(np.float32)).view(np.uint32)
    return np.where(np.isnan(exact), 0x7FFFFFFF, bits)


# ---- running an instruction ----------------------------------------------------------------------


@dataclass(frozen=True)
class Mma:
    name: str
    a: str
    b: str
    c: str = "f32"
    scale: str = ""
    count: int = 1  # factors of a row
    braces: bool = False  # around a factor

    @property
    def k(self):
        return 64 if self.a == "e2m1" else 32

    @property
    def per_word(self):
        return self.k // 8

    def __str__(self):
        return self.name.removeprefix("mma.sync.aligned.") + " braces" * self.braces


def plain_mmas():
    for a, b, c in itertools.product(("e4m3", "e5m2"), ("e4m3", "e5m2"), ("f32", "f16")):
        yield Mma(f"mma.sync.aligned.m16n8k32.row.col.{c}.{a}.{b}.{c}", a, b, c)


def scaled_mmas():
    """Every spelling: the kind in two places, vectors with and without their size."""
    types = [("m16n8k32", "mxf8f6f4", "ue8m0", 1, a, b) for a in FP8 for b in FP8]
    types += [("m16n8k64", "mxf4nvf4", "ue4m3", 4, "e2m1", "e2m1")]
    types += [("m16n8k64", kind, "ue8m0", 2, "e2m1", "e2m1") for kind in ("mxf4nvf4", "mxf4")]
    for shape, kind, scale, count, a, b in types:
        vectors = [f".scale_vec::{count}X"] + [""] * (kind != "mxf4nvf4")
        for vec, braces in itertools.product(vectors, (False, True)):
            rest = f"f32.{a}.{b}.f32.{scale}"
            block = f"kind::{kind}.block_scale{vec}"
            for text in (f"{block}.{shape}.row.col.{rest}", f"{shape}.row.col.{block}.{rest}"):
                yield Mma(f"mma.sync.aligned.{text}", a, b, "f32", scale, count, braces)


FP8 = ("e4m3", "e5m2")
PLAIN = list(plain_mmas())
SPELLINGS = list(scaled_mmas())
SCALED = [mma for mma in SPELLINGS if ".row.col.kind" in mma.name and not mma.braces]
SCALED = [mma for mma in SCALED if ".scale_vec" in mma.name]
every = pytest.mark.parametrize("mma", PLAIN + SCALED, ids=str)
every_scaled = pytest.mark.parametrize("mma", SCALED, ids=str)


def packed(codes, place, count, per_word):
    """Registers [blocks, count, lanes] of codes [blocks, rows, columns]."""
    words = np.zeros((len(codes), count, LANES), np.uint32)
    width = 32 // per_word
    for r, lane, i in itertools.product(range(count), range(LANES), range(per_word)):
        row, column = place(lane // 4, lane % 4, r, i, per_word)
        words[:, r, lane] |= codes[:, row, column].astype(np.uint32) << np.uint32(width * i)
    return words


def place_a(g, t, r, i, per_word):
    return g + 8 * (r & 1), per_word * t + i + 4 * per_word * (r >> 1)


def place_b(g, t, r, i, per_word):
    return per_word * t + i + 4 * per_word * r, g


def place_c(g, t, r, i, per_word):
    return (g + 8 * r, 2 * t + i) if per_word == 2 else (g + 8 * (r >> 1), 2 * t + (r & 1))


def scale_registers(rng, codes, lanes, byte):
    """Registers of factors [blocks, rows, count], from `byte` on; the rest is anything."""
    blocks, _, count = codes.shape
    raw = rng.integers(0, 256, (blocks, LANES, 4), np.uint8)
    for row, lane in enumerate(lanes):
        raw[:, lane, byte : byte + count] = codes[:, row]
    return raw.view(np.uint32).reshape(blocks, 1, LANES)


def selected_lanes(tid_a, tid_b):
    return [4 * (m % 8) + 2 * tid_a + m // 8 for m in range(16)], [4 * n + tid_b for n in range(8)]


def instruction(mma, selectors=("0, 0", "0, 0"), name=None):
    c_count = 4 if mma.c == "f32" else 2
    operands = [vector(name, n) for name, n in zip("dabc", (c_count, 4, 2, c_count), strict=True)]
    if mma.scale:
        for register, pair in zip(("%r5", "%r6"), selectors, strict=True):
            operands += ["{" + register + "}" if mma.braces else register, "{" + pair + "}"]
    return f"    {name or mma.name} {', '.join(operands)};\n"


def run(mma, a, b, c, scales=None, selectors=((0, 0), (0, 0)), in_registers=False):
    """D's bits [blocks, 16, 8] of codes and of C's bits; scales: two arrays of registers."""
    c_count, c_words = (4, 1) if mma.c == "f32" else (2, 2)
    arrays = [
        packed(a, place_a, 4, mma.per_word),
        packed(b, place_b, 2, mma.per_word),
        packed(c, place_c, c_count, c_words),
    ]
    body = load("a", 4) + load("b", 2) + load("c", c_count)
    pairs = [f"{byte}, {thread}" for byte, thread in selectors]
    if mma.scale:
        arrays += scales
        for name, register in (("x", 5), ("y", 6)):
            body += load(name, 1).replace(f"%{name}0", f"%r{register}")
        if in_registers:
            body += "    .reg .b16 %s<4>;\n"
            body += "".join(f"    mov.u16 %s{i}, {n};\n" for i, n in enumerate(sum(selectors, ())))
            pairs = ["%s0, %s1", "%s2, %s3"]
    names = "abcxy" if mma.scale else "abc"
    d = np.zeros((len(a), c_count, LANES), np.uint32)
    body += instruction(mma, pairs)
    emulator().run(kernel([*names, "d"], body + store("d", c_count)), *arrays, d, grid=len(a))
    bits = np.zeros((len(a), 16, 8), np.uint32)
    for r, lane, i in itertools.product(range(c_count), range(LANES), range(c_words)):
        row, column = place_c(lane // 4, lane % 4, r, i, c_words)
        bits[:, row, column] = d[:, r, lane] >> (16 * i) & (0xFFFFFFFF if c_words == 1 else 0xFFFF)
    return bits


def check(mma, a, b, c, scale_a=None, scale_b=None, **options):
    """Codes through the instruction and through the model: the same bits. Returns them."""
    blocks = len(a)
    (byte_a, tid_a), (byte_b, tid_b) = options.get("selectors", ((0, 0), (0, 0)))
    c_values = c.astype(np.uint16).view(np.float16) if mma.c == "f16" else c.view(np.float32)
    scales, factors = None, [np.ones((blocks, n, 1)) for n in (16, 8)]
    if mma.scale:
        lanes_a, lanes_b = selected_lanes(tid_a, tid_b)
        rng = np.random.default_rng(1)
        scales = [
            scale_registers(rng, scale_a, lanes_a, byte_a),
            scale_registers(rng, scale_b, lanes_b, byte_b),
        ]
        factors = [VALUES[mma.scale][scale] for scale in (scale_a, scale_b)]
    found = run(mma, a, b, c, scales, **options)
    values = VALUES[mma.a][a], VALUES[mma.b][b], c_values.astype(np.float64)
    expected = expected_bits(mma, *values, *factors)
    assert np.array_equal(found, expected)
    return found


# ---- random operands -----------------------------------------------------------------------------


def drawn_codes(rng, type, shape, spread=False):
    """Codes of N(0, 1), or with `spread` of any finite number."""
    values = VALUES[type]
    codes = np.arange(len(values), dtype=np.uint8)
    finite = np.isfinite(values)
    if spread:
        return rng.choice(codes[finite], shape)
    order = codes[finite][np.argsort(values[finite], kind="stable")]
    at = np.searchsorted(values[order], rng.standard_normal(shape))
    return order[np.minimum(at, len(order) - 1)]


def drawn_c(rng, mma, blocks, spread):
    """Bits of C: N(0, 1), or of any finite number, subnormals and zeros of both signs among it."""
    shape = (blocks, 16, 8)
    if not spread:
        dtype = np.float16 if mma.c == "f16" else np.float32
        return rng.standard_normal(shape).astype(dtype).view(f"u{dtype().itemsize}")
    if mma.c == "f16":
        return rng.integers(0, 0x7C00, shape, np.uint32) | rng.integers(0, 2, shape) << 15
    bits = rng.integers(0, 0x7F800000, shape, np.uint32)
    bits[rng.random(shape) < 0.3] &= 0x3FFFFF
    bits[rng.random(shape) < 0.1] = 0
    return bits | rng.integers(0, 2, shape, np.uint32) << np.uint32(31)


def drawn_scales(rng, mma, blocks, low, high):
    """Codes of factors of A and B."""
    if not mma.scale:
        return ()
    return tuple(rng.integers(low, high, (blocks, n, mma.count), np.uint8) for n in (16, 8))


def drawn(rng, mma, blocks, spread=False):
    a = drawn_codes(rng, mma.a, (blocks, 16, mma.k), spread)
    b = drawn_codes(rng, mma.b, (blocks, mma.k, 8), spread)
    return a, b, drawn_c(rng, mma, blocks, spread)


@every
def test_random_numbers(mma):
    rng = np.random.default_rng(0)
    limits = (0x20, 0x60) if mma.scale == "ue4m3" else (120, 135)
    check(mma, *drawn(rng, mma, 64), *drawn_scales(rng, mma, 64, *limits))


@every
def test_numbers_of_all_sizes(mma):
    """Differences of exponents beyond any alignment, subnormals, overflow."""
    rng = np.random.default_rng(1)
    high = 0x7F if mma.scale == "ue4m3" else 255
    scales = drawn_scales(rng, mma, 128, 0, high)
    found = check(mma, *drawn(rng, mma, 128, spread=True), *scales)
    if mma.scale == "ue8m0":
        assert (found & 0x7FFFFFFF == 0x7F800000).any()  # products too large for a float


@every
def test_sums_that_are_all_tiny(mma):
    """The least factors with C of zero or a subnormal: what is below the zero's exponent is cut."""
    rng = np.random.default_rng(2)
    a, b, c = drawn(rng, mma, 64, spread=True)
    if mma.c == "f32":
        c &= np.uint32(0x8000000F)
    check(mma, a, b, c, *drawn_scales(rng, mma, 64, 0, 8 if mma.scale == "ue4m3" else 70))


@every
def test_products_that_cancel(mma):
    """The largest exponent counts although its terms leave nothing."""
    rng = np.random.default_rng(3)
    a, b, c = drawn(rng, mma, 64, spread=True)
    half = mma.k // 2
    sign = 0x8 if mma.a == "e2m1" else 0x80
    at = np.arange(mma.k).reshape(-1, 2)[:, 1] if mma.a == "e2m1" else np.arange(half, mma.k)
    a[:, :, at] = a[:, :, at - (1 if mma.a == "e2m1" else half)] ^ sign
    b[:, at] = b[:, at - (1 if mma.a == "e2m1" else half)]
    limits = (1, 0x40) if mma.scale == "ue4m3" else (100, 150)
    check(mma, a, b, c, *drawn_scales(rng, mma, 64, *limits))


@every
def test_zeros(mma):
    """Of either sign: the sum is +0, or C."""
    rng = np.random.default_rng(4)
    a, b, c = drawn(rng, mma, 8, spread=True)
    a &= np.uint8(0x8 if mma.a == "e2m1" else 0x80)
    c[:4] = 1 << 31 if mma.c == "f32" else 1 << 15
    found = check(mma, a, b, c, *drawn_scales(rng, mma, 8, 0, 0x7F))
    assert (found[:4] == 0).all()


@every
def test_infinity_and_nan(mma):
    rng = np.random.default_rng(5)
    a, b, c = drawn(rng, mma, 64)
    scales = drawn_scales(rng, mma, 64, 0x30, 0x60)
    specials = {"e4m3": [0x7F, 0xFF], "e5m2": [0x7C, 0xFC, 0x7D, 0xFF], "e2m1": []}
    for codes, type in ((a, mma.a), (b, mma.b)):
        hit = rng.random(codes.shape) < 0.004
        if specials[type]:
            codes[hit] = rng.choice(specials[type], hit.sum())
    of_c = [0x7C00, 0xFC00, 0x7E01] if mma.c == "f16" else [0x7F800000, 0xFF800000, 0xFFC00001]
    hit = rng.random(c.shape) < 0.1
    c[hit] = rng.choice(np.array(of_c, c.dtype), hit.sum())
    for scale in scales:
        hit = rng.random(scale.shape) < 0.01
        scale[hit] = 0xFF if mma.scale == "ue8m0" else rng.choice([0x7F, 0xFF], hit.sum())
    found = check(mma, a, b, c, *scales)
    one_nan, infinity = (0x7FFF, 0x7C00) if mma.c == "f16" else (0x7FFFFFFF, 0x7F800000)
    assert (found == one_nan).any() and (found == infinity).any()


def test_a_sign_of_ue4m3_counts_for_nothing():
    mma = next(mma for mma in SCALED if mma.scale == "ue4m3")
    rng = np.random.default_rng(6)
    scales = drawn_scales(rng, mma, 16, 0, 255)
    check(mma, *drawn(rng, mma, 16), *(np.where(s == 0x7F, 0x7E, s) for s in scales))


# ---- factors -------------------------------------------------------------------------------------

BYTES = {1: (0, 1, 2, 3), 2: (0, 2), 4: (0,)}


@every_scaled
@pytest.mark.parametrize("in_registers", [False, True], ids=["constants", "registers"])
def test_every_selector(mma, in_registers):
    rng = np.random.default_rng(7)
    limits = (0x20, 0x60) if mma.scale == "ue4m3" else (120, 135)
    bytes_ = BYTES[mma.count]
    for byte_a, tid_a, byte_b, tid_b in itertools.product(bytes_, range(2), bytes_, range(4)):
        operands = *drawn(rng, mma, 1), *drawn_scales(rng, mma, 1, *limits)
        check(
            mma, *operands, selectors=((byte_a, tid_a), (byte_b, tid_b)), in_registers=in_registers
        )


@pytest.mark.parametrize("mma", SPELLINGS, ids=str)
def test_every_spelling(mma):
    rng = np.random.default_rng(8)
    limits = (0x20, 0x60) if mma.scale == "ue4m3" else (120, 135)
    check(mma, *drawn(rng, mma, 2), *drawn_scales(rng, mma, 2, *limits))


ZEROS = "".join(f"    mov.b32 %{name}{i}, 0;\n" for name in "abcd" for i in range(4))
ZEROS += "    mov.b32 %r5, 0;\n    mov.b32 %r6, 0;\n"


@every_scaled
@pytest.mark.parametrize("selectors", [("0, 2", "0, 0"), ("0, 0", "0, 4"), ("4, 0", "0, 0")])
def test_selectors_out_of_range(mma, selectors):
    assert "out of range" in refusal(ZEROS + instruction(mma, selectors))


@every_scaled
def test_selectors_that_differ_between_lanes(mma):
    body = ZEROS + "    .reg .b16 %s<1>;\n    and.b32 %r7, %r0, 1;\n    cvt.u16.u32 %s0, %r7;\n"
    assert "differs from that of lane 0" in refusal(body + instruction(mma, ("0, %s0", "0, 0")))


@pytest.mark.parametrize(
    "text",
    [
        "m16n8k64.row.col.kind::mxf4nvf4.block_scale.f32.e2m1.e2m1.f32.ue4m3",
        "m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue8m0",
        "m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue4m3",
        "m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f16.e4m3.e4m3.f16.ue8m0",
        "m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::2X.f32.e4m3.e4m3.f32.ue8m0",
    ],
)
def test_what_ptxas_refuses(text):
    name = f"mma.sync.aligned.{text}"
    assert f"unknown instruction {name}" in refusal(ZEROS + instruction(SCALED[0], name=name))
