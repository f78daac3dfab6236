"""``python -m flash_attn_sm120``, as a person runs it."""

import os
import re
import subprocess
import sys

import pytest
import torch

import flash_attn_sm120.__main__ as cli


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "flash_attn_sm120", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_info():
    done = run("info")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert (
        "driver: " in done.stdout
        and "compiler: " in done.stdout
        and "kernel cache: " in done.stdout
    )
    for direction in ("forward", "backward"):
        line = rf"{direction}\w*_bf16_d128_dv128\S+ +tile \d+ x \d+, \d+ KB"
        assert re.search(line, done.stdout)


def test_info_shows_the_environment():
    assert "'FA_SM120_LIMITS': '120'" in run("info", FA_SM120_LIMITS="120").stdout


def test_demo():
    done = run("demo")
    assert done.returncode == 0, done.stderr
    error = re.search(r"largest error against fp32: (\S+)", done.stdout)
    assert error and float(error[1]) < (1e-4 if not torch.cuda.is_available() else 2e-2)


def test_check_passes():
    done = run("check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("all passed")
    for name, rows in (("out", 3), ("dq", 1), ("dk", 1), ("dv", 1)):
        found = re.findall(rf"^{name} bfloat16 head_dim 128 seqlen \d+ causal", done.stdout, re.M)
        assert len(found) == rows


def test_check_fails_where_attention_is_wrong(monkeypatch, capsys):
    """The self-test must be able to fail: here attention returns half of what it should."""
    right = cli.flash_attn_func
    monkeypatch.setattr(
        cli, "flash_attn_func", lambda *args, **kwargs: (right(*args, **kwargs)[0] / 2, None)
    )
    monkeypatch.setattr(cli, "CHECK_HEAD_DIMS", (64,))
    assert cli.main(["check"]) == 1
    said = capsys.readouterr().out
    assert said.count(" seqlen ") >= 24 and "failed" in said.splitlines()[-1]
    assert said.count("FAILED") >= said.count(" seqlen ") * 3 / 4


def test_check_fails_where_gradients_alone_are_wrong(monkeypatch, capsys):
    right = cli.flash_attn_func

    def with_doubled_gradients(*tensors, **options):
        out, lse = right(*tensors, **options)
        return out + (out - out.detach()), lse

    call = ("cpu", torch.float32, 64, 65, True)
    assert cli._check_gradients(*call)
    monkeypatch.setattr(cli, "flash_attn_func", with_doubled_gradients)
    assert cli._check_forward(*call) and not cli._check_gradients(*call)
    assert capsys.readouterr().out.count("FAILED") == 3


def test_warmup_fills_the_cache(tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc")
    from flash_attn_sm120 import common_kernels

    monkeypatch.setenv("FA_SM120_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(common_kernels, "COMMON_HEAD_DIMS", ((64, 64),))
    monkeypatch.setattr(common_kernels, "DTYPES", (torch.bfloat16,))
    seen = []
    count = common_kernels.warmup(120, lambda kernels: (seen.append(k) or k for k in kernels))
    assert count == len(set(seen)) == len(common_kernels.common_kernels(120)) >= 10
    steps = {"backward_delta", "backward", "backward_convert", "backward_sink"}
    assert {"forward_tma", "combine", *steps} <= {kernel.kernel for kernel in seen}
    cubins = sorted(
        path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix == ".cubin"
    )
    assert len(cubins) == count
    common_kernels.warmup(120)
    again = sorted(
        path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix == ".cubin"
    )
    assert again == cubins, "the second time all comes from the cache"


def test_warmup_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run("warmup")
    assert done.returncode != 0 and "no CUDA driver" in done.stderr


def test_unknown_command():
    done = run("frobnicate")
    assert done.returncode == 2 and "invalid choice" in done.stderr
