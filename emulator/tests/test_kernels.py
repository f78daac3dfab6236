"""The kernels on the emulator: right for every schedule, free of bank conflicts, and broken ones are caught."""

import functools
import importlib.machinery
import importlib.util
import itertools
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import emulator
from flash_attn_sm120 import _C, common_kernels, explain, flash_attn_func, jit
from helpers.devices import EMULATOR
from helpers.reference import assert_close
from helpers.tiles import LARGE_TILES, PRODUCERS, constants, tile_row, use_tiles

pytestmark = pytest.mark.skipif(bool(EMULATOR.missing), reason=EMULATOR.missing)

# In fp16 those of two head dims: its constants have nothing to do with tiles.
COMMON_PLANS = [
    plan
    for plan in (common_kernels.common_plans(120) if not EMULATOR.missing else ())
    if re.search("_bf16_|_d64_dv64|_d128_dv128", plan.variant)
]

SCHEDULES = [(seed, late) for seed in range(8) for late in (False, True)]


def emulated(*shape, dtype=torch.bfloat16):
    return (torch.randn(shape) + 0.25).to(dtype).as_subclass(emulator.EmulatedTensor)


def make_qkv(batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v, dtype):
    return (
        emulated(batch, seqlen_q, heads, head_dim, dtype=dtype),
        emulated(batch, seqlen_k, heads_kv, head_dim, dtype=dtype),
        emulated(batch, seqlen_k, heads_kv, head_dim_v, dtype=dtype),
    )


def inputs_of(plan, seqlen_q, seqlen_k):
    """q, k, v and options of a call that the plan is for."""
    of = constants(plan)
    dtype = {1: torch.float16, 2: torch.bfloat16}[of["DTYPE"]]
    qkv = make_qkv(1, seqlen_q, seqlen_k, 2, 1, of["HEAD_DIM"], of["HEAD_DIM_V"], dtype)
    return qkv, {"causal": bool(of["MASK_RIGHT"])}


# So that two query heads share a KV head, and not the rows of a block: test_pack_gqa.py has those.
attend = functools.partial(flash_attn_func, pack_gqa=False)
plan_of = functools.partial(explain, pack_gqa=False)


def tma_row_of(producer, q, k, v, **options):
    """The call's tile, as a row for forward_tma."""
    return tile_row(explain(q, k, v, **options), kernel="forward_tma", producer=producer)


# ---- the kernels that ship -----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def large_tiles():
    """Unless a test uses others: some need several tiles of keys, or know what a block does."""
    with use_tiles(*LARGE_TILES):
        yield


@pytest.mark.parametrize("plan", COMMON_PLANS, ids=lambda plan: plan.variant)
def test_common_kernels_at_every_tile_edge(plan):
    edges_q, edges_k = ([1, tile - 1, tile, tile + 1] for tile in (plan.tile_m, plan.tile_n))
    if plan.variant.endswith("_right"):
        edges_q[0] = 2  # causal hides nothing from a single query, and is another kernel then
    with use_tiles(tile_row(plan)):
        for seqlen_q in edges_q:
            for seqlen_k in edges_k:
                (q, k, v), options = inputs_of(plan, seqlen_q, seqlen_k)
                assert plan_of(q, k, v, **options).variant == plan.variant
                out, lse = attend(q, k, v, return_lse=True, **options)
                assert_close(out, lse, q, k, v, **options)


