"""Tensor maps, mbarriers and bulk copies of the emulator: PTX by hand, answers by numpy."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest

from emulator import EmulatorError, emulator, ptx_module, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

SWIZZLES = {"none": 0, "32": 1, "64": 2, "128": 3}  # CUtensorMapSwizzle
DATA_TYPES = {"uint8": 0, "uint16": 1, "uint32": 2, "int32": 3, "uint64": 4}  # CUtensorMapDataType
DATA_TYPES |= {"int64": 5, "float16": 6, "float32": 7, "float64": 8}
INVALID_VALUE, NOT_SUPPORTED = 1, 801  # CUresult


@pytest.fixture(params=[False, True], ids=["early", "late"])
def late(request):
    return request.param


@pytest.fixture(params=[0, 1, 2], ids=lambda seed: f"seed{seed}")
def run(request, late):
    """Launches PTX with copies that land early or late, and a seed."""

    def run(ptx, *arguments, **launch):
        with emulator().settings(seed=request.param, late_copies=late):
            emulator().run(ptx, *arguments, **launch)

    return run


# ---- tensor maps ---------------------------------------------------------------------------------


def encode(sizes, strides, box, **changes):
    """The result of cuTensorMapEncodeTiled and the map, for float16 unless `changes` say else."""
    memory = np.zeros(128 + 64, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :][:128]
    rank = len(sizes)
    arguments = {
        "map": aligned.ctypes.data,
        "data_type": DATA_TYPES["float16"],
        "rank": rank,
        "address": 1 << 20,
        "element_strides": [1] * rank,
        "interleave": 0,
        "swizzle": 0,
        "l2_promotion": 0,
        "oob_fill": 0,
    } | changes
    result = emulator().driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(arguments["map"]),
        arguments["data_type"],
        ctypes.c_uint32(arguments["rank"]),
        ctypes.c_void_p(arguments["address"]),
        (ctypes.c_uint64 * 8)(*sizes),
        (ctypes.c_uint64 * 8)(*strides),
        (ctypes.c_uint32 * 8)(*box),
        (ctypes.c_uint32 * 8)(*arguments["element_strides"]),
        arguments["interleave"],
        arguments["swizzle"],
        arguments["l2_promotion"],
        arguments["oob_fill"],
    )
    return result, aligned.tobytes()


def tensor_map(array, box, swizzle="none", oob_fill=0):
    """A map of a numpy array, whose last dimension is the innermost; `box` is in numpy's order."""
    assert array.strides[-1] == array.itemsize
    result, encoded = encode(
        array.shape[::-1],
        array.strides[-2::-1],
        box[::-1],
        address=array.ctypes.data,
        data_type=DATA_TYPES[str(array.dtype)],
        swizzle=SWIZZLES[swizzle],
        oob_fill=oob_fill,
    )
    assert result == 0
    return encoded


@pytest.mark.parametrize(
    "result, changes",
    [
        (0, {}),
        (0, {"swizzle": 3, "l2_promotion": 3, "oob_fill": 1}),
        (0, {"element_strides": [2, 1, 1]}),  # the innermost one is ignored
        (0, {"sizes": [1 << 32, 1, 1]}),
        (0, {"strides": [128, 48]}),  # any order: a transposed tensor
        (INVALID_VALUE, {"map": 0}),
        (INVALID_VALUE, {"map": 32}),
        (INVALID_VALUE, {"address": 0}),
        (INVALID_VALUE, {"address": (1 << 20) + 8}),
        (INVALID_VALUE, {"rank": 0}),
        (INVALID_VALUE, {"rank": 6}),
        (INVALID_VALUE, {"data_type": -1}),
        (INVALID_VALUE, {"data_type": 16}),
        (INVALID_VALUE, {"sizes": [0, 4, 4]}),
        (INVALID_VALUE, {"sizes": [64, (1 << 32) + 1, 4]}),
        (INVALID_VALUE, {"strides": [128 + 8, 1024]}),
        (INVALID_VALUE, {"strides": [128, 1 << 40]}),
        (INVALID_VALUE, {"box": [64, 0, 1]}),
        (INVALID_VALUE, {"box": [64, 257, 1]}),
        (INVALID_VALUE, {"box": [12, 4, 1]}),  # 24 bytes
        (INVALID_VALUE, {"box": [72, 4, 1], "swizzle": 3}),
        (INVALID_VALUE, {"box": [40, 4, 1], "swizzle": 2}),
        (INVALID_VALUE, {"box": [24, 4, 1], "swizzle": 1}),
        (INVALID_VALUE, {"element_strides": [1, 0, 1]}),
        (INVALID_VALUE, {"element_strides": [1, 9, 1]}),
        (INVALID_VALUE, {"interleave": 3}),
        (INVALID_VALUE, {"interleave": 1, "rank": 2}),
        (INVALID_VALUE, {"swizzle": 7}),
        (INVALID_VALUE, {"l2_promotion": 4}),
        (INVALID_VALUE, {"oob_fill": 2}),
        (INVALID_VALUE, {"oob_fill": 1, "data_type": DATA_TYPES["uint16"]}),
        (NOT_SUPPORTED, {"element_strides": [1, 2, 1]}),
        (NOT_SUPPORTED, {"interleave": 1}),
        (NOT_SUPPORTED, {"swizzle": 4}),
        (NOT_SUPPORTED, {"data_type": 10}),
    ],
    ids=str,
)
def test_encode(result, changes):
    arguments = {"sizes": [64, 4, 4], "strides": [128, 1024], "box": [64, 4, 1]} | changes
    assert encode(**arguments)[0] == result


