"""Memory of the emulator: what loads, stores and atomics do, and every way to be told off.

Each rule has a kernel that breaks it and a twin that does not; a race is one for every schedule, so
each of them runs with several seeds, and with copies that land early or late.
"""

from __future__ import annotations

import itertools
import random
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest

from emulator import EmulatorError, emulator, ptx_module, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

SCHEDULES = [(seed, late) for seed in range(4) for late in (False, True)]


# ---- PTX -----------------------------------------------------------------------------------------


def kernel(body, parameters=("data",), shared=0):
    """A register per parameter, of its name; %tid, %lane and %warp; %smem of `shared` bytes."""
    pointers = "".join(
        f"    .reg .b64 %{name};\n    ld.param.u64 %{name}, [{name}];\n" for name in parameters
    )
    preamble = f"""
    .reg .pred %p<8>;
    .reg .b16 %h<9>;
    .reg .b32 %r<33>;
    .reg .b64 %rd<33>;
    .reg .b32 %tid, %lane, %warp, %smem, %at;
    .reg .b64 %wide;
    .shared .align 128 .b8 smem[{shared or 16}];
{pointers}
    mov.u32 %tid, %tid.x;
    and.b32 %lane, %tid, 31;
    shr.u32 %warp, %tid, 5;
    mov.u32 %smem, smem;
"""
    return ptx_module([f".param .u64 {name}" for name in parameters], preamble + body)


def element(name, bytes_, register="%wide", index="%tid"):
    """Puts into `register` the address of this thread's element of a parameter's array."""
    return f"""
    mul.wide.u32 {register}, {index}, {bytes_};
    add.s64 {register}, {register}, %{name};
"""


def place(bytes_, index="%tid"):
    """Puts into %at the address of this thread's bytes in shared memory."""
    return f"""
    mul.lo.u32 %at, {index}, {bytes_};
    add.u32 %at, %at, %smem;
"""


def run(ptx, *arguments, seed=0, late=False, **launch):
    with emulator().settings(seed=seed, late_copies=late):
        emulator().run(ptx, *arguments, **launch)


def refusal(ptx, *arguments, **launch):
    with pytest.raises(EmulatorError) as caught:
        run(ptx, *arguments, **launch)
    return str(caught.value)


def row(opcode):
    """What the last launch did at its only instruction of this name."""
    (found,) = (row for row in emulator().profile() if row.text.split(" ")[0] == opcode)
    return found


def aligned(count):
    """So many bytes, zeros, on a boundary of 128."""
    memory = np.zeros(count + 128, np.uint8)
    return memory[-memory.ctypes.data % 128 :][:count]


def random_bytes(count):
    return np.random.default_rng(count).integers(0, 256, count, dtype=np.uint8)


# ---- loads and stores ----------------------------------------------------------------------------

