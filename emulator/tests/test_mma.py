"""mma of 16-bit floats, FP8 and integers: PTX by hand, placed by the tables of the PTX ISA."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from one_warp import LANES, kernel, load, refusal, store, vector

from emulator import emulator, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

FLOATS = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "f32": torch.float32,
}
INTEGERS = {"s8": torch.int8, "u8": torch.uint8, "s32": torch.int32}
DTYPES = FLOATS | INTEGERS


# ---- where the ISA has the elements --------------------------------------------------------------

# Of element i of a lane's fragment, by (shape, bits per element): its row and column. `g` is the
# ISA's groupID, `t` its threadID_in_group.
A_TABLES = {
    ("m16n8k8", 16): lambda g, t, i: (g if i < 2 else g + 8, t * 2 + (i & 1)),
    ("m16n8k16", 16): lambda g, t, i: (
        g if 0 <= i < 2 or 4 <= i < 6 else g + 8,
        t * 2 + (i & 1) if i < 4 else t * 2 + (i & 1) + 8,
    ),
    ("m16n8k32", 8): lambda g, t, i: (
        g if 0 <= i < 4 or 8 <= i < 12 else g + 8,
        t * 4 + (i & 3) if i < 8 else t * 4 + (i & 3) + 16,
    ),
}
B_TABLES = {
    ("m16n8k8", 16): lambda g, t, i: (t * 2 + i, g),
    ("m16n8k16", 16): lambda g, t, i: (t * 2 + (i & 1) if i < 2 else t * 2 + (i & 1) + 8, g),
    ("m16n8k32", 8): lambda g, t, i: (t * 4 + (i & 3) if i < 4 else t * 4 + (i & 3) + 16, g),
}


def c_table(g, t, i):
    return (g if i < 2 else g + 8, t * 2 + (i & 1))


def places(table, count):
    """Row and column [count, lanes] of every element of every lane's fragment."""
    lanes = [(lane >> 2, lane % 4) for lane in range(LANES)]
    rows_and_columns = [[table(g, t, i) for g, t in lanes] for i in range(count)]
    return tuple(np.moveaxis(np.array(rows_and_columns), -1, 0))


