"""ldmatrix, stmatrix and movmatrix of the emulator, and what all matrix instructions refuse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from one_warp import LANES, address, kernel, load, refusal, store, vector

from emulator import emulator, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

ROW_BYTES = 16


# ---- ldmatrix, stmatrix, movmatrix ---------------------------------------------------------------

SLOTS = 64  # rows of 16 bytes in shared memory
IMAGE = np.arange(1, SLOTS * ROW_BYTES // 2 + 1, dtype=np.uint16)  # no two elements are the same

OWN_WORDS = "    shl.b32 %r3, %r0, 2;\n    add.s32 %r3, %r3, %r1;\n"


def each_own_word(*instructions):
    """Instructions on %d0 for all of the image, a word of each 128 bytes per lane."""
    ats = range(0, SLOTS * ROW_BYTES, 4 * LANES)
    return "".join(f"    {text.format(at)};\n" for at in ats for text in instructions)


FILL = OWN_WORDS + address("image", 0)
FILL += each_own_word("ld.global.b32 %d0, [%rd2+{}]", "st.shared.b32 [%r3+{}], %d0")
FILL += "    bar.sync 0;\n"
DUMP = "    bar.sync 0;\n" + address("image", 0)
DUMP += each_own_word("ld.shared.b32 %d0, [%r3+{}]", "st.global.b32 [%rd2+{}], %d0")

# %r4: shared memory's address, and the lane's offset in it
ROW_ADDRESS = load("offsets", 0) + "    ld.global.b32 %r4, [%rd2];\n    add.s32 %r4, %r4, %r1;\n"

counts = pytest.mark.parametrize("count", [1, 2, 4])
transposed = pytest.mark.parametrize("trans", ["", ".trans"], ids=["rows", "columns"])
spaces = pytest.mark.parametrize("space", ["shared", "shared::cta"])


def offsets_of(slots, count):
    """The offsets that the lanes give: those that the instruction must not use are nowhere."""
    offsets = np.full(LANES, 0x7FFFFFF1, np.uint32)
    offsets[: 8 * count] = np.asarray(slots)[: 8 * count] * ROW_BYTES
    return offsets


def element(lane, half, trans):
    """Row and column of the 8 x 8 matrix, of a half of a lane's word."""
    return (2 * (lane % 4) + half, lane // 4) if trans else (lane // 4, 2 * (lane % 4) + half)


def halves(registers):
    """[registers, lanes, 2]"""
    return registers.view(np.uint16).reshape(*registers.shape, 2)


@counts
@transposed
@spaces
def test_ldmatrix(count, trans, space):
    slots = np.random.default_rng(count).permutation(SLOTS)
    registers = np.zeros((count, LANES), np.uint32)
    name = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.{space}.b16"
    body = FILL + ROW_ADDRESS + f"    {name} {vector('a', count)}, [%r4];\n"
    ptx = kernel(("image", "offsets", "out"), body + store("out", count, "a"))
    emulator().run(ptx, IMAGE, offsets_of(slots, count), registers, shared=IMAGE.nbytes)
    rows = IMAGE.reshape(SLOTS, 8)
    for m, lane, half in itertools.product(range(count), range(LANES), range(2)):
        row, column = element(lane, half, trans)
        assert halves(registers)[m, lane, half] == rows[slots[8 * m + row], column]


@counts
@transposed
@spaces
def test_stmatrix(count, trans, space):
    slots = np.random.default_rng(count).permutation(SLOTS)
    registers = np.arange(0x8000, 0x8000 + 2 * count * LANES, dtype=np.uint16).view(np.uint32)
    registers = registers.reshape(count, LANES)
    name = f"stmatrix.sync.aligned.m8n8.x{count}{trans}.{space}.b16"
    body = FILL + ROW_ADDRESS + load("a", count)
    body += f"    {name} [%r4], {vector('a', count)};\n"
    image, expected = IMAGE.copy(), IMAGE.copy().reshape(SLOTS, 8)
    ptx = kernel(("image", "offsets", "a"), body + DUMP)
    emulator().run(ptx, image, offsets_of(slots, count), registers, shared=image.nbytes)
    for m, lane, half in itertools.product(range(count), range(LANES), range(2)):
        row, column = element(lane, half, trans)
        expected[slots[8 * m + row], column] = halves(registers)[m, lane, half]
    assert np.array_equal(image.reshape(SLOTS, 8), expected)


@pytest.mark.parametrize("d", ["d0", "a0"])
def test_movmatrix(d):
    source = np.arange(2 * LANES, dtype=np.uint16).view(np.uint32).reshape(1, LANES)
    target = np.zeros_like(source)
    body = load("a", 1) + f"    movmatrix.sync.aligned.m8n8.trans.b16 %{d}, %a0;\n"
    body += f"    mov.b32 %d0, %{d};\n" + store("d", 1)
    emulator().run(kernel("ad", body), source, target)
    matrix = halves(source).reshape(8, 8)
    assert np.array_equal(halves(target).reshape(8, 8), matrix.T)


# ---- bytes ---------------------------------------------------------------------------------------

BYTES = np.random.default_rng(8).integers(0, 256, SLOTS * ROW_BYTES, np.uint8)


def registers_after(name, rows, count):
    """Bytes [register, lane, 4] that an ldmatrix of `rows` row addresses leaves, and the slots."""
    slots = np.random.default_rng(rows).permutation(SLOTS)
    registers = np.zeros((count, LANES), np.uint32)
    body = FILL + ROW_ADDRESS + f"    {name} {vector('a', count)}, [%r4];\n"
    ptx = kernel(("image", "offsets", "out"), body + store("out", count, "a"))
    emulator().run(ptx, BYTES.copy(), offsets_of(slots, rows // 8), registers, shared=BYTES.nbytes)
    return registers.view(np.uint8).reshape(count, LANES, 4), BYTES.reshape(SLOTS, ROW_BYTES)[slots]


@pytest.mark.parametrize("count", [1, 2])
@spaces
def test_ldmatrix_m16n16(count, space):
    """A lane has four rows of a column, of the columns from 0 and from 8."""
    name = f"ldmatrix.sync.aligned.m16n16.x{count}.trans.{space}.b8"
    found, rows = registers_after(name, 16 * count, 2 * count)
    for m, half, g, t, b in itertools.product(range(count), *map(range, (2, 8, 4, 4))):
        assert found[2 * m + half, 4 * g + t, b] == rows[16 * m + 4 * t + b, 8 * half + g]
    wavefronts = emulator().counters().wavefronts_ideal["ldmatrix"]
    assert wavefronts == 2 * count  # 8 rows each


@pytest.mark.parametrize("count", [1, 2])
def test_ldmatrix_m16n16_is_the_operand_of_a_product(count):
    """Registers in order are A, columns as its rows; every other register is B."""
    name = f"ldmatrix.sync.aligned.m16n16.x{count}.trans.shared.b8"
    found, rows = registers_after(name, 16 * count, 2 * count)
    for r, g, t, i in itertools.product(range(2 * count), range(8), range(4), range(4)):
        m, k = g + 8 * (r & 1), 4 * t + i + 16 * (r >> 1)
        assert found[r, 4 * g + t, i] == rows[k, m]


@counts
@spaces
def test_ldmatrix_of_nibbles(count, space):
    name = f"ldmatrix.sync.aligned.m8n16.x{count}.{space}.b8x16.b4x16_p64"
    found, rows = registers_after(name, 8 * count, count)
    nibbles = np.stack([rows[:, :8] & 0xF, rows[:, :8] >> 4], axis=2).reshape(SLOTS, 16)
    for m, g, t, b in itertools.product(range(count), *map(range, (8, 4, 4))):
        assert found[m, 4 * g + t, b] == nibbles[8 * m + g, 4 * t + b]


@counts
@spaces
def test_stmatrix_m16n8(count, space):
    """Four accumulators of a lane as bytes: rows of the memory are columns of C."""
    slots = np.random.default_rng(count).permutation(SLOTS)
    registers = np.random.default_rng(9).integers(0, 2**32, (count, LANES), np.uint32)
    name = f"stmatrix.sync.aligned.m16n8.x{count}.trans.{space}.b8"
    body = FILL + ROW_ADDRESS + load("a", count)
    body += f"    {name} [%r4], {vector('a', count)};\n"
    image, expected = BYTES.copy(), BYTES.copy().reshape(SLOTS, ROW_BYTES)
    ptx = kernel(("image", "offsets", "a"), body + DUMP)
    emulator().run(ptx, image, offsets_of(slots, count), registers, shared=image.nbytes)
    codes = registers.view(np.uint8).reshape(count, LANES, 4)
    for m, g, t, r in itertools.product(range(count), *map(range, (8, 4, 4))):
        row, column = g + 8 * (r >> 1), 2 * t + (r & 1)  # of C
        expected[slots[8 * m + column], row] = codes[m, 4 * g + t, r]
    assert np.array_equal(image.reshape(SLOTS, ROW_BYTES), expected)


# ---- bank conflicts ------------------------------------------------------------------------------


STRIDES = {16: 1, 144: 1, 48: 1, 0: 1, 32: 2, 96: 2, 64: 4, 128: 8, 256: 8}  # -> passes


@pytest.mark.parametrize(
    "instruction, stride",
    [("ldmatrix", stride) for stride in STRIDES]
    + [("stmatrix", stride) for stride in STRIDES if stride],
)
@counts
def test_bank_conflicts(instruction, stride, count):
    """Rows of a matrix that are `stride` bytes apart: one pass per matrix at best."""
    matrix, row = np.divmod(np.arange(LANES), 8)
    offsets = (matrix * 16 * 128 + row * stride).astype(np.uint32)
    size = 4 * 16 * 128
    operands = ["[%r4]", vector("a", count)]
    operands = operands if instruction == "stmatrix" else operands[::-1]
    words = range(0, size, 4 * LANES)
    fill = OWN_WORDS + "".join(f"    st.shared.b32 [%r3+{at}], %r0;\n" for at in words)
    body = fill + "    bar.sync 0;\n" + ROW_ADDRESS
    body += "".join(f"    mov.b32 %a{i}, {i};\n" for i in range(count))
    body += f"    {instruction}.sync.aligned.m8n8.x{count}.shared.b16 {', '.join(operands)};\n"
    emulator().run(kernel(["offsets"], body), offsets, shared=size)
    counters = emulator().counters()
    assert counters.instructions[instruction] == 1
    assert counters.wavefronts[instruction] == STRIDES[stride] * count
    assert counters.wavefronts_ideal[instruction] == count


# ---- what is refused -----------------------------------------------------------------------------

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
ZEROS = "".join(f"    mov.b32 %{name}{i}, 0;\n" for name in "abcd" for i in range(4))
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%a0, %a1, %a2, %a3}, [%r4];\n"
STMATRIX = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%a0, %a1, %a2, %a3};\n"
OPERANDS = {
    f"{MMA} {{%d0, %d1, %d2, %d3}}, {{%a0, %a1, %a2, %a3}}, {{%b0, %b1}}, {{%c0, %c1, %c2, %c3}};",
    LDMATRIX,
    STMATRIX,
    "movmatrix.sync.aligned.m8n8.trans.b16 %d0, %a0;",
}


@pytest.mark.parametrize("instruction", sorted(OPERANDS), ids=lambda text: text.split(".")[0])
@pytest.mark.parametrize("active", [1, 31])
def test_a_diverged_warp(instruction, active):
    body = ZEROS + FILL + "    shl.b32 %r4, %r0, 4;\n    add.s32 %r4, %r4, %r1;\n"
    body += f"    setp.lt.u32 %p0, %r0, {active};\n    @%p0 {instruction}\n"
    report = refusal(body, ["image"], IMAGE, shared=IMAGE.nbytes)
    assert "all 32 lanes" in report and f"lane {active}" in report
    assert instruction.split(" ")[0] in report


@pytest.mark.parametrize("instruction", [LDMATRIX, STMATRIX], ids=["ldmatrix", "stmatrix"])
@pytest.mark.parametrize(
    "lane, offset, words",
    [
        (9, 8, "multiple of 16"),
        (31, 2, "multiple of 16"),
        (17, SLOTS * ROW_BYTES, f"the block's {SLOTS * ROW_BYTES}"),
        (0, -16, f"the block's {SLOTS * ROW_BYTES}"),
    ],
)
def test_a_wrong_row_address(instruction, lane, offset, words):
    offsets = offsets_of(np.arange(LANES), 4)
    offsets[lane] = np.uint32(offset % 2**32)
    body = ZEROS + FILL + ROW_ADDRESS + instruction
    report = refusal(body, ("image", "offsets"), IMAGE, offsets, shared=IMAGE.nbytes)
    assert words in report and f"lane {lane}" in report


def test_rows_that_nobody_wrote():
    """One word of one row is enough."""
    body = OWN_WORDS + "    setp.lt.u32 %p0, %r0, 31;\n    mov.b32 %a0, 0;\n"
    body += "".join(f"    st.shared.b32 [%r3+{128 * i}], %a0;\n" for i in range(3))
    body += "    @%p0 st.shared.b32 [%r3+384], %a0;\n    bar.sync 0;\n" + ROW_ADDRESS
    offsets = offsets_of(np.arange(LANES), 4)
    report = refusal(body + LDMATRIX, ["offsets"], offsets, shared=512)
    assert "nobody has written" in report and "lane 31" in report


def test_a_row_that_is_written_again_too_early():
    """Every lane has read every row."""
    body = FILL + ROW_ADDRESS + LDMATRIX + "    st.shared.b32 [%r3], %a0;\n"
    offsets = offsets_of(np.arange(LANES), 4)
    report = refusal(body, ("image", "offsets"), IMAGE, offsets, shared=IMAGE.nbytes)
    assert "with no bar.warp.sync between" in report


@pytest.mark.parametrize(
    "name",
    [
        "ldmatrix.sync.aligned.m8n8.x4.b16",
        "ldmatrix.sync.aligned.x4.m8n8.shared.b16",
        "ldmatrix.sync.aligned.m16n16.x4.trans.shared.b8",
        "ldmatrix.sync.aligned.m16n16.x2.shared.b8",
        "stmatrix.sync.aligned.m16n8.x4.shared.b8",
    ],
)
def test_an_unknown_move(name):
    operands = [vector("a", 4), "[%r4]"]
    operands = operands if name.startswith("ld") else operands[::-1]
    assert name in refusal(f"    {name} {', '.join(operands)};\n")
