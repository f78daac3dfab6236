"""What bounds the kernels on sm_120, by their SASS: gates on the main loop. No GPU needed."""

import itertools
import re
import sys
from pathlib import Path

import pytest

from flash_attn_sm120 import common_kernels
from helpers import builds

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("runs in a checkout alone", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import sass  # noqa: E402
import sass_report  # noqa: E402

from flash_attn_sm120.quantized import RECIPES, speed  # noqa: E402


def listing(text):
    """As nvdisasm prints it: addresses before the instructions, labels in the first column."""
    address = itertools.count(0, 16)
    lines = [line.strip() for line in text.strip().splitlines()]
    return "\n".join(
        line if line.endswith(":") else f"        /*{next(address):04x}*/      {line} ;"
        for line in lines
    )


# Careful tiles, with a shuffle whose detour for divergent warps lies at the end; then fast ones,
# with a loop over sub-tiles; a loop that multiplies without waiting; and one around everything.
KERNEL = listing("""
    S2R R0, SR_TID.X
    .L_again:
    MOV R9, RZ
    .L_careful:
    BAR.RED.OR.DEFER_BLOCKING 0x0, P0
    HMMA.16816.F32.BF16 R4, R16, R80, RZ
    FMNMX R3, R4, R5, !PT
    BRA.DIV UR4, `(.L_detour)
    SHFL.BFLY PT, R3, R3, 0x1, 0x1f
    .L_met:
    FMUL R4, R4, R3
    @P1 BRA `(.L_careful)
    .L_fast:
    DEPBAR.LE SB0, 0x1
    BAR.SYNC.DEFER_BLOCKING 0x0
    BSSY.RECONVERGENT B2, `(.L_copied)
    @P2 BRA `(.L_copied)
    @!PT LDS RZ, [RZ]
    LDGSTS.E.BYPASS.128 [R13], desc[UR6][R238.64]
    .L_copied:
    UMOV UR4, URZ
    .L_sub:
    LDSM.16.M88.4 R80, [R3+UR4]
    HMMA.16816.F32.BF16 R4, R16, R80, RZ
    HMMA.16816.F32.BF16 R8, R16, R82, RZ
    MUFU.EX2 R4, R4
    BRA.U UP1, `(.L_sub)
    IADD3 R9, PT, PT, R9, 0x1, RZ
    @P1 BRA `(.L_fast)
    .L_plain:
    HMMA.16816.F32.BF16 R4, R16, R80, RZ
    @P1 BRA `(.L_plain)
    @P3 BRA `(.L_again)
    STG.E.128 desc[UR4][R2.64], R4
    EXIT
    .L_detour:
    WARPSYNC.COLLECTIVE R16, `(.L_met)
    SHFL.BFLY PT, R3, R3, 0x1, 0x1f
    BRA `(.L_met)
    .L_trap:
    BRA `(.L_trap);
""")


def opcodes(code, loop):
    return [code[i].opcode.split(".")[0] for i in loop.body]


def test_parse():
    code = sass.parse(KERNEL)
    lines = [line for line in KERNEL.splitlines() if "/*" in line]
    assert len(code) == len(lines)
    assert str(code[1]).split() == ["MOV", "R9,", "RZ"]
    branch = next(i for i in code if i.guard == "@P1")
    assert (branch.opcode, branch.operands) == ("BRA", "`(.L_careful)")
    assert code[branch.target].opcode == "BAR.RED.OR.DEFER_BLOCKING"
    region = next(i for i in code if i.opcode.startswith("BSSY"))
    assert region.target is None  # no jump
    assert not any(i.opcode.startswith("LDS.") or i.opcode == "LDS" for i in code)  # @!PT: a NOP
    assert [i.operands for i in code if i.opcode == "NOP"] == ["LDS"]


@pytest.mark.parametrize(
    "line, falls_through",
    [
        ("FADD R0, R0, R1", True),
        ("@P0 BRA `(.L_x)", True),
        ("BRA `(.L_x)", False),
        ("BRA.U UP1, `(.L_x)", True),
        ("BRA.DIV UR4, `(.L_x)", True),
        ("EXIT", False),
        ("@!P2 EXIT", True),
        ("RET.REL.NODEC R18 `(forward)", False),
    ],
)
def test_falls_through(line, falls_through):
    (instruction,) = sass.parse(listing(line))
    assert instruction.falls_through == falls_through


def test_loops():
    code = sass.parse(KERNEL)
    loops = sass.find_loops(code)
    again, careful, fast, sub, plain = loops  # neither the detour nor the trap
    assert [len(loop.body) for loop in loops] == [25, 7, 14, 5, 2]
    assert opcodes(code, careful) == ["BAR", "HMMA", "FMNMX", "BRA", "SHFL", "FMUL", "BRA"]
    assert opcodes(code, sub) == ["LDSM", "HMMA", "HMMA", "MUFU", "BRA"]
    assert all(again.holds(loop) for loop in (careful, fast, sub, plain))
    assert fast.holds(sub) and not sub.holds(fast) and not fast.holds(fast)


def test_main_loop():
    code = sass.parse(KERNEL)
    main = sass.find_main_loop(code, sub_tiles=2)
    assert [(i.opcode.split(".")[0], runs) for i, runs in main] == [
        ("DEPBAR", 1),
        ("BAR", 1),
        ("BSSY", 1),
        ("BRA", 1),
        ("NOP", 1),
        ("LDGSTS", 1),
        ("UMOV", 1),
        ("LDSM", 2),
        ("HMMA", 2),
        ("HMMA", 2),
        ("MUFU", 2),
        ("BRA", 2),
        ("IADD3", 1),
        ("BRA", 1),
    ]


def test_main_loop_that_polls_an_mbarrier():
    """Polling, laid out beyond the end, counts once, and is no loop over tiles."""
    code = sass.parse(
        listing("""
        .L_tile:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3], R4
        @!P1 BRA `(.L_poll)
        .L_landed:
        HMMA.16816.F32.BF16 R4, R16, R80, RZ
        @P2 BRA `(.L_tile)
        EXIT
        .L_poll:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3], R4
        @!P1 BRA `(.L_poll)
        BRA `(.L_landed)
        """)
    )
    main = sass.find_main_loop(code, sub_tiles=4)
    assert [(i.opcode[:4], runs) for i, runs in main] == [
        ("SYNC", 1),
        ("BRA", 1),
        ("HMMA", 1),
        ("BRA", 1),
    ]


def test_what_is_done_where_a_max_rises_is_not_counted():
    """The code behind a vote; not what one thread does for all."""
    code = sass.parse(
        listing("""
        .L_tile:
        BAR.SYNC.DEFER_BLOCKING 0x0
        HMMA.16816.F32.BF16 R4, R16, R80, RZ
        VOTE.ANY P1, P1
        @!P1 BRA `(.L_same)
        FMUL R4, R4, R3
        MUFU.EX2 R3, R3
        .L_same:
        @P4 BRA `(.L_asked)
        UTMALDG.4D [UR4], [UR6]
        .L_asked:
        @P2 BRA `(.L_tile)
        EXIT
        """)
    )
    main = sass.find_main_loop(code, sub_tiles=1)
    names = [i.opcode.split(".")[0] for i, _ in main]
    assert names == ["BAR", "HMMA", "VOTE", "BRA", "BRA", "UTMALDG", "BRA"]


def test_the_shortest_way_copies_and_multiplies_all():
    """Around a mask and a rescale, not around the copies of the next tile, which a branch skips."""
    code = sass.parse(
        listing("""
        .L_tile:
        BAR.SYNC.DEFER_BLOCKING 0x0
        @P0 BRA `(.L_last)
        LDGSTS.E.BYPASS.128 [R13], desc[UR6][R238.64]
        .L_last:
        @P1 BRA `(.L_whole)
        .L_look:
        LDS R3, [R4]
        @P3 BRA `(.L_look)
        .L_whole:
        LDSM.16.M88.4 R80, [R3]
        IMMA.16832.S8.S8 R4, R16.ROW, R80.COL, R4
        @P1 BRA `(.L_unmasked)
        FSEL R4, R4, -INF, P2
        FSEL R5, R5, -INF, P2
        BRA `(.L_met)
        .L_unmasked:
        FMNMX R3, R4, R5, !PT
        .L_met:
        @!P4 BRA `(.L_same)
        FMUL R4, R4, R3
        .L_same:
        QMMA.16832.F32.E4M3.E4M3 R4, R16, R80, R4
        @P2 BRA `(.L_tile)
        EXIT
        """)
    )
    names = [i.opcode.split(".")[0] for i, _ in sass.find_shortest_way(code)]
    way = ["BAR", "BRA", "LDGSTS", "BRA", "LDSM", "IMMA", "BRA", "FMNMX", "BRA", "QMMA", "BRA"]
    assert names == way


def test_no_main_loop():
    with pytest.raises(ValueError, match="no loop"):
        sass.find_main_loop(sass.parse(listing("FADD R0, R0, R1\nEXIT")), 1)


# Two groups of warps in one loop: those with exponentials have a way with a mask and one without,
# laid out around the other group's; then a part that all share, and what one thread does for all.
PAIR = listing("""
    .L_tile:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3], R4
    BRA.U UP0, `(.L_other_group)
    BRA.U UP1, `(.L_plain)
    HMMA.16816.F32.BF16 R4, R16, R80, RZ
    ISETP.GE.AND P0, PT, R4, R5, PT
    MUFU.EX2 R4, R4
    BRA `(.L_met)
    .L_other_group:
    LDSM.16.M88.4 R80, [R3]
    @!P1 BRA `(.L_poll)
    .L_landed:
    HMMA.16816.F32.BF16 R8, R16, R80, RZ
    BRA `(.L_met)
    .L_plain:
    HMMA.16816.F32.BF16 R12, R16, R80, RZ
    MUFU.EX2 R4, R4
    .L_met:
    @P2 BRA `(.L_asked)
    UTMALDG.4D [UR4], [UR6]
    .L_asked:
    HMMA.16816.F32.BF16 R16, R16, R80, RZ
    REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R16
    @P3 BRA `(.L_tile)
    EXIT
    .L_poll:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3], R4
    @!P1 BRA `(.L_poll)
    BRA `(.L_landed)
""")


def test_paths():
    code = sass.parse(PAIR)
    (loop,), _ = sass.find_tile_loops(code)
    begin, end = ["SYNCS", "BRA"], ["BRA", "UTMALDG", "HMMA", "REDG", "BRA"]
    found = [[code[i].opcode.split(".")[0] for i in path] for path in sass.find_paths(code, loop)]
    assert sorted(found) == sorted(
        [
            [*begin, "BRA", "HMMA", "ISETP", "MUFU", "BRA", *end],
            [*begin, "LDSM", "BRA", "HMMA", "BRA", *end],
            [*begin, "BRA", "HMMA", "MUFU", *end],
        ]
    )


def test_main_loop_of_two_groups_of_warps():
    """The path without a mask, and that of the other group: what they share counts for each."""
    runs = sass.find_pair_loop(sass.parse(PAIR))
    names = [instruction.opcode.split(".")[0] for instruction, times in runs if times == 1]
    counts = {name: names.count(name) for name in ("HMMA", "MUFU", "LDSM", "ISETP", "REDG")}
    assert counts == {"HMMA": 4, "MUFU": 1, "LDSM": 1, "ISETP": 0, "REDG": 2}
    with pytest.raises(ValueError, match="both groups"):
        sass.find_pair_loop(sass.parse(KERNEL.replace("MUFU.EX2", "MUFU.RCP")))


@pytest.mark.parametrize(
    "opcode, pipe, geforce, pro",
    [
        ("HMMA.16816.F32.BF16", "tensor", 32, 16),
        ("HMMA.16816.F16", "tensor", 16, 16),
        ("QMMA.16832.F32.E4M3.E4M3", "tensor", 32, 16),
        ("QMMA.SF.16832.F32.E4M3.E4M3.E8", "tensor", 16, 16),
        ("IMMA.16832.S8.S8", "tensor", 16, 16),
        ("OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X", "tensor", 16, 16),
        ("LDSM.16.MT88.4", "shared", 16, 16),
        ("LDSM.16.M88.2", "shared", 8, 8),
        ("LDS", "shared", 4, 4),
        ("LDS.128", "shared", 16, 16),
        ("LDGSTS.E.BYPASS.128", "shared", 16, 16),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU", "shared", 16, 16),
        ("REDG.E.ADD.F32.FTZ.RN.STRONG.GPU", "shared", 4, 4),
        ("STL.64", "spills", 4, 4),
        ("MUFU.EX2", "mufu", 8, 8),
        ("FFMA", "fma", 1, 1),
        ("IMAD.SHL.U32", "fma", 2, 2),
        ("F2FP.BF16.F32.PACK_AB", "alu", 2, 2),
        ("LOP3.LUT", "alu", 2, 2),
        ("ULEA", "uniform", 2, 2),
        ("LDGDEPBAR", "control", 0, 0),
        ("UTMALDG.4D", "control", 0, 0),
        ("UBLKCP.S.G", "control", 0, 0),
        ("B2R.RESULT", "other", 0, 0),
        ("NOP", "nop", 0, 0),
    ],
)
def test_price(opcode, pipe, geforce, pro):
    found, cycles = sass.price(opcode)
    assert found == pipe and len(cycles) == len(sass.CHIPS)
    assert cycles[:2] == (geforce, pro)


def test_tensor_instructions_without_a_rate_are_refused():
    with pytest.raises(ValueError, match=r"IMMA\.16864"):
        sass.price("IMMA.16864.S4.S4")


def test_missing_nvdisasm_says_what_to_install(monkeypatch):
    pathfinder = pytest.importorskip("cuda.pathfinder")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(pathfinder, "find_nvidia_binary_utility", lambda name: None, raising=False)
    with pytest.raises(RuntimeError, match=r"pip install .*nvidia-cuda-nvdisasm"):
        sass.find_nvdisasm()


@pytest.fixture(scope="module")
def nvdisasm():
    pytest.importorskip("cuda.bindings.nvrtc")
    try:
        return sass.find_nvdisasm()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def figures(nvdisasm):
    """Of the common kernels in bf16: those in fp16 differ in the names of the types alone. Of the
    backward one for each of its tiles, with a mask: it has the tiles without one, too."""
    forward = [p for p in common_kernels.common_plans(120) if "_bf16_" in p.variant]
    plans = common_kernels.backward_plans(120, ((64, 64), (128, 128), (192, 128), (256, 256)))
    backward = [p for p in plans if re.search("_bf16_.*_right", p.main.variant)]
    assert len(forward) >= 2 * len(common_kernels.COMMON_HEAD_DIMS) and len(backward) == 4
    with pytest.MonkeyPatch.context() as patch:
        # test_resources.py has made them, too.
        patch.setattr(sass.jit, "build", builds.build)
        found = sass.analyse_all([*forward, *backward], "sm_120f")
    sass_report.report(found)
    return found


@pytest.fixture(scope="module")
def backward_figures(figures):
    return [f for f in figures if f.warps == 2]


def test_main_loops_are_whole(figures):
    """Each has the products of its tile, by the tile's shape: no other loop was taken for it."""
    for f in figures:
        assert f.counts()["tensor"] == f.products, f.variant
        assert f.counts()["mufu"] > 0, f.variant


def test_main_loops_spill_nothing_much(figures):
    """Registers that spill do so elsewhere; the backward's loops may have a few, of hundreds."""
    for f in figures:
        assert f.counts()["spills"] <= (f.issued // 100 if f.warps == 2 else 0), f.variant


def test_every_instruction_has_a_pipe(figures):
    """What the report lists as other is a handful: its cycles, unknown, cannot matter."""
    for f in figures:
        assert sum(f.others().values()) <= f.issued // 100, (f.variant, f.others())


def test_tensor_pipe_is_the_bound(figures):
    """On GeForce its cycles are at least 90% of the slowest pipe's and of the issue slots'."""
    for f in figures:
        assert f.tensor_share("GeForce") >= 0.9, (f.variant, f.cycles("GeForce"))


@pytest.mark.parametrize("chip", sass.CHIPS)
def test_backward_leaves_other_pipes_room(backward_figures, chip):
    """The tensor pipe is the bound. Next is shared memory, where tensor instructions are fastest
    with 38% of its cycles at D 128, 42% at D 64 and 61% at D 256."""
    for f in backward_figures:
        assert f.bound(chip) == "tensor" and f.blocks_per_sm == 1, f.variant
        tensor, runner_up, *_ = f.cycles(chip).values()
        head_dim = int(re.search(r"_d(\d+)", f.variant)[1])
        assert runner_up / tensor <= (0.5 if head_dim <= 128 else 0.65), f.cycles(chip)


def test_eight_bit_loops(nvdisasm):
    """Of D 128: at most 400 instructions for 16 x 64 scores, and no shuffle on the way to O."""
    kind = "e4m3 q, k, v"
    cell = sass_report.lowp.cells(((1, sass_report.LONG),))[3]
    for chip in sass_report.CLASSES:
        plan = sass_report.KINDS[kind](sass_report.DEVICES[chip], cell)
        figures = sass.analyse(plan, "sm_120f")
        assert figures.counts()["tensor"] == figures.products == 64 and not figures.spill_bytes
        row = sass_report.step_row(kind, chip, plan, figures)
        issued, tensor, shuffles = float(row[2]), float(row[3]), float(row[7])
        assert issued + figures.counts()["nop"] <= 400 and shuffles == 0 and tensor == 1024


@pytest.mark.parametrize("recipe", RECIPES)
def test_loops_of_recipes(nvdisasm, monkeypatch, recipe):
    """All products of a tile, no spills, and no shuffle on the way from Q K^T to O but those of the
    scales of P in e2m1; e4m3 in at most 400 instructions; and the counts of quantized/speed.py."""
    monkeypatch.setattr(sass.jit, "build", builds.build)
    of_dims = {cell.preset.head_dim: cell for cell in sass_report.lowp.cells(((1, 512),))}
    assert tuple(of_dims) == speed.HEAD_DIMS
    for chip, (dim, cell) in itertools.product(sass_report.CLASSES, of_dims.items()):
        plan = sass_report.KINDS[recipe](sass_report.DEVICES[chip], cell)
        figures = sass.analyse(plan, "sm_120f")
        counts = figures.counts()
        assert counts["tensor"] == figures.products and counts["mufu"] >= 32
        assert not figures.spill_bytes and not counts["spills"]
        shuffles = sum(n for name, n in figures.instructions.items() if name.startswith("SHFL"))
        assert shuffles == (5 if RECIPES[recipe].pv == "nvfp4" else 0)
        assert figures.issued <= 400 or recipe not in ("fp8", "int8_fp8")
        issued = figures.issued - counts["nop"] - counts["tensor"]
        known = speed.ISSUED[recipe][speed.HEAD_DIMS.index(dim)]
        assert issued == pytest.approx(known, rel=0.02), (chip, dim)
        assert figures.blocks_per_sm == plan.blocks_per_sm


@pytest.mark.parametrize("is_backward", [False, True])
def test_report_of_tiles(nvdisasm, monkeypatch, capsys, is_backward):
    """The plan's own and the best of all, of each call on both cards."""
    few = {"tile_n": (64,), "sub_n": (64,), "warps": (4, 8), "warp_m": (16,), "stages": (3,)}
    few_backward = {"warps": (8,), "warp_n": (32,), "tile_m": (128,), "sub_m": (32, 64)}
    balance = sass_report.balance
    monkeypatch.setattr(balance.tune_tiles, "CHOICES", few)
    monkeypatch.setattr(balance.tune_tiles, "BACKWARD_CHOICES", few_backward | {"stages": (1,)})
    monkeypatch.setattr(sass.jit, "build", builds.build)
    preset = sass_report.Preset(16, 16, 64)
    calls = [balance.Call(preset, seqlen, False, is_backward, {}) for seqlen in (1024, 8192)]
    sass_report.report_tiles(calls)
    said = capsys.readouterr().out
    for call, chip in itertools.product(calls, sass_report.CLASSES):
        row = re.search(rf"^\| {call} +\| {chip} +\| \w+ +\| 0\.\d+ +\|(.*)\|$", said, re.M)
        shares = [float(tile.split(": ")[1]) for tile in row[1].split(";")]
        assert shares == sorted(shares, reverse=True) and len(shares) == 2


def test_report_of_eight_bits(nvdisasm, monkeypatch, capsys, tmp_path):
    """A row for each kernel, and for each call how fast it is beside bf16."""
    monkeypatch.setattr(sass_report, "LONG", 1024)
    cells = sass_report.lowp.cells
    monkeypatch.setattr(sass_report.lowp, "cells", lambda sizes=(): cells(sizes)[:1])
    monkeypatch.setattr(sass.jit, "build", builds.build)
    path = tmp_path / "low.jsonl"
    sass_report.report_low(path)
    said = capsys.readouterr().out
    for kind in sass_report.KINDS:
        assert len(re.findall(rf"^\| {kind} +\| (GeForce|PRO) +\| \d", said, re.M)) == 2
    speeds = re.search(r"^\| 16/16 heads, D 64, B 1, S 1024 \|(.*)\|$", said, re.M)[1].split("|")
    assert len(speeds) == 2 * len(sass_report.KINDS) - 2
    assert float(speeds[2]) > float(speeds[0])
    records = sass_report.harness.read_records(path)[1]
    assert {(r["operands"], r["device"]) for r in records} == set(
        itertools.product(sass_report.KINDS, sass_report.CLASSES)
    )


def test_json_lines(figures, tmp_path):
    path = tmp_path / "sass.jsonl"
    records = sass_report.harness.Records(path, "sass_report", "cpu")
    for f in figures:
        sass_report.record(records, f)
    header, cells = sass_report.harness.read_records(path)
    assert header["benchmark"] == "sass_report" and len(cells) == len(figures)
    for cell, f in zip(cells, figures, strict=True):
        direction = ("forward", "backward")[cell["warps"] - 1]
        assert re.match(rf"{direction}\w*_bf16_d\d+", cell["variant"]) and not cell["measured"]
        assert set(cell["chips"]) == set(sass.CHIPS)
        assert cell["chips"]["PRO"]["cycles"]["tensor"] == 16 * f.products