# ---- PTX -----------------------------------------------------------------------------------------

# Shared memory: the data from smem on, the mbarriers in front of it.
FRONT = 1024
TAIL = 16  # bytes per thread that copy_out moves


def kernel(parameters, body):
    """%r0 is the thread, %r1 the lane, %r2 the warp, %r3 shared memory, %r4 the data in it."""
    preamble = f"""
    .reg .pred %p<4>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<20>;
    .reg .f32 %f<8>;
    mov.u32 %r0, %tid.x;
    and.b32 %r1, %r0, 31;
    shr.u32 %r2, %r0, 5;
    mov.u32 %r3, smem;
    add.s32 %r4, %r3, {FRONT};
"""
    return ptx_module(parameters, preamble + body, ".extern .shared .align 1024 .b8 smem[];")


MAP = ".param .align 64 .b8 map[128]"
LOAD_BYTES = "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes"
labels = itertools.count()


def by_thread(thread, body, register="%r0"):
    """`body` for one thread of the block (with %r1: for one lane of each warp)."""
    label = f"$skip{next(labels)}"
    return f"""
    setp.ne.s32 %p1, {register}, {thread};
    @%p1 bra {label};
{body}
{label}:
"""


def init(**counts):
    """Thread 0 initialises mbarriers, `at8=2`: at byte 8, for 2 arrivals."""
    body = "".join(
        f"    mbarrier.init.shared::cta.b64 [%r3+{name[2:]}], {count};\n"
        for name, count in counts.items()
    )
    return by_thread(0, body + "    fence.mbarrier_init.release.cluster;") + "    bar.sync 0;\n"


def wait(mbarrier, parity):
    label = f"$wait{next(labels)}"
    return f"""
{label}:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3+{mbarrier}], {parity};
    @!%p2 bra {label};
"""


def expect(mbarrier, count):
    return f"    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3+{mbarrier}], {count};\n"


def each_chunk(count, threads, parameter, body, done):
    """All of the block run `body` for each 16 bytes of `count` in the data, at %r32, and in a
    parameter's array, of which each block has its own, at %rd12."""
    passes = "".join(
        f"""
    add.s32 %r31, %r30, {at};
    setp.ge.s32 %p1, %r31, {count};
    @%p1 bra {done};
    add.s32 %r38, %r37, %r31;
    cvt.s64.s32 %rd11, %r38;
    add.s64 %rd12, %rd10, %rd11;
    add.s32 %r32, %r4, %r31;
{body}"""
        for at in range(0, count, TAIL * threads)
    )
    return f"""
    ld.param.u64 %rd10, [{parameter}];
    mov.u32 %r37, %ctaid.x;
    mul.lo.s32 %r37, %r37, {count};
    shl.b32 %r30, %r0, 4;
{passes}
{done}:
"""


def copy_out(count, threads):
    """All of the block write `count` bytes of the data to parameter `out`."""
    body = """
    ld.shared.v4.u32 {%r33, %r34, %r35, %r36}, [%r32];
    st.global.v4.u32 [%rd12], {%r33, %r34, %r35, %r36};
"""
    return each_chunk(count, threads, "out", body, "$copied")


def copy_in(count, threads):
    """All of the block fill the data from parameter `values`."""
    body = """
    ld.global.v4.u32 {%r33, %r34, %r35, %r36}, [%rd12];
    st.shared.v4.u32 [%r32], {%r33, %r34, %r35, %r36};
"""
    chunks = each_chunk(count, threads, "values", body, "$filled")
    return chunks + "    fence.proxy.async.shared::cta;\n    bar.sync 0;\n"


