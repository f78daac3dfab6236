"""The benchmarks' own logic, in dry runs on the CPU: what they say where something cannot run."""

import argparse
import dataclasses
import itertools
import json
import re
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("runs in a checkout alone", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import accuracy  # noqa: E402
import backward  # noqa: E402
import balance  # noqa: E402
import decode  # noqa: E402
import dropout  # noqa: E402
import flex  # noqa: E402
import forward  # noqa: E402
import grid  # noqa: E402
import harness  # noqa: E402
import lowp  # noqa: E402
import mods  # noqa: E402
import overhead  # noqa: E402
import paged  # noqa: E402
import parallel  # noqa: E402
import sass  # noqa: E402
import sass_report  # noqa: E402
import sparse  # noqa: E402
import static_model  # noqa: E402
import varlen  # noqa: E402
import versus  # noqa: E402
import video  # noqa: E402
from harness import OURS, Contestant  # noqa: E402

import flash_attn_sm120  # noqa: E402
from helpers.devices import EMULATOR  # noqa: E402

TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 4.02 GiB is free."
)
SHORT = "out of memory (a tensor of 20.00 GiB)"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(harness, "SOAK_S", 0.0)
    monkeypatch.setattr(harness, "flush_buffer", lambda device: torch.empty(1))


def exhausted(*arguments, **options):
    raise torch.cuda.OutOfMemoryError(TORCH_SAYS)


def after(calls, then):
    """A call that returns 0 for some calls, and then does something else."""
    left = iter(range(calls))
    return lambda: 0 if next(left, None) is not None else then()


def accept(name, result):
    pass