def pack(matrices, table):
    """Registers [blocks, registers, lanes] of matrices [blocks, rows, columns]."""
    per_word = 4 // matrices.itemsize
    raw = matrices.contiguous().view(torch.uint8).numpy().view(f"u{matrices.itemsize}")
    rows, columns = places(table, raw[0].size // LANES)
    words = raw[:, rows, columns].reshape(len(raw), -1, per_word, LANES).astype(np.uint32)
    shifts = np.arange(per_word, dtype=np.uint32)[:, None] * np.uint32(32 // per_word)
    return np.ascontiguousarray(np.bitwise_or.reduce(words << shifts, axis=2))


def unpack(registers, dtype):
    """D [blocks, 16, 8] of registers [blocks, registers, lanes]."""
    per_word = 4 // dtype.itemsize
    elements = torch.from_numpy(registers).view(dtype).unflatten(2, (LANES, per_word))
    rows, columns = places(c_table, 4)
    d = torch.empty(len(registers), 16, 8, dtype=dtype)
    d[:, rows, columns] = elements.movedim(3, 2).reshape(len(registers), 4, LANES)
    return d


# ---- what it computes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Mma:
    name: str
    shape: str
    a: str
    b: str
    c: str

    @property
    def k(self):
        return int(self.shape.rpartition("k")[2])

    @property
    def tables(self):
        key = self.shape, 8 * DTYPES[self.a].itemsize
        return A_TABLES[key], B_TABLES[key]

    @property
    def counts(self):
        """Registers of A, B and C."""
        sizes = (16 * self.k * DTYPES[self.a].itemsize, self.k * 8 * DTYPES[self.b].itemsize)
        return *(size // 4 // LANES for size in sizes), 128 * DTYPES[self.c].itemsize // 4 // LANES

    def __str__(self):
        return self.name.removeprefix("mma.sync.aligned.")


def every_mma():
    for shape in ("m16n8k8", "m16n8k16"):
        for c, a in (("f32", "bf16"), ("f32", "f16"), ("f16", "f16")):
            name = f"mma.sync.aligned.{shape}.row.col.{c}.{a}.{a}.{c}"
            yield Mma(name, shape, a, a, c)
    spellings = "m16n8k32.row.col", "m16n8k32.row.col.kind::f8f6f4", "kind::f8f6f4.m16n8k32.row.col"
    for spelling, c in itertools.product(spellings, ("f32", "f16")):
        for a, b in itertools.product(("e4m3", "e5m2"), repeat=2):
            yield Mma(f"mma.sync.aligned.{spelling}.{c}.{a}.{b}.{c}", "m16n8k32", a, b, c)
    for a, b in itertools.product(("s8", "u8"), repeat=2):
        yield Mma(f"mma.sync.aligned.m16n8k32.row.col.s32.{a}.{b}.s32", "m16n8k32", a, b, "s32")


MMAS = {str(mma): mma for mma in every_mma()}
FLOAT_MMAS = {name: mma for name, mma in MMAS.items() if mma.c in FLOATS and "kind" not in name}
HALF_MMAS = {name: mma for name, mma in FLOAT_MMAS.items() if DTYPES[mma.a].itemsize == 2}
every = pytest.mark.parametrize("mma", MMAS.values(), ids=str)
every_float = pytest.mark.parametrize("mma", FLOAT_MMAS.values(), ids=str)


def registers_of(mma, a, b, c):
    """D's registers after D = A B + C, one product per block."""
    (a_table, b_table), (a_count, b_count, c_count) = mma.tables, mma.counts
    operands = pack(a, a_table), pack(b, b_table), pack(c, c_table)
    assert [x.shape[1] for x in operands] == [a_count, b_count, c_count]
    d = np.zeros((len(a), c_count, LANES), np.uint32)
    vectors = [vector("d", c_count), vector("a", a_count), vector("b", b_count)]
    body = load("a", a_count) + load("b", b_count) + load("c", c_count)
    body += f"    {mma.name} {', '.join([*vectors, vector('c', c_count)])};\n"
    ptx = kernel("abcd", body + store("d", c_count))
    emulator().run(ptx, *operands, d, grid=len(a))
    return d


def product(mma, a, b, c):
    return unpack(registers_of(mma, a, b, c), DTYPES[mma.c])


def exact(a, b, c):
    a, b, c = a.double(), b.double(), c.double()
    return (a[:, :, :, None] * b[:, None, :, :]).sum(2) + c


def bound(mma, a, b, c):
    """How far from the exact result rounding may lead: of each sum, and of what comes out."""
    magnitude = exact(*(x.double().abs() for x in (a, b, c)))
    error = magnitude * (mma.k + 1) * 2.0**-24
    return error + (magnitude * 2.0**-11 + 2.0**-24 if mma.c == "f16" else 0)


def drawn(mma, blocks, draw):
    """A, B and C of numbers that `draw` draws, in the types of an mma."""
    shapes = (16, mma.k), (mma.k, 8), (16, 8)
    types = mma.a, mma.b, mma.c
    return [
        draw(blocks, *shape).to(DTYPES[type]) for shape, type in zip(shapes, types, strict=True)
    ]


@every
def test_every_element_is_where_the_isa_has_it(mma):
    """Integers, so that no sum is rounded."""
    low = 0 if "u8" in (mma.a, mma.b) else -4
    a, b, c = drawn(mma, 8, lambda *shape: torch.randint(low, 5, shape))
    assert torch.equal(product(mma, a, b, c).double(), exact(a, b, c))


@every_float
def test_random_numbers(mma):
    a, b, c = drawn(mma, 8, lambda *shape: torch.randn(shape))
    error = (product(mma, a, b, c).double() - exact(a, b, c)).abs()
    assert (error <= bound(mma, a, b, c)).all()


@pytest.mark.parametrize("mma", HALF_MMAS.values(), ids=str)
def test_sums_run_up_k_in_float(mma):
    """The same bits on every machine: products are exact, each addition rounds to a float."""
    a, b, c = drawn(mma, 8, lambda *shape: torch.randn(shape))
    sums = c.float()
    for k in range(mma.k):
        sums = sums + a[:, :, k, None].float() * b[:, None, k, :].float()
    assert torch.equal(product(mma, a, b, c), sums.to(DTYPES[mma.c]))


@every_float
@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_infinity_and_nan(mma, special):
    """They reach what they should: infinity times zero and infinity minus infinity are NaN."""
    a, b, c = drawn(mma, 16, lambda *shape: torch.randint(-4, 5, shape))
    c[torch.rand(c.shape) < 0.1] = special
    for matrix, type in ((a, mma.a), (b, mma.b)):
        value = torch.nan if type == "e4m3" else special  # e4m3 has no infinity
        hit = torch.rand(matrix.shape) < 0.01
        matrix.copy_(torch.where(hit, value, matrix.float()))
    expected = exact(a, b, c)
    assert expected.isnan().any() and expected.isinf().any() == (special == special)
    d = product(mma, a, b, c).double()
    assert torch.equal(d.isnan(), expected.isnan())
    assert torch.equal(d[~d.isnan()], expected[~d.isnan()])


@pytest.mark.parametrize("type, bits", [("f32", 0x7FFFFFFF), ("f16", 0x7FFF)])
def test_there_is_one_nan(type, bits):
    mma = MMAS[f"m16n8k16.row.col.{type}.f16.f16.{type}"]
    a, b, c = drawn(mma, 1, lambda *shape: torch.zeros(shape))
    c[:] = -torch.nan
    c.view(torch.int16)[:, ::2] |= 1
    d = product(mma, a, b, c).view({4: torch.int32, 2: torch.int16}[c.itemsize])
    assert (d == bits).all()


def patterns(type):
    """Every number of a type."""
    raw = {1: torch.uint8, 2: torch.int16}[DTYPES[type].itemsize]
    low = torch.iinfo(raw).min
    return torch.arange(low, torch.iinfo(raw).max + 1).to(raw).view(DTYPES[type])


@pytest.mark.parametrize(
    "name",
    ["m16n8k16.row.col.f32.bf16.bf16.f32", "m16n8k16.row.col.f32.f16.f16.f32"]
    + [f"m16n8k32.row.col.f32.{a}.{a}.f32" for a in ("e4m3", "e5m2")],
)
def test_every_number_there_is(name):
    """Times one: as elements of A, then of B, one in each row or column."""
    mma = MMAS[name]
    numbers = patterns(mma.a)
    for rows in (16, 8):
        blocks = len(numbers) // rows
        a, b, c = drawn(mma, blocks, lambda *shape: torch.zeros(shape))
        if rows == 16:
            a[:, :, 1], b[:, 1, :] = numbers.view(blocks, 16), 1
            expected = numbers.view(blocks, 16, 1).float()
        else:
            a[:, :, 1], b[:, 1, :] = 1, numbers.view(blocks, 8)
            expected = numbers.view(blocks, 1, 8).float()
        d = product(mma, a, b, c)
        assert torch.equal(d.nan_to_num(torch.pi), expected.expand_as(d).nan_to_num(torch.pi))


def test_every_f16_passes_as_an_accumulator():
    mma = MMAS["m16n8k16.row.col.f16.f16.f16.f16"]
    numbers = patterns("f16").view(-1, 16, 8)
    a, b, _ = drawn(mma, len(numbers), lambda *shape: torch.zeros(shape))
    d = product(mma, a, b, numbers)
    assert torch.equal(d.isnan(), numbers.isnan())
    assert torch.equal(d.nan_to_num(), numbers.nan_to_num())


def test_f16_sums_are_rounded_to_the_nearest():
    """Single products, exact in float: to even at a tie, to subnormals and to infinity."""
    mma = MMAS["m16n8k16.row.col.f16.f16.f16.f16"]
    a, b, c = drawn(mma, 512, lambda *shape: torch.zeros(shape))
    a[:, :, 0] = torch.randn(512, 16) * torch.logspace(-4, 3, 512)[:, None]
    b[:, 0, :] = torch.randn(512, 8) * torch.logspace(-4, 3, 512)[:, None]
    products = a[:, :, :1].float().numpy() * b[:, :1, :].float().numpy()
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(products.astype(np.float16))
    assert expected.isinf().any() and ((expected != 0) & (expected.abs() < 2**-14)).any()
    assert torch.equal(product(mma, a, b, c), expected)


@pytest.mark.parametrize("a, b", [*itertools.product(("s8", "u8"), repeat=2)])
def test_integer_sums_are_exact_and_wrap(a, b):
    mma = MMAS[f"m16n8k32.row.col.s32.{a}.{b}.s32"]
    limits = [torch.iinfo(DTYPES[type]) for type in (a, b, "s32")]
    operands = drawn(mma, 64, torch.zeros)
    for operand, limit in zip(operands, limits, strict=True):
        operand[:] = torch.randint(limit.min, limit.max + 1, operand.shape)
    for operand, limit in zip(operands, limits, strict=True):
        operand[:2] = limit.max
        operand[2:4] = limit.min
    a, b, c = (operand.long() for operand in operands)
    expected = (a[:, :, :, None] * b[:, None, :, :]).sum(2) + c
    assert (expected > limits[2].max).any()
    assert torch.equal(product(mma, *operands), expected.int())


@pytest.mark.parametrize(
    "d", ["a0 a1 a2 a3", "c0 c1 c2 c3", "c2 c3 c0 c1", "c1 c0 c3 c2", "b0 a3 c3 b1"]
)
@pytest.mark.parametrize("types", ["f32.f16.f16.f32", "s32.s8.s8.s32"])
def test_results_may_replace_any_operand(d, types):
    """All operands are read before the first result is written."""
    mma = next(mma for mma in reversed(MMAS.values()) if mma.name.endswith(types))
    assert mma.counts == (4, 2, 4)
    a, b, c = drawn(mma, 1, lambda *shape: torch.randint(-4, 5, shape))
    operands = [pack(x, table) for x, table in zip((a, b, c), (*mma.tables, c_table), strict=True)]
    results = np.zeros((1, 4, LANES), np.uint32)
    names = [f"%{name}" for name in d.split()]
    vectors = ["{" + ", ".join(names) + "}", vector("a", 4), vector("b", 2), vector("c", 4)]
    body = load("a", 4) + load("b", 2) + load("c", 4) + f"    {mma.name} {', '.join(vectors)};\n"
    body += "".join(f"    mov.b32 %d{i}, {name};\n" for i, name in enumerate(names))
    emulator().run(kernel("abcd", body + store("d", 4)), *operands, results)
    assert torch.equal(unpack(results, DTYPES[mma.c]).double(), exact(a, b, c))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "mma.sync.aligned.m16n8k16.row.row.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f16.bf16.bf16.f16",
        "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
        "mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.e2m1.e2m1.f32",
        "mma.sync.m16n8k16.row.col.f32.bf16.bf16.f32",
    ],
)
def test_an_unknown_mma(name):
    vectors = [vector("d", 4), vector("a", 4), vector("b", 2), vector("c", 4)]
    assert name in refusal(f"    {name} {', '.join(vectors)};\n")
