"""The report: its parts come to an end whatever happens in them, and it says what they found."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flash_attn_sm120 import cards, quantized, report
from flash_attn_sm120.__main__ import main
from flash_attn_sm120._measure import Timed
from flash_attn_sm120.report import correctness, recipes, speed
from helpers.children import run_python
from helpers.devices import CPU, EMULATOR, params_of
from helpers.recipes import attend_there, emulate_device


@pytest.mark.parametrize("device", params_of(CPU, EMULATOR))
def test_correctness_of_small_calls(device):
    """The checks themselves, of calls that an emulator can do; the others are the same but larger."""

    def small(case):
        queries = 4 if case.name == "splits" else 40
        return case._replace(batch=1, queries=queries, keys=40, heads=(2, 1), head_dims=(64, 32))

    every = [small(case) for case in correctness.cases() if "heads" not in case.name]
    found = list(correctness.run(device.place, iter(every)))
    assert len(found) == len(every) + 4
    assert [record for record in found if not record["passed"]] == []


def test_wrong_results_are_found(monkeypatch):
    right = correctness.flash_attn_func

    def wrong(*arguments, **options):
        out, lse = right(*arguments, **options)
        return out + 0.1, lse

    monkeypatch.setattr(correctness, "flash_attn_func", wrong)
    case = correctness.Case("a call", 1, 40, 40, (2, 1), (64, 64))
    record = next(correctness.run(lambda x: x, iter([case])))
    assert record["passed"] is False and "largest error" in record["said"]


def test_a_check_that_raises_is_a_row_and_the_others_run(monkeypatch):
    """Whatever it raises, with a message or without; a lack of memory is no wrong result."""
    errors = iter((ValueError(), torch.cuda.OutOfMemoryError("8 GB"), NotImplementedError("no"), IndexError("x\ny")))  # fmt: skip

    def raises(*_, **__):
        raise next(errors)

    monkeypatch.setattr(correctness, "flash_attn_func", raises)
    case = correctness.Case("a call", 1, 40, 40, (2, 1), (64, 64))
    found = [correctness.guarded("", lambda: correctness._check(case, lambda x: x)) for _ in "1234"]
    assert [record["passed"] for record in found] == [False, None, None, False]
    assert [record["said"] for record in found] == [
        "ValueError()",
        "out of memory",
        "not supported: no",
        "x",
    ]


@pytest.mark.parametrize("recipe", quantized.RECIPES)
def test_recipes_are_right(recipe, monkeypatch):
    """The checks of a card, whose kernels run on the emulator."""
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    emulate_device(monkeypatch)
    found = list(recipes.run(recipe, lambda x: x, attend_there))
    assert len(found) == len(recipes.CASES) + 1
    assert [record for record in found if not record["passed"]] == []


def test_a_wrong_recipe_is_found(monkeypatch):
    def wrong(*operands, **options):
        out, lse = quantized.quantized_attention(*operands, **options)
        return out * 1.5, lse

    found = list(recipes.run("fp8", lambda x: x, wrong))
    assert [record["passed"] for record in found] == [False] * (len(recipes.CASES) + 1)
    assert all("relative error" in record["said"] for record in found)


def test_a_recipe_that_does_not_end_is_a_row_and_the_others_stand(monkeypatch):
    good = 'print(\'{"check": "a", "passed": true, "said": ""}\', flush=True)'
    commands = dict.fromkeys(quantized.RECIPES, child(good))
    commands["nvfp4"] = child(f"import time; {good}; time.sleep(60)")
    monkeypatch.setattr(report, "command_of", commands.get)
    found = report.run_recipes(5)
    assert [r["check"] for r in found if not r["passed"]] == ["nvfp4"]
    assert len(found) == len(quantized.RECIPES) + 1
    assert "did not end within 5 s" in found[-1]["said"]
    text = report.markdown(made(recipes={"ended": "", "records": found}))
    assert "| nvfp4 | WRONG: did not end" in text and "WRONG OR UNFINISHED" in text


def child(code):
    return [sys.executable, "-c", code]


LINE = 'print(\'{"check": "a", "passed": true, "said": ""}\', flush=True)'


@pytest.mark.parametrize(
    ("code", "limit_s", "ended"),
    [
        (LINE, 60, ""),
        (f"import time; {LINE}; time.sleep(60)", 3, "did not end within 3 s"),
        (f"import os; {LINE}; os._exit(9)", 60, "ended with 9"),
        (f"{LINE}; print('{{\"torn'); raise RuntimeError('sticky')", 60, "RuntimeError: sticky"),
    ],
)
def test_what_a_part_found_stands_however_it_ends(code, limit_s, ended):
    records, how = report.run_part("correctness", child(code), limit_s)
    assert records == [{"check": "a", "passed": True, "said": ""}]
    assert how == ended or (ended and ended in how)


def test_a_failed_check_is_a_row():
    code = "print('out bf16   1e+00  1e-02 FAILED'); print('1 failed'); raise SystemExit(1)"
    records, ended = report.run_part("check", child(code), 60)
    assert [record["passed"] for record in records] == [False] and ended
    assert report.run_part("check", child("print('all passed')"), 60) == ([], "")


def made(**parts):
    nothing = {"ended": "", "records": []}
    facts = {"flash_attn_sm120": "1", "torch": "2", "cuda": "13", "system": "Linux"}
    every = {part: parts.get(part, nothing) for part in report.LIMITS_S}
    return {**facts, "tuned_tiles": False, "parts": every}


def test_a_report_is_right_only_if_all_came_to_its_end():
    good = {"check": "a", "passed": True, "said": ""}
    left_out = {"check": "b", "passed": None, "said": "not supported: b"}
    assert report.passed(made(correctness={"ended": "", "records": [good, left_out]}))
    assert not report.passed(made(correctness={"ended": "ended with 9", "records": [good]}))
    bad = {**good, "passed": False, "said": "largest error 1, allowed 0.1"}
    text = report.markdown(made(correctness={"ended": "", "records": [bad]}))
    assert "| a | WRONG: largest error 1, allowed 0.1 |" in text and "WRONG OR UNFINISHED" in text


@pytest.fixture
def quick_speed(monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(speed, "SOAK_S", 0.0)
    monkeypatch.setattr(speed, "FLUSH_BYTES", 1 << 10)
    monkeypatch.setattr(speed, "RECOVERY_S", 0.0)
    a = torch.randn(64, 64)
    peak = SimpleNamespace(flops=2.0 * 64**3, timed=lambda: Timed("peak", lambda: a @ a))
    monkeypatch.setattr(speed, "MmaPeak", lambda: peak)


def small_cell(kind):
    return speed.Cell(kind, 1, (2, 2), 16, 32, 32, True)


def test_speed_of_small_calls(monkeypatch, quick_speed):
    """On the CPU: each contestant has a row, or says why it has none; the text has the verdicts."""
    cells = [small_cell(kind) for kind in ("forward", "backward")]
    monkeypatch.setitem(speed.PREDICTED, str(cells[0]), {cards.PRO: 0.123})
    found = list(speed.measure(cells, "cpu", cards.PRO))
    names = {(r["cell"], r["contestant"]) for r in found}
    assert names >= {(str(c), n) for c in cells for n in (speed.OURS, *speed.BACKENDS)}
    timed = [r for r in found if r["contestant"] == speed.OURS]
    assert all(r["share"] > 0 and "low_clocks" in r for r in timed)
    assert [r["predicted"] for r in timed] == [0.123, None]
    text = report.markdown(made(speed={"ended": "", "records": found}))
    assert all(str(cell) in text for cell in cells)
    assert "absent: sdpa cudnn" in text and "| 0.12 |" in text


def test_a_cell_that_breaks_is_a_row_and_the_others_run(monkeypatch, quick_speed):
    """Memory that runs out beside the others, or a GPU that one of them has broken."""
    samples = speed._samples
    left = iter([RuntimeError("CUDA error: sticky\nmore")])

    def once(*arguments):
        if error := next(left, None):
            raise error
        return samples(*arguments)

    monkeypatch.setattr(speed, "_samples", once)
    cells = [small_cell(kind) for kind in ("forward", "backward")]
    found = list(speed.measure(cells, "cpu"))
    ours = [r for r in found if r["contestant"] == speed.OURS]
    assert ours[0]["absent"] == "CUDA error: sticky" and "ms" in ours[1]
    text = report.markdown(made(speed={"ended": "", "records": found}))
    assert f"| {cells[0]} | absent |" in text


def test_every_cell_but_decoding_has_a_prediction():
    names = {str(cell) for cell in speed.cells() if cell.kind != "decoding"}
    assert names == set(speed.PREDICTED)
    assert all(0 < x < 1 for each in speed.PREDICTED.values() for x in each.values())


def test_what_a_card_says_is_in_the_text():
    card = {"name": "A card", "arch": 120, "sms": 170, "l2_bytes": 96 << 20}
    record = {
        "card": card,
        "half_rate": 1.98,
        "kind": cards.GEFORCE,
        "why": "by its name",
        "while_running": {"clocks.sm": "2407 MHz", "power.draw": None},
        "others": {"flash_attn": "2.8.3"},
    }
    text = report.markdown(made(speed={"ended": "", "records": [record]}))
    assert "A card: compute capability 12.0, 170 SMs, 96 MB of L2" in text
    assert "clocks.sm 2407 MHz\nflash_attn 2.8.3\n" in text and "(1.98)" in text


def test_nothing_personal_is_in_it(monkeypatch):
    path = Path.home() / "secret"
    code = f"import sys; sys.exit({str(path)!r})"
    assert str(Path.home()) not in report.run_part("speed", child(code), 60)[1]
    said = {"check": "a", "passed": False, "said": f"no file {path}"}
    monkeypatch.setattr(report, "run_part", lambda *_: ([dict(said)], ""))
    assert str(Path.home()) not in json.dumps(report.make())


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["report"]) == 1
    assert "a report is of a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "half_rate", "kind", "why"),
    [
        ("NVIDIA GeForce RTX 5090", None, cards.GEFORCE, "name"),
        ("NVIDIA GeForce RTX 5070 Ti Laptop GPU", None, cards.GEFORCE, "name"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None, cards.PRO, "name"),
        ("NVIDIA GB10", None, cards.PRO, "name"),
        ("NVIDIA Graphics Device", 1.97, cards.GEFORCE, "1.97 times"),
        ("NVIDIA Graphics Device", 1.02, cards.PRO, "1.02 times"),
        ("NVIDIA Graphics Device", None, "", "not been measured"),
    ],
)
def test_classes_of_cards(name, half_rate, kind, why):
    found = cards.kind_of(name, 120, half_rate)
    assert found.kind == kind and why in found.why
    assert cards.kind_of("NVIDIA H100 80GB HBM3", 90, 1.0).kind == ""


def test_explain_says_which_class_is_planned_for(capsys):
    assert main(["explain", "--arch", "120"]) == 0
    assert f"planned for 170 SMs: {cards.GEFORCE}" in capsys.readouterr().out
    assert main(["explain", "--arch", "90"]) == 0
    assert "-like" not in capsys.readouterr().out


EXPLAIN = """
import torch
from flash_attn_sm120 import _C, explain
from helpers.devices import EMULATOR
q = EMULATOR.place(torch.zeros(1, 4, 1, 64, dtype=torch.float16))
print(_C.devices()[1][0]["name"], "|", explain(q, q, q).reasons["class"])
"""


def test_tune_keeps_the_class(tmp_path):
    """A plan takes the rows of the class that tune has measured, where the name says nothing."""
    if EMULATOR.missing:
        pytest.skip(EMULATOR.missing)
    file = tmp_path / "tiles.json"
    name = "Emulated sm_120"
    for gpu, said in ((name, "PRO-like: as tune measured"), ("another", "GeForce-like: the name is unknown")):  # fmt: skip
        table = {"gpu": gpu, "kind": cards.PRO, "why": "measured", "arch": 120, "rows": []}
        file.write_text(json.dumps({"tables": [table]}))
        done = run_python(EXPLAIN, tmp_path, FA_SM120_TILES=str(file))
        assert done.stdout.startswith(f"{name} | {said}"), done.stderr
    asked = run_python(EXPLAIN, tmp_path, FA_SM120_TILES="", FA_SM120_PLAN_AS="120-pro")
    assert asked.stdout == f"{name} | PRO-like: as FA_SM120_PLAN_AS asks\n", asked.stderr