CASES = [
    ((1, 130, 200, 4, 2, 64, 64), {"causal": True}),
    ((1, 130, 200, 2, 1, 64, 64), {"window_size": (30, 20)}),
    ((1, 130, 500, 1, 1, 64, 64), {}),
    ((1, 70, 300, 2, 1, 128, 128), {}),
    ((1, 140, 140, 1, 1, 96, 40), {"causal": True}),
    ((1, 70, 140, 1, 1, 256, 256), {"causal": True}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rows", [(), LARGE_TILES], ids=["chosen", "large"])
def test_every_schedule_gives_the_same_bits(case, rows):
    """Eight orders of the warps, with asynchronous copies that land at once or at the last moment."""
    sizes, options = case
    q, k, v = make_qkv(*sizes, torch.bfloat16)
    first = None
    for seed, late in SCHEDULES:
        with emulator.emulator().settings(seed=seed, late_copies=late), use_tiles(*rows):
            result = flash_attn_func(q, k, v, return_lse=True, **options)
        first = first or result
        assert all(map(torch.equal, result, first)), (seed, late)


AGAIN = 200.0  # times q: scores that grow by so much send blocks through a second pass


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("scale", [1.0, AGAIN], ids=["", "again"])
def test_every_schedule_of_the_tma_gives_the_bits_of_the_other(case, producer, scale):
    sizes, options = case
    q, k, v = make_qkv(*sizes, torch.bfloat16)
    q *= scale
    right = flash_attn_func(q, k, v, return_lse=True, **options)
    with use_tiles(tma_row_of(producer, q, k, v, **options)):
        for seed, late in SCHEDULES:
            with emulator.emulator().settings(seed=seed, late_copies=late):
                result = flash_attn_func(q, k, v, return_lse=True, **options)
            assert all(map(torch.equal, result, right)), (seed, late)


ODD_HEAD_DIMS = [(8, 8), (16, 24), (24, 8), (40, 72), (104, 120), (136, 16), (200, 248)]


@pytest.mark.quick("*large-(64, 64)-True*")
@pytest.mark.parametrize(
    "head_dims, causal",
    [(dims, True) for dims in (*common_kernels.COMMON_HEAD_DIMS, *ODD_HEAD_DIMS)]
    + [((64, 64), False)],
    ids=str,
)
@pytest.mark.parametrize("rows", [(), LARGE_TILES], ids=["chosen", "large"])
def test_no_bank_conflicts(head_dims, causal, rows):
    """Copies of tiles, ldmatrix and loads take the fewest passes through shared memory that there are.

    Causal calls have tiles with a mask and tiles without one, and see that an inf of V is hidden: a
    second pass loads V, too, to find it.
    """
    q, k, v = make_qkv(1, 130, 300, 1, 1, *head_dims, torch.bfloat16)
    if causal:
        v[:, -1] = torch.inf
    with use_tiles(*rows):
        flash_attn_func(q, k, v, causal=causal)
    counters = emulator.emulator().counters()
    for kind in ("ldmatrix", "copy", "load_shared"):
        assert (counters.instructions[kind] > 0) == (kind != "load_shared" or causal)
        assert counters.wavefronts[kind] == counters.wavefronts_ideal[kind], kind


@pytest.mark.parametrize(
    "head_dims, producer",
    [*zip((*common_kernels.COMMON_HEAD_DIMS, *ODD_HEAD_DIMS), itertools.cycle(PRODUCERS))],
    ids=str,
)
def test_no_bank_conflicts_where_the_tma_writes(head_dims, producer):
    """And one instruction copies a segment, a row of which is 128 bytes at best, whoever issues it."""
    q, k, v = make_qkv(1, 130, 300, 1, 1, *head_dims, torch.bfloat16)
    v[:, -1] = torch.inf  # the last block of queries computes a second time, and loads V to find it
    with use_tiles(tma_row_of(producer, q, k, v, causal=True)):
        plan = explain(q, k, v, causal=True)
        flash_attn_func(q, k, v, causal=True)
    counters = emulator.emulator().counters()
    for kind in ("ldmatrix", "load_shared"):
        assert counters.wavefronts[kind] == counters.wavefronts_ideal[kind] > 0, kind
    most = max(sum(-(-dim // 16) for dim in head_dims), 2) * -(-300 // plan.tile_n)
    assert 0 < counters.instructions["copy"] <= 2 * (most + 2) * plan.blocks


@pytest.mark.quick
def test_counters_count():
    """A call of one block, whose every product and copy is known in number."""
    q, k, v = make_qkv(1, 128, 256, 1, 1, 64, 64, torch.bfloat16)
    plan = explain(q, k, v)
    flash_attn_func(q, k, v)
    counters = emulator.emulator().counters()
    products = 2 * 128 * 256 * 64 // (16 * 8 * 16)
    assert counters.instructions["mma"] == products
    assert counters.instructions["ldmatrix"] == 2 * 256 * 64 * 2 // 512 * plan.warps
    assert counters.instructions["copy"] >= 2 * 256 * 64 * 2 // (32 * 16)
    assert counters.global_bytes == sum(x.nbytes for x in (q, k, v)) + 128 * 64 * 2


# ---- broken kernels ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """A change of the kernels' source, and what the emulator or the reference says of it."""

    file: str
    right: str
    wrong: str
    said: str  # of the report; "": the launch ends, with wrong numbers
    sizes: tuple[int, ...] = (1, 140, 400, 2, 1, 64, 64)
    options: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0  # of q
    producer: str = ""  # of forward_tma; else the kernel is forward
    num_splits: int = 1


CAUSAL = {"causal": True}

BROKEN = {
    "no barrier in the fast loop": Broken(
        "forward.cuh",
        "ring.wait_all(); /* barrier, as above */\n",
        "",
        "no barrier between",
    ),
    "no barrier in the careful loop": Broken(
        "cp_async_ring.cuh",
        "return __syncthreads_or(x);",
        "return x;",
        "with no bar|on its way",
        options=CAUSAL,
        scale=AGAIN,
    ),
    "no barrier before the second time": Broken(
        "forward.cuh",
        "!__syncthreads_or(flagged)",
        "!flagged",
        "with no barrier|the warp has diverged",
        scale=AGAIN,
    ),
    "a barrier for one warp": Broken(
        "forward.cuh",
        "float *lse_gmem",
        "if (threadIdx.x < 32)\n        __syncthreads();\n    float *lse_gmem",
        "barrier 0 lacks",
    ),
    "a barrier for half a warp": Broken(
        "forward.cuh",
        "float *lse_gmem",
        "if (threadIdx.x % 32 < 16)\n        __syncthreads();\n    float *lse_gmem",
        "a barrier that only the lanes 0000ffff",
    ),
    "waits for one group too few": Broken(
        "cp_async_ring.cuh",
        "cp_async_wait<STAGES - 2>();",
        "cp_async_wait<STAGES - 1>();",
        "on its way: wait for it first",
    ),
    "refills before the barrier": Broken(
        "forward.cuh",
        "ring.wait_all(); /* barrier, as above */\n",
        "ring.refill(i);\n                    ring.wait_all();\n                    if (false)\n",
        "no barrier between",
    ),
    "refills the stage in use": Broken(
        "cp_async_ring.cuh",
        "copy_next_tile(before(), TILE_N)",
        "copy_next_tile(stage, TILE_N)",
        "shared bytes",
    ),
    "a ring that starts one tile short": Broken(
        "cp_async_ring.cuh",
        "if (i < tiles)",
        "if (i < tiles && i != 1)",
        "that nobody has written",
    ),
    "a ring with a stage too many": Broken(
        "tile.cuh",
        "constexpr int RING_BYTES = STAGES * STAGE_BYTES;",
        "constexpr int RING_BYTES = (STAGES + 1) * STAGE_BYTES;",
        "block's",
    ),
    "one query too many is read": Broken(
        "queries.cuh",
        "chunk < HEAD_DIM / CHUNK_DIMS && row < block.row_count();",
        "chunk < HEAD_DIM / CHUNK_DIMS && row <= block.row_count();",
        "no tensor",
    ),
    "one key too many is read": Broken(
        "layout.cuh",
        "row + r < rows)",
        "row + r <= rows)",
        "no tensor",
    ),
    "the padding of a row is read": Broken(
        "layout.cuh",
        "const bool padding = c + layout::COLS > layout::CHUNKS && col + c >= layout::CHUNKS;",
        "const bool padding = false;",
        "no tensor",
        sizes=(1, 140, 400, 1, 1, 24, 24),
    ),
    "one row of the output too many": Broken(
        "forward.cuh",
        "store_row<O_FRAGS>(out_row, O_rmem[m], half, inverse, stores);",
        "store_row<O_FRAGS>(out_row, O_rmem[m], half, inverse, row <= block.row_count());",
        "no writable tensor",
    ),
    "one row of the lse too many": Broken(
        "forward.cuh",
        "if (lse_gmem && stores)",
        "if (lse_gmem && row <= block.row_count())",
        "no writable tensor",
        sizes=(1, 140, 400, 2, 2, 64, 64),
    ),
    "the output goes to q": Broken(
        "forward.cuh",
        "static_cast<element *>(params.out)",
        "static_cast<element *>(const_cast<void *>(params.q))",
        "may only read",
    ),
    "a misaligned store": Broken(
        "layout.cuh",
        "row + (n + quad_lane()) * 8)",
        "row + (n + quad_lane()) * 8 + 4)",
        "no multiple of 16",
    ),
    "a sum that is never cleared": Broken(
        "softmax.cuh", "            l_rmem[m][half] = 0.0f;\n", "", "never been written"
    ),
    "a shuffle of half a warp": Broken(
        "layout.cuh",
        "return x + __shfl_xor_sync(0xffffffff, x, 2);",
        "return quad_lane() < 2 ? x + __shfl_xor_sync(0xffffffff, x, 2) : x;",
        "lanes",
    ),
    "the halves of a K fragment are swapped": Broken(
        "product.cuh",
        "A_rmem[m][k + step], B[0], B[1]",
        "A_rmem[m][k + step], B[1], B[0]",
        "",
    ),
    "a fragment takes the place of the next": Broken(
        "product.cuh",
        "2 * (step * COLUMNS + column)",
        "2 * (step * COLUMNS)",
        "",
    ),
    "the registers of Q are swapped": Broken(
        "queries.cuh",
        "Q_rmem[m][chunk / 2][chunk % 2 * 2 + half]",
        "Q_rmem[m][chunk / 2][chunk % 2 + 2 * half]",
        "",
    ),
    "V is not transposed": Broken(
        "kv_operands.cuh",
        "ldmatrix_x4_trans(x, layout::moved(smem, 16 * k",
        "ldmatrix_x4(x, layout::moved(smem, 16 * k",
        "",
    ),
    "another swizzle is read than written": Broken(
        "tile.cuh",
        ": V_layout::offset(lane % 16, lane / 16);",
        ": V_layout::offset(lane % 16, 0) ^ lane / 16 * FA_CHUNK_BYTES * 2;",
        "",
    ),
    "a diagonal that is one off": Broken(
        "mask.cuh",
        "min(query + right + 1, seqlen_k)",
        "min(query + right, seqlen_k)",
        "",
        options=CAUSAL,
    ),
    "a sum over half a quad": Broken(
        "layout.cuh", "return x + __shfl_xor_sync(0xffffffff, x, 2);", "return x;", ""
    ),
    "an element of P is rounded into the wrong half": Broken(
        "softmax.cuh", "pack<OPERAND>(p0, p1)", "pack<OPERAND>(p1, p0)", ""
    ),
    "a part without its last tile": Broken(
        "forward_walk.cuh",
        "end = begin + share.quotient + (split < share.rest);",
        "end = begin + share.quotient;",
        "",
        num_splits=3,
    ),
    "all parts go to one place": Broken(
        "forward.cuh",
        "split_offset + block.lse_offset",
        "block.lse_offset",
        "",
        num_splits=3,
    ),
    "a part weighs what another does": Broken(
        "combine.cu", "exp2_approx(lse - raised)", "exp2_approx(-above)", "", num_splits=3
    ),
    "no barrier between the slices": Broken(
        "combine.cu",
        "__syncthreads(); /* every slice is there */",
        "",
        "with no ba|before anyone wrote",
        num_splits=7,
    ),
    "a row of parts too many": Broken(
        "combine.cu",
        "row < params.rows",
        "row < params.rows + 1",
        "belongs to no tensor",
        num_splits=3,
    ),
}


def broken_ring(right, wrong, said, file="tma_ring.cuh", **changes):
    return Broken(file, right, wrong, said, **{"producer": "thread", **changes})


# Of tiles that are read before they have come, and refilled before all have read them.
TOO_EARLY = "on its way|was not waited for|nobody has written|lacks"
TOO_SOON = "with no bar|was not waited for|1 arrivals"
EMPTY_WAIT = "mbarrier_wait(empty(before()), stage == 0 ? parity ^ 1 : parity);"

BROKEN_TMA = {
    "the other parity is waited for": broken_ring(
        "mbarrier_wait(full(stage), parity)",
        "mbarrier_wait(full(stage), parity ^ 1)",
        TOO_EARLY,
    ),
    "nobody waits for the tile": broken_ring("mbarrier_wait(full(stage), parity)", "", TOO_EARLY),
    "no bytes are expected": broken_ring(
        "mbarrier_expect(full(stage), STAGE_BYTES)",
        "mbarrier_arrive(full(stage))",
        TOO_EARLY,
    ),
    "too many bytes are expected": broken_ring(
        "mbarrier_expect(full(stage), STAGE_BYTES)",
        "mbarrier_expect(full(stage), STAGE_BYTES + 16)",
        "lacks",
    ),
    "K alone is expected": broken_ring(
        "mbarrier_expect(full(stage), STAGE_BYTES)",
        "mbarrier_expect(full(stage), K_layout::BYTES)",
        TOO_EARLY,
    ),
    "nobody waits for the release": broken_ring(EMPTY_WAIT, ";", TOO_SOON),
    "a producer warp does not wait for the release": broken_ring(
        EMPTY_WAIT, ";", TOO_SOON, producer="warp"
    ),
    "the release before is waited for": broken_ring(
        EMPTY_WAIT,
        EMPTY_WAIT.replace("parity ^ 1 : parity", "parity : parity ^ 1"),
        TOO_SOON + "|lacks",
    ),
    "no barrier releases the stage": broken_ring(
        "if (!HAS_EMPTY_MBARRIERS)\n            __syncthreads();",
        ";",
        TOO_SOON,
        producer="barrier",
    ),
    "a lane releases for all while others still read": broken_ring(
        "__syncwarp(); /* all lanes have read the tile */", "", TOO_SOON
    ),
    "a release without one warp": broken_ring(
        "mbarrier_init(empty(i * STAGE_BYTES), WARPS)",
        "mbarrier_init(empty(i * STAGE_BYTES), WARPS - 1)",
        TOO_SOON + "|lacks",
    ),
    "a release that waits for a warp too many": broken_ring(
        "mbarrier_init(empty(i * STAGE_BYTES), WARPS)",
        "mbarrier_init(empty(i * STAGE_BYTES), WARPS + 1)",
        "lacks",
    ),
    "every lane releases": broken_ring("if (elect_one())", "", "arrivals"),
    "the stage in use is refilled": broken_ring(
        "load(before(), i + STAGES - 1)",
        "load(stage, i + STAGES - 1)",
        TOO_SOON + "|on its way",
    ),
    "the first stage is loaded twice": broken_ring(
        "to = to == RING_BYTES - STAGE_BYTES ? 0 : to + STAGE_BYTES;",
        "",
        TOO_SOON + "|on its way",
    ),
    "the second pass starts at phase 0 again": broken_ring(
        "        walk = next;",
        "        walk = next;\n        parity = 0;",
        TOO_EARLY + "|" + TOO_SOON,
        scale=AGAIN,
        sizes=(1, 140, 300, 2, 1, 64, 64),
    ),
    "the second pass starts at stage 0 again": broken_ring(
        "        walk = next;",
        "        walk = next;\n        rewind();",
        TOO_EARLY + "|" + TOO_SOON,
        scale=AGAIN,
    ),
    "no fence behind the mbarriers": broken_ring("fence_mbarrier_init();", "", "fence"),
    "no barrier behind the mbarriers": broken_ring(
        "__syncthreads(); /* barrier: the",
        "/* barrier: the",
        "no mbarrier|with no bar",
    ),
    "a vote that a producer warp is counted in": broken_ring(
        "barrier_or<COMPUTING_THREADS, THREADS>(x)",
        "__syncthreads_or(x)",
        "barrier 0|lacks",
        producer="warp",
        options=CAUSAL,
        scale=AGAIN,
    ),
    "a producer warp that leaves before the last vote": Broken(
        "forward.cuh",
        "ring.feed();\n            flagged = 0;",
        "ring.feed();\n            return;",
        "barrier 0 lacks|ended",
        producer="warp",
    ),
    "the mbarriers lie in the ring": broken_ring(
        "return smem + RING_BYTES + stage",
        "return smem + RING_BYTES - 64 + stage",
        "shared bytes",
    ),
    "keys that are one off": broken_ring(
        "return (end - 1 - i) * TILE_N;",
        "return (end - 1 - i) * TILE_N + 1;",
        "",
        file="kv_source.cuh",
    ),
    "V's segments from K's map": broken_ring(
        "K_layout::BYTES, params.v_map", "K_layout::BYTES, params.k_map", "", file="kv_source.cuh"
    ),
    "head and batch are swapped": broken_ring(
        "params.k_map, mbarrier, row, walk.head_kv, walk.entry);",
        "params.k_map, mbarrier, row, walk.entry, walk.head_kv);",
        "",
        file="kv_source.cuh",
        sizes=(1, 140, 400, 2, 2, 64, 64),
    ),
}


@pytest.fixture
def attend_with(tmp_path, monkeypatch):
    """attend_with(edits, q, k, v, **options): out and lse of kernels whose source has been edited."""
    kernels = {path.name: path.read_text() for path in jit.kernel_directory().glob("*.*")}

    def attend(edits, q, k, v, causal=False, rows=(), num_splits=1):
        for name, text in kernels.items():
            for file, right, wrong in edits:
                if file == name:
                    assert text.count(right) == 1, (file, right)
                    text = text.replace(right, wrong)
            (tmp_path / name).write_text(text)
        # Another instance of the extension: this one has loaded the right kernels.
        loader = importlib.machinery.ExtensionFileLoader(_C.__name__, _C.__file__)
        spec = importlib.util.spec_from_loader(_C.__name__, loader)
        extension = importlib.util.module_from_spec(spec)
        loader.exec_module(extension)
        with monkeypatch.context() as patch:
            patch.setattr(jit, "kernel_directory", lambda: tmp_path)
            patch.setenv("FA_SM120_CACHE_DIR", str(tmp_path / "cache"))
            patch.setenv("FA_SM120_DRIVER", str(emulator.library()))
            with use_tiles(*(rows or LARGE_TILES), extension=extension):
                options = {"causal": causal, "num_splits": num_splits}
                return extension.forward(q, k, v, return_lse=True, **options)

    return attend


@pytest.mark.parametrize(
    "broken", [*BROKEN.values(), *BROKEN_TMA.values()], ids=[*BROKEN, *BROKEN_TMA]
)
def test_broken_kernels_are_caught(attend_with, broken):
    """On every schedule that is tried; and the same call of the right kernel is not complained of."""
    q, k, v = make_qkv(*broken.sizes, torch.bfloat16)
    q *= broken.scale
    edits = [(broken.file, broken.right, broken.wrong)]
    options = {**broken.options, "num_splits": broken.num_splits}
    rows = [tma_row_of(broken.producer, q, k, v, **broken.options)] if broken.producer else []
    for seed in range(4):
        for late in (False, True):
            with emulator.emulator().settings(seed=seed, late_copies=late):
                with use_tiles(*(rows or LARGE_TILES)):
                    right = flash_attn_func(q, k, v, return_lse=True, **options)
                assert_close(*right, q, k, v, **broken.options)
                if broken.said:
                    with pytest.raises(RuntimeError, match=broken.said):
                        attend_with(edits, q, k, v, **options, rows=rows)
                else:
                    out, lse = attend_with(edits, q, k, v, **options, rows=rows)
                    with pytest.raises(AssertionError):
                        assert_close(out, lse, q, k, v, **broken.options)


@pytest.mark.parametrize("scale", [1.0, AGAIN], ids=["", "again"])
def test_one_code_for_both_passes(attend_with, scale):
    """As on 8.x, where the first pass looks for inf and NaN at hidden keys of V."""
    q, k, v = make_qkv(1, 140, 400, 2, 1, 64, 64, torch.bfloat16)
    v[:, -1] = torch.inf  # the last query alone sees it
    edits = [("forward.cuh", "(MASKED || BLOCK_SPARSE) && __CUDA_ARCH__ >= 900", "false")]
    out, lse = attend_with(edits, q * scale, k, v, **CAUSAL)
    assert_close(out, lse, q * scale, k, v, **CAUSAL)


@pytest.mark.quick
def test_a_report_names_the_place(attend_with):
    q, k, v = make_qkv(1, 140, 400, 2, 1, 64, 64, torch.bfloat16)
    broken = BROKEN["no barrier in the fast loop"]
    with pytest.raises(RuntimeError) as raised:
        attend_with([(broken.file, broken.right, broken.wrong)], q, k, v)
    report = str(raised.value)
    for part in ("forward: ", "PTX line ", ".cuh:", "forward.cu:", "block (", "warp ", "lane "):
        assert part in report, report


@pytest.mark.quick
def test_the_next_good_call_works(attend_with):
    q, k, v = make_qkv(1, 140, 400, 2, 1, 64, 64, torch.bfloat16)
    broken = BROKEN["one query too many is read"]
    with pytest.raises(RuntimeError):
        attend_with([(broken.file, broken.right, broken.wrong)], q, k, v)
    out, lse = attend_with([], q, k, v)
    assert_close(out, lse, q, k, v)