def corner(rank):
    """%r10 ... are the block's coordinates, of the parameter `corners`."""
    return f"""
    ld.param.u64 %rd1, [corners];
    mov.u32 %r5, %ctaid.x;
    mul.lo.s32 %r5, %r5, {4 * rank};
    cvt.s64.s32 %rd2, %r5;
    add.s64 %rd1, %rd1, %rd2;
""" + "".join(f"    ld.global.u32 %r{10 + d}, [%rd1+{4 * d}];\n" for d in range(rank))


def coordinates(rank):
    return "{" + ", ".join(f"%r{10 + d}" for d in range(rank)) + "}"


def tensor_load(rank, mbarrier=0, space="shared::cluster", mode="", hint=False):
    name = f"cp.async.bulk.tensor.{rank}d.{space}.global{mode}.mbarrier::complete_tx::bytes"
    return f"""
    mov.b64 %rd3, map;
    cvta.param.u64 %rd3, %rd3;
    {name}{".L2::cache_hint" if hint else ""} [%r4], [%rd3, {coordinates(rank)}],
        [%r3+{mbarrier}]{", 0x14F0000000000000" if hint else ""};
"""


# ---- boxes in numpy ------------------------------------------------------------------------------


def cut(array, corner, box, fill=0):
    """The elements of a box, with `fill` where the array has none."""
    index = np.ix_(*(np.arange(c, c + b) for c, b in zip(corner, box, strict=True)))
    is_inside = np.ones(box, bool)
    for axis, size in zip(index, array.shape, strict=True):
        is_inside &= (axis >= 0) & (axis < size)
    clipped = tuple(np.clip(axis, 0, n - 1) for axis, n in zip(index, array.shape, strict=True))
    return np.where(is_inside, array[clipped], np.array(fill, array.dtype)), is_inside


