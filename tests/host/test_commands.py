"""``python -m flash_attn_sm120``, as a person runs it."""

import os
import re
import subprocess
import sys
from importlib import metadata
from types import ModuleType

import pytest
import torch

from flash_attn_sm120 import cache, fa2, flash_attn_func, sdpa, vllm
from flash_attn_sm120.__main__ import COMMANDS, main
from flash_attn_sm120.commands import check, demo, doctor, info
from helpers.children import run_command


def run(*arguments, **environment):
    return run_command(sys.executable, "-m", "flash_attn_sm120", *arguments, **environment)


def test_info_is_one_screen():
    done = run("info")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    for fact in ("driver", "compiler", "kernel cache", "tuned tiles", "environment"):
        assert f"\n{fact}: " in done.stdout
    assert re.search(r"^ +128  \d+ x \d+.*\d+ splits.*\d+ x \d+", done.stdout, re.M)
    assert done.stdout.count("\n") <= 24 and "_bf16_" not in done.stdout


def test_info_beside_a_process_that_drops_kernels(monkeypatch, tmp_path):
    """A file that is listed may be gone when its size is asked for."""
    (tmp_path / "a.cubin").write_bytes(b"12")
    (tmp_path / "b.cubin").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(cache, "directory", lambda: tmp_path)
    assert info._cache().endswith(", 1 kernels, 0.0 MB")


def test_info_names_the_kernels_if_asked():
    done = run("info", "--kernels")
    for direction in ("forward", "backward"):
        assert re.search(rf"^  {direction}\w*_bf16_d128_dv128\S+$", done.stdout, re.M)


def test_info_shows_the_environment():
    assert "FA_SM120_LIMITS=120" in run("info", FA_SM120_LIMITS="120").stdout


def test_explain(capsys):
    call = ["explain", "--batch", "2", "--seqlen", "100", "--heads", "4", "--arch", "120"]
    assert main([*call, "--heads-kv", "2", "--window", "64", "none", "--softcap", "30"]) == 0
    said = capsys.readouterr().out
    assert "q (2, 100, 4, 128), k (2, 100, 2, 128), v (2, 100, 2, 128), bf16" in said
    assert "compute capability 12.0" in said and re.search(r"^  forward\w+_left", said, re.M)
    assert main([*call, "--backward", "--deterministic", "--sink"]) == 0
    said = capsys.readouterr().out
    assert "backward_bf16_d128_dv128" in said and "backward_sink" in said
    assert main([*call, "--packed", "--seqlen-k", "300", "--causal"]) == 0
    said = capsys.readouterr().out
    assert "q (200, 4, 128), k (600, 4, 128), v (600, 4, 128), bf16" in said
    assert re.search(r"^  forward\w+_right\w*_varlen: ", said, re.M) and "varlen_fill" in said
    for packed in ([], ["--packed"]):
        assert main([*call, *packed, "--page-size", "16", "--seqlen-k", "300"]) == 0
        said = capsys.readouterr().out
        assert "k (38, 16, 4, 128), v (38, 16, 4, 128), bf16" in said
        assert re.search(r"^  forward\w+_varlen_paged: ", said, re.M)
    assert main([*call, "--backward", "--page-size", "16"]) == 1
    assert "page_table has no backward" in capsys.readouterr().err


def test_explain_of_a_recipe(capsys):
    call = ["explain", "--recipe", "nvfp4", "--seqlen", "512", "--head-dim", "64"]
    assert main([*call, "--arch", "120", "--causal", "--sink"]) == 0
    said = capsys.readouterr().out
    assert "forward by quantized_forward" in said and "speed: by the static model" in said
    assert main([*call, "--arch", "90"]) != 0
    assert "block-scaled products" in capsys.readouterr().err
    assert main([*call, "--arch", "120", "--packed"]) != 0
    assert "does not support" in capsys.readouterr().err


