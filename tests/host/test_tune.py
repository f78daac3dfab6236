"""The tuner and its table. Times are made up; plans, kernels and outputs are real."""

import errno
import functools
import itertools
import json
import os
import sys
import warnings

import pytest
import torch

from flash_attn_sm120 import (
    _C,
    cache,
    common_kernels,
    explain,
    explain_backward,
    jit,
    recipe_tiles,
    tuned_tiles,
)
from flash_attn_sm120.__main__ import main
from flash_attn_sm120.commands import tune as command
from flash_attn_sm120.quantized import RECIPES, explain_quantized
from flash_attn_sm120.tune import candidates, contest, grid, journal, trial, tune
from flash_attn_sm120.tune import table as tune_table
from flash_attn_sm120.tune.machine import Machine
from helpers import trials
from helpers.children import run_python
from helpers.devices import CUDA, EMULATOR

DEVICE = CUDA if EMULATOR.missing else EMULATOR
CELLS = [grid.Cell(64, 64, causal, grid.Bucket(0, 64, (40,))) for causal in (False, True)]
CHOICES = {"tile_n": (32, 64), "sub_n": (32,), "stages": (2, 3)}
BACKWARD_CHOICES = {"warps": (4, 8), "warp_n": (32,), "tile_m": (64,), "sub_m": (32,), "stages": (1, 2)}  # fmt: skip