def swizzled(data, swizzle):
    """Bytes as a tensor copy lays them out: chunk c of row r of 128 bytes is at c ^ r, as far as
    the span of the swizzle goes."""
    if swizzle == "none":
        return data
    chunks = data.reshape(-1, 16)
    number = np.arange(len(chunks))
    row, column = number // 8, number % 8
    moved = np.empty_like(chunks)
    moved[row * 8 + (column ^ row % (int(swizzle) // 16))] = chunks
    return moved.reshape(-1)


def edges(size, box):
    """Across the left edge, inside, across the right one; and just outside of both."""
    return sorted({-box, -box + 1, -1, 0, 1, size - box, size - box + 1, size - 1, size})


# shape, box, and a swizzle whose span is the box's row
BOXES = {
    "2d": ((11, 40), (5, 8), "none"),
    "2d-wide": ((11, 120), (3, 72), "none"),
    "2d-32": ((19, 24), (16, 16), "32"),
    "2d-64": ((19, 40), (16, 32), "64"),
    "2d-128": ((19, 72), (16, 64), "128"),
    "3d": ((3, 5, 24), (2, 3, 16), "none"),
    "3d-128": ((3, 9, 72), (2, 4, 64), "128"),
    "4d": ((2, 3, 2, 16), (1, 2, 2, 8), "none"),
    "4d-64": ((2, 3, 9, 40), (1, 1, 8, 32), "64"),
    "5d": ((2, 2, 2, 3, 16), (1, 2, 1, 2, 8), "none"),
    "5d-32": ((2, 2, 2, 9, 24), (1, 1, 2, 4, 16), "32"),
}


def strided(shape, dtype, seed=0):
    """Random numbers in rows with holes between them, aligned as tensor maps want it."""
    row = shape[-1] + -shape[-1] % 16 + 16
    values = np.random.default_rng(seed).integers(1, 200, (*shape[:-1], row)).astype(dtype)
    memory = np.empty(values.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 128
    padded = memory[start : start + values.nbytes].view(dtype).reshape(values.shape)
    padded[...] = values
    return padded[..., : shape[-1]]


def some_corners(shape, box):
    """Every combination for two dimensions; of more, a sample that has every edge of each."""
    choices = [edges(n, b) for n, b in zip(shape, box, strict=True)]
    corners = list(itertools.product(*choices))
    return corners[:: max(1, len(corners) // 90 | 1)] if len(shape) > 2 else corners


@pytest.fixture
def allowed(request):
    """Lets the launches of a test touch arrays that their tensor maps point to."""

    def allow(array):
        if array.ndim > 4:
            return [allow(part) for part in array]
        context = emulator().allowed(array)
        context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))

    return allow


@pytest.mark.parametrize("name", BOXES)
def test_tensor_loads(name, run, allowed):
    shape, box, swizzle = BOXES[name]
    rank, array = len(shape), strided(shape, np.float16)
    allowed(array)
    corners = np.array(some_corners(shape, box), np.int32)
    count = int(np.prod(box)) * array.itemsize
    ptx = kernel(
        [MAP, ".param .u64 corners", ".param .u64 out"],
        init(at0=1)
        + corner(rank)
        + by_thread(0, expect(0, count) + tensor_load(rank))
        + wait(0, 0)
        + copy_out(count, 64),
    )
    out = np.full((len(corners), count), 0xAA, np.uint8)
    encoded = tensor_map(array, box, swizzle)
    reversed_corners = np.ascontiguousarray(corners[:, ::-1])
    run(ptx, encoded, reversed_corners, out, grid=len(corners), block=64, shared=FRONT + count)
    for got, at in zip(out, corners, strict=True):
        want = np.ascontiguousarray(cut(array, at, box)[0]).view(np.uint8).reshape(-1)
        np.testing.assert_array_equal(got, swizzled(want, swizzle), err_msg=str(at))


@pytest.mark.parametrize("space", ["shared::cta", "shared::cluster"])
@pytest.mark.parametrize("hint", [False, True])
def test_spellings_of_plain_loads(space, hint):
    values, out = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
    name = LOAD_BYTES.replace("shared::cta", space) + ".L2::cache_hint" * hint
    load = f"    {name} [%r4], [%rd1], 64, [%r3]{', 0x14F0000000000000' if hint else ''};\n"
    body = init(at0=1) + "    ld.param.u64 %rd1, [values];\n" + by_thread(0, expect(0, 64) + load)
    ptx = kernel([".param .u64 values", ".param .u64 out"], body + wait(0, 0) + copy_out(64, 32))
    emulator().run(ptx, values, out, shared=FRONT + 64)
    np.testing.assert_array_equal(out, values)


@pytest.mark.parametrize("space", ["shared::cta", "shared::cluster"])
@pytest.mark.parametrize("mode", ["", ".tile"])
@pytest.mark.parametrize("hint", [False, True])
def test_spellings_of_tensor_loads(space, mode, hint, allowed):
    array = strided((4, 8), np.float32)
    allowed(array)
    load = tensor_load(2, 0, space, mode, hint)
    zero = "    mov.u32 %r10, 0;\n    mov.u32 %r11, 0;\n"
    body = init(at0=1) + zero + by_thread(0, expect(0, 128) + load) + wait(0, 0) + copy_out(128, 32)
    out = np.zeros((4, 8), np.float32)
    ptx = kernel([MAP, ".param .u64 out"], body)
    emulator().run(ptx, tensor_map(array, (4, 8)), out, shared=FRONT + 128)
    np.testing.assert_array_equal(out, array)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_fill_with_nan(dtype, allowed):
    array = strided((3, 16), dtype)
    allowed(array)
    count = 4 * 16 * array.itemsize
    body = init(at0=1) + "    mov.u32 %r10, -8;\n    mov.u32 %r11, 1;\n"
    body += by_thread(0, expect(0, count) + tensor_load(2)) + wait(0, 0) + copy_out(count, 64)
    out = np.zeros((4, 16), dtype)
    ptx = kernel([MAP, ".param .u64 out"], body)
    encoded = tensor_map(array, (4, 16), oob_fill=1)
    emulator().run(ptx, encoded, out, block=64, shared=FRONT + count)
    np.testing.assert_array_equal(out, cut(array, (1, -8), (4, 16), np.nan)[0])


def test_map_in_global_memory(allowed):
    array = strided((4, 8), np.float32)
    allowed(array)
    memory = np.zeros(192, np.uint8)
    start = -memory.ctypes.data % 64
    in_memory = memory[start : start + 128]
    in_memory[:] = np.frombuffer(tensor_map(array, (4, 8)), np.uint8)
    body = init(at0=1) + "    ld.param.u64 %rd3, [map];\n    prefetch.tensormap [%rd3];\n"
    name = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
    load = f"    {name} [%r4], [%rd3, {{0, 0}}], [%r3];\n"
    body += by_thread(0, expect(0, 128) + load) + wait(0, 0) + copy_out(128, 32)
    out = np.zeros((4, 8), np.float32)
    ptx = kernel([".param .u64 map", ".param .u64 out"], body)
    emulator().run(ptx, in_memory, out, shared=FRONT + 128)
    np.testing.assert_array_equal(out, array)


# ---- stores --------------------------------------------------------------------------------------

COMMIT = "    cp.async.bulk.commit_group;\n"


def wait_group(groups=0, read=""):
    return f"    cp.async.bulk.wait_group{read} {groups};\n"


def tensor_store(rank):
    return f"""
    mov.b64 %rd3, map;
    cvta.param.u64 %rd3, %rd3;
    cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group [%rd3, {coordinates(rank)}], [%r4];
"""


@pytest.mark.parametrize("name", BOXES)
def test_tensor_stores(name, run, allowed):
    shape, box, swizzle = BOXES[name]
    rank, array = len(shape), strided(shape, np.float16)
    allowed(array)
    corners = some_corners(shape, box)[::7]
    count = int(np.prod(box)) * array.itemsize
    store = tensor_store(rank) + COMMIT + wait_group(read=".read")
    body = corner(rank) + copy_in(count, 64) + by_thread(0, store)
    ptx = kernel([MAP, ".param .u64 corners", ".param .u64 values"], body)
    encoded = tensor_map(array, box, swizzle)
    values = np.random.default_rng(1).integers(200, 400, box).astype(np.float16)
    data = swizzled(values.view(np.uint8).reshape(-1), swizzle)
    for at in corners:
        array[...] = 7
        run(ptx, encoded, np.array(at[::-1], np.int32), data, block=64, shared=FRONT + count)
        want = np.full(shape, 7, np.float16)
        inside = cut(want, at, box)[1]
        for index in zip(*np.nonzero(inside), strict=True):
            want[tuple(np.add(at, index))] = values[index]
        np.testing.assert_array_equal(array, want, err_msg=str(at))


def test_bulk_bytes(run):
    """In by a plain copy, out by another one."""
    count = 1536
    body = f"""
{init(at0=1)}
    ld.param.u64 %rd1, [values];
    ld.param.u64 %rd2, [out];
    mov.u32 %r5, %ctaid.x;
    mul.lo.s32 %r5, %r5, {count};
    cvt.s64.s32 %rd3, %r5;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
{by_thread(0, expect(0, count) + f"    {LOAD_BYTES} [%r4], [%rd1], {count}, [%r3];")}
{wait(0, 0)}
    bar.sync 0;
{
        by_thread(
            0,
            f"    cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r4], {count};"
            + COMMIT
            + wait_group(),
        )
    }
"""
    values = np.random.default_rng(0).integers(0, 255, (3, count)).astype(np.uint8)
    out = np.zeros_like(values)
    ptx = kernel([".param .u64 values", ".param .u64 out"], body)
    run(ptx, values, out, grid=3, block=64, shared=FRONT + count)
    np.testing.assert_array_equal(out, values)


def test_reduction(run):
    """Four blocks add their numbers to the same ones."""
    count = 512
    add = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32"
    store = f"    ld.param.u64 %rd1, [out];\n    {add} [%rd1], [%r4], {count};\n" + COMMIT
    body = copy_in(count, 32) + by_thread(0, store + wait_group())
    values = np.random.default_rng(0).integers(-99, 99, (4, count // 4)).astype(np.float32)
    out = np.full(count // 4, 0.5, np.float32)
    ptx = kernel([".param .u64 values", ".param .u64 out"], body)
    run(ptx, values, out, grid=4, block=32, shared=FRONT + count)
    np.testing.assert_array_equal(out, values.sum(0) + np.float32(0.5))


def two_stores(between):
    """Stores the same 64 bytes twice, the second time from its own group, with other data."""
    store = "    cp.async.bulk.global.shared::cta.bulk_group"
    write = "    st.shared.u32 [%r6], %r5;\n    fence.proxy.async.shared::cta;\n"
    body = f"""
    ld.param.u64 %rd1, [out];
    shl.b32 %r5, %r0, 2;
    add.s32 %r6, %r4, %r5;
{write}
    bar.warp.sync -1;
{by_thread(0, f"{store} [%rd1], [%r4], 64;" + COMMIT + between)}
    bar.warp.sync -1;
    add.s32 %r5, %r5, 1;
{write}
    bar.warp.sync -1;
{by_thread(0, f"{store} [%rd1+64], [%r4], 64;" + COMMIT + wait_group())}
"""
    return kernel([".param .u64 out"], body)


def test_source_of_a_store_written_after_its_wait(run):
    out = np.zeros(32, np.uint32)
    run(two_stores(wait_group(read=".read")), out, shared=FRONT + 128)
    once = 4 * np.arange(16)
    np.testing.assert_array_equal(out, np.concatenate([once, once + 1]))


@pytest.mark.parametrize("between", ["", wait_group(1), wait_group(1, ".read")])
def test_source_of_a_store_written_too_early(between, run):
    with pytest.raises(EmulatorError, match="store"):
        run(two_stores(between), np.zeros(32, np.uint32), shared=FRONT + 128)


# ---- a ring of two stages ------------------------------------------------------------------------

TILES, STAGES, CONSUMERS = 7, 2, 2  # consuming warps
TILE = 4 * 32 * CONSUMERS  # bytes: one word per consuming thread
FULL, EMPTY = (0, 8), (16, 24)  # mbarriers of the stages


def produce(tile, expects=TILE, releases=True, **_):
    """One lane fills a stage, once its tile before has been consumed."""
    stage, use = tile % STAGES, tile // STAGES
    released = wait(EMPTY[stage], (use - 1) % 2) if use and releases else ""
    arrival = expect(FULL[stage], expects)
    if expects is None:
        arrival = f"    mbarrier.arrive.shared.b64 _, [%r3+{FULL[stage]}];\n"
    return f"""
{released}
{arrival}
    add.s32 %r20, %r4, {stage * TILE};
    add.s64 %rd5, %rd1, {tile * TILE};
    {LOAD_BYTES} [%r20], [%rd5], {TILE}, [%r3+{FULL[stage]}];
"""


def consume(tile, waits=True, parity=0, syncs=True, all_release=False, **_):
    """x = 3 x + a word of the tile: of another thread's place than this one's."""
    stage, use = tile % STAGES, tile // STAGES
    release = f"    mbarrier.arrive.shared::cta.b64 %rd7, [%r3+{EMPTY[stage]}];\n"
    return f"""
{wait(FULL[stage], (use + parity) % 2) if waits else ""}
    ld.shared.u32 %r22, [%r21+{stage * TILE}];
    mul.lo.s32 %r23, %r23, 3;
    add.s32 %r23, %r23, %r22;
{"    bar.warp.sync -1;" if syncs else ""}
{release if all_release else by_thread(0, release, "%r1")}
"""


def ring(producer, inits=True, **flaws):
    """`producer` is "lane", thread 0, which consumes as well, or "warp", one beside the others."""
    first = "".join(produce(tile, **flaws) for tile in range(STAGES))
    later = [produce(tile, **flaws) for tile in range(STAGES, TILES)] + [""] * STAGES
    released_by = 32 * CONSUMERS if flaws.get("all_release") else CONSUMERS
    setup = init(at0=1, at8=1, at16=released_by, at24=released_by)
    if not inits:
        setup = "    bar.sync 0;\n"
    tiles = [consume(tile, **flaws) for tile in range(TILES)]
    if producer == "lane":
        refills = [by_thread(0, refill) if refill else "" for refill in later]
        work = by_thread(0, first) + "".join(map("".join, zip(tiles, refills, strict=True)))
    else:
        work = f"""
    setp.ge.s32 %p3, %r2, {CONSUMERS};
    @%p3 bra $produce;
{"".join(tiles)}
    bra $done;
$produce:
{by_thread(0, first + "".join(later), "%r1")}
    ret;
$done:
"""
    body = f"""
{setup}
    ld.param.u64 %rd1, [values];
    ld.param.u64 %rd2, [out];
    mov.u32 %r5, %ctaid.x;
    mul.lo.s32 %r6, %r5, {TILES * TILE};
    cvt.s64.s32 %rd3, %r6;
    add.s64 %rd1, %rd1, %rd3;
    xor.b32 %r6, %r0, 33;
    shl.b32 %r6, %r6, 2;
    add.s32 %r21, %r4, %r6;
    mov.u32 %r23, 0;
{work}
    mul.lo.s32 %r6, %r5, {TILE};
    shl.b32 %r7, %r0, 2;
    add.s32 %r6, %r6, %r7;
    cvt.s64.s32 %rd3, %r6;
    add.s64 %rd2, %rd2, %rd3;
    st.global.u32 [%rd2], %r23;
"""
    return kernel([".param .u64 values", ".param .u64 out"], body)


def run_ring(run, producer, **flaws):
    """Runs it for three blocks, and checks what they computed."""
    values = np.random.default_rng(0).integers(0, 999, (3, TILES, TILE // 4)).astype(np.uint32)
    out = np.zeros((3, TILE // 4), np.uint32)
    warps = CONSUMERS + (producer == "warp")
    shared = FRONT + STAGES * TILE
    run(ring(producer, **flaws), values, out, grid=3, block=32 * warps, shared=shared)
    want = np.zeros_like(out)
    for tile in range(TILES):
        want = want * 3 + values[:, tile, np.arange(TILE // 4) ^ 33]
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("producer", ["lane", "warp"])
def test_ring(producer, run):
    run_ring(run, producer)


def test_ring_that_every_thread_releases(run):
    """All lanes arrive together: no bar.warp.sync is needed before."""
    run_ring(run, "warp", all_release=True, syncs=False)


# How it shows depends on who comes first.
UNSEEN = "that the bulk copy .* wrote|on its way|nobody has written"
STUCK = r"deadlock: .*mbarrier \d+ lacks in phase \d+: "


@pytest.mark.parametrize("producer", ["lane", "warp"])
@pytest.mark.parametrize(
    "flaws, message",
    [
        ({"inits": False}, "no mbarrier has been initialised"),
        ({"waits": False}, UNSEEN),
        ({"parity": 1}, f"{UNSEEN}|{STUCK}"),
        ({"expects": None}, UNSEEN),
        ({"expects": TILE + 16}, f"{STUCK}0 of 1 arrivals, 16 bytes;"),
        ({"expects": TILE - 16}, f"{STUCK}0 of 1 arrivals, 16 bytes too many"),
        ({"releases": False}, f"copies to .* lane 1 read|{UNSEEN}|1 arrivals at|{STUCK}"),
        ({"syncs": False}, "copies to .* lane 1 read"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_broken_ring(producer, flaws, message, run):
    with pytest.raises(EmulatorError, match=message):
        run_ring(run, producer, **flaws)


def test_every_lane_loads(run):
    """32 arrivals, 32 copies; and who polls sleeps in between."""
    body = f"""
{init(at0=32)}
    ld.param.u64 %rd1, [values];
    shl.b32 %r5, %r0, 4;
    cvt.s64.s32 %rd2, %r5;
    add.s64 %rd1, %rd1, %rd2;
    add.s32 %r6, %r4, %r5;
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r3], 16;
    mbarrier.arrive.release.cta.shared::cta.b64 _, [%r3];
    {LOAD_BYTES} [%r6], [%rd1], 16, [%r3];
$poll:
    mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p1, [%r3], 0, 1000;
    @%p1 bra $landed;
    nanosleep.u32 20;
    bra $poll;
$landed:
{copy_out(512, 32)}
"""
    values = np.random.default_rng(0).integers(0, 255, 512).astype(np.uint8)
    out = np.zeros_like(values)
    run(kernel([".param .u64 values", ".param .u64 out"], body), values, out, shared=FRONT + 512)
    np.testing.assert_array_equal(out, values)


# ---- misuse --------------------------------------------------------------------------------------

INIT = "    mbarrier.init.shared.b64 [%r3], 2;\n"
FENCE = "    fence.proxy.async;\n"
ARRIVE = "    mbarrier.arrive.shared.b64 %rd5, [%r3];\n"


def test_states(run):
    """The state that an arrival returns is of the phase that it arrived in."""
    test = "    mbarrier.test_wait.shared.b64 %p1, [%r3], %rd5;\n    selp.u32 %r{}, 1, 0, %p1;\n"
    first = INIT + ARRIVE + test.format(20)
    second = "    mbarrier.arrive.release.cta.shared::cta.b64 _, [%r3], 1;\n" + test.format(21)
    write = "    ld.param.u64 %rd1, [out];\n    st.global.v2.u32 [%rd1], {%r20, %r21};\n"
    out = np.full(2, 9, np.uint32)
    run(kernel([".param .u64 out"], by_thread(0, first + second + write)), out, shared=FRONT)
    np.testing.assert_array_equal(out, [0, 1])


@pytest.mark.parametrize(
    "body, message",
    [
        (ARRIVE, "no mbarrier has been initialised at shared address 1024"),
        (INIT + INIT, "an mbarrier is at shared address 1024 already"),
        ("    mbarrier.init.shared.b64 [%r3], 0;", "an mbarrier for 0 arrivals"),
        ("    mbarrier.init.shared.b64 [%r3+4], 1;", "multiple of 8"),
        (INIT + "    mbarrier.arrive.shared.b64 _, [%r3], 3;", "3 arrivals at mbarrier 1024"),
        (INIT + "    mbarrier.expect_tx.relaxed.cta.shared.b64 [%r3], 1048576;", "cannot count"),
        (INIT + "    mbarrier.inval.shared.b64 [%r3];\n" + ARRIVE, "no mbarrier"),
        (INIT + "    mbarrier.inval.shared.b64 [%r3];\n" + INIT, None),
        (INIT + "    st.shared.u32 [%r3], %r0;\n" + ARRIVE, "has been overwritten"),
        (INIT + "    mbarrier.try_wait.parity.shared.b64 %p1, [%r3], 2;", "parity is 0 or 1"),
        (
            INIT + "    mov.u64 %rd5, 5;\n    mbarrier.test_wait.shared.b64 %p1, [%r3], %rd5;",
            "state",
        ),
        ("    setmaxnreg.dec.sync.aligned.u32 20;", "cannot have 20 registers"),
        (FENCE + INIT + f"    {LOAD_BYTES} [%r4], [%rd1], 64, [%r3];", "fence.mbarrier_init"),
        (INIT + FENCE + f"    {LOAD_BYTES} [%r4], [%rd1], 64, [%r3];", None),
        (INIT + FENCE + f"    {LOAD_BYTES} [%r4], [%rd1], 24, [%r3];", "multiples of 16"),
        (INIT + FENCE + f"    {LOAD_BYTES} [%r4], [%rd1], 0, [%r3];", "multiples of 16"),
        (INIT + FENCE + f"    {LOAD_BYTES} [%r4], [%rd1+8], 64, [%r3];", "multiples of 16"),
        (INIT + FENCE + f"    {LOAD_BYTES} [%r4+8], [%rd1], 64, [%r3];", "not aligned to 16"),
        (INIT + FENCE + f"    {LOAD_BYTES} [%r4+992], [%rd1], 64, [%r3];", "the block has"),
        (INIT + FENCE + f"    {LOAD_BYTES} [%r4], [%rd1], 1024, [%r3];", "no tensor"),
    ],
)
def test_misuse(body, message):
    ptx = kernel([".param .u64 values"], "    ld.param.u64 %rd1, [values];\n" + by_thread(0, body))
    values = np.zeros(512, np.uint8)
    if message is None:
        emulator().run(ptx, values, shared=2 * FRONT)
        return
    with pytest.raises(EmulatorError, match=message):
        emulator().run(ptx, values, shared=2 * FRONT)


@pytest.mark.parametrize(
    "box, swizzle, place, message",
    [
        ((8, 64), "128", 512, "not aligned to 1024"),
        ((8, 32), "64", 256, "not aligned to 512"),
        ((8, 16), "32", 128, "not aligned to 256"),
        ((8, 8), "none", 64, "not aligned to 128"),
        ((8, 32), "128", 0, "not documented"),
        ((32, 64), "128", 0, "the block has"),
        ((1, 8, 8), "none", 0, "has 3 dimensions, not 2"),
    ],
)
def test_boxes_that_cannot_be(box, swizzle, place, message, allowed):
    array = strided((2, 8, 64)[-len(box) :], np.float16)
    allowed(array)
    body = (
        INIT
        + FENCE
        + f"    mov.u32 %r10, 0;\n    mov.u32 %r11, 0;\n    add.s32 %r4, %r4, {place};\n"
    )
    ptx = kernel([MAP], by_thread(0, body + tensor_load(2)))
    with pytest.raises(EmulatorError, match=message):
        emulator().run(ptx, tensor_map(array, box, swizzle), shared=3 * FRONT)


def test_bytes_that_are_no_map():
    body = INIT + FENCE + "    mov.u32 %r10, 0;\n    mov.u32 %r11, 0;\n"
    with pytest.raises(EmulatorError, match="no tensor map is at address 0"):
        emulator().run(kernel([MAP], by_thread(0, body + tensor_load(2))), bytes(128), shared=4096)


def test_load_from_beyond_the_tensor_of_the_launch(allowed):
    """The map promises more than the launch may read."""
    array = strided((8, 64), np.float16)
    allowed(array[:7])
    body = INIT + FENCE + "    mov.u32 %r10, 0;\n    mov.u32 %r11, 0;\n"
    with pytest.raises(EmulatorError, match="no tensor of the launch"):
        ptx = kernel([MAP], by_thread(0, body + tensor_load(2)))
        emulator().run(ptx, tensor_map(array, (8, 64)), shared=4096)
