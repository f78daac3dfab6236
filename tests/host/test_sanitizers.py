"""The C code under AddressSanitizer and UndefinedBehaviorSanitizer, driven by its own tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
# Each test of the driver starts Python and torch anew, which takes 10 s here: a few walk its C code.
SELECTED = "not driver or parameters or hundreds or LoadData or threads"
DRIVEN_BY = [
    "tests/host/test_tensor.py",
    "tests/host/test_hostile.py",
    "tests/host/test_results.py",
    "tests/host/test_options.py",
    "tests/host/test_errors.py",
    "tests/plan/test_plan.py",
    "tests/host/test_driver.py",
]


def library(name):
    path = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"gcc has no {name}")
    return path


@pytest.mark.skipif("FA_SM120_CFLAGS" in os.environ, reason="runs the tests that run it")
def test_c_tests_under_sanitizers(tmp_path):
    if not shutil.which("gcc") or not (ROOT / "setup.py").exists():
        pytest.skip("needs gcc and a checkout")
    preload = f"{library('libasan.so')} {library('libstdc++.so')}"
    for name in ("csrc", "kernels", "flash_attn_sm120", "emulator", "tests"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("conftest.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {**os.environ, "FA_SM120_CFLAGS": FLAGS, "PYTHONPATH": str(tmp_path)}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tmp_path, env=environment, check=True, capture_output=True)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            SELECTED,
            *DRIVEN_BY,
        ],
        cwd=tmp_path,
        # Python and torch keep memory until the end, which is no leak of ours; test_tensor.py counts those.
        env={
            **environment,
            "LD_PRELOAD": preload,
            "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONMALLOC": "malloc",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert " passed" in done.stdout