class FakeMachine(Machine):
    """Runs on the emulator or the GPU, but tells times of the test's own making.

    `gains` maps a part of a variant's name to how much faster it is than the fallback.
    """

    def __init__(self, gains=(), noise=0.0):
        super().__init__()
        self.device = {**self.device, "sms": 17}  # smaller calls: outputs are compared, not timed
        self.gains, self.noise = dict(gains), noise
        self.cells = set()  # that were measured: causal or not

    def tensor(self, *shape):
        return DEVICE.place(torch.randn(shape, dtype=torch.bfloat16))

    def integers(self, numbers):
        return DEVICE.place(torch.tensor(numbers, dtype=torch.int32))

    def compile(self, plan):
        if EMULATOR.missing:
            return super().compile(plan)
        jit.compile(plan.kernel, plan.variant, plan.options, self.arch, 0, ptx=True)

    def samples(self, candidates, i, rounds):
        self.cells.add(candidates[0].calls[i].causal)
        return [[self.ms(c, round) for round in range(rounds)] for c in candidates]

    def ms(self, candidate, i):
        gain = next((g for part, g in self.gains.items() if part in candidate.name), 0.5)
        if not candidate.rows:
            gain = 1.0
        elif i % 2:
            gain *= 1 + self.noise
        return (1 + i % 3) / gain  # clocks drift: ratios alone mean something


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(gains) -> a machine; the table in use is in tmp_path."""
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    monkeypatch.setenv("FA_SM120_TILES", str(tmp_path / "tiles.json"))
    yield FakeMachine
    monkeypatch.setenv("FA_SM120_TILES", "")
    tuned_tiles.load()


def run(machine, where, cells=CELLS, choices=CHOICES):
    return tune(machine, cells, choices, where, backward_choices=BACKWARD_CHOICES)


def records(where):
    (file,) = where.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if "cell" in line]


def winners(where):
    (table,) = tuned_tiles.read(where / "tiles.json")
    return [(entry["row"]["mask_right"], entry["row"]["stages"]) for entry in table["rows"]]


def shape(head_dim, seqlen, heads=1, head_dim_v=None):
    def make(dim):
        return torch.empty(dim, dtype=torch.bfloat16).expand(1, seqlen, heads, dim)

    return make(head_dim), make(head_dim), make(head_dim_v or head_dim)


# ---- who wins ------------------------------------------------------------------------------------


def test_the_best_wins_and_is_used_from_then_on(fake, tmp_path, capsys):
    assert run(fake({"n32x32_w4x16_s2": 1.03, "n64x32_w4x16_s2": 1.05}), tmp_path) == 0
    assert winners(tmp_path) == [(0, 2), (1, 2)]
    assert [r["gain"] for r in records(tmp_path)] == [1.05, 1.05]
    assert all({x["verdict"] for x in r["results"]} >= {"accepted"} for r in records(tmp_path))
    plan = explain(*shape(64, 170 * 64), causal=True, arch=120)
    assert "n64x32" in plan.variant and "use_tiles" in plan.reasons["tile"]
    assert "n64x32" not in explain(*shape(64, 170 * 64 + 1), causal=True, arch=120).variant
    assert "2 of 2 cells" in capsys.readouterr().out


@pytest.mark.parametrize("gain, count", [(1.019, 0), (1.021, 2), (0.9, 0)])
def test_two_percent_are_asked_for(fake, tmp_path, gain, count):
    run(fake({"n32x32_w4x16_s2": gain}), tmp_path)
    assert len(winners(tmp_path)) == count


def test_a_noisy_candidate_is_rejected(fake, tmp_path):
    run(fake({"n32x32_w4x16_s2": 1.3}, noise=0.2), tmp_path)
    assert winners(tmp_path) == []
    assert "noisy" in {result["verdict"] for result in records(tmp_path)[0]["results"]}


def test_a_candidate_that_loses_on_one_call_is_rejected():
    assert contest.Score([1, 1], [1.10, 0.98], [0, 0]).verdict == "no faster"
    assert contest.Score([1, 1], [1.10, 0.995], [0, 0]).verdict == "accepted"
    assert contest.Score([1, 1], [1.10, 1.10], [0, 0.11]).verdict == "noisy"


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_wrong_candidate_is_reported_and_never_accepted(
    fake, tmp_path, monkeypatch, capsys, wrong
):
    right = candidates.Candidate.run

    def sabotaged(self, i):
        return right(self, i) + (wrong if "n32x32_w4x16_s2" in self.name else 0)

    monkeypatch.setattr(candidates.Candidate, "run", sabotaged)
    status = run(fake({"n32x32_w4x16_s2": 1.5, "n32x32_w4x16_s3": 1.1}), tmp_path)
    assert status == 1
    assert winners(tmp_path) == [(0, 3), (1, 3)]
    assert capsys.readouterr().err.count("WRONG") == 2
    assert all("WRONG" in why for r in records(tmp_path) for why in r["stopped"].values())


def test_what_does_not_compile_or_run_is_left_out(fake, tmp_path, monkeypatch):
    machine = fake({"n32x32_w4x16_s2": 1.5, "n64x32_w4x16_s2": 1.3, "n32x32_w4x16_s3": 1.1})
    compile, right = machine.compile, candidates.Candidate.run

    def fails(plan):
        if "n32x32_w4x16_s2" in plan.variant:
            raise RuntimeError("no such thing")
        compile(plan)

    def crashes(self, i):
        if "n64x32_w4x16_s2" in self.name:
            raise RuntimeError("out of resources")
        return right(self, i)

    monkeypatch.setattr(machine, "compile", fails)
    monkeypatch.setattr(candidates.Candidate, "run", crashes)
    assert run(machine, tmp_path) == 0
    assert winners(tmp_path) == [(0, 3), (1, 3)]
    stopped = "".join(records(tmp_path)[0]["stopped"].values())
    assert "no such thing" in stopped and "out of resources" in stopped


def test_elimination_leaves_the_best(fake, monkeypatch):
    """Few samples of many, many of few."""
    machine = fake({"n64x64_w8x16_s2": 1.04})
    monkeypatch.setattr(contest.Contest, "compile", lambda self, progress: None)
    monkeypatch.setattr(contest.Contest, "check", lambda self: None)
    seen = []

    def samples(candidates, i, rounds):
        seen.append((len(candidates) - 1, rounds))
        return FakeMachine.samples(machine, candidates, i, rounds)

    monkeypatch.setattr(machine, "samples", samples)
    with tuned_tiles.using(()):
        record = contest.Contest(machine, CELLS[0], candidates.CHOICES).run(lambda text: None)
    assert [rounds for _, rounds in seen] == [5, 15, 15, contest.FINAL_ROUNDS]
    _, many, fed, few = (count for count, _ in seen)
    assert many == 12 and few == 3
    assert 4 < fed <= 4 + 3 * 4, "four, and those of them that are boxes also by the TMA"
    assert (record["winner"]["warps"], record["winner"]["stages"]) == (8, 2)


def test_the_tma_competes_with_the_best_tiles(fake, tmp_path):
    run(fake({"s2_p2": 1.3, "s2": 1.1}), tmp_path)
    found = [cell["winner"] for cell in records(tmp_path)]
    assert [(row["kernel"], row["producer"], row["stages"]) for row in found] == [(1, 2, 2)] * 2


def test_a_tile_that_differs_by_its_feed_alone_is_told_by_it(fake, tmp_path, capsys):
    only = {"tile_n": (64,), "sub_n": (64,), "stages": (3,)}
    run(fake({"s3_p1": 1.3}), tmp_path, choices=only)
    assert capsys.readouterr().out.count("1.300x with feed TMA_THREAD\n") == 2


def test_packed_sequences_are_measured_beside_the_others(fake, tmp_path, monkeypatch):
    """A tile that makes them slower is not accepted, nor one that is wrong for them alone."""
    cells = [grid.Cell(64, 64, True, grid.Bucket(0, 64, (40,), 64))]
    only = {"tile_n": (32,), "sub_n": (32,), "stages": (2, 3)}
    machine = fake({"n32x32_w4x16_s2": 1.3, "n32x32_w4x16_s3": 1.2})
    right, samples = candidates.Candidate.run, machine.samples

    def slow(tiles, i, rounds):
        times = samples(tiles, i, rounds)
        if tiles[0].calls[i].lengths:
            for tile, own in zip(tiles, times, strict=True):
                if "n32x32_w4x16_s2" in tile.name:
                    own[:] = [2 * ms for ms in own]
        return times

    monkeypatch.setattr(machine, "samples", slow)
    assert run(machine, tmp_path, cells, only) == 0
    (record,) = records(tmp_path)
    assert record["winner"]["stages"] == 3 and [len(x) for x in record["calls"]] == [4, 3]

    def wrong(self, i):
        return right(self, i) + bool(self.calls[i].lengths and "n32x32" in self.name)

    monkeypatch.setattr(candidates.Candidate, "run", wrong)
    assert run(machine, tmp_path / "again", cells, only) == 1
    assert records(tmp_path / "again")[0]["winner"] is None


# ---- the backward --------------------------------------------------------------------------------


def backward_cells(longest=0):
    bucket = grid.Bucket(0, 64, (40,), longest)
    return [grid.Cell(64, 64, causal, bucket, tuned_tiles.BACKWARD) for causal in (False, True)]


def backward_winners(where):
    (table,) = tuned_tiles.read(where / "tiles.json")
    rows = [entry["row"] for entry in table["backward_rows"]]
    return [(row["mask_right"], *(row[name] for name in BACKWARD_CHOICES)) for row in rows]


def test_the_best_tile_of_the_backward_wins_and_is_used(fake, tmp_path, capsys):
    machine = fake({"m64x32_w4x32_s2": 1.07, "m64x32_w8x32_s2": 1.05})
    assert run(machine, tmp_path, backward_cells()) == 0
    assert backward_winners(tmp_path) == [(0, 4, 32, 64, 32, 2), (1, 4, 32, 64, 32, 2)]
    assert "1.070x with warps 4, tile_m 64, stages 2\n" in capsys.readouterr().out

    def plan(seqlen, arch=120, **options):
        return explain_backward(*shape(64, seqlen), arch=arch, causal=True, **options)

    assert "m64x32_w4x32_s2" in plan(170 * 64).variant
    assert "use_backward_tiles" in plan(170 * 64).reasons["tile"]
    assert "tiles.c" in plan(170 * 64 + 1).reasons["tile"]
    assert "tiles.c" in plan(170 * 64, arch=90).reasons["tile"]
    with tuned_tiles.using(()):
        assert "tiles.c" in plan(170 * 64).reasons["tile"]
    assert main(["tune", "--show"]) == 0
    shown = capsys.readouterr().out
    assert "    {120, ANY, 64, ANY, 64, 1, 0, {4, 32, 64, 32, 2}}, /* 1.07x */" in shown
    assert "2 rows of " in tune_table.describe()
    again = fake({"s1": 1.5})
    run(again, tmp_path, backward_cells())
    assert not again.cells, "a second run measures nothing"


def test_the_best_tile_of_a_recipe_wins_and_is_used(fake, tmp_path, monkeypatch, capsys):
    """By formats, mask and rows; a tile that does not fit the head dims is none."""

    def plan(recipe, seqlen, dim=64, **options):
        return explain_quantized(*shape(dim, seqlen), recipe, arch=120, **options)

    monkeypatch.setattr(
        candidates, "explain_quantized", functools.partial(explain_quantized, arch=120)
    )
    machine = fake({"_8_1_": 1.2, "_4_2_": 1.1})
    monkeypatch.setattr(machine, "tensor", lambda *dims: torch.randn(dims).bfloat16())
    bucket = grid.Bucket(0, 64, (40,))
    cells = [grid.Cell(dim, dim, True, bucket, tuned_tiles.RECIPE, "int8_fp8") for dim in (64, 256)]
    assert run(machine, tmp_path, cells) == 0
    tried = {record["cell"]: record["tried"] for record in records(tmp_path)}
    assert [len(rows) for rows in tried.values()] == [3, 0]  # at 256 one tile alone fits
    (table,) = tuned_tiles.read(tmp_path / "tiles.json")
    assert [entry["row"]["warps"] for entry in table["recipe_rows"]] == [8]
    small = plan("int8_fp8", 170 * 64, causal=True)
    assert (small.warps, small.tile_m) == (8, 128) and "tune" in small.reasons["tile"]
    assert plan("int8_fp8", 170 * 64 + 1, causal=True).warps == 4
    assert plan("int8_fp8", 100).warps == 4 and plan("fp8", 100, causal=True).warps == 4
    assert "1 of 2 cells" in capsys.readouterr().out
    assert main(["tune", "--show"]) == 0
    assert "qk_format, pv_format" in capsys.readouterr().out
    assert run(machine, tmp_path, cells) == 0 and len(records(tmp_path)) == 2


def test_cells_of_recipes():
    wanted = grid.cells([(64, 64), (80, 80), (192, 128)], [tuned_tiles.RECIPE], RECIPES)
    assert {cell.recipe for cell in wanted} == set(RECIPES)
    assert {cell.head_dim for cell in wanted} == {64, 80}
    assert not any(cell.head_dim == 80 for cell in wanted if cell.recipe == "mxfp8")
    assert str(wanted[0]).startswith("int8_fp8 head_dim 64 full")


def test_rows_of_recipes_are_checked():
    row = (120, 1, 2, 64, 64, 64, 1, 8, 1)
    with pytest.raises(ValueError, match="has 9 fields"):
        recipe_tiles.use([row[:-1]])
    with pytest.raises(ValueError, match="no tile of"):
        recipe_tiles.use([(*row[:-1], 3)])


def test_both_directions_stand_in_one_table(fake, tmp_path):
    machine = fake({"n32x32_w4x16_s2": 1.03, "m64x32_w4x32_s2": 1.07})
    assert run(machine, tmp_path, [CELLS[0], backward_cells()[1]]) == 0
    assert winners(tmp_path) == [(0, 2)] and backward_winners(tmp_path) == [(1, 4, 32, 64, 32, 2)]


@pytest.mark.parametrize("gradient", [0, 1, 2])
def test_a_wrong_gradient_is_reported(fake, tmp_path, monkeypatch, capsys, gradient):
    right = candidates.Candidate.run

    def sabotaged(self, i):
        results = list(right(self, i))
        if "w4x32_s2" in self.name:
            results[gradient] = results[gradient] * 1.1
        return results

    monkeypatch.setattr(candidates.Candidate, "run", sabotaged)
    machine = fake({"m64x32_w4x32_s2": 1.5, "m64x32_w8x32_s2": 1.1})
    assert run(machine, tmp_path, backward_cells()) == 1
    assert [winner[1] for winner in backward_winners(tmp_path)] == [8, 8]
    assert capsys.readouterr().err.count("WRONG: differs from the fallback by dq") == 2


def test_packed_sequences_are_measured_in_the_backward_too(fake, tmp_path):
    assert run(fake({"w4x32_s2": 1.5}), tmp_path, backward_cells(64)[1:]) == 0
    (record,) = records(tmp_path)
    assert [len(shape) for shape in record["calls"]] == [4, 3]
    assert [len(result["gains"]) for result in record["results"]] == [2] * len(record["results"])
    assert record["winner"]["warps"] == 4


def test_rows_of_the_backward_of_another_version_are_left_out(table):
    row = dict.fromkeys(_C.backward_tile_fields(), -1) | {"head_dim": 64, "colour": 3}
    content = tables(entry())
    content["tables"][0]["backward_rows"] = [{"row": row, "above": {}}]
    (warning,) = table(content)
    assert "colour" in warning and planned_stages() == 7


def test_cells_of_the_backward():
    """Rows of unequal head dims are those of the larger one."""
    both = (tuned_tiles.FORWARD, tuned_tiles.BACKWARD)
    cells = grid.cells([(128, 128), (192, 128)], both)
    of_backward = [cell for cell in cells if cell.direction == tuned_tiles.BACKWARD]
    assert len(cells) == 3 * 8 and {cell.head_dim for cell in of_backward} == {128}
    assert len({str(cell) for cell in cells}) == len(cells)
    assert str(of_backward[0]) == "backward head_dim 128 full keys/SM <= 64"
    assert set(of_backward[0].key(120)) == set(tuned_tiles.BACKWARD.key)
    assert of_backward[1].above() == {"head_dim": 120, "keys_per_sm": 64}


def test_candidates_of_the_backward_are_few_and_include_what_is_in_use():
    for head_dim in (64, 80, 96, 128, 192, 256):
        tiles = list(candidates.backward_tiles(head_dim, head_dim, candidates.BACKWARD_CHOICES))
        assert 0 < len(tiles) <= 42
        for arch in (90, 120, 121):
            q = torch.empty(1, 8192, 32, head_dim).half()
            plan = explain_backward(q, q, q, arch=arch)
            name = "m{tile_m}x{sub_m}_w{warps}x{warp_n}_s{stages}_"
            assert any(name.format(**tile) in plan.variant for tile in tiles), plan.variant


# ---- resuming ------------------------------------------------------------------------------------


def test_a_second_run_measures_nothing(fake, tmp_path):
    run(fake({"s2": 1.1}), tmp_path)
    before = records(tmp_path)
    again = fake({"s2": 0.5})
    run(again, tmp_path)
    assert not again.cells and records(tmp_path) == before and len(winners(tmp_path)) == 2


def test_fewer_candidates_need_no_measuring_more_do(fake, tmp_path):
    run(fake({"s2": 1.1}), tmp_path)
    fewer, more = fake(), fake({"s3": 1.2})
    run(fewer, tmp_path, choices=CHOICES | {"stages": (2,)})
    assert not fewer.cells
    run(more, tmp_path, choices=CHOICES | {"stages": (2, 3, 4)})
    assert more.cells == {False, True}
    assert winners(tmp_path) == [(0, 3), (1, 3)]


def test_measurements_of_another_gpu_or_version_do_not_count(fake, tmp_path, monkeypatch):
    run(fake({"s2": 1.1}), tmp_path)
    monkeypatch.setattr("flash_attn_sm120.__version__", "99.0")
    other = fake()
    run(other, tmp_path)
    assert other.cells == {False, True} and len(records(tmp_path)) == 4 and winners(tmp_path) == []


def test_interrupted_it_keeps_what_it_has(fake, tmp_path, monkeypatch):
    machine = fake({"s2": 1.1})

    def samples(candidates, i, rounds):
        if candidates[0].calls[i].causal:
            raise KeyboardInterrupt
        return FakeMachine.samples(machine, candidates, i, rounds)

    monkeypatch.setattr(machine, "samples", samples)
    assert run(machine, tmp_path) == 130
    assert winners(tmp_path) == [(0, 2)]
    monkeypatch.undo()
    monkeypatch.setenv("FA_SM120_TILES", "")
    rest = fake({"s2": 1.1})
    assert run(rest, tmp_path) == 0
    assert rest.cells == {True} and winners(tmp_path) == [(0, 2), (1, 2)]


def test_interrupted_at_once_it_leaves_the_table_alone(fake, tmp_path, monkeypatch):
    run(fake({"s2": 1.1}), tmp_path)
    monkeypatch.setattr("flash_attn_sm120.__version__", "99.0")
    machine = fake()

    def samples(candidates, i, rounds):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "samples", samples)
    assert run(machine, tmp_path) == 130
    assert winners(tmp_path) == [(0, 2), (1, 2)]
    assert "use_tiles" in explain(*shape(64, 100), arch=120).reasons["tile"], "put back"


@pytest.mark.parametrize(
    "target, begun, said",
    [
        (trials.hangs, "slow", "HANGS"),
        (trials.dies, "fatal", "ends with 7"),
        (trials.fails, "sticky", "ILLEGAL_ADDRESS"),
    ],
)
def test_a_child_that_ends_badly_names_its_candidate(target, begun, said):
    outcome, name = trial.watch(target, (), lambda text: None, 5.0)
    assert name == begun and said in outcome


def test_a_child_that_ends_well_hands_over_its_record():
    seen = []
    assert trial.watch(trials.ends, (), seen.append, 60.0) == ({"gain": 1.0}, "")
    assert seen == ["compiled 1 of 1"]


def test_a_broken_candidate_costs_itself_alone(fake, tmp_path, monkeypatch):
    """The contest goes on without it, and a second run does not try it again."""
    begun = []

    def watch(target, arguments, progress, limit_s):
        cell, choices, stopped = arguments
        inside = contest.Contest(machine, cell, choices)
        inside.stopped = dict(stopped)
        names = [c.name for c in inside.candidates if c.name not in stopped]
        begun.append(names)
        if any("n32x32_w4x16_s2" in name for name in names):
            return "HANGS", next(name for name in names if "n32x32_w4x16_s2" in name)
        return inside.run(progress), ""

    machine = fake({"n32x32_w4x16_s2": 1.3, "n32x32_w4x16_s3": 1.1})
    monkeypatch.setattr(trial, "watch", watch)
    assert tune(machine, CELLS, CHOICES, tmp_path, trial.in_child) == 0
    assert winners(tmp_path) == [(0, 3), (1, 3)]
    assert len(begun) == 2 * len(CELLS)
    stopped = [list(r["stopped"].values()) for r in records(tmp_path)]
    assert stopped == [["HANGS"], ["HANGS"]]
    again = journal.Journal(next(tmp_path.glob("*.jsonl")), machine)
    assert all("n32x32_w4x16_s2" in name for cell in CELLS for name in again.broken(cell))


def test_a_torn_line_is_ignored(fake, tmp_path):
    run(fake({"s2": 1.1}), tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text('{"cell": 3}\n\n' + file.read_text()[:-100])  # killed in the last cell
    rest = fake({"s2": 1.1})
    with pytest.warns(RuntimeWarning) as notes:
        run(rest, tmp_path)
    assert [str(n.message).split(" is ignored")[0][-1] for n in notes] == ["1", "5"]
    assert rest.cells == {True} and winners(tmp_path) == [(0, 2), (1, 2)]
    assert file.read_text().endswith("}\n") and len(file.read_text().splitlines()) == 7


def test_a_full_disk_says_so(fake, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal, "open", full, raising=False)
    with pytest.raises(RuntimeError, match=r"cannot be written to .*jsonl: No space left"):
        run(fake(), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(tuned_tiles.files, "write", full)
    with pytest.raises(RuntimeError, match=r"tiles.json: No space left.*measurements are in"):
        run(fake(), tmp_path)


# ---- candidates and cells ------------------------------------------------------------------------


@pytest.mark.parametrize("sms", [16, 36, 48, 84, 132, 170, 188])
def test_calls_are_in_their_bucket(sms):
    for bucket, next_bucket in itertools.pairwise((*grid.BUCKETS, None)):
        assert next_bucket is None or bucket.upto == next_bucket.above
        for seqlen in bucket.seqlens:
            seqlen, heads = bucket.heads(seqlen, sms)
            rows = -(-seqlen * heads // sms)
            assert bucket.above < rows and (rows <= bucket.upto or bucket.upto == tuned_tiles.ANY)
        lengths, heads = bucket.packed(sms)
        assert max(lengths) == bucket.longest and sum(lengths) * heads >= 1024 * sms
        assert bucket.above < bucket.longest
        assert bucket.longest <= bucket.upto or bucket.upto == tuned_tiles.ANY


def test_packed_calls_are_in_their_bucket():
    """A plan knows the longest sequence alone, which it rounds up."""
    for cell in grid.cells([(128, 128)]):
        q, ends = torch.empty(5000, 8, 128).half(), torch.empty(9).int()
        rows = tuned_tiles.in_order([entry(128, cell.causal, cell.bucket.above, cell.bucket.upto)])
        with tuned_tiles.using(rows):
            plan = explain(q, q, q, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=cell.bucket.longest, causal=cell.causal, arch=120)  # fmt: skip
        assert plan.stages == 7, cell


@pytest.mark.parametrize("arch", [90, 120])
def test_candidates_are_few_enough_and_include_what_is_known(arch):
    fallback = dict(zip(_C.tile_fields(), _C.tiles()[0], strict=True))
    variants_seen = set()
    for cell in grid.cells(common_kernels.COMMON_HEAD_DIMS):
        rows = list(candidates.candidate_rows(cell, fallback, arch, candidates.CHOICES))
        quick = list(candidates.candidate_rows(cell, fallback, arch, candidates.QUICK_CHOICES))
        assert 0 < len(quick) < len(rows) and all(row in rows for row in quick)
        assert all(set(row) == set(fallback) and row["arch"] == arch for row in rows)
        for row in rows:
            ring = row["tile_n"] * row["stages"] * (cell.head_dim + cell.head_dim_v) * 2
            if ring <= 99 << 10:
                variants_seen.add((cell[:3], *(row[name] for name in candidates.CHOICES)))
    assert len(variants_seen) < 1000, "a second of compiling each, on four cores"


def test_unknown_fields_stay_as_the_fallback_has_them():
    fallback = dict(zip(_C.tile_fields(), _C.tiles()[0], strict=True)) | {"cluster": 7}
    for row in candidates.candidate_rows(CELLS[0], fallback, 120, candidates.CHOICES):
        assert row["cluster"] == 7


# ---- the table -----------------------------------------------------------------------------------


def entry(head_dim=128, causal=1, above=64, upto=128, arch=120, **changes):
    """A row with a tile that csrc/tiles.c has nowhere, so that plans show it."""
    bucket = grid.Bucket(above, upto, ())
    cell = grid.Cell(head_dim, head_dim, bool(causal), bucket)
    tile = {"tile_n": 16, "sub_n": 16, "warps": 2, "warp_m": 16, "stages": 7}
    row = dict(zip(_C.tile_fields(), _C.tiles()[0], strict=True)) | cell.key(arch) | tile
    return {"row": row | changes, "above": cell.above()}


def test_a_row_serves_what_was_measured_and_no_more():
    """All other calls are planned as without it."""
    entries = [entry(128), entry(128, 0, 256, -1), entry(96, 1, 0, 64), entry(192, 1, 64, 128)]
    calls = list(
        itertools.product(
            (64, 72, 96, 104, 120, 128, 136, 192, 200, 256),
            (64, 96, 128, 192, 256),
            (64, 512),
            (1, 20, 21, 22, 42, 43, 84, 90, 400),
            (90, 120),
            ({}, {"causal": True}, {"window_size": (9, 0)}),
        )
    )

    def plans(rows):
        with tuned_tiles.using(rows):
            for dim, dim_v, seqlen, heads, arch, mask in calls:
                yield explain(*shape(dim, seqlen, heads, dim_v), arch=arch, **mask)

    before, after = list(plans(())), list(plans(tuned_tiles.in_order(entries)))
    hits = 0
    for call, plain, tuned in zip(calls, before, after, strict=True):
        dim, dim_v, seqlen, heads, arch, mask = call
        rows = -(-seqlen * heads // 170)
        expected = arch == 120 and (
            (mask == {"causal": True} and dim == dim_v and dim in (128, 192) and 64 < rows <= 128)
            or (mask == {} and dim == dim_v == 128 and rows > 256)
            or (mask == {"causal": True} and dim == dim_v == 96 and rows <= 64)
        )
        assert (tuned.stages == 7) == expected, call
        if not expected:
            assert tuned.variant == plain.variant, call
        hits += expected
    assert hits > 10


def test_the_whole_table_stays_short():
    """Plans walk through it: all cells won by another tile is the worst case."""
    entries = [
        {"row": entry()["row"] | cell.key(120), "above": cell.above()}
        for cell in grid.cells(common_kernels.COMMON_HEAD_DIMS)
    ]
    rows = tuned_tiles.in_order(entries)
    assert len(rows) == len(entries)
    assert tuned_tiles.in_order(reversed(entries)) == rows


def many(count):
    """Rows of head dims, equal or not, masks and sizes of a call that no two share."""
    dims = range(8, 257, 8)
    return [
        {"row": entry(dim, causal, *bounds)["row"] | {"head_dim_v": dim_v}, "above": {}}
        for dim, dim_v, causal, bounds in itertools.product(
            dims, dims, (0, 1), [(0, 64), (64, 128), (128, 256)]
        )
    ][:count]


def steps_of(function):
    """How many lines of Python it runs, and calls of C it makes."""
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1
        return count

    sys.settrace(count), sys.setprofile(count)
    try:
        function()
    finally:
        sys.settrace(None), sys.setprofile(None)
    return steps


@pytest.mark.parametrize("above", [{}, {"head_dim": 8}, {"rows_per_sm": 32, "heads_per_kv": 1}])
def test_a_table_is_read_in_a_time_that_grows_as_its_length(table, above):
    long = tables(*(one | {"above": above} for one in many(5000)))
    assert len(long["tables"][0]["rows"]) == 5000
    assert table(long) == [] and len(tuned_tiles._in_use[tuned_tiles.FORWARD]) == 5000
    steps = steps_of(tuned_tiles.load)
    assert table(tables(*long["tables"][0]["rows"][:1000])) == []
    assert 4 < steps / steps_of(tuned_tiles.load) < 6
    assert steps < 100 * 5000


def test_rows_leave_out_what_they_are_above(table):
    """As far as the extension is concerned, whatever the bound."""
    row, calls = tuned_tiles.as_tuple(entry(128, 0, 0, -1)["row"]), {}
    for bound in tuned_tiles.FORWARD.bounds:
        for above in (0, 1, 127, 128, 129, 10**6):
            limits = tuple(above if name == bound else 0 for name in tuned_tiles.FORWARD.bounds)
            with tuned_tiles.using([row + limits]):
                q, k, v = shape(128, 170, 1)
                calls[bound, above] = explain(q, k, v, arch=120).stages == 7
    served = {
        bound: [calls[bound, x] for x in (0, 1, 127, 128, 129, 10**6)]
        for bound in tuned_tiles.FORWARD.bounds
    }
    assert served["head_dim"] == served["head_dim_v"] == [True, True, True, False, False, False]
    assert served["heads_per_kv"] == [True, False, False, False, False, False]
    assert served["seqlen_q"] == [True, True, True, True, True, False]
    assert served["rows_per_sm"] == [True, False, False, False, False, False]


def test_tables_of_other_gpus_are_kept(tmp_path):
    file = tmp_path / "deep" / "tiles.json"
    tuned_tiles.write(file, {"arch": 120, "rows": [entry()]})
    tuned_tiles.write(file, {"arch": 90, "rows": [entry(arch=90)]})
    tuned_tiles.write(file, {"arch": 121, "rows": []})
    assert [table["arch"] for table in tuned_tiles.read(file)] == [90, 121]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table(text) -> that text is the table, loaded; warnings are returned."""

    def use(text):
        file = tmp_path / "tiles.json"
        file.write_text(text if isinstance(text, str) else json.dumps(text))
        monkeypatch.setenv("FA_SM120_TILES", str(file))
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            tuned_tiles.load()
        return [str(note.message) for note in notes if note.category is RuntimeWarning]

    yield use
    monkeypatch.setenv("FA_SM120_TILES", "")
    tuned_tiles.load()
    assert not tuned_tiles.in_use()


