"""The emulator around the instructions: modules, special registers, divergence, barriers, limits."""

import ctypes

import numpy as np
import pytest

from emulator import EmulatorError, emulator, ptx_module, unavailable

pytestmark = [pytest.mark.quick, pytest.mark.skipif(bool(unavailable()), reason=unavailable())]

SCHEDULES = [(seed, late) for seed in range(4) for late in (False, True)]

REGISTERS = """
    .reg .pred %p<8>;
    .reg .b32 %r<32>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd0, [out];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mad.lo.u32 %r3, %r1, %r2, %r0;
    mul.wide.u32 %rd1, %r3, 4;
    add.u64 %rd1, %rd0, %rd1;
"""
OUT = [".param .u64 out"]


def module(body, variables=""):
    """%r0 is the thread, %r1 the block, %r3 the thread of the grid, %rd1 its word of `out`."""
    return ptx_module(OUT, REGISTERS + body, variables)


def words(ptx, *, grid=1, block=32, **launch):
    """What the threads wrote to `out`, a row per block."""
    out = np.zeros((grid, block), np.uint32)
    emulator().run(ptx, out, grid=grid, block=block, **launch)
    return out


def refusal(ptx, **launch):
    with pytest.raises(EmulatorError) as caught:
        words(ptx, **launch)
    return str(caught.value)


STORE = "    st.global.u32 [%rd1], %r9;\n"


# ---- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, message",
    [
        ("    add.s31 %r9, %r0, 1;\n", "unknown instruction add.s31 %r9, %r0, 1"),
        ("    add.s32.wrong %r9, %r0, 1;\n", "unknown instruction add.s32.wrong"),
        ("    wgmma.fence.sync.aligned;\n", "unknown instruction wgmma.fence.sync.aligned"),
        ("    add.s32 %r9, %r0;\n", "unknown operands: add.s32 %r9, %r0"),
        ("    add.s32 %r9, %r0, %rd0;\n", "unknown operands"),  # 64 bits
        ("    add.s32 %r9, %r0, %r99;\n", "unknown operands"),  # not declared
        ("    add.s32 %r9, %r0, nobody;\n", "unknown operands"),
        ("    add.s32 7, %r0, 1;\n", "unknown operands"),
        ("    mov.u32 %r9, %clock;\n", "unknown operands"),
        ("    @%p99 add.s32 %r9, %r0, 1;\n", "unknown predicate"),
        ("    bra $nowhere;\n", "unknown label $nowhere"),
        ("    .local .b8 stack[16];\n", "unknown directive .local"),
        ("    add.s32 %r9, %r0, 1\n", "unknown operands"),  # no semicolon: two in one
    ],
)
def test_what_is_unknown_is_named_with_its_line(body, message):
    ptx = module(body)
    report = refusal(ptx)
    line = 1 + ptx[: ptx.index(body)].count("\n")
    assert f"PTX line {line}: " in report and message in report


def test_an_empty_module():
    """Whatever a driver is given, it says no, and goes on."""
    load = emulator().driver.cuLibraryLoadData
    for text in (b"", b".version 9.0\n", b"\x7fELF", b"{ { {", b";;;}", b"@", b"$a:"):
        library = ctypes.c_void_p()
        assert load(ctypes.byref(library), text, None, None, 0, None, None, 0) != 0
        assert not library


def test_scopes():
    """Registers and labels in braces are others than those of the same name outside."""
    body = """
    mov.u32 %r9, 1;
    {
        .reg .b32 %r9;
        .reg .pred %p1;
        setp.lt.u32 %p1, %r0, 16;
        mov.u32 %r9, 5;
        @%p1 bra LAB;
        mov.u32 %r10, 7;
        bra.uni END;
    LAB:
        mov.u32 %r10, %r9;
    END:
    }
    {
        bra LAB;
        mov.u32 %r10, 99;
    LAB:
    }
    add.u32 %r9, %r9, %r10;
"""
    assert words(module(body + STORE)).tolist() == [[6] * 16 + [8] * 16]


