"""The probe of 8- and 4-bit instructions on the emulator, whose tests have models of their own."""

import re

import numpy as np
import pytest
import torch

from emulator import emulator, unavailable
from flash_attn_sm120 import jit, probe_8bit

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

GRID = (probe_8bit.REPEATS, len(probe_8bit.PROBES))


@pytest.fixture(scope="module")
def ptx():
    code = jit.compile("probe_8bit", "probe_8bit", probe_8bit.OPTIONS, 120, 13000, True)
    return code.rstrip(b"\0").decode()


def results_of(ptx, words):
    results = np.zeros((*words.shape[:2], probe_8bit.RESULTS, probe_8bit.LANES), np.int32)
    emulator().run(ptx, words.numpy(), results, grid=GRID, block=probe_8bit.LANES)
    return torch.from_numpy(results)


def test_what_the_probe_expects(ptx):
    words = probe_8bit.operands()
    found = dict(probe_8bit.differences(words, results_of(ptx, words)))
    assert found == {probe.name: 0 for probe in probe_8bit.PROBES}


@pytest.mark.parametrize(
    "right, wrong, name",
    [
        (r"e4m3\.e4m3\.f32\.ue8m0", "e5m2.e4m3.f32.ue8m0", "mma mxf8f6f4"),
        (r"\{2, 1\}", "{2, 0}", "mma mxf8f6f4, other selectors"),
        (r"\{0, 2\}", "{0, 3}", "mma mxf4nvf4, other selectors"),
        (r"b8 \{(\S+), (\S+),", r"b8 {\2, \1,", "ldmatrix m16n16.trans.b8"),
    ],
)
def test_the_probe_can_fail(ptx, right, wrong, name):
    changed, count = re.subn(right, wrong, ptx)
    assert count
    words = probe_8bit.operands()
    found = dict(probe_8bit.differences(words, results_of(changed, words)))
    assert found.pop(name) > 0
    assert not any(wrong for other, wrong in found.items() if not other.startswith(name))


def test_operands_are_those_of_every_run():
    assert torch.equal(probe_8bit.operands(), probe_8bit.operands())