def planned_stages():
    return explain(*shape(128, 170 * 100), causal=True, arch=120).stages


def tables(*entries):
    return {"tables": [{"arch": 120, "gpu": "a card", "rows": list(entries)}]}


def test_the_table_is_loaded(table):
    assert table(tables(entry())) == [] and planned_stages() == 7 and tuned_tiles.in_use()
    with tuned_tiles.using(()):
        assert planned_stages() != 7
    assert planned_stages() == 7


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "Expecting value"),
        ('{"tables": [', "Expecting"),
        ("[" * 100_000, "recursion"),
        ("[]", "has a list of tables, and this has none"),
        ('{"tables": [3]}', "a table has a list of rows, got 3"),
        ('{"tables": [{"rows": []}]}', "for which arch"),
        (tables({}), "row and above"),
        (tables(3), "row and above"),
        (tables({"row": 1, "above": {}}), "row and above"),
        (tables(entry(stages="3")), "whole numbers"),
        (tables(entry(stages=3.5)), "whole numbers"),
        (tables(entry(stages=1)), "stages must be from 2"),
        (tables(entry(), entry(warps=3)), "warps must be"),
        (tables(entry(head_dim=10**30)), "out of range"),
    ],
    ids=range(14),
)
def test_a_broken_table_warns_once_and_is_not_used(table, text, problem):
    (warning,) = table(text)
    assert problem in warning and "tiles.json" in warning and "tune" in warning
    assert planned_stages() != 7 and not tuned_tiles.in_use()