TYPES = {
    **{f"{kind}{bits}": f"u{bits // 8}" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    "f32": "u4",
    "f64": "u8",
}
REGISTERS = {16: "%h", 32: "%r", 64: "%rd"}
MOVES = [
    (type_, bits)
    for type_ in TYPES
    for bits in REGISTERS
    if bits == int(type_[1:]) or (bits > int(type_[1:]) and type_[0] != "f")
]


def vectors(type_):
    return [1, 2, 4] if int(type_[1:]) < 64 else [1, 2]


def operand(register, count):
    names = [f"{register}{i}" for i in range(count)]
    return names[0] if count == 1 else "{" + ", ".join(names) + "}"


def opcode(name, type_, count):
    return f"{name}.{type_}" if count == 1 else f"{name}.v{count}.{type_}"


@pytest.mark.parametrize("type_, bits", MOVES)
def test_load_extends_as_its_type_says(type_, bits):
    for count in vectors(type_):
        values = random_bytes(32 * count * int(type_[1:]) // 8).view(TYPES[type_])
        out = np.zeros((32, count), f"u{bits // 8}")
        body = element("data", values.itemsize * count)
        body += f"{opcode('ld.global', type_, count)} {operand(REGISTERS[bits], count)}, [%wide];"
        body += element("out", out.itemsize * count)
        for i in range(count):
            body += f"st.global.b{bits} [%wide+{i * out.itemsize}], {REGISTERS[bits]}{i};\n"
        run(kernel(body, ("data", "out")), values, out)
        signed = values.astype(f"i{bits // 8}" if type_[0] == "s" else f"u{bits // 8}")
        assert (out.ravel() == signed.view(out.dtype)).all()
        assert emulator().counters().global_bytes == values.nbytes + out.nbytes


@pytest.mark.parametrize("type_, bits", MOVES)
def test_store_takes_the_low_bits(type_, bits):
    for count in vectors(type_):
        values = random_bytes(32 * count * bits // 8).view(f"u{bits // 8}")
        out = np.zeros(32 * count, TYPES[type_])
        body = element("data", values.itemsize * count)
        for i in range(count):
            body += f"ld.global.b{bits} {REGISTERS[bits]}{i}, [%wide+{i * values.itemsize}];\n"
        body += element("out", out.itemsize * count)
        body += f"{opcode('st.global', type_, count)} [%wide], {operand(REGISTERS[bits], count)};"
        run(kernel(body, ("data", "out")), values, out)
        assert (out == values.astype(out.dtype)).all()


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
@pytest.mark.parametrize("volatile", ["", ".volatile"])
@pytest.mark.parametrize("type_", TYPES)
def test_shared_memory_passes_values_on(space, volatile, type_):
    for count in vectors(type_):
        size = int(type_[1:]) // 8 * count
        registers = REGISTERS[max(16, int(type_[1:]))]
        values, out = random_bytes(64 * size), np.zeros(64 * size, np.uint8)
        moved = operand(registers, count)
        body = f"""
    {element("data", size)}
    {opcode("ld.global", type_, count)} {moved}, [%wide];
    {place(size)}
    {opcode(f"st{volatile}.{space}", type_, count)} [%at], {moved};
    bar.sync 0;
    xor.b32 %r32, %tid, 63;
    {place(size, "%r32")}
    {opcode(f"ld{volatile}.{space}", type_, count)} {moved}, [%at];
    {element("out", size)}
    {opcode("st.global", type_, count)} [%wide], {moved};
"""
        run(kernel(body, ("data", "out"), 64 * size), values, out, block=64)
        assert (out.reshape(64, size) == values.reshape(64, size)[::-1]).all()


LOADS = "ld.global.nc ld.global.L1::no_allocate ld.global.nc.L1::no_allocate ld.volatile.global"
LOADS += " ld.relaxed.gpu.global ld.acquire.gpu.global ld.global.cs ld.global.cg"
STORES = "st.global.L1::no_allocate st.volatile.global st.relaxed.gpu.global st.release.gpu.global"
STORES += " st.global.cs st.global.cg"


@pytest.mark.parametrize("load", LOADS.split())
@pytest.mark.parametrize("store", STORES.split())
def test_spellings(load, store):
    data, out = random_bytes(128).view(np.uint32), np.zeros(32, np.uint32)
    data.flags.writeable = False
    body = f"{element('data', 4)} {load}.u32 %r0, [%wide];"
    body += f"{element('out', 4)} {store}.u32 [%wide], %r0;"
    run(kernel(body, ("data", "out")), data, out)
    assert (out == data).all()


def test_inactive_lanes_keep_their_registers():
    data = np.arange(32, dtype=np.uint32)
    body = f"""
    mov.u32 %r0, 1000;
    setp.lt.u32 %p0, %lane, 7;
    {element("data", 4)}
    @%p0 ld.global.u32 %r0, [%wide];
    add.u32 %r0, %r0, 1;
    st.global.u32 [%wide], %r0;
"""
    run(kernel(body), data)
    assert data.tolist() == [lane + 1 if lane < 7 else 1001 for lane in range(32)]


def test_address_register_may_be_overwritten():
    data = np.arange(64, dtype=np.uint32)
    body = f"""
    {element("data", 8)}
    ld.global.v2.u32 {{%rd0, %rd1}}, [%wide];
    {element("data", 8)}
    add.u64 %wide, %wide, %rd0;
    sub.u64 %wide, %wide, %rd0;
    mov.b64 %rd2, %wide;
    ld.global.u64 %rd2, [%rd2];
    st.global.u64 [%wide], %rd2;
"""
    run(kernel(body), data)
    assert data.tolist() == list(range(64))


STRUCT = ptx_module(
    [".param .u64 out", ".param .align 8 .b8 params[24]"],
    """
    .reg .b16 %h<4>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd0, [out];
    mov.b64 %rd1, params;
    ld.param.s8 %h0, [%rd1+1];
    ld.param.v2.u32 {%r0, %r1}, [params+8];
    ld.param.u64 %rd2, [%rd1+OFFSET];
    cvt.s32.s16 %r2, %h0;
    st.global.v2.u32 [%rd0], {%r0, %r1};
    st.global.u32 [%rd0+8], %r2;
    st.global.u64 [%rd0+16], %rd2;
""",
)


def test_parameters():
    out, struct = np.zeros(24, np.uint8), bytes(range(100, 124))
    run(STRUCT.replace("OFFSET", "16"), out, struct)
    assert out[:8].tobytes() == struct[8:16]
    assert out[8:12].view(np.int32)[0] == 101
    assert out[16:].tobytes() == struct[16:]


@pytest.mark.parametrize(
    "offset, message",
    [(24, "reads 8 bytes at byte 32 of 32 bytes of parameters"), (12, "no multiple of 8")],
)
def test_parameters_end(offset, message):
    out = np.zeros(24, np.uint8)
    assert message in refusal(STRUCT.replace("OFFSET", str(offset)), out, bytes(24))


# ---- atomics -------------------------------------------------------------------------------------

MASK = 2**32 - 1


def signed(x):
    return x - 2**32 if x >= 2**31 else x


OPERATIONS = {
    "add.u32": lambda old, b: (old + b) & MASK,
    "add.s32": lambda old, b: (old + b) & MASK,
    "and.b32": lambda old, b: old & b,
    "or.b32": lambda old, b: old | b,
    "xor.b32": lambda old, b: old ^ b,
    "exch.b32": lambda old, b: b,
    "min.u32": min,
    "max.u32": max,
    "min.s32": lambda old, b: min(old, b, key=signed),
    "max.s32": lambda old, b: max(old, b, key=signed),
    "inc.u32": lambda old, b: 0 if old >= b else old + 1,
    "dec.u32": lambda old, b: b if old == 0 or old > b else old - 1,
}
SEMANTICS = ["", ".relaxed.gpu", ".acquire.gpu", ".release.gpu", ".acq_rel.gpu"]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("order", SEMANTICS)
def test_atom_returns_what_was_there(operation, order):
    operands = random_bytes(128).view(np.uint32) >> (27 if operation[:3] in ("inc", "dec") else 0)
    operands = np.ascontiguousarray(operands)
    memory, out = np.full(1, 0x80001234, np.uint32), np.zeros(32, np.uint32)
    body = f"""
    {element("data", 4)}
    ld.global.u32 %r0, [%wide];
    atom{order}.global.{operation} %r1, [%memory], %r0;
    {element("out", 4)}
    st.global.u32 [%wide], %r1;
"""
    run(kernel(body, ("data", "memory", "out")), operands, memory, out)
    expected, olds = 0x80001234, []
    for b in operands.tolist():
        olds.append(expected)
        expected = OPERATIONS[operation](expected, b)
    assert out.tolist() == olds
    assert memory.tolist() == [expected]


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if "exch" not in name])
@pytest.mark.parametrize("order", ["", ".relaxed.gpu", ".release.gpu"])
def test_red(operation, order):
    memory = np.full(1, 9, np.uint32)
    body = f"add.u32 %r0, %lane, 3; red{order}.global.{operation} [%data], %r0;"
    run(kernel(body), memory)
    expected = 9
    for lane in range(32):
        expected = OPERATIONS[operation](expected, lane + 3)
    assert memory.tolist() == [expected]


def test_compare_and_swap():
    memory, out = np.full(2, 5, np.uint64), np.zeros(32, np.uint32)
    body = f"""
    add.u32 %r0, %lane, 5;
    add.u32 %r1, %lane, 6;
    atom.relaxed.global.cas.b32 %r2, [%memory], %r0, %r1;
    {element("out", 4)}
    st.global.u32 [%wide], %r2;
    mov.b64 %rd0, 5;
    mov.b64 %rd1, 0x123456789abc;
    atom.global.cas.b64 %rd2, [%memory+8], %rd0, %rd1;
"""
    run(kernel(body, ("memory", "out")), memory, out)
    assert out.tolist() == list(range(5, 37))
    assert memory.tolist() == [37, 0x123456789ABC]


@pytest.mark.parametrize(
    "spelled", ["red.global.add.v4.f32", "red.global.v4.f32.add", "atom.global.add.v4.f32"]
)
def test_vector_adds_of_floats(spelled):
    data = np.arange(8, dtype=np.float32)
    old = "{%r4, %r5, %r6, %r7}, " if spelled.startswith("atom") else ""
    body = f"""
    mov.b32 %r0, 0f3F800000;
    mov.b32 %r1, 0f40000000;
    mov.b32 %r2, 0f40400000;
    mov.b32 %r3, 0fC0800000;
    {spelled} {old}[%data+16], {{%r0, %r1, %r2, %r3}};
"""
    run(kernel(body), data, grid=3, block=64)
    count = 3 * 64
    assert data.tolist() == [0, 1, 2, 3, 4 + count, 5 + 2 * count, 6 + 3 * count, 7 - 4 * count]
    assert row(spelled).global_bytes == 16 * count


def bits_of(*floats):
    return np.array(floats, np.float32).view(np.uint32).tolist()


@pytest.mark.parametrize(
    "old, added, result",
    [
        (0x00000001, 0x00000001, 0x00000000),  # subnormal inputs and results are zeros
        (0x80000001, 0x80000001, 0x80000000),
        (0x00800001, 0x80800000, 0x00000000),
        (0x3F800000, 0x33800000, 0x3F800000),  # 1 + 2^-24: to the even one
        (0x3F800001, 0x33800000, 0x3F800002),
        (0x7F800000, 0xFF800000, 0x7FFFFFFF),  # every NaN is the same
        (0x7FC12345, 0x3F800000, 0x7FFFFFFF),
    ],
)
def test_atomic_add_of_floats_rounds_as_the_l2_does(old, added, result):
    memory = np.array([old], np.uint32)
    body = f"""
    setp.eq.u32 %p0, %lane, 0;
    mov.b32 %r0, {added};
    @%p0 red.global.add.f32 [%data], %r0;
"""
    run(kernel(body), memory)
    assert memory.tolist() == [result]


def test_atomics_lose_nothing_between_host_threads():
    memory = np.zeros(3, np.uint64)
    body = """
    mov.b32 %r0, 1;
    mov.b32 %r1, 0f3F800000;
    mov.b64 %rd0, 0x100000001;
    red.global.add.u32 [%data], %r0;
    red.global.add.f32 [%data+8], %r1;
    atom.global.add.u64 %rd1, [%data+16], %rd0;
"""
    with emulator().settings(threads=4):
        emulator().run(kernel(body), memory, grid=500, block=128)
    assert memory[0] == 64000
    assert memory[1:2].view(np.float32)[0] == 64000
    assert memory[2] == 64000 * 0x100000001


@pytest.mark.parametrize("seed, late", SCHEDULES)
def test_a_warp_may_wait_for_another_in_global_memory(seed, late):
    flag = np.zeros(2, np.uint32)
    body = """
    setp.eq.u32 %p0, %warp, 0;
    @%p0 bra $WRITER;
$POLL:
    ld.acquire.gpu.global.u32 %r0, [%data];
    setp.eq.u32 %p1, %r0, 0;
    @%p1 bra $POLL;
    ld.global.u32 %r1, [%data+4];
    add.u32 %r1, %r1, 1;
    st.global.u32 [%data+4], %r1;
    bra $END;
$WRITER:
    mov.u32 %r2, 41;
    st.global.u32 [%data+4], %r2;
    st.release.gpu.global.u32 [%data], %r2;
$END:
"""
    run(kernel(body), flag, block=64, seed=seed, late=late)
    assert flag.tolist() == [41, 42]


# ---- what a launch may touch ---------------------------------------------------------------------


def touch(instruction, index="%tid", bytes_=4):
    return kernel(
        f"mov.b32 %r0, 7; mov.b32 %r1, 7; {element('data', bytes_, index=index)}\n{instruction}"
    )


ACCESSES = {
    "load": "ld.global.u32 %r0, [%wide];",
    "store": "st.global.u32 [%wide], %r0;",
    "atom": "atom.global.add.u32 %r1, [%wide], %r0;",
    "copy": "cp.async.ca.shared.global [%smem], [%wide], 4;",
}


def one_lane(instruction, lane=31):
    return f"setp.eq.u32 %p0, %lane, {lane};\n    @%p0 {instruction}"


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("elements, distance", [(31, "-1"), (0, None)])
def test_beyond_the_end(access, elements, distance):
    instruction = one_lane(ACCESSES[access])
    data = np.zeros(32, np.uint32)
    run(touch(instruction), data)
    message = refusal(touch(instruction), data[:elements])
    assert "4 bytes at 0x" in message
    assert "whose byte 0 belongs to no " in message
    assert "block (0, 0, 0), warp 0, lane 31" in message
    assert instruction.split("@%p0 ")[1].rstrip(";") in message
    if distance:
        assert f"(the nearest byte of one: {distance})" in message


@pytest.mark.parametrize("access", ACCESSES)
def test_before_the_start(access):
    data = np.zeros(33, np.uint32)
    instruction = one_lane(ACCESSES[access].replace("%wide", "%wide+-4"), lane=0)
    with emulator().allowed(data[:1], writable=True):
        run(touch(instruction), data[1:])
    assert "(the nearest byte of one: +4)" in refusal(touch(instruction), data[1:])


def test_a_vector_beyond_the_end():
    instruction = one_lane("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%wide];")
    data = aligned(512).view(np.uint32)
    run(touch(instruction, bytes_=16), data)
    message = refusal(touch(instruction, bytes_=16), data[:127])
    assert "reads 16 bytes" in message
    assert (
        "whose byte 12 belongs to no tensor of the launch (the nearest byte of one: -1)" in message
    )


@pytest.mark.parametrize("access", ["store", "atom"])
def test_a_tensor_that_may_only_be_read(access):
    data = np.zeros(32, np.uint32)
    run(touch(ACCESSES[access]), data)
    data.flags.writeable = False
    run(touch(ACCESSES["load"]), data)
    message = refusal(touch(ACCESSES[access]), data)
    assert "writes 4 bytes" in message
    assert "a tensor that the launch may only read" in message


def test_the_noncoherent_cache_is_for_what_nobody_writes():
    data = np.zeros(32, np.uint32)
    ptx = touch("ld.global.nc.u32 %r0, [%wide];")
    assert "by .nc, and the launch may write" in refusal(ptx, data)
    data.flags.writeable = False
    run(ptx, data)


LAYOUTS = {
    "rows with a hole": lambda x: x.reshape(8, 16)[:, :12],
    "every other element": lambda x: x[::2],
    "a transposed window": lambda x: x.reshape(8, 16)[2:5, 3:9].T,
    "four dimensions": lambda x: x.reshape(2, 4, 4, 4)[:, ::2, 1:3, :3],
    "permuted": lambda x: x.reshape(2, 4, 4, 4).transpose(2, 0, 3, 1)[1:, :, :, :2],
    "broadcast": lambda x: np.broadcast_to(x[5:6], (4, 3)),
    "one element": lambda x: x[77:78].reshape(1, 1, 1),
    "nothing": lambda x: x.reshape(8, 16)[:, :0],
    "across pages": lambda x: x,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_holes_between_rows(layout):
    """Every element, whatever its strides, and no other."""
    memory = np.zeros(4096 + 128, np.uint32)
    start = (4096 - 256 - memory.ctypes.data % 4096) // 4 % 1024  # the last are on the next page
    window = memory[start : start + 128]
    inside = np.zeros(128, bool)
    tensor = LAYOUTS[layout](window)
    addresses = np.full(tensor.shape, tensor.ctypes.data)
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.strides, strict=True)):
        shape = [-1 if axis == i else 1 for i in range(tensor.ndim)]
        addresses = addresses + (np.arange(size) * stride).reshape(shape)
    inside[(addresses.ravel() - window.ctypes.data) // 4] = True
    instruction = "ld.global.u32 %r0, [%wide];"
    base = window[:0]  # an address, and no right to anything
    for i in range(128):
        ptx = touch(instruction, index=str(i))
        with emulator().allowed(tensor):
            if inside[i]:
                run(ptx, base)
            else:
                assert "belongs to no tensor" in refusal(ptx, base)


@pytest.mark.parametrize(
    "instruction, bytes_",
    [
        ("ld.global.u16 %h0, [%wide+1];", 2),
        ("ld.global.u32 %r0, [%wide+2];", 4),
        ("ld.global.v2.u32 {%r0, %r1}, [%wide+4];", 8),
        ("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%wide+8];", 16),
        ("st.global.v4.u16 [%wide+4], {%h1, %h2, %h3, %h4};", 8),
        ("red.global.add.v4.f32 [%wide+8], {%r4, %r5, %r6, %r7};", 16),
        ("atom.global.add.u64 %rd0, [%wide+4], %rd1;", 8),
        ("cp.async.cg.shared.global [%smem], [%wide+8], 16;", 16),
        ("cp.async.ca.shared.global [%smem], [%wide+8], 16, 4;", 16),
        ("cp.async.ca.shared.global [%smem+4], [%wide], 8;", 8),
        ("ld.shared.u32 %r0, [%smem+2];", 4),
        ("st.shared.v2.u32 [%smem+4], {%r4, %r5};", 8),
        ("st.shared.v4.u8 [%smem+2], {%h1, %h2, %h3, %h4};", 4),
    ],
)
def test_alignment(instruction, bytes_):
    data = aligned(1024)
    written = "".join(f"mov.b32 %r{i}, 0; mov.b16 %h{i}, 0; mov.b64 %rd{i}, 0;\n" for i in range(8))
    zeros = "\n".join(f"st.shared.u64 [%smem+{i}], %rd1;" for i in range(0, 128, 8))
    body = f"mov.b64 %wide, %data; {written} setp.eq.u32 %p0, %lane, 0; @!%p0 ret; {zeros}\n"
    message = refusal(kernel(body + instruction, shared=128), data)
    assert f"no multiple of {bytes_}" in message or "not aligned" in message
    offset = instruction.split("+")[1].split("]")[0]
    run(kernel(body + instruction.replace("+" + offset, f"+{bytes_ * 2}"), shared=128), data)


# ---- shared memory: who wrote it, and was there a barrier? ---------------------------------------

READ = "ld.shared.u32 %r1, [%smem];"
WRITE = "st.shared.u32 [%smem], %r0;"
BARRIER = "bar.sync 0;"
WARP_BARRIER = "bar.warp.sync 0xffffffff;"
COPY = "cp.async.cg.shared.global [%smem], [%data], 16;"
COPY_BEHIND = "cp.async.cg.shared.global [%smem+16], [%data], 16;"
COMMIT = "cp.async.commit_group;"
WAIT = "cp.async.wait_group 0;"
WAIT_ALL = "cp.async.wait_all;"
FILL = [(0, "st.shared.u64 [%smem], %wide;"), (0, "st.shared.u64 [%smem+8], %wide;"), BARRIER]

SMEM_BYTES = 256


def script(*steps):
    """A kernel of steps: an instruction for all threads, or (thread, instruction)."""
    body = "mov.b32 %r0, 7; mov.b64 %wide, 7;\n"
    for step in steps:
        if isinstance(step, str):
            body += step + "\n"
        else:
            body += f"setp.eq.u32 %p0, %tid, {step[0]};\n@%p0 {step[1]}\n"
    return kernel(body, shared=SMEM_BYTES)


@dataclass
class Case:
    broken: list
    message: str
    right: list
    threads: int = 64


ORDERED = "with no barrier between"
WARP_ORDERED = "with no bar.warp.sync between"
ON_ITS_WAY = r"while the copy to them of PTX line \d+ is on its way: wait for it first"
UNWRITTEN = "that nobody has written"

CASES = {
    # warps
    "write, read": Case(
        [*FILL, (5, WRITE), (37, READ)],
        rf"(reads|writes) shared bytes 0\.\.3 that warp (0|1) lane 5 .*{ORDERED}",
        [*FILL, (5, WRITE), BARRIER, (37, READ)],
    ),
    "read, write": Case(
        [*FILL, (37, READ), (5, WRITE)],
        rf"(reads|writes) shared bytes 0\.\.3 that warp (0|1) lane 5 .*{ORDERED}",
        [*FILL, (37, READ), BARRIER, (5, WRITE)],
    ),
    "write, write": Case(
        [(5, WRITE), (38, WRITE)],
        rf"writes shared bytes 0\.\.3 that warp \d lane \d wrote at PTX line \d+, {ORDERED}",
        [(5, WRITE), BARRIER, (38, WRITE)],
    ),
    "reads of several lanes, write": Case(
        [*FILL, READ, (63, WRITE)],
        rf"that (lanes of warp 0|warp 1 lane 31) (read|wrote).*({ORDERED}|{WARP_ORDERED})"
        rf"|lanes of warp 1 read, {WARP_ORDERED}",
        [*FILL, READ, BARRIER, (63, WRITE)],
    ),
    "a barrier of the warp only": Case(
        [*FILL, (5, WRITE), WARP_BARRIER, (37, READ)],
        ORDERED,
        [*FILL, (5, WRITE), WARP_BARRIER, BARRIER, (37, READ)],
    ),
    "a barrier before": Case(
        [*FILL, BARRIER, (5, WRITE), (37, READ), BARRIER],
        ORDERED,
        [*FILL, BARRIER, (5, WRITE), "bar.sync 3;", (37, READ), BARRIER],
    ),
    "luck": Case(
        [
            *FILL,
            (5, WRITE),
            "setp.lt.u32 %p1, %tid, 32; @%p1 bra $SKIP; mov.u32 %r5, 0;",
            "$LOOP: add.u32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, 3000; @%p1 bra $LOOP; $SKIP:",
            (37, READ),
        ],
        rf"reads shared bytes 0\.\.3 that warp 0 lane 5 wrote at PTX line \d+, {ORDERED}",
        [*FILL, (5, WRITE), BARRIER, (37, READ)],
    ),
    "through a third warp": Case(
        [*FILL, (5, WRITE), "setp.lt.u32 %p1, %tid, 64; @%p1 bar.sync 1, 64;", (70, READ)],
        ORDERED,
        [
            *FILL,
            (5, WRITE),
            "setp.lt.u32 %p1, %tid, 64; @%p1 bar.sync 1, 64;",
            "setp.ge.u32 %p1, %tid, 32; @%p1 bar.sync 2, 64;",
            (70, READ),
        ],
        threads=96,
    ),
    # lanes
    "write, read of another lane": Case(
        [*FILL, (5, WRITE), (6, READ)],
        rf"reads shared bytes 0\.\.3 that warp 0 lane 5 wrote at PTX line \d+, {WARP_ORDERED}",
        [*FILL, (5, WRITE), WARP_BARRIER, (6, READ)],
    ),
    "read, write of another lane": Case(
        [*FILL, (6, READ), (5, WRITE)],
        rf"writes shared bytes 0\.\.3 that warp 0 lane 6 read, {WARP_ORDERED}",
        [*FILL, (6, READ), WARP_BARRIER, (5, WRITE)],
    ),
    "write, write of another lane": Case(
        [(5, WRITE), (6, WRITE)],
        rf"writes shared bytes 0\.\.3 that warp 0 lane 5 wrote at PTX line \d+, {WARP_ORDERED}",
        [(5, WRITE), WARP_BARRIER, (6, WRITE)],
    ),
    "read and written by a lane, between reads of another": Case(
        [*FILL, (5, READ), (6, READ), (5, WRITE)],
        rf"writes shared bytes 0\.\.3 that lanes of warp 0 read, {WARP_ORDERED}",
        [*FILL, (6, READ), WARP_BARRIER, (5, READ), (5, WRITE), (5, READ), (5, WRITE)],
    ),
    "lanes of one instruction": Case(
        [WRITE],
        rf"writes shared bytes 0\.\.3 that warp \d lane 0 wrote at PTX line \d+, {WARP_ORDERED}"
        rf"|{ORDERED}",
        [place(4), "st.shared.u32 [%at], %r0;"],
    ),
    # bytes
    "neighbours within a word": Case(
        [(0, "st.shared.u16 [%smem], %r0;"), (32, "st.shared.u8 [%smem+1], %r0;")],
        rf"writes shared bytes 1\.\.1 that .*{ORDERED}",
        [
            (0, "st.shared.u8 [%smem], %r0;"),
            (1, "st.shared.u8 [%smem+1], %r0;"),
            (32, "st.shared.u8 [%smem+2], %r0;"),
            (33, "st.shared.u16 [%smem+4], %r0;"),
            (0, "st.shared.u8 [%smem+3], %r0;"),
        ],
    ),
    "a vector with one byte of another": Case(
        [
            *FILL,
            (32, "st.shared.u8 [%smem+13], %r0;"),
            (0, "ld.shared.v2.u64 {%rd1, %rd2}, [%smem];"),
        ],
        r"(reads shared bytes 13\.\.13 that warp 1 lane 0 wrote"
        r"|writes shared bytes 13\.\.13 that warp 0 lane 0 read)",
        [
            *FILL,
            (32, "st.shared.u8 [%smem+16], %r0;"),
            (0, "ld.shared.v2.u64 {%rd1, %rd2}, [%smem];"),
        ],
    ),
    "never written": Case(
        [(0, READ)],
        rf"reads shared bytes 0\.\.3 {UNWRITTEN}",
        [(0, WRITE), (0, READ)],
    ),
    "written in part": Case(
        [(0, "st.shared.u16 [%smem], %r0;"), (0, "st.shared.u8 [%smem+2], %r0;"), (0, READ)],
        rf"reads shared bytes 3\.\.3 {UNWRITTEN}",
        [
            (0, "st.shared.u16 [%smem], %r0;"),
            (0, "st.shared.u8 [%smem+2], %r0;"),
            (0, "st.shared.u8 [%smem+3], %r0;"),
            (0, READ),
        ],
    ),
    "beyond the allocation": Case(
        [(0, f"st.shared.u32 [%smem+{SMEM_BYTES}], %r0;")],
        f"writes 4 bytes at shared byte {SMEM_BYTES} of the block's {SMEM_BYTES}",
        [(0, f"st.shared.u32 [%smem+{SMEM_BYTES - 4}], %r0;")],
    ),
    "before the allocation": Case(
        [(0, "ld.shared.u32 %r1, [%smem+-4];")],
        f"reads 4 bytes at shared byte -4 of the block's {SMEM_BYTES}",
        [(0, "st.shared.u32 [%smem+0], %r0;")],
    ),
    # copies
    "copy, read": Case(
        [(0, COPY), (0, COMMIT), (0, READ)],
        rf"reads shared bytes 0\.\.3 {ON_ITS_WAY}",
        [(0, COPY), (0, COMMIT), (0, WAIT), (0, READ)],
    ),
    "no commit": Case(
        [(0, COPY), (0, WAIT), (0, READ)],
        ON_ITS_WAY,
        [(0, COPY), (0, WAIT_ALL), (0, READ)],
    ),
    "copy, barrier": Case(
        [(0, COPY), (0, COMMIT), BARRIER, (32, READ)],
        ON_ITS_WAY,
        [(0, COPY), (0, COMMIT), (0, WAIT), BARRIER, (32, READ)],
    ),
    "copy, wait": Case(
        [*FILL, (0, COPY), (0, COMMIT), (0, WAIT), (32, READ)],
        rf"{ORDERED}|{ON_ITS_WAY}",
        [*FILL, (0, COPY), (0, COMMIT), (0, WAIT), BARRIER, (32, READ)],
    ),
    "copy, wait, read of another lane": Case(
        [(0, COPY), (0, COMMIT), (0, WAIT), (1, READ)],
        rf"reads shared bytes 0\.\.3 that warp 0 lane 0 wrote at PTX line \d+, {WARP_ORDERED}",
        [(0, COPY), (0, COMMIT), (0, WAIT), WARP_BARRIER, (1, READ)],
    ),
    "a barrier before the wait": Case(
        [*FILL, (0, COPY), (0, COMMIT), BARRIER, (0, WAIT), (32, READ)],
        rf"{ORDERED}|{ON_ITS_WAY}",
        [*FILL, (0, COPY), (0, COMMIT), BARRIER, (0, WAIT), BARRIER, (32, READ)],
    ),
    "another lane waits": Case(
        [(0, COPY), COMMIT, (1, WAIT), WARP_BARRIER, (1, READ)],
        ON_ITS_WAY,
        [(0, COPY), COMMIT, (0, WAIT), WARP_BARRIER, (1, READ)],
    ),
    "the newer of two groups": Case(
        [
            (0, COPY_BEHIND),
            (0, COMMIT),
            (0, COPY),
            (0, COMMIT),
            (0, "cp.async.wait_group 1;"),
            (0, READ),
        ],
        ON_ITS_WAY,
        [
            (0, COPY),
            (0, COMMIT),
            (0, COPY_BEHIND),
            (0, COMMIT),
            (0, "cp.async.wait_group 1;"),
            (0, READ),
        ],
    ),
    "an empty group counts": Case(
        [(0, COPY), (0, COMMIT), (0, COMMIT), (0, "cp.async.wait_group 2;"), (0, READ)],
        ON_ITS_WAY,
        [(0, COPY), (0, COMMIT), (0, COMMIT), (0, "cp.async.wait_group 1;"), (0, READ)],
    ),
    "refill of what is read": Case(
        [*FILL, (32, READ), (0, COPY)],
        rf"copies to shared bytes 0\.\.3 that warp 1 lane 0 read, {ORDERED}|{ON_ITS_WAY}",
        [*FILL, (32, READ), BARRIER, (0, COPY)],
    ),
    "refill of what is written": Case(
        [(32, WRITE), (0, COPY)],
        rf"copies to shared bytes 0\.\.3 that warp 1 lane 0 wrote at .*, {ORDERED}|{ON_ITS_WAY}",
        [(32, WRITE), BARRIER, (0, COPY)],
    ),
    "write to where a copy goes": Case(
        [(0, COPY), (0, WRITE)],
        rf"writes shared bytes 0\.\.3 {ON_ITS_WAY}",
        [(0, COPY), (0, WAIT_ALL), (0, WRITE), (0, "st.shared.u32 [%smem+16], %r0;")],
    ),
    "two copies to one place": Case(
        [(0, COPY), (0, COPY)],
        rf"copies to shared bytes 0\.\.15 {ON_ITS_WAY}",
        [(0, COPY), (0, WAIT_ALL), (0, COPY), (0, COPY_BEHIND)],
    ),
    "a copy of more than it has room for": Case(
        [(0, "cp.async.ca.shared.global [%smem], [%data], 4, 5;")],
        "copies 5 of 4 bytes",
        [(0, "cp.async.ca.shared.global [%smem], [%data], 4, 3;")],
    ),
    "a size that there is not": Case(
        [(0, "cp.async.cg.shared.global [%smem], [%data], 8;")],
        "copies 8 bytes at once",
        [(0, "cp.async.ca.shared.global [%smem], [%data], 8;")],
    ),
    "a copy beyond the allocation": Case(
        [(0, f"cp.async.ca.shared.global [%smem+{SMEM_BYTES}], [%data], 4;")],
        f"copies 4 bytes to shared byte {SMEM_BYTES} of the block's {SMEM_BYTES}",
        [(0, f"cp.async.ca.shared.global [%smem+{SMEM_BYTES - 4}], [%data], 4;")],
    ),
}


@pytest.mark.parametrize("seed, late", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_broken_and_right(name, seed, late):
    case, data = CASES[name], aligned(64)
    schedule = {"seed": seed, "late": late, "block": case.threads}
    run(script(*case.right), data, **schedule)
    with pytest.raises(EmulatorError, match=case.message):
        run(script(*case.broken), data, **schedule)


def test_a_block_finds_nothing_of_the_last():
    """The host thread that runs both has the same shared memory for them."""
    body = f"""
    mov.u32 %r0, %ctaid.x;
    setp.eq.u32 %p0, %r0, 0;
    {place(4)}
    @%p0 st.shared.u32 [%at], %r0;
    ld.shared.u32 %r1, [%at];
"""
    with emulator().settings(threads=1), pytest.raises(EmulatorError, match=UNWRITTEN) as caught:
        emulator().run(kernel(body, shared=128), aligned(4), grid=2)
    assert "block (1, 0, 0)" in str(caught.value)


def test_epochs_of_many_blocks():
    """More of them than one tag can tell apart: it starts again, in time."""
    body = f"""
    {place(4)}
    mov.u32 %r0, 0;
$LOOP:
    st.shared.u32 [%at], %r0;
    bar.warp.sync 0xffffffff;
    ld.shared.u32 %r1, [%smem+64];
    bar.warp.sync 0xffffffff;
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p0, %r0, 2000;
    @%p0 bra $LOOP;
"""
    with emulator().settings(threads=1):
        emulator().run(kernel(body, shared=128), aligned(4), grid=300)


# ---- any program: the detector against the definition --------------------------------------------

THREADS = (0, 1, 32, 33)  # two lanes of two warps


@dataclass
class Step:
    thread: int
    kind: str  # "read", "write", "copy"; "wait" for all copies of the thread
    offset: int = 0
    size: int = 0

    def ptx(self):
        match self.kind:
            case "read":
                return (
                    f"ld.shared.{self.moved('%r1', '%rd1', '{%rd1, %rd2}')}, [%smem+{self.offset}];"
                )
            case "write":
                moved = self.moved("%r0", "%wide", "{%wide, %wide}")
                type_, register = moved.split(" ", 1)
                return f"st.shared.{type_} [%smem+{self.offset}], {register};"
            case "copy":
                return f"cp.async.ca.shared.global [%smem+{self.offset}], [%data], {self.size};"
        return WAIT_ALL

    def moved(self, narrow, wide, vector):
        registers = {8: f"u64 {wide}", 16: f"v2.u64 {vector}"}
        return registers.get(self.size, f"u{8 * self.size} {narrow}")


def random_steps(choose):
    """Steps and barriers, after one thread has written all, 64 bytes."""
    steps = [Step(0, "write", i, 8) for i in range(0, 64, 8)] + [BARRIER]
    for _ in range(choose.randint(2, 14)):
        if choose.random() < 0.35:
            steps.append(choose.choice([BARRIER, WARP_BARRIER]))
            continue
        kind = choose.choice(["read", "read", "write", "copy", "wait"])
        size = choose.choice([4, 8, 16] if kind == "copy" else [1, 2, 4, 8, 16])
        offset = choose.randrange(0, 64, size)
        steps.append(Step(choose.choice(THREADS), kind, offset, size))
    return steps


def has_race(steps):
    """By the definition: two accesses to a byte, one of them a write, and nothing that orders them.

    A copy is a write from its issue to the wait of its thread, or for ever.
    """
    accesses = []  # thread, writes?, bytes, first position, last position
    for i, step in enumerate(steps):
        if isinstance(step, str) or step.kind == "wait":
            continue
        last = i
        if step.kind == "copy":
            waits = (
                k
                for k, other in enumerate(steps)
                if k > i and isinstance(other, Step) and other.kind == "wait"
                if other.thread == step.thread
            )
            last = next(waits, len(steps))
        span = set(range(step.offset, step.offset + step.size))
        accesses.append((step.thread, step.kind != "read", span, i, last))

    def ordered(a, b):
        """Whether all of `a` is before all of `b`."""
        between = steps[a[4] + 1 : b[3]]
        if a[0] == b[0]:
            return a[4] < b[3]
        if BARRIER in between:
            return True
        return a[0] // 32 == b[0] // 32 and WARP_BARRIER in between

    return any(
        (a[1] or b[1]) and a[2] & b[2] and not ordered(a, b) and not ordered(b, a)
        for a, b in itertools.combinations(accesses, 2)
    )


@pytest.mark.parametrize("number", range(40))
def test_every_race_and_nothing_else(number):
    choose = random.Random(number)
    data = aligned(64)
    for _ in range(10):
        steps = random_steps(choose)
        ptx = script(
            *(step if isinstance(step, str) else (step.thread, step.ptx()) for step in steps)
        )
        schedule = {"seed": choose.randrange(1000), "late": choose.random() < 0.5, "block": 64}
        if has_race(steps):
            assert "shared bytes" in refusal(ptx, data, **schedule), steps
        else:
            run(ptx, data, **schedule)


def test_the_random_programs_are_of_both_kinds():
    chosen = [has_race(random_steps(random.Random(number))) for number in range(300)]
    assert 60 < sum(chosen) < 240


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("hint", ["", ".L2::64B", ".L2::128B", ".L2::256B"])
@pytest.mark.parametrize("space", ["shared", "shared::cta"])
@pytest.mark.parametrize("cache, size", [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_copies_of_a_part_fill_up_with_zeros(cache, size, space, hint, late):
    """Lane i copies i % (size + 1) bytes of a tensor that has no more."""
    out = np.full((32, size), 99, np.uint8)
    rows = aligned(32 * 16).reshape(32, 16)
    rows[:] = random_bytes(512).reshape(32, 16) | 1
    lengths = [lane % (size + 1) for lane in range(32)]
    name = f"cp.async.{cache}.{space}.global{hint}"
    width = {4: "u32 %r1", 8: "u64 %rd1", 16: "v2.u64 {%rd1, %rd2}"}[size]
    type_, register = width.split(" ", 1)
    body = f"""
    rem.u32 %r0, %lane, {size + 1};
    {element("data", 16)}
    {place(size)}
    {name} [%at], [%wide], {size}, %r0;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.{type_} {register}, [%at];
    {element("out", size)}
    st.global.{type_} [%wide], {register};
"""
    ptx = kernel(body, ("data", "out"), 512)
    addresses = rows[:0]
    with ExitStack() as stack:
        for lane, length in enumerate(lengths):
            stack.enter_context(emulator().allowed(rows[lane, :length]))
        run(ptx, addresses, out, late=late)
    for lane, length in enumerate(lengths):
        assert out[lane].tolist() == rows[lane, :length].tolist() + [0] * (size - length)
    assert row(name).global_bytes == sum(lengths)


@pytest.mark.parametrize("late, expected", [(False, 1), (True, 2)])
def test_when_the_data_arrives(late, expected):
    """It is PTX that does not say: a kernel that can tell is wrong, and settings choose."""
    data, out = aligned(16).view(np.uint32), np.zeros(1, np.uint32)
    data[:] = 1
    steps = """
    setp.eq.u32 %p0, %tid, 0;
    @!%p0 ret;
    mov.u32 %r0, 2;
    cp.async.ca.shared.global [%smem], [%data], 4;
    st.global.u32 [%data], %r0;
    cp.async.wait_all;
    ld.shared.u32 %r1, [%smem];
    st.global.u32 [%out], %r1;
"""
    run(kernel(steps, ("data", "out")), data, out, late=late)
    assert out.tolist() == [expected]


RING = """
    {threads_element}
    mov.u64 %rd1, %wide;
    mov.u32 %r10, 0;
    mov.u32 %r11, 0;
{prologue}
    mov.u32 %r12, {ahead};
$LOOP:
    cp.async.wait_group {pending};
    {filled}
    rem.u32 %r13, %r10, {stages};
    mul.lo.u32 %r13, %r13, 512;
    xor.b32 %r14, %tid, 127;
    {place_read}
    add.u32 %at, %at, %r13;
    ld.shared.u32 %r15, [%at];
    add.u32 %r11, %r11, %r15;
    {emptied}
    setp.lt.u32 %p1, %r12, {tiles};
    rem.u32 %r13, %r12, {stages};
    mul.lo.u32 %r13, %r13, 512;
    {place_write}
    add.u32 %at, %at, %r13;
    @%p1 cp.async.ca.shared.global [%at], [%rd1], 4;
    @%p1 add.s64 %rd1, %rd1, 512;
    cp.async.commit_group;
    add.u32 %r12, %r12, 1;
    add.u32 %r10, %r10, 1;
    setp.lt.u32 %p1, %r10, {tiles};
    @%p1 bra $LOOP;
    {out_element}
    st.global.u32 [%wide], %r11;
"""


def ring(stages=3, tiles=7, ahead=None, pending=None, filled=BARRIER, emptied=BARRIER):
    """Sums tiles of 128 numbers that come through a ring of stages, `ahead` of them at once.

    All stages, unless told otherwise: then the stage that was just read is filled again.
    """
    prologue, ahead = "", ahead or stages
    for stage in range(ahead):
        prologue += place(4) + f"cp.async.ca.shared.global [%at+{512 * stage}], [%rd1], 4;\n"
        prologue += "add.s64 %rd1, %rd1, 512;\ncp.async.commit_group;\n"
    body = RING.format(
        threads_element=element("data", 4),
        out_element=element("out", 4),
        place_read=place(4, "%r14"),
        place_write=place(4),
        prologue=prologue,
        ahead=ahead,
        pending=ahead - 1 if pending is None else pending,
        filled=filled,
        emptied=emptied,
        stages=stages,
        tiles=tiles,
    )
    return kernel(body, ("data", "out"), 512 * stages)


@pytest.mark.parametrize("seed, late", SCHEDULES)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_ring(stages, seed, late):
    data, out = np.arange(7 * 128, dtype=np.uint32), np.zeros(128, np.uint32)
    run(ring(stages), data, out, seed=seed, late=late, block=128)
    assert (out == data.reshape(7, 128).sum(0)[::-1]).all()


@pytest.mark.parametrize("seed, late", SCHEDULES)
@pytest.mark.parametrize(
    "flaw, message",
    [
        ({"pending": 3}, "on its way"),
        ({"filled": ""}, f"{ORDERED}|{WARP_ORDERED}|{UNWRITTEN}|on its way"),
        ({"filled": WARP_BARRIER}, f"{ORDERED}|{UNWRITTEN}|on its way"),
        ({"emptied": ""}, f"{ORDERED}|{WARP_ORDERED}|on its way"),
        ({"emptied": WARP_BARRIER}, f"{ORDERED}|on its way"),
    ],
    ids=str,
)
def test_broken_ring(flaw, message, seed, late):
    data, out = np.arange(7 * 128, dtype=np.uint32), np.zeros(128, np.uint32)
    with pytest.raises(EmulatorError, match=message):
        run(ring(**flaw), data, out, seed=seed, late=late, block=128)


@pytest.mark.parametrize("seed, late", SCHEDULES)
@pytest.mark.parametrize("stages", [2, 3])
def test_one_barrier_per_tile_is_enough_for_a_stage_less(stages, seed, late):
    """Whoever fills a stage again has met all its readers at the barrier of the next tile."""
    data, out = np.arange(7 * 128, dtype=np.uint32), np.zeros(128, np.uint32)
    ptx = ring(stages, ahead=stages - 1, emptied="")
    run(ptx, data, out, seed=seed, late=late, block=128)
    assert (out == data.reshape(7, 128).sum(0)[::-1]).all()


# ---- what it costs -------------------------------------------------------------------------------


def wavefronts(offsets, size):
    """(passes, ideal): per phase of 128 bytes at most, distinct words of the fullest bank."""
    lanes_per_phase = 32 // max(1, size // 4)
    passes = ideal = 0
    for first in range(0, 32, lanes_per_phase):
        banks = [set() for _ in range(32)]
        for offset in offsets[first : first + lanes_per_phase]:
            for word in range(offset // 4, (offset + size + 3) // 4):
                banks[word % 32].add(word)
        passes += max(map(len, banks))
        ideal += 1
    return passes, ideal


PATTERNS = {
    "in a row": lambda lane, size: lane * size,
    "one address": lambda lane, size: 64,
    "one column": lambda lane, size: lane * 128,
    "a padded column": lambda lane, size: lane * (128 + max(4, size)),
    "a swizzled column": lambda lane, size: lane * 128 + (lane % (128 // size)) * size,
    "pairs": lambda lane, size: lane // 2 * 256,
    "halves": lambda lane, size: lane % 16 * 128,
    "random": lambda lane, size: random.Random(lane).randrange(0, 8192, size),
    "other random": lambda lane, size: random.Random(lane + 32).randrange(0, 1024, size),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_bank_conflicts_of_loads(pattern, size):
    offsets = [PATTERNS[pattern](lane, size) for lane in range(32)]
    type_ = {8: "v2.u32", 16: "v4.u32"}.get(size, f"u{8 * size}")
    register = {8: "{%r1, %r2}", 16: "{%r1, %r2, %r3, %r4}"}.get(size, "%r1")
    body = f"""
    mov.u64 %wide, 0;
    mov.u32 %at, %smem;
$FILL:
    setp.eq.u32 %p0, %lane, 0;
    @%p0 st.shared.u64 [%at], %wide;
    add.u32 %at, %at, 8;
    add.u32 %r0, %smem, 8448;
    setp.lt.u32 %p0, %at, %r0;
    @%p0 bra $FILL;
    bar.warp.sync 0xffffffff;
    {element("data", 4)}
    ld.global.u32 %r0, [%wide];
    add.u32 %at, %smem, %r0;
    ld.shared.{type_} {register}, [%at];
"""
    run(kernel(body, shared=8448), np.array(offsets, np.uint32))
    load = row(f"ld.shared.{type_}")
    assert (load.wavefronts, load.wavefronts_ideal) == wavefronts(offsets, size)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8, 16, 32, 33])
def test_bank_conflicts_of_stores(stride):
    body = f"mov.u32 %r0, 0;\n{place(4 * stride)} st.shared.u32 [%at], %r0;"
    run(kernel(body, shared=128 * 33), aligned(4))
    store = row("st.shared.u32")
    assert (store.wavefronts, store.wavefronts_ideal) == (np.gcd(stride, 32), 1)


def test_phases_without_lanes_cost_nothing():
    body = f"""
    mov.u32 %r0, 0;
    setp.lt.u32 %p0, %lane, 9;
    {place(16)}
    @%p0 st.shared.v4.u32 [%at], {{%r0, %r0, %r0, %r0}};
"""
    run(kernel(body, shared=512), aligned(4))
    store = emulator().profile()[-2]
    assert (store.wavefronts, store.wavefronts_ideal) == (2, 2)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("stride", [1, 2, 3, 8, 16])
def test_copies_take_a_turn_for_every_row(size, stride):
    """Rows of 128 bytes; a lane's place is `stride` copies behind the last one's."""
    name = "cp.async.ca.shared.global"
    body = f"{place(size * stride)} {name} [%at], [%data], {size};"
    run(kernel(body, shared=16 * 16 * 32), aligned(16))
    copy = row(name)
    assert copy.wavefronts == len({lane * size * stride // 128 for lane in range(32)})
    assert copy.wavefronts_ideal == 32 * size // 128
    assert copy.global_bytes == 32 * size