def test_explain_says_what_is_wrong_with_a_call(capsys):
    assert main(["explain", "--head-dim", "12"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("explain: ") and "multiple of 8" in said.err


def test_doctor_says_which_doors_there_are(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for door in doctor.DOORS:
        assert re.search(rf"^{re.escape(door.program)}: (not )?possible", said, re.M)


def test_doctor_says_whether_a_door_is_open(monkeypatch):
    def refuse(_):
        raise NotImplementedError("no such door")

    door = doctor.Door("Torch", "torch", "sdpa", "activate()", lambda _: True)
    version = f"possible with torch {metadata.version('torch')}"
    assert doctor.state(door) == f"{version}; open"
    closed = door._replace(is_open=lambda _: False)
    how = "closed; flash_attn_sm120.sdpa.activate() opens it"
    assert doctor.state(closed) == f"{version}; {how}"
    assert doctor.state(door._replace(is_open=refuse)) == f"not {version}: no such door"
    missing = door._replace(package="no-such-package")
    assert doctor.state(missing) == "not possible, no-such-package is not installed"
    monkeypatch.setattr(sdpa, "_OLDEST_TRIED", (99, 0))
    assert doctor.state(door) == f"{version}, which has not been tried; open"


def test_doctor_looks_for_flash_attn(monkeypatch):
    (door,) = (door for door in doctor.DOORS if door.module == "fa2")
    assert "; closed; flash_attn_sm120.fa2.install_as_flash_attn() opens it" in doctor.state(door)
    handle = fa2.install_as_flash_attn()
    assert doctor.state(door).endswith("; open")
    handle.remove()
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert "not possible with torch" in doctor.state(door)
    assert "flash_attn is imported already" in doctor.state(door)


def test_doctor_asks_for_the_entry_point_of_vllm(monkeypatch):
    """vLLM itself is not imported: that takes long."""
    before = "vllm" in sys.modules
    group = "vllm.general_plugins"
    entry = metadata.EntryPoint("ours", "flash_attn_sm120.vllm:register", group)
    other = metadata.EntryPoint("ours", "other:register", group)
    for found in ([], [other], [entry]):
        monkeypatch.setattr(metadata, "entry_points", lambda *, group, found=found: found)
        (door,) = (door for door in doctor.DOORS if door.package == "vllm")
        assert door.is_open(vllm) == (found == [entry])
    assert ("vllm" in sys.modules) == before


def test_help_says_what_each_command_is_for():
    said = re.sub(r"\s+", " ", run("--help").stdout)
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        assert f" {name} {command.__doc__.splitlines()[0]}" in said
        assert run(name, "--help").returncode == 0


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    shell = (
        f"{sys.executable} -m flash_attn_sm120 info --kernels | head -n 1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=600)
    assert done.stderr == "" and done.stdout.splitlines()[1:] in (["141"], ["0"])


def test_a_closed_pipe_has_the_status_of_sigpipe(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["explain", "--arch", "120"]) == 141


def test_demo():
    done = run("demo")
    assert done.returncode == 0, done.stderr
    error = re.search(r"largest error against fp32: (\S+)", done.stdout)
    assert error and float(error[1]) < (1e-4 if not torch.cuda.is_available() else 2e-2)


def test_check_passes(monkeypatch, capsys):
    """With the head dim that most models have; test_forward.py and test_backward.py have all."""
    monkeypatch.setattr(check, "HEAD_DIMS", (128,))
    status = main(["check"])
    said = capsys.readouterr().out
    assert status == 0 and said.rstrip().endswith("all passed"), said
    assert len(re.findall(r"^out bfloat16 head_dim 128 pages ", said, re.M)) == 2
    for name in ("out", "dq", "dk", "dv"):
        assert len(re.findall(rf"^{name} bfloat16 head_dim 128 packed ", said, re.M)) == 2
    for name, rows in (("out", 3), ("dq", 1), ("dk", 1), ("dv", 1)):
        assert (
            len(re.findall(rf"^{name} bfloat16 head_dim 128 seqlen \d+ causal", said, re.M)) == rows
        )


def test_check_fails_where_attention_is_wrong(monkeypatch, capsys):
    """The self-test must be able to fail: here attention returns half of what it should."""
    monkeypatch.setattr(
        check,
        "flash_attn_func",
        lambda *qkv, **kwargs: (flash_attn_func(*qkv, **kwargs)[0] / 2, None),
    )
    monkeypatch.setattr(check, "HEAD_DIMS", (64,))
    assert main(["check"]) == 1
    said = capsys.readouterr().out
    assert said.count(" seqlen ") >= 24 and "failed" in said.splitlines()[-1]
    assert said.count("FAILED") >= said.count(" seqlen ") * 3 / 4


@pytest.mark.parametrize("major, wrong, passes", [(12, 0, True), (12, 3, False), (9, 3, True)])
def test_check_probes_8bit_instructions(major, wrong, passes, monkeypatch, capsys):
    """On 12.x alone: elsewhere it says so."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.setattr(check.probe_8bit, "run", lambda: iter([("mma e4m3", wrong)]))
    assert check.check_8bit("cuda") == passes
    said = capsys.readouterr().out
    assert ("FAILED" in said) != passes and ("left out" in said) == (major != 12)
    assert check.check_8bit("cpu") and "left out" in capsys.readouterr().out


def test_check_says_why_8bit_instructions_cannot_be_probed(monkeypatch, capsys):
    def run():
        raise RuntimeError("no NVRTC")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 1))
    monkeypatch.setattr(check.probe_8bit, "run", run)
    assert not check.check_8bit("cuda")
    assert "no NVRTC FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("passed, word", [(True, ""), (False, "FAILED"), (None, "left out")])
def test_check_runs_recipes_as_children(passed, word, monkeypatch, capsys):
    record = {"check": "fp8: causal", "passed": passed, "said": "as said"}
    monkeypatch.setattr(check.report, "run_recipes", lambda limit_s: [record])
    assert check.check_recipes("cuda") == (passed is not False)
    line = capsys.readouterr().out.strip()
    assert line.startswith("fp8: causal ") and line.endswith(f"as said {word}".strip())
    assert check.check_recipes("cpu") and "left out" in capsys.readouterr().out


def test_check_fails_where_gradients_alone_are_wrong(monkeypatch, capsys):
    def with_doubled_gradients(*tensors, **options):
        out, lse = flash_attn_func(*tensors, **options)
        return out + (out - out.detach()), lse

    call = ("cpu", torch.float32, 64, 65, True)
    assert check.check_gradients(*call)
    monkeypatch.setattr(check, "flash_attn_func", with_doubled_gradients)
    assert check.check_forward(*call) and not check.check_gradients(*call)
    assert capsys.readouterr().out.count("FAILED") == 3


def test_check_fails_where_packed_sequences_are_wrong(monkeypatch, capsys):
    """As where the second sequence sees the first."""

    def without_lengths(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
        out, lse = flash_attn_func(q[None], k[None], v[None], **options)
        return out[0], lse

    call = ("cpu", torch.float32, 64, True)
    assert check.check_packed(*call)
    monkeypatch.setattr(check, "flash_attn_varlen_func", without_lengths)
    assert not check.check_packed(*call)
    assert capsys.readouterr().out.count("FAILED") == 4


def test_warmup_fills_the_cache(tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc")
    from flash_attn_sm120 import common_kernels

    monkeypatch.setenv("FA_SM120_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(common_kernels, "COMMON_HEAD_DIMS", ((64, 64),))
    monkeypatch.setattr(common_kernels, "DTYPES", (torch.bfloat16,))
    seen = []
    count = common_kernels.warmup(120, lambda kernels: (seen.append(k) or k for k in kernels))
    assert count == len(set(seen)) == len(common_kernels.common_kernels(120)) >= 10
    steps = {"backward_preprocess", "backward", "backward_postprocess", "backward_sink"}
    assert {"forward_tma", "combine", *steps} <= {kernel.kernel for kernel in seen}
    assert any(kernel.variant.endswith("_paged") for kernel in seen)
    packed = {kernel.kernel for kernel in seen if kernel.variant.endswith("_varlen")}
    assert {"forward", *steps} <= packed
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
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("warmup: no CUDA driver") and done.stderr.count("\n") == 1


def test_what_fails_is_said_in_a_line(monkeypatch, capsys):
    def fail(arguments):
        raise OSError(28, "No space left on device", "tiles.json")

    monkeypatch.setattr(demo, "run", fail)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "demo: [Errno 28] No space left on device: 'tiles.json'\n"


def test_unknown_command():
    done = run("frobnicate")
    assert done.returncode == 2 and "invalid choice" in done.stderr