def test_rows_of_another_version_are_left_out(table):
    older = entry()
    del older["row"]["sub_n"]
    (warning,) = table(tables(older, entry(colour=3), entry()))
    assert "colour, sub_n" in warning and planned_stages() == 7
    (warning,) = table(tables(older))
    assert planned_stages() != 7


def test_a_missing_table_warns_only_if_it_was_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FA_SM120_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FA_SM120_TILES")
    assert tuned_tiles.path() == tmp_path / "tune" / "tiles.json"
    tuned_tiles.load()
    monkeypatch.setenv("FA_SM120_TILES", str(tmp_path / "none.json"))
    with pytest.warns(RuntimeWarning, match=r"No such file.*none.json"):
        tuned_tiles.load()
    monkeypatch.setenv("FA_SM120_TILES", "")
    assert tuned_tiles.path() is None


def test_a_cache_directory_that_cannot_be_read_has_no_table(tmp_path, monkeypatch):
    (tmp_path / "tune").write_text("a file, where a directory should be")
    monkeypatch.setenv("FA_SM120_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FA_SM120_TILES")
    tuned_tiles.load()
    assert not tuned_tiles.in_use()


@pytest.fixture
def python(tmp_path):
    """python(code, **environment) -> what came of it, in a process of its own."""

    def run(code, **environment):
        done = run_python(code, tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        return done

    return run


PLAN = """
import torch
from flash_attn_sm120 import explain
q = torch.empty(128, dtype=torch.bfloat16).expand(1, 170 * 100, 1, 128)
print(explain(q, q, q, causal=True, arch=120).stages)
"""


def test_import_loads_the_table_of_the_cache_directory(python, tmp_path):
    file = tmp_path / "tune" / "tiles.json"
    tuned_tiles.write(file, tables(entry())["tables"][0])
    code = "import os; del os.environ['FA_SM120_TILES']" + PLAN
    assert python(code, FA_SM120_CACHE_DIR=str(tmp_path)).stdout == "7\n"
    assert python(PLAN, FA_SM120_CACHE_DIR=str(tmp_path)).stdout != "7\n", "empty: none"
    file.write_text("{")
    done = python(code, FA_SM120_CACHE_DIR=str(tmp_path))
    assert done.stdout != "7\n" and done.stderr.count("RuntimeWarning") == 1


def test_wheels_are_made_without_the_tuned_table(table, tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(jit, "prebuild", lambda directory, jobs, arch: planned.extend(jobs))
    table(tables(entry(128, 1, 0, -1)))
    common_kernels.prebuild(tmp_path, ["sm_120f"])
    assert planned and not any(name.count("_s7") for _, name, _ in planned)
    assert planned_stages() == 7


# ---- the command ---------------------------------------------------------------------------------


def test_the_command(fake, tmp_path, monkeypatch, capsys):
    """From end to end: tunes, shows, tells, resets."""
    monkeypatch.setattr(trial, "in_child", trial.in_process)
    monkeypatch.setattr(command, "Machine", lambda: fake({"n32x32_w4x16_s3": 1.07}))
    monkeypatch.setattr(grid, "BUCKETS", (grid.Bucket(0, 64, (40,)),))
    monkeypatch.setattr(command, "QUICK_CHOICES", CHOICES)
    assert (
        main(
            [
                "tune",
                "--quick",
                "--direction",
                "forward",
                "--head-dims",
                "64",
                "--output",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert "used from now on" in capsys.readouterr().out
    assert main(["tune", "--show"]) == 0
    shown = capsys.readouterr().out
    assert (
        "    {120, ANY, 64, 64, ANY, ANY, 64, 0, 0, {32, 32, 4, 16, 3, 0, 0}}, /* 1.07x */" in shown
    )
    assert "contribute" in shown and str(tmp_path) in shown
    assert main(["info"]) == 0
    assert "tuned tiles: 2 rows of " in capsys.readouterr().out
    assert main(["tune", "--reset"]) == 0 and not (tmp_path / "tiles.json").exists()
    with pytest.warns(RuntimeWarning, match="No such file"):  # it is still named
        tuned_tiles.load()
    assert "_s3" in explain(*shape(64, 170), arch=120).variant
    assert "use_tiles" not in explain(*shape(64, 170), arch=120).reasons["tile"]


def test_on_a_gpu(cuda, tmp_path):
    """Nothing is made up here: compiled, run, timed."""
    cell = grid.Cell(64, 64, True, grid.Bucket(0, 64, (512, 2048)))
    assert run(Machine(), tmp_path, cells=[cell]) == 0
    (record,) = records(tmp_path)
    assert len(record["results"]) == 3 and record["stopped"] == {}
    for result in record["results"]:
        assert all(0.001 < ms < 10 for ms in result["ms"]), result
        assert all(0.1 < gain < 10 for gain in result["gains"]), result


def test_another_directory_is_not_used_by_itself(fake, tmp_path, capsys):
    run(fake({"s2": 1.1}), tmp_path / "other")
    assert f"export FA_SM120_TILES={tmp_path / 'other' / 'tiles.json'}" in capsys.readouterr().out
    assert not tuned_tiles.in_use()


def test_head_dims_are_checked(capsys):
    for text in ("12", "64,64,64", "0", "264", "x"):
        with pytest.raises(SystemExit):
            main(["tune", "--head-dims", text])
    assert "multiples of 8" in capsys.readouterr().err


def test_without_a_gpu(python, tmp_path):
    code = "from flash_attn_sm120.__main__ import main; import sys; print(main(['tune']))"
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = python(code, FA_SM120_CACHE_DIR=str(tmp_path))
    assert done.stdout == "1\n" and "finds none: no CUDA driver" in done.stderr
    assert cache.directory() != tmp_path and not list(tmp_path.rglob("*.json*"))


def test_plans_of_another_arch_are_not_tuned(monkeypatch, capsys):
    monkeypatch.setenv("FA_SM120_PLAN_AS", "120")
    assert main(["tune"]) == 1
    assert "unset FA_SM120_PLAN_AS" in capsys.readouterr().err
