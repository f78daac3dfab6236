"""Tests on a GPU that hang: conftest.py ends their process and names them. No GPU needed."""

import os
import sys
from pathlib import Path

import pytest

from helpers.children import run_command

ROOT = Path(__file__).parents[2]

HANGING = """
import ctypes, dataclasses, time
import pytest
from helpers import watchdog
from helpers.devices import CPU, CUDA, params_of

watchdog.GRACE_S = 1.0

# As if both were there; only one of them is a GPU.
@pytest.fixture(params=params_of(CPU, dataclasses.replace(CUDA, missing="")))
def device(request):
    return request.param

@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_kernel(device, kernel):
    if device is CPU:
        time.sleep(0.6)  # beyond the limit
    elif kernel == "backward":
        {hang}

def test_after(device):
    pass
"""

WITHOUT_THE_GIL = "time.sleep(60)"
WITH_THE_GIL = "ctypes.PyDLL(None).sleep(60)"


@pytest.mark.parametrize("hang", [WITHOUT_THE_GIL, WITH_THE_GIL])
def test_a_hang_ends_the_process_and_is_named(tmp_path, hang):
    (tmp_path / "test_hanging.py").write_text(HANGING.format(hang=hang))
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "conftest"]
    command += ["--gpu-time-limit", "0.3", "--rootdir", str(tmp_path), str(tmp_path)]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = run_command(*command, cwd=tmp_path, timeout=50, PYTHONPATH=paths)
    output = done.stdout + done.stderr
    assert done.returncode == 1 and done.stdout.count("PASSED") == 3, output
    assert "in test_kernel" in done.stderr and "test_after" not in done.stdout, output
    if hang == WITHOUT_THE_GIL:
        name = "test_hanging.py::test_kernel[cuda-backward] is not done after 0.3 s"
        assert name in done.stderr, output
