"""The cache of plans: its key holds what a plan depends on, and nothing else."""

import pytest
import torch

from flash_attn_sm120 import _C, explain, flash_attn_func
from helpers.devices import EMULATOR

pytestmark = pytest.mark.skipif(bool(EMULATOR.missing), reason=EMULATOR.missing)

KEY_STEP = 16  # FA_KEY_STEP of csrc/plan.h


def qkv(seqlen_q, seqlen_k, heads=(4, 2), head_dim=64):
    return [
        EMULATOR.place(torch.randn(1, seqlen, h, head_dim).bfloat16())
        for seqlen, h in ((seqlen_q, heads[0]), (seqlen_k, heads[1]), (seqlen_k, heads[1]))
    ]


def planned_by(calls):
    """How many plans some calls make, and kernels they load."""
    before = _C.counts()
    for call in calls:
        call()
    return {name: count - before[name] for name, count in _C.counts().items()}


def test_a_decoding_loop_finds_its_plan():
    """The keys grow by one in each step; a plan is made anew for every 16 of them."""
    q, k, v = qkv(1, 300)
    steps = [
        lambda n=n: flash_attn_func(q, k[:, :n], v[:, :n], causal=True, num_splits=1)
        for n in range(200, 300)
    ]
    steps[0]()
    made = planned_by(steps)
    assert made["plans"] <= 100 // KEY_STEP + 1 and made["kernels"] == 0
    assert planned_by(steps[-10:]) == {"plans": 0, "kernels": 0}


@pytest.mark.parametrize(
    "name, values", [("softmax_scale", (0.1, 0.2, -3)), ("softcap", (5, 6, 7.5))]
)
def test_numbers_that_reach_only_parameters(name, values):
    call = qkv(8, 40)
    flash_attn_func(*call, **{name: values[0]})
    made = planned_by(lambda x=x: flash_attn_func(*call, **{name: x}) for x in values)
    assert made == {"plans": 0, "kernels": 0}


def test_what_a_plan_depends_on_makes_another():
    call = qkv(40, 40)
    flash_attn_func(*call)
    for options in ({"causal": True}, {"num_splits": 2}, {"softcap": 3.0}, {"pack_gqa": True}):
        assert planned_by([lambda o=options: flash_attn_func(*call, **o)])["plans"] == 1, options


@pytest.mark.parametrize("seqlen_k", [1, 15, 16, 17, 100, 128, 129, 1000, 4097])
@pytest.mark.parametrize("seqlen_q", [1, 100])
def test_keys_of_one_step_have_one_plan(seqlen_q, seqlen_k):
    """What is rounded up to 16 keys is never less than a tile: no plan could tell them apart."""
    q = torch.empty(2, seqlen_q, 8, 128).bfloat16()
    rounded = -(-seqlen_k // KEY_STEP) * KEY_STEP
    exact, of_step = (
        explain(q, *2 * [torch.empty(2, n, 2, 128).bfloat16()], window_size=(50, 0), arch=120)
        for n in (seqlen_k, rounded)
    )
    assert exact == of_step
