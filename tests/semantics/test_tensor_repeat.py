"""FA_SM120_TENSOR_REPEAT: repeated products change a kernel's name and time, not its results."""

import pytest

from flash_attn_sm120 import explain, explain_backward, jit
from helpers.children import run_python
from helpers.devices import EMULATOR, params_of
from helpers.shapes import shapes

CALLS = """
import torch
from flash_attn_sm120 import _C, explain, flash_attn_func
from helpers.devices import EMULATOR
torch.manual_seed(0)
q, k, v = (torch.randn(1, s, h, 64).bfloat16() for s, h in ((70, 2), (90, 1), (90, 1)))
bias = torch.randn(1, 2, 70, 90)
for options in ({"causal": True}, {"softcap": 3.0, "deterministic": True}, {"attn_bias": bias}):
    results = []
    for place in (lambda x: x, EMULATOR.place):
        qkv = [place(x) for x in (q, k, v)]
        wants = {"bias_gradient": True} if "attn_bias" in options else {}
        if wants:
            options = {"attn_bias": place(bias)}
        out, lse = flash_attn_func(*qkv, return_lse=True, **options)
        dout = place(torch.ones_like(q))
        gradients = _C.backward(dout, *qkv, out, lse, None, **options, **wants)
        gradients = [x for x in gradients if x is not None]
        results.append([torch.as_tensor(x).float() for x in (out, lse, *gradients)])
    for expected, got in zip(*results):
        seen = expected.isfinite()
        error = (got - expected)[seen].abs().max() / expected[seen].abs().max()
        print(float(error))
"""


@pytest.mark.parametrize("device", params_of(EMULATOR))
@pytest.mark.parametrize("repeat", ["2", "4"])
def test_results_are_right(device, repeat, tmp_path):
    """out, lse and all gradients are those of the CPU, as far as bf16 goes."""
    done = run_python(CALLS, tmp_path, FA_SM120_TENSOR_REPEAT=repeat)
    errors = [float(line) for line in done.stdout.splitlines()]
    assert len(errors) == 16, done.stderr
    assert max(errors) < 2**-6


@pytest.mark.parametrize("make", [explain, explain_backward])
def test_repeats_are_a_variant(make, tmp_path):
    """Such a kernel has a name and options of its own; others have the constant 1 and no such name."""
    code = f"""
from flash_attn_sm120 import {make.__name__}
from helpers.shapes import shapes
plan = {make.__name__}(*shapes(), arch=120)
print(plan.variant, plan.options)
"""
    plan = make(*shapes(), arch=120)
    assert "-DTENSOR_REPEAT=1" in plan.options
    repeated = run_python(code, tmp_path, FA_SM120_TENSOR_REPEAT="4").stdout
    assert repeated.startswith(f"{plan.variant}_repeat4 ")
    assert "-DTENSOR_REPEAT=4" in repeated


def test_repeats_are_not_shipped(tmp_path):
    kernel = ("forward", "forward_repeat2", ("-DWARPS=4", "-DTENSOR_REPEAT=2"))
    with pytest.raises(RuntimeError, match="unset FA_SM120_TENSOR_REPEAT"):
        jit.prebuild(tmp_path, [kernel], "sm_120f")
    assert not list(tmp_path.iterdir())