def test_branches_out_of_scopes_and_backwards():
    body = """
    mov.u32 %r9, 0;
    mov.u32 %r4, 0;
$again:
    add.u32 %r9, %r9, %r4;
    {
        .reg .pred %p1;
        add.u32 %r4, %r4, 1;
        setp.le.u32 %p1, %r4, %r0;
        @%p1 bra $again;
        bra.uni $done;
    }
    mov.u32 %r9, 99;
$done:
"""
    expected = [[n * (n + 1) // 2 for n in range(32)]]
    assert words(module(body + STORE)).tolist() == expected


def test_special_registers():
    body = "".join(
        f"    mov.u32 %r{10 + i}, {name};\n"
        for i, name in enumerate(("%tid.y", "%ntid.y", "%laneid", "%warpid", "%nctaid.x"))
    )
    body += """
    mad.lo.u32 %r9, %r10, 8, %r0;
    mad.lo.u32 %r3, %r1, 64, %r9;
    mul.wide.u32 %rd1, %r3, 4;
    add.u64 %rd1, %rd0, %rd1;
    mad.lo.u32 %r9, %r9, 32, %r12;
    mad.lo.u32 %r9, %r9, 2, %r13;
    mad.lo.u32 %r9, %r9, 8, %r11;
    mad.lo.u32 %r9, %r9, 8, %r14;
"""
    out = np.zeros((3, 64), np.uint32)
    emulator().run(module(body + STORE), out, grid=3, block=(8, 8))
    threads = np.arange(64)
    expected = (((threads * 32 + threads % 32) * 2 + threads // 32) * 8 + 8) * 8 + 3
    assert (out == expected).all()


def test_every_block_runs_once():
    """In an order of the seed's, on any number of host threads."""
    body = """
    mov.u32 %r9, 1;
    red.global.add.u32 [%rd1], %r9;
"""
    ptx = module(body)
    for seed in range(5):
        for threads in (1, 2, 5):
            with emulator().settings(seed=seed, threads=threads):
                assert (words(ptx, grid=1 + 12 * seed, block=64) == 1).all()


def test_static_and_dynamic_shared_memory_do_not_overlap():
    body = """
    mov.u32 %r9, first;
    mov.u32 %r10, second;
    mov.u32 %r11, dynamic;
    sub.u32 %r10, %r10, %r9;
    sub.u32 %r11, %r11, %r9;
    mad.lo.u32 %r9, %r11, 1000, %r10;
"""
    variables = """
.extern .shared .align 256 .b8 dynamic[];
.shared .align 4 .b8 first[20];
.shared .align 16 .b8 second[24];
"""
    (row,) = words(module(body + STORE, variables), shared=512)
    offset_dynamic, offset_second = divmod(int(row[0]), 1000)
    assert offset_second >= 20 and offset_dynamic >= offset_second + 24


# ---- registers -----------------------------------------------------------------------------------


def test_a_register_that_was_never_written():
    report = refusal(module("    add.s32 %r9, %r0, %r20;\n" + STORE))
    assert "operand 3, a register, has never been written" in report and "lane 0" in report


def test_a_register_that_other_lanes_wrote():
    body = """
    setp.lt.u32 %p1, %r0, 20;
    @%p1 mov.u32 %r9, 1;
"""
    assert "lane 20" in refusal(module(body + STORE))
    assert (words(module(body + "    @!%p1 mov.u32 %r9, 2;\n" + STORE))[0, 20:] == 2).all()


def test_a_predicate_that_was_never_written():
    report = refusal(module("    mov.u32 %r9, 0;\n    @%p5 mov.u32 %r9, 1;\n" + STORE))
    assert "the predicate has never been written" in report


# ---- divergence ----------------------------------------------------------------------------------


def test_lanes_go_their_own_ways_and_meet_again():
    """Loops of as many rounds as the lane's number, then a shuffle of all of them."""
    body = """
    mov.u32 %r9, 0;
    mov.u32 %r4, %r0;
$loop:
    setp.eq.u32 %p1, %r4, 0;
    @%p1 bra $out;
    add.u32 %r9, %r9, 3;
    sub.u32 %r4, %r4, 1;
    bra $loop;
$out:
    shfl.sync.bfly.b32 %r9, %r9, 31, 31, -1;
"""
    assert words(module(body + STORE)).tolist() == [[3 * (31 - n) for n in range(32)]]


def test_lanes_may_leave_early():
    body = """
    setp.ge.u32 %p1, %r0, 20;
    mov.u32 %r9, 1;
    @%p1 ret;
"""
    assert words(module(body + STORE)).tolist() == [[1] * 20 + [0] * 12]


def test_trap():
    assert "the kernel gave up (trap)" in refusal(module("    trap;\n"))


# ---- barriers ------------------------------------------------------------------------------------

SHARED = ".extern .shared .align 128 .b8 smem[];"
NEIGHBOUR = """
    shl.b32 %r10, %r0, 2;
    mov.u32 %r11, smem;
    add.u32 %r10, %r10, %r11;
    st.shared.u32 [%r10], %r3;
    BARRIER
    xor.b32 %r12, %r0, 96;
    shl.b32 %r12, %r12, 2;
    add.u32 %r12, %r12, %r11;
    ld.shared.u32 %r9, [%r12];
"""


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "bar.sync 3, 128;", "barrier.sync.aligned 1;"])
def test_barriers_order_warps(barrier):
    ptx = module(NEIGHBOUR.replace("BARRIER", barrier) + STORE, SHARED)
    for seed, late in SCHEDULES:
        with emulator().settings(seed=seed, late_copies=late):
            out = words(ptx, grid=3, block=128, shared=512)
        assert (out[:, np.arange(128) ^ 96] == np.arange(3 * 128).reshape(3, 128)).all()


def test_no_barrier():
    for barrier in ("", "bar.warp.sync -1;", "bar.sync %r13, 32;"):
        body = "    shr.u32 %r13, %r0, 5;\n" + NEIGHBOUR.replace("BARRIER", barrier)
        ptx = module(body + STORE, SHARED)
        for seed, late in SCHEDULES:
            with emulator().settings(seed=seed, late_copies=late):
                report = refusal(ptx, block=128, shared=512)
            assert "with no barrier between" in report or "that nobody has written" in report


def test_a_producer_arrives_and_a_consumer_waits():
    """Warp 0 writes and goes on; warp 1 reads after the barrier."""
    body = """
    mov.u32 %r11, smem;
    and.b32 %r10, %r0, 31;
    mad.lo.u32 %r10, %r10, 4, %r11;
    mov.u32 %r9, 0;
    setp.lt.u32 %p1, %r0, 32;
    @%p1 bra $produce;
    CONSUME
    ld.shared.u32 %r9, [%r10];
    bra.uni $done;
$produce:
    st.shared.u32 [%r10], %r3;
    bar.arrive 1, 64;
$done:
"""
    good = module(body.replace("CONSUME", "bar.sync 1, 64;") + STORE, SHARED)
    bad = module(body.replace("CONSUME", "bar.sync 2, 32;") + STORE, SHARED)
    for seed, late in SCHEDULES:
        with emulator().settings(seed=seed, late_copies=late):
            assert words(good, block=64, shared=128).tolist() == [[0] * 32 + [*range(32)]]
            report = refusal(bad, block=64, shared=128)
            assert "with no barrier between" in report or "that nobody has written" in report


@pytest.mark.parametrize(
    "opcode, expected",
    [
        ("bar.red.or.pred", lambda votes: int(votes.any())),
        ("bar.red.and.pred", lambda votes: int(votes.all())),
        ("bar.red.popc.u32", lambda votes: int(votes.sum())),
    ],
)
@pytest.mark.parametrize("below", [0, 1, 40, 127, 128])
def test_reductions_over_the_block(opcode, expected, below):
    destination = "%r9" if "popc" in opcode else "%p2"
    body = f"""
    setp.lt.u32 %p1, %r0, {below};
    {opcode} {destination}, 0, %p1;
"""
    if destination == "%p2":
        body += "    selp.u32 %r9, 1, 0, %p2;\n"
    ptx = module(body + STORE)
    for seed, _ in SCHEDULES:
        with emulator().settings(seed=seed):
            out = words(ptx, grid=2, block=128)
        assert (out == expected(np.arange(128) < below)).all()


@pytest.mark.parametrize(
    "body, message",
    [
        ("    setp.lt.u32 %p1, %r0, 32;\n    @%p1 bar.sync 0;\n", "barrier 0 lacks 32 of 64"),
        ("    setp.lt.u32 %p1, %r0, 40;\n    @%p1 bar.sync 0;\n", "only the lanes 000000ff"),
        ("    bar.sync 16;\n", "there is no barrier 16"),
        ("    bar.sync 0, 33;\n", "not whole warps"),
        ("    shr.u32 %r9, %r0, 5;\n    bar.sync %r9;\n", "lacks 32 of 64"),
        (
            "    setp.lt.u32 %p1, %r0, 32;\n    @%p1 bar.sync 0, 64;\n    @!%p1 bar.sync 0, 96;\n",
            "others came to it for",
        ),
        ("    setp.lt.u32 %p1, %r0, 32;\n    @%p1 ret;\n    bar.sync 0;\n", "lacks 32 of 64"),
    ],
)
def test_barriers_that_not_all_come_to(body, message):
    for seed, _ in SCHEDULES:
        with emulator().settings(seed=seed):
            assert message in refusal(module(body), block=64)


def test_a_barrier_is_ready_for_the_next_round():
    body = """
    mov.u32 %r9, 0;
$loop:
    bar.sync 0;
    add.u32 %r9, %r9, 1;
    setp.lt.u32 %p1, %r9, 50;
    @%p1 bra $loop;
"""
    assert (words(module(body + STORE), grid=2, block=256) == 50).all()


# ---- limits --------------------------------------------------------------------------------------


def test_shared_memory_of_99_kilobytes():
    ptx = module("    mov.u32 %r9, smem;\n" + STORE, SHARED)
    words(ptx, shared=99 * 1024)
    assert "a block has 101376" in refusal(ptx, shared=99 * 1024 + 1)
    fixed = module("    mov.u32 %r9, fixed;\n" + STORE, ".shared .align 4 .b8 fixed[4096];")
    words(fixed, shared=95 * 1024)
    assert "a block has 101376" in refusal(fixed, shared=95 * 1024 + 4)


@pytest.mark.parametrize("block", [0, 33, 1056, (32, 32, 2)])
def test_blocks_that_cannot_be(block):
    out = np.zeros(1, np.uint32)
    with pytest.raises(EmulatorError, match="whole warps are run here"):
        emulator().run(module(""), out, block=block)


def test_a_failed_launch_leaves_nothing_behind():
    good, bad = module("    mov.u32 %r9, 7;\n" + STORE), module("    trap;\n")
    for _ in range(3):
        refusal(bad, grid=5, block=128)
        assert (words(good, grid=5, block=128) == 7).all()


def test_the_profile_is_of_the_last_launch():
    ptx = module("    mov.u32 %r9, 7;\n" + STORE)
    words(ptx, grid=3, block=64)
    (store,) = (row for row in emulator().profile() if row.kind == "store_global")
    assert store.executed == 3 * 2 and store.global_bytes == 3 * 64 * 4
    assert ptx.split("\n")[store.line - 1].strip() == f"{store.text};"