@pytest.mark.parametrize(
    "error, reason",
    [
        (torch.cuda.OutOfMemoryError(TORCH_SAYS), SHORT),
        (RuntimeError("CUDA driver: out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory"),
        (RuntimeError("an illegal memory access was encountered"), ""),
        (ValueError("out of memory"), ""),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, reason):
    assert harness.out_of_memory(error) == reason


def test_out_of_memory_in_a_capture_is_told_from_what_follows():
    try:
        try:
            exhausted()
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        assert harness.out_of_memory(error) == SHORT


def test_who_runs_out_of_memory_is_absent_ours_too():
    contestants = [Contestant(OURS, exhausted), Contestant("peer", lambda: 0)]
    entrants, absent = harness.admit(contestants, accept, [])
    assert [c.name for c in entrants] == ["peer"] and absent == {OURS: SHORT}


def test_another_error_of_ours_ends_the_run():
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        harness.admit([Contestant(OURS, broken)], accept, [])
    peer = Contestant("peer", broken, **harness.by_backend(harness.FLASH))
    assert "illegal" in harness.admit([peer], accept, [])[1]["peer"], "it said so before: cannot"


def test_a_wrong_result_ends_the_run():
    def check(name, result):
        raise harness.WrongResult(name)

    with pytest.raises(harness.WrongResult):
        harness.admit([Contestant(OURS, lambda: 0)], check, [])


def test_warnings_say_whose_they_are():
    def warn():
        warnings.warn("packed nothing", stacklevel=1)

    with pytest.warns(UserWarning, match="ours: packed nothing"):
        harness.admit([Contestant(OURS, warn)], accept, [])


def test_who_runs_out_of_memory_beside_others_is_absent_alone():
    contestants = [Contestant(OURS, after(0, exhausted)), Contestant("peer", lambda: 0)]
    timings, absent = harness.time_interleaved(contestants, "cpu", rounds=3)
    assert list(timings) == ["peer"] and absent == {OURS: SHORT}
    timings, absent = harness.time_interleaved(contestants[:1], "cpu", rounds=3)
    assert timings == {} and absent == {OURS: SHORT}


def test_cells_that_do_not_fit_are_skipped(monkeypatch):
    monkeypatch.setattr(harness, "free_bytes", lambda device: 3 << 30)
    too_much = harness.within_memory(exhausted, ("a", "b"), 5 << 30, "cpu")
    reason = "does not fit: it takes 5.0 GiB, 3.0 are free"
    assert too_much == {"a": {"absent": reason}, "b": {"absent": reason}}
    assert harness.within_memory(exhausted, ("a",), 1, "cpu") == {"a": {"absent": SHORT}}
    assert harness.within_memory(lambda: {"a": {"ms": 1}}, ("a",), 1, "cpu") == {"a": {"ms": 1}}


def test_a_cell_knows_its_bytes():
    preset = harness.PRESETS["d192-128"]
    cell = harness.Cell(preset, 256, True, 3, torch.bfloat16, queries=16)
    problem = cell.problem("cpu")
    out = problem.q.new_empty(problem.out_shape)
    assert cell.bytes() == sum(x.nbytes for x in (problem.q, problem.k, problem.v, out))


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(
        sys, "argv", [module.__name__, "--device", "cpu", "--rounds", "2", *arguments]
    )
    module.main()


SMALL = ("--presets", "hd64-gqa", "--seqlens", "16")


@pytest.mark.parametrize("module", [forward, backward])
def test_a_dry_run_of_a_grid(monkeypatch, capsys, tmp_path, module):
    file = tmp_path / "records.jsonl"
    run(monkeypatch, module, *SMALL, "--output", str(file))
    header, *records = map(json.loads, file.read_text().splitlines())
    assert header["benchmark"] == module.__name__ and header["commit"]
    assert len(records) == 2 * len(module.NAMES)
    assert all("ms" in r or "absent" in r for r in records)
    assert "2 of 2 cells, geomean ours/flash" in capsys.readouterr().out


@pytest.mark.parametrize("module", [forward, backward])
def test_ours_out_of_memory_is_a_row(monkeypatch, capsys, module):
    monkeypatch.setattr(module, "flash_attn_func", exhausted)
    run(monkeypatch, module, *SMALL)
    said = capsys.readouterr().out
    assert len(re.findall(r"^\| hd64-gqa \| 1 +\| 16 +\| [01] +\| absent", said, re.M)) >= 2
    assert f"absent in 2 cells: ours: {SHORT}" in said


@pytest.mark.parametrize("module", [forward, backward, decode])
def test_where_nothing_fits_all_are_absent(monkeypatch, capsys, module):
    monkeypatch.setattr(harness, "free_bytes", lambda device: 0)
    run(monkeypatch, module, "--presets", "hd64", "--seqlens", "16")
    said = capsys.readouterr().out
    for name in module.NAMES:
        assert re.search(rf"absent in \d cells: {name}: does not fit", said)


DECODING = ("--presets", "hd64", "--seqlens", "32", "--batches", "2")


def test_a_dry_run_of_decoding(monkeypatch, capsys, tmp_path):
    file = tmp_path / "records.jsonl"
    run(monkeypatch, decode, *DECODING, "--output", str(file))
    said = capsys.readouterr().out
    assert re.search(r"^\| hd64 +\| 2 +\| 32 ", said, re.M) and "a plain read" in said
    header, *records = map(json.loads, file.read_text().splitlines())
    assert header["benchmark"] == "decode"
    assert {"gb_per_s", "num_splits"} <= set(records[0]) and records[0]["seqlen_q"] == 1
    monkeypatch.setattr(decode, "flash_attn_func", exhausted)
    run(monkeypatch, decode, *DECODING)
    assert re.search(r"^\| hd64 +\| 2 +\| 32 .*\| absent", capsys.readouterr().out, re.M)


def test_a_dry_run_of_e4m3(monkeypatch, capsys):
    run(monkeypatch, decode, *DECODING, "--kv", "e4m3")
    assert re.search(r"^\| hd64 +\| 2 +\| 32 +\| \d", capsys.readouterr().out, re.M)


TINY = {"mixed": [5, 16, 3], "equal": [8, 8]}


@pytest.mark.parametrize("direction", [(), ("--backward",)], ids=["forward", "backward"])
def test_a_dry_run_of_packed_sequences(monkeypatch, capsys, tmp_path, direction):
    monkeypatch.setattr(varlen, "MIXES", TINY)
    file = tmp_path / "records.jsonl"
    run(monkeypatch, varlen, "--presets", "hd64-gqa", *direction, "--output", str(file))
    _, *records = map(json.loads, file.read_text().splitlines())
    assert len(records) == 2 * ((3 + 4) + 2 * bool(direction))
    for record in records:
        assert "ms" in record or record["contestant"] == varlen.VARLEN_ATTN
    dense = [r for r in records if r["contestant"] == varlen.DENSE]
    assert {r["mix"] for r in dense} == {"equal"} and len(dense) == 2
    said = capsys.readouterr().out
    assert re.search(r"^\| hd64-gqa \| mixed +\| 1 ", said, re.M)
    monkeypatch.setattr(varlen, "flash_attn_varlen_func", exhausted)
    run(monkeypatch, varlen, "--presets", "hd64-gqa", *direction)
    assert f"absent in 4 cells: ours: {SHORT}" in capsys.readouterr().out


@pytest.mark.parametrize("direction", ["--forward", "--backward"])
def test_a_dry_run_of_the_balance(monkeypatch, capsys, tmp_path, direction):
    preset, asked = harness.Preset(2, 1, 16), {4: 0.9}
    calls = [balance.Call(preset, 32, True, is_backward, asked) for is_backward in (False, True)]
    call = calls[direction == "--backward"]
    monkeypatch.setattr(balance, "CALLS", calls)
    for variable in (*balance.ENVIRONMENT, "FA_SM120_TENSOR_REPEAT", "FA_SM120_PLAN_AS"):
        monkeypatch.setenv(variable, "")
    output = tmp_path / "balance.jsonl"
    argv = ["balance.py", "--device", "cpu", "--rounds", "2", "--repeat", "4", direction]
    monkeypatch.setattr(sys, "argv", [*argv, "--output", str(output)])
    balance.main()
    records = harness.read_records(output)[1]
    assert len(records) == 1 + call.is_backward and all(r["share"] > 0 for r in records)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if str(call) in line)
    assert "0.90" in row


def test_calls_of_a_grid_are_measured_in_both_directions(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["balance.py", "--device", "cpu", "--grid", "fa4-only"])
    names = [str(call) for call in balance.parse().calls]
    assert len(names) == 12 and "backward D 256,128, 32/32, B 2, S 2048 causal" in names
    (call,) = (c for c in balance.calls_of_grid("qwen3") if "forward" in str(c) and c.batch == 8)
    assert call.cell.shapes()[1] == (8, 256, 8, 128)


def sweep(call, stopped=None):
    """The records of its tiles, run on the emulator in this process, and what it has begun."""
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    sent = []
    args = argparse.Namespace(calls=[call], device="emulator", tiles=True, rounds=2)
    balance.Job(args, 4, frozenset(), stopped or {}, sent.append).run()
    call.use_tiles(())
    (records,) = (value for kind, value in sent if kind == "found")
    return records, [value for kind, value in sent if kind == "begin" and value]


@pytest.mark.parametrize("is_backward", [False, True])
def test_tiles_of_the_balance_run_beside_the_plans_own(monkeypatch, is_backward):
    """All are checked, the best ones timed again; a broken one is left out, and a call, too."""
    few = {"tile_n": (64,), "sub_n": (32,), "warps": (4,), "warp_m": (16,), "stages": (2, 3)}
    of_backward = {
        "warps": (4,),
        "warp_n": (32,),
        "tile_m": (128,),
        "sub_m": (32,),
        "stages": (1, 2),
    }
    monkeypatch.setattr(balance.tune_tiles, "CHOICES", few)
    monkeypatch.setattr(balance.tune_tiles, "BACKWARD_CHOICES", of_backward)
    call = balance.Call(harness.Preset(1, 1, 32), 64, True, is_backward, {4: 0.9})
    records, begun = sweep(call)
    assert all("ms" in record for record in records)
    assert [record["contestant"] for record in records].count(balance.OURS) == 1
    tiles = [record["tile"] for record in records]
    assert len(set(tiles)) == len(tiles)
    expected = {"4,32,128,32,1", "4,32,128,32,2"} if is_backward else {"64,32,4,16,3 CP_ASYNC"}
    assert expected < set(tiles) and any("TMA_WARP" in tile for tile in tiles) != is_backward
    assert "**" in balance.tiles_table(records, [4])
    broken, whole = begun[1], str(call)
    records, _ = sweep(call, {broken: "HANGS"})
    assert [r["absent"] for r in records if "absent" in r] == ["HANGS"]
    records, begun = sweep(call, {whole: "BREAKS"})
    assert [r["absent"] for r in records] == ["BREAKS"] and not begun


def test_a_process_that_breaks_costs_its_tile_alone(monkeypatch, capsys):
    call = balance.CALLS[0]
    jobs = []

    def watch(child, job, hear, limit_s):
        jobs.append(dict(job[3]))
        if len(jobs) == 1:
            return "HANGS", "a tile"
        hear([{"call": str(call), "ms": 1.0}])
        return {}, ""

    added = []
    monkeypatch.setattr(balance.trial, "watch", watch)
    monkeypatch.setenv("FA_SM120_TENSOR_REPEAT", "")
    monkeypatch.setenv("FA_SM120_PLAN_AS", "")
    args = argparse.Namespace(plan_as=None)
    balance.measured_at(4, args, lambda **record: added.append(record))
    assert jobs == [{}, {"a tile": "HANGS"}] and len(added) == 1
    monkeypatch.setattr(balance.trial, "watch", lambda *_: ("fails", ""))
    with pytest.raises(SystemExit, match="fails"):
        balance.measured_at(4, args, None)


def test_tiles_of_the_balance_are_those_of_its_kernels():
    """A candidate is found by the plan that it leads to; the plan's own is among them."""
    for call in balance.CALLS[4:13:4]:
        problem = call.problem("cpu")
        tiles = balance.first_tiles(call, problem, arch=120)
        own = balance.plan_of(call, problem, arch=120)
        every = tiles
        if not call.is_backward:
            every = tiles | balance.fed_otherwise(call, problem, tiles.values(), arch=120)
        assert own.variant in every and len(tiles) > 10
        assert "tiles.c" in own.reasons["tile"]


LOOP = static_model.Loop(1000, 100, 0, 1, False, 1)


def grid_of(heads, causal=False):
    return static_model.Grid(256, 64, 4096, causal, heads, 128)


def test_parts_of_a_predicted_call_are_all_of_its_time():
    for blocks_per_sm, is_backward in itertools.product((1, 2), (False, True)):
        loop = dataclasses.replace(
            LOOP, is_backward=is_backward, slowest=1500, blocks_per_sm=blocks_per_sm
        )
        for device, causal in itertools.product(static_model.DEVICES.values(), (False, True)):
            found = static_model.predict(loop, grid_of(32, causal), device)
            assert sum(found.parts.values()) == pytest.approx(1)
            assert 0 < found.share == found.parts["tensor"] < 1
            assert min(found.parts.values()) >= -1e-9
            assert (found.parts["handover"] > 0) == is_backward


def test_slower_products_and_fuller_grids_have_a_higher_share():
    def share(heads=33, **loop):
        device = static_model.DEVICES["H100 x1"]
        found = static_model.predict(dataclasses.replace(LOOP, **loop), grid_of(heads), device)
        return found.share

    # 33 heads of 16 blocks: 4 for each of 132 multiprocessors. One more head is a fifth round.
    assert share() < share(tensor=2000) < share(tensor=4000)
    assert share(34) == pytest.approx(share() * 34 / 33 * 4 / 5, rel=0.01)
    assert share(slowest=5000) < share() == share(slowest=900)


def test_blocks_go_where_a_place_gets_free():
    makespan = static_model.makespan
    assert makespan([3, 2, 2, 1], 2, 1) == 4
    assert makespan([3, 3], 1, 2) == 6  # both at half the speed
    assert makespan([1, 4, 2], 1, 2) == 7  # the third starts at 2, where 3 are left of the second
    assert makespan([5], 4, 2) == 5 and makespan([], 4, 2) == 0


def test_a_measured_file_takes_the_place_of_the_table(monkeypatch, capsys, tmp_path):
    """A call that it has not got has a prediction alone."""
    call, other = balance.CALLS[:2]
    file, output = tmp_path / "balance.jsonl", tmp_path / "shares.jsonl"
    records = harness.Records(file, "balance", "cpu")
    records.add(call=str(call), repeat=4, contestant=OURS, share=0.8)
    records.add(call=str(call), repeat=4, contestant="deterministic", share=0.1)
    records.add(call=str(other), repeat=2, contestant=OURS, absent="HANGS")
    one = static_model.Prediction(0.88, 1e-3, dict.fromkeys(sass_report.PARTS, 0.125))
    devices = static_model.DEVICES
    found = {(str(c), device): one for c in (call, other) for device in devices}
    monkeypatch.setattr(sass_report, "predict_all", lambda calls: found)
    sass_report.report_shares([call, other], file, output)
    said = capsys.readouterr().out
    assert re.search(
        rf"{re.escape(str(call))} +\| 0.88 +\| 0.88 \| 0.880 +\| 0.800 .*\+10.0%", said
    )
    assert "Off by 10.0% (root mean square of 1 cells)" in said
    lines = harness.read_records(output)[1]
    assert [line["share_measured"] for line in lines].count(0.8) == 1
    assert len(lines) == 2 * len(devices)


def test_predicted_shares_are_near_the_measured_ones():
    """No cell is off by more than 10%: those of S 1024, of the same kernels, and 4096."""
    pytest.importorskip("cuda.bindings.nvrtc")
    try:
        sass.find_nvdisasm()
    except RuntimeError as error:
        pytest.skip(str(error))
    measured = {name for name, _ in static_model.PROXY}
    assert measured <= set(map(str, balance.CALLS))
    calls = [c for c in balance.CALLS if str(c) in measured and c.seqlen in (1024, 4096)]
    predicted = sass_report.predict_all(calls, ("H100 x2", "H100 x4"))
    assert len(calls) == 6
    for call, repeat in itertools.product(map(str, calls), (2, 4)):
        share = predicted[call, f"H100 x{repeat}"].share
        assert abs(share / static_model.PROXY[call, repeat] - 1) < 0.1, (call, repeat, share)


def test_mixes_are_what_they_are_called():
    totals = {name: sum(lengths) for name, lengths in varlen.MIXES.items()}
    assert totals["lognormal, 16k"] == 16 << 10 and totals["lognormal, 128k"] == 128 << 10
    assert all(16 <= min(lengths) <= max(lengths) <= 8192 for lengths in varlen.MIXES.values())
    assert totals["256 of 64"] == totals["8 of 2048"] == 16 << 10
    mixed = varlen.MIXES["16 of 256-4096"]
    assert len(mixed) == 16 and min(mixed) >= 256 and max(mixed) <= 4096


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_wrong_packed_result_is_found(monkeypatch, which):
    """In the shortest, the longest and the last sequence, forward and backward."""
    monkeypatch.setattr(varlen, "MIXES", {"mixed": [9, 5, 70, 30]})
    problem = varlen.PackedCell(harness.PRESETS["hd64-gqa"], "mixed", True).problem("cpu")
    dout = torch.randn_like(problem.q)
    row = problem.rows(problem.checked()[which]).stop - 1
    out = varlen.forwards(problem)[0].call()
    varlen.check_out(problem, OURS, out)
    out[row, 8, 3] += 0.5
    with pytest.raises(harness.WrongResult):
        varlen.check_out(problem, OURS, out)
    gradients = list(varlen.backwards(problem, dout)[0].call())
    check = varlen.CheckGradients(problem, dout)
    check(OURS, gradients)
    gradients[which][row, 0, 3] += 0.5
    with pytest.raises(harness.WrongResult):
        check(OURS, gradients)


def test_a_peer_that_may_be_wrong_is_absent_where_it_is():
    def check(name, result):
        raise harness.WrongResult("dk is half of what it should be")

    peer = Contestant("peer", lambda: 0, cannot=(harness.WrongResult,))
    assert harness.admit([peer], check, []) == (
        [],
        {"peer": "wrong: dk is half of what it should be"},
    )


def test_a_dry_run_of_pages(monkeypatch, capsys):
    preset = harness.Preset(4, 2, 64)
    tiny = {"prefill": [(preset, 2, 40, None)], "decoding": [(preset, 3, 40, 1)]}
    monkeypatch.setattr(paged, "CELLS", tiny)
    run(monkeypatch, paged)
    said = capsys.readouterr().out
    assert len(re.findall(r"^\| prefill  \| 4/2 ", said, re.M)) == 2
    assert len(re.findall(r"^\| decoding \| 4/2 ", said, re.M)) == 1
    assert "absent in 3 cells: contiguous" not in said and "absent in 3 cells: seqused" not in said


def no_compiler(*_):
    raise RuntimeError("it takes long to compile")


def test_a_dry_run_of_sparse(monkeypatch, capsys):
    monkeypatch.setattr(flex, "compiled", no_compiler)
    monkeypatch.setattr(sparse, "PRESETS", (harness.Preset(2, 2, 16),))
    monkeypatch.setattr(sparse, "DENSITIES", (0.5, 1.0))
    monkeypatch.setattr(sparse, "SEQLEN", {"cpu": dict.fromkeys(sparse.SEQLEN["cuda"], 150)})
    run(monkeypatch, sparse)
    said = capsys.readouterr().out
    assert re.search(r"^\| backward +\| 16 \| random, 50% +\| 150 \| 75.0% ", said, re.M)
    assert len(re.findall(r"^\| (?:for|back)ward +\| 16 ", said, re.M)) == 16
    assert "wrong" not in said


def test_a_dry_run_of_video(monkeypatch, capsys, tmp_path):
    preset = harness.Preset(2, 2, 64)
    monkeypatch.setattr(video, "CALLS", [("tiny", preset, 1, 40, 40), ("text", preset, 2, 40, 9)])
    file = tmp_path / "records.jsonl"
    run(monkeypatch, video, "--output", str(file))
    said = capsys.readouterr().out
    assert re.search(r"^\| tiny \| 2 +\| 64 \| 1 \| 40 +\| 40 ", said, re.M)
    _, *records = map(json.loads, file.read_text().splitlines())
    assert [r["seqlen_k"] for r in records if r["contestant"] == OURS] == [40, 9]
    assert all("ms" in r for r in records if r["contestant"] == OURS)
    monkeypatch.setattr(harness, "free_bytes", lambda device: 0)
    run(monkeypatch, video)
    assert "absent in 2 cells: ours: does not fit" in capsys.readouterr().out


def test_calls_of_video_are_of_the_sizes_that_models_have():
    for _, preset, batch, queries, keys in video.CALLS:
        assert 24 <= preset.heads_q == preset.heads_kv <= 48 and preset.head_dim in (64, 128)
        assert batch in (1, 2) and 30_000 <= queries <= 120_000 and keys in (queries, 512)


@pytest.mark.parametrize("size", paged.PAGE_SIZES)
def test_pages_hold_the_rows_of_each_sequence(size):
    problem = harness.Cell(harness.Preset(2, 2, 8), 70, False, 3, torch.bfloat16).problem("cpu")
    k, v, table = paged.in_pages(problem, size)
    for x, cache in ((problem.k, k), (problem.v, v)):
        for b in range(3):
            assert torch.equal(cache[table[b].long()].flatten(0, 1)[:70], x[b])


def test_host_times_have_a_line_for_packed_calls():
    contestants = {c.name: c for c in overhead.forwards("cpu")}
    rows = contestants["ours, packed"].call()[0]
    assert torch.equal(rows, contestants[OURS].call()[0].flatten(0, 1))


def test_a_dry_run_of_the_sweep_of_splits(monkeypatch, capsys):
    run(monkeypatch, decode, *DECODING, "--sweep")
    assert "plan/best" in capsys.readouterr().out


@pytest.mark.parametrize(
    "call",
    [
        decode.Call("tiny", harness.Preset(4, 2, 64), 1, 40, 3),
        decode.Call("tiny", harness.Preset(4, 2, 64), 2, 40, sink=True),
        decode.Call("tiny", harness.Preset(6, 1, 64), 2, 40, 2, window=7, sink=True),
        decode.Call("tiny", harness.Preset(4, 4, 64), 1, 40, window=7),
    ],
    ids=str,
)
def test_layers_are_right_and_distinct(monkeypatch, call):
    monkeypatch.setitem(decode.COLD_BYTES, "cpu", 3 * call.bytes_read)
    inputs = decode.Inputs.of(call, "cpu")
    check = decode.Check(inputs)
    out = inputs.ours()()
    check(OURS, out)
    out[-1, -1, -1, 5] += 0.5
    with pytest.raises(harness.WrongResult):
        check(OURS, out)
    seen = [x[:, -call.keys_read :] for x in inputs.keys]
    assert len(seen) == 3
    for x, y in itertools.pairwise(seen):
        assert y.storage_offset() - x.storage_offset() == call.layer_rows * call.row_elements
    if not call.sink and not call.window:
        check(harness.CUDNN, inputs.peer(harness.CUDNN).call())


def test_a_dry_run_of_models(monkeypatch, capsys):
    """And the door that it opens is closed again."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    import models

    run(monkeypatch, models)
    said = capsys.readouterr().out
    for what in ("prompt", "decoding, batch 1", "training step"):
        assert len(re.findall(rf"^\| {what} +\| .*%", said, re.M)) == (3 if "dec" in what else 5)
        assert f"attention's share, {what}: sdpa " in said
    assert "greedy tokens as by SDPA" in said
    assert models.door.registered() == ()
    assert not {models.EXACT, models.NONE} & models.AttentionInterface._global_mapping.keys()


def test_wrong_logits_of_a_model_are_found(monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    import models

    with models.register():
        model = models.make_model("cpu").eval()
        read = models.Decoder.read

        def wrong(self, tokens):
            shift = model.config._attn_implementation == models.OURS and tokens.shape[1] == 1
            return read(self, tokens).roll(int(shift), -1)

        monkeypatch.setattr(models.Decoder, "read", wrong)
        with pytest.raises(harness.WrongResult, match="sm120_attention: tensor 0"):
            models.greedy(model, models.SIZES["cpu"], "cpu")


def test_a_dry_run_of_ranks(monkeypatch, capsys):
    run(monkeypatch, parallel)
    said = capsys.readouterr().out
    assert len(re.findall(r"^\| [12] +\| (zigzag|in order)", said, re.M)) == 6


def test_a_wrong_part_of_a_rank_is_found():
    right = tuple(torch.randn(2, 8) for _ in range(4))
    parallel.check(right, right)
    with pytest.raises(harness.WrongResult, match="dk: relative error"):
        parallel.check((*right[:2], right[2] * 1.1, right[3]), right)


def test_without_a_gpu_they_say_so(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for module in (forward, backward, decode, varlen, paged, parallel, video):
        monkeypatch.setattr(sys, "argv", [module.__name__])
        with pytest.raises(SystemExit, match="no CUDA device here"):
            module.main()


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
@pytest.mark.parametrize("which", range(3))
def test_a_wrong_gradient_is_found(wrong, which):
    cell = harness.Cell(harness.PRESETS["hd64-gqa"], 200, True, 1, torch.bfloat16)
    problem = cell.problem("cpu")
    dout = torch.randn_like(problem.q)
    ours = backward.by_autograd(problem, dout)[0]
    check = backward.Check(problem, dout)
    gradients = list(ours.call())
    check(OURS, gradients)
    gradients[which][0, 150, 0, 3] += wrong
    with pytest.raises(harness.WrongResult, match="rows from 128 on"):
        check(OURS, gradients)


def test_a_wrong_output_is_found():
    cell = harness.Cell(harness.PRESETS["hd64-gqa"], 64, True, 1, torch.bfloat16)
    problem = cell.problem("cpu")
    out = forward.contestants(problem)[0].call()
    harness.check_forward(problem, OURS, out)
    out[0, 40, 8, 3] += 0.5
    with pytest.raises(harness.WrongResult, match="head 8"):
        harness.check_forward(problem, OURS, out)


def test_presets_of_one_shape_are_measured_once():
    ((shapes,), (fa2,)) = (grid.GRIDS[name] for name in ("shapes", "fa2"))
    names = [name for _, group in shapes.shapes() for name in group]
    assert sorted(names) == sorted(grid.SHAPES)
    assert len(shapes.shapes()) < len(grid.SHAPES)
    assert len(fa2.shapes()) == len(grid.MODELS)


def test_cells_of_the_grids_that_peers_are_weak_in():
    """Every shape that FlashAttention-2 does not take, and every prompt, once."""

    def found(name):
        cells = [cell for part in grid.GRIDS[name] for cell in part.cells()]
        shapes = [(c.preset.head_dim, c.preset.head_dim_v, c.batch, c.seqlen) for c in cells]
        return shapes, {(c.preset.heads_q, c.preset.heads_kv, c.causal) for c in cells}

    shapes, calls = found("fa4-only")
    assert calls == {(32, 32, False), (32, 32, True)}
    kinds = [(128, 64, 2, 4096), (192, 128, 2, 2048), (256, 128, 2, 2048)]
    assert shapes == [kind for kind in kinds for _ in range(2)]
    shapes, calls = found("qwen3")
    assert calls == {(16, 8, True)}
    sizes = [(1, 128), (1, 256), (1, 512), (1, 1024), (1, 2048), (1, 4096), (2, 512)]
    assert shapes == [(128, None, *size) for size in [*sizes, (4, 256), (8, 256)]]


@pytest.mark.parametrize("module", [forward, backward])
def test_a_dry_run_of_head_dims_that_peers_need_padding_for(monkeypatch, capsys, module):
    """And once for each part of the grid that the arguments leave the same."""
    monkeypatch.setattr(harness, "PRESETS", {"mha-d128-64": harness.Preset(4, 2, 32, 16)})
    small = ("--presets", "mha-d128-64", "--seqlens", "16", "--batch", "1")
    run(monkeypatch, module, "--grid", "fa4-only", *small)
    said = capsys.readouterr().out
    assert "2 of 2 cells, geomean ours/flash" in said and "Wall time" not in said


@pytest.mark.parametrize("module", [forward, backward])
def test_short_prompts_have_a_wall_time(monkeypatch, capsys, tmp_path, module):
    file = tmp_path / "records.jsonl"
    run(monkeypatch, module, "--grid", "qwen3", *SMALL, "--causal", "1", "--output", str(file))
    _, *records = map(json.loads, file.read_text().splitlines())
    assert [r["batch"] for r in records if r["contestant"] == OURS] == [1, 2, 4, 8]
    assert all(("wall_ms" in r) == ("ms" in r) for r in records)
    table = capsys.readouterr().out.split("Wall time of a call")[1]
    assert re.search(r"^\| hd64-gqa \| 8 +\| 16 +\| 1 +\| \d+\.\d", table, re.M)


@pytest.mark.parametrize("of_backward", [False, True])
def test_two_revisions_are_compared(monkeypatch, capsys, of_backward):
    """Here a package with itself."""
    monkeypatch.setitem(grid.GRIDS, "tiny", (grid.Grid(("hd64",), (16, 32), True),))
    packages = {"this": flash_attn_sm120, "other": flash_attn_sm120}
    versus.compare_times(packages, "tiny", of_backward, "cpu")
    said = capsys.readouterr().out
    assert "4 cells of tiny" in said and "absent" not in said
    geomean = re.search(r"geomean (\S+)", said)
    assert 0.1 < float(geomean[1]) < 10


def test_readme_says_what_each_script_is_for():
    readme = (BENCHMARKS / "README.md").read_text()
    assert [p.name for p in BENCHMARKS.glob("*.py") if f"**`{p.name}`**" not in readme] == []


def test_a_dry_run_of_mods(monkeypatch, capsys):
    monkeypatch.setattr(flex, "compiled", no_compiler)
    monkeypatch.setattr(mods, "PRESETS", (harness.Preset(2, 2, 16),))
    monkeypatch.setattr(mods, "SEQLEN", {"cpu": 130})
    run(monkeypatch, mods)
    said = capsys.readouterr().out
    assert len(re.findall(r"^\| (?:for|back)ward +\| 16 ", said, re.M)) == 2 * 20
    assert "wrong" not in said


@pytest.mark.parametrize("module", [mods, sparse])
def test_a_peer_that_compiles_for_too_long_is_absent(monkeypatch, capsys, module):
    """And the run goes on, in time."""

    def compiled(*_):
        try:
            threading.Event().wait()
        except Exception as error:  # as a compiler does
            raise AssertionError from error

    monkeypatch.setattr(flex, "compiled", compiled)
    monkeypatch.setattr(module, "PRESETS", (harness.Preset(2, 2, 16),))
    seqlen = dict.fromkeys(sparse.SEQLEN["cuda"], 130) if module is sparse else 130
    monkeypatch.setattr(module, "SEQLEN", {"cpu": seqlen})
    run(monkeypatch, module, "--only", "softcap|prefix of", "--peer-limit", "0.01")
    said = capsys.readouterr().out
    assert len(re.findall(r"^\| (?:for|back)ward +\| 16 ", said, re.M)) == 2
    assert f"absent in 2 cells: {flex.NAME}: compiling took longer than 0.01 s" in said


def test_flex_attention_is_compiled_for_each_mod():
    """Of one function torch keeps eight versions."""
    mods = [lambda s, b, h, i, j, n=n: s + n for n in range(2)]
    first = flex.compiled(mods[0], None)
    assert flex.compiled(mods[0], None) is first
    assert flex.compiled(mods[1], None) is not first


def test_cells_of_neighbourhoods(monkeypatch):
    """An image as NATTEN has it, and a video of 32k tokens: what a token of the middle sees."""
    monkeypatch.setitem(sparse.SEQLEN, "cpu", sparse.SEQLEN["cuda"])
    found = {case.name: case for case in sparse.cases("cpu")}
    for name, tokens, seen in (
        ("image, 128 x 128, 13 x 13", 128**2, 13**2),
        ("video, 32 x 32 x 32, 9 x 9 x 9", 32**3, 9**3),
    ):
        case = found[name]
        keys = torch.arange(case.seqlen)
        middle = torch.tensor(tokens // 2 + (64 if "image" in name else 16 * 33))
        assert case.seqlen == tokens and case.mask_mod(0, 0, middle, keys).sum() == seen


@pytest.mark.parametrize(
    "module, only, named",
    [
        (mods, "^soft|table", ["softcap", "relative table"]),
        (sparse, r"random, (5|10)%", ["random, 5%", "random, 10%"]),
        (dropout, "^backward.*D 16.*causal", ["1"]),
    ],
)
def test_a_run_of_some_cells_without_the_peer(monkeypatch, capsys, module, only, named):
    def broken(*_, **__):
        raise AssertionError("it was left out")

    if module is not dropout:  # whose check takes its peer, too
        monkeypatch.setattr(flex, "compiled", broken)
    monkeypatch.setattr(module, "PRESETS", (harness.Preset(2, 2, 16),))
    seqlen = dict.fromkeys(sparse.SEQLEN["cuda"], 130) if module is sparse else 130
    monkeypatch.setattr(module, "SEQLEN", {"cpu": seqlen})
    run(monkeypatch, module, "--only", only, "--peers", "none")
    said = capsys.readouterr().out
    rows = re.findall(r"^\| (?:for|back)ward +\| 16 +\| (.+?) +\|", said, re.M)
    assert list(dict.fromkeys(rows)) == named and "--peers none" in said


def test_a_dry_run_of_eight_bits(monkeypatch, capsys, tmp_path):
    """A recipe without a kernel is absent, any other error of it ends the run."""
    attend = lowp.quantized_attention

    def no_kernel(*tensors, **options):
        if tensors[3] == "nvfp4":
            raise RuntimeError("recipe 'nvfp4' needs compute capability 12.0")
        return attend(*tensors, **options)

    monkeypatch.setattr(lowp, "quantized_attention", no_kernel)
    file = tmp_path / "records.jsonl"
    argv = ("--seqlens", "96", "--only", "D 64, B 1")
    run(monkeypatch, lowp, *argv, "--output", str(file))
    _, *records = map(json.loads, file.read_text().splitlines())
    assert len(records) == 2 * len(lowp.NAMES)
    assert {r["contestant"] for r in records if "absent" in r} == {"nvfp4", "nvfp4" + lowp.NARROW}
    said = capsys.readouterr().out
    assert len(re.findall(r"^\| 64 +\| 1 \| 96 ", said, re.M)) == 2 and "needs compute" in said
    monkeypatch.setattr(lowp, "quantized_attention", exhausted)
    run(monkeypatch, lowp, *argv)
    assert f"absent in 2 cells: int8_fp8: {SHORT}" in capsys.readouterr().out

    def broken(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(lowp, "quantized_attention", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        run(monkeypatch, lowp, *argv)


def test_cells_of_eight_bits():
    """Every combination of both batches, three lengths, two head dims, full and causal, once."""
    names = {str(cell) for cell in lowp.cells()}
    assert len(names) == len(lowp.cells()) == 2 * 3 * 2 * 2
    assert "16/16 heads, D 64, B 1, S 512 causal" in names


@pytest.mark.parametrize("name", lowp.NAMES)
def test_a_wrong_result_of_eight_bits_is_found(name):
    problem = lowp.cells(((1, 80),))[1].problem("cpu")
    check = lowp.Check(problem)
    contestant = next(c for c in lowp.contestants(problem) if c.name == name)
    out = contestant.call()
    check(name, out)
    out[0, check.rows[3], 15] = out[0, check.rows[4], 15] * 3
    with pytest.raises(harness.WrongResult, match="head 15"):
        check(name, out)


def test_accuracy_has_a_row_for_each_recipe_and_case(tmp_path, capsys):
    output = tmp_path / "accuracy.jsonl"
    argv = ["--seqlen", "96", "--head-dim", "32", "--only", "int8_fp8|^fp8"]
    assert accuracy.main([*argv, "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["recipe"], row["case"]) for row in rows[:2]] == [
        ("int8_fp8", "normal"),
        ("fp8", "normal"),
    ]
    assert len(rows) == 2 * len(accuracy.CASES)
    assert all(row["relative_l2"] < 0.2 and row["cosine"] > 0.98 for row in rows)
    assert capsys.readouterr().out.count("\n") == 4
