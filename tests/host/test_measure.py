"""How results are judged and calls are timed: flash_attn_sm120/_measure.py."""

import pytest
import torch

from flash_attn_sm120 import _measure
from flash_attn_sm120._measure import Timed, Timing

NAN, INF = float("nan"), float("inf")


# ---- numbers -------------------------------------------------------------------------------------


def test_twice_the_error_of_plain_pytorch_is_allowed():
    reference = torch.tensor([1.0, -4.0], dtype=torch.float64)
    plain = reference + torch.tensor([0.25, -0.5])
    rounding = _measure.allowed_error(reference, reference)
    assert 0 < rounding < 1e-6, "of fp32, around 4.3"
    assert _measure.allowed_error(reference, plain) == 2 * 0.5 + rounding
    assert _measure.allowed_error(reference, plain, factor=3) == 3 * 0.5 + rounding


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_where_plain_pytorch_overflows_it_allows_nothing(special):
    reference = torch.tensor([1.0, 2.0])
    plain = torch.tensor([1.5, special], dtype=torch.float16)
    assert 1 <= _measure.allowed_error(reference, plain) < 1.001


def test_nan_is_never_close():
    reference = torch.zeros(2)
    assert _measure.max_error(torch.tensor([0.0, -3.0]), reference) == 3
    assert not _measure.max_error(torch.tensor([NAN, 0.0]), reference) <= INF


def test_nothing_has_no_error():
    empty = torch.zeros(0, 3)
    assert _measure.max_error(empty, empty) == _measure.allowed_error(empty, empty) == 0


def test_plain_attention_is_attention():
    q, k, v = (torch.randn(2, 5, 8) for _ in range(3))
    visible = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    out = _measure.plain_attention(q, k, v, visible)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[:, 1:], k, v, attn_mask=visible[1:]
    )
    torch.testing.assert_close(out[:, 1:], expected)
    assert (out[:, 0] == 0).all(), "a row that sees no key"


# ---- times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_calls_are_timed_in_turn_with_a_cold_l2(monkeypatch, device):
    log = []

    class Event:
        def record(self):
            log.append("time")
            self.at = len(log)

        def elapsed_time(self, end):
            return end.at - self.at

    class Flush:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(_measure, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(_measure, "event", lambda device: Event())
    calls = [Timed(name, lambda name=name: log.append(name)) for name in "AB"]
    samples = _measure.round_robin(calls, device, 3, Flush())
    assert samples == [[2] * 3] * 2
    timed = ["flush", "time", "A", "time", "flush", "time", "B", "time"]
    assert log == ["synchronize", "flush", *timed * 3, "synchronize"]


def test_a_context_is_entered_before_the_flush(monkeypatch):
    log = []

    class Context:
        def __enter__(self):
            log.append("enter")

        def __exit__(self, *error):
            log.append("exit")

    class Flush:
        def zero_(self):
            log.append("flush")

    call = Timed("A", lambda: log.append("A"), Context)
    _measure.round_robin([call], "cpu", 1, Flush())
    _measure.soak([call], "cpu", 0.0)
    assert log == ["flush", "enter", "flush", "A", "exit", "enter", "A", "exit"]


def test_a_timing_is_a_median_and_quartiles():
    timing = Timing.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (timing.ms, timing.ms_q1, timing.ms_q3, timing.rounds) == (3, 2, 4, 5)
    assert timing.spread == 2 / 3
    assert Timing.of([20.0, 20.0], graph_calls=10).ms == 2, "of one of the calls of a graph"


# ---- the machine ---------------------------------------------------------------------------------


def test_what_nvidia_smi_does_not_say_is_none(monkeypatch):
    monkeypatch.setattr(_measure, "output_of", lambda *command: "1980 MHz, 600.00 W")
    assert _measure.nvidia_smi("clocks.sm", "power.limit", "colour") == {
        "clocks.sm": "1980 MHz",
        "power.limit": "600.00 W",
        "colour": None,
    }
    monkeypatch.setattr(_measure, "output_of", lambda *command: None)
    assert _measure.nvidia_smi("clocks.sm") == {"clocks.sm": None}
    monkeypatch.undo()
    assert _measure.output_of("no-such-command-anywhere") is None
