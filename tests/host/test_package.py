"""The package as it is installed: one wheel, light to import, usable from anywhere."""

import re
import shutil
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from flash_attn_sm120 import common_kernels
from helpers.children import run_command

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in a checkout alone")


def run(*command, cwd, **environment):
    """What a command printed, which must succeed."""
    done = run_command(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files that git would give a new user, in an empty directory."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    target = tmp_path_factory.mktemp("checkout")
    files = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def build_wheel(checkout, target, **environment):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        target,
        ".",
    ]
    run(*command, cwd=checkout, **environment)
    (wheel,) = Path(target).glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a clean venv that has the wheel, and borrows only what the wheel depends on."""
    target = tmp_path_factory.mktemp("venv")
    venv.create(target, with_pip=False)
    interpreter = target / "bin" / "python"
    site = run(
        interpreter, "-c", "import site; print(site.getsitepackages()[0])", cwd=target
    ).strip()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    import torch

    # The dependencies alone, without the editable install that may stand beside them.
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if "flash_attn_sm120" not in entry.name and entry.suffix != ".pth":
            Path(site, entry.name).symlink_to(entry)
    return interpreter


def test_wheel_serves_every_python_from_3_10(wheel):
    assert re.fullmatch(r"flash_attn_sm120-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)


def test_wheel_holds_sources_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kernels = {
        f"flash_attn_sm120/kernels/{p.name}" for p in (ROOT / "kernels").iterdir() if p.is_file()
    }
    assert kernels and kernels <= names
    assert {
        "flash_attn_sm120/_C.abi3.so",
        "flash_attn_sm120/py.typed",
        "flash_attn_sm120/_C.pyi",
    } <= names
    with zipfile.ZipFile(wheel) as archive:
        (points,) = (name for name in names if name.endswith("/entry_points.txt"))
        assert archive.read(points).decode().split() == [
            "[vllm.general_plugins]",
            *["flash_attn_sm120", "=", "flash_attn_sm120.vllm:register"],
        ]
    assert not [
        name for name in names if name.startswith(("tests", "benchmarks", "csrc", "kernels/"))
    ]


def test_extension_links_neither_cuda_nor_torch(wheel, tmp_path):
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("flash_attn_sm120/_C.abi3.so", tmp_path)
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library, cwd=tmp_path))
    assert set(needed) <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"}


def test_installed_wheel_attends_from_another_directory(python, tmp_path):
    code = """
import flash_attn_sm120, torch
q = torch.randn(1, 8, 2, 16)
out, lse = flash_attn_sm120.flash_attn_func(q, q, q, causal=True, return_lse=True)
torch.testing.assert_close(out[:, 0], q[:, 0])
print(flash_attn_sm120.__file__)
"""
    where = Path(run(python, "-c", code, cwd=tmp_path, PYTHONPATH="").strip())
    assert python.parent.parent in where.parents


def test_installed_wheel_compiles_its_own_kernels(python, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc")
    code = """
from flash_attn_sm120 import jit, common_kernels
plan = next(common_kernels.common_plans(120))
print(jit.compile(plan.kernel, plan.variant, plan.options, 120, 0)[:4])
"""
    cache = str(tmp_path / "cache")
    assert (
        run(python, "-c", code, cwd=tmp_path, PYTHONPATH="", FA_SM120_CACHE_DIR=cache).strip()
        == r"b'\x7fELF'"
    )


def test_sdist_builds_the_same_wheel(checkout, wheel, tmp_path):
    """What a source distribution holds is enough to build from."""
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    again = build_wheel(unpacked, tmp_path / "wheel")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_wheel_ships_cubins_where_asked(checkout, tmp_path, monkeypatch):
    """FA_SM120_PREBUILD: kernels that need neither NVRTC nor a cache; here those of one head dim."""
    pytest.importorskip("cuda.bindings.nvrtc")
    source = Path(
        shutil.copytree(checkout, tmp_path / "checkout"), "flash_attn_sm120/common_kernels.py"
    )
    text, found = re.subn(r"(?m)^(COMMON_HEAD_DIMS) = .*", r"\1 = ((64, 64),)", source.read_text())
    assert found == 1
    source.write_text(text)
    monkeypatch.setattr(common_kernels, "COMMON_HEAD_DIMS", ((64, 64),))
    kernels = common_kernels.common_kernels(120)
    # packed sequences, caches, mods, recipes and measurements are not among the common calls
    others = {"varlen_fill", "kv_append", "kv_scatter", "backward_captured", "backward_order"}
    others |= {"backward_captured_sums"}
    others |= {"mma_peak", "mod_cost", "probe_8bit", "quantized_forward", "quantize"}
    assert {kernel.kernel for kernel in kernels} | others == {
        x.stem for x in (ROOT / "kernels").glob("*.cu")
    }
    prebuilt = build_wheel(tmp_path / "checkout", tmp_path / "wheel", FA_SM120_PREBUILD="sm_120f")
    with zipfile.ZipFile(prebuilt) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import sys
from flash_attn_sm120 import jit, common_kernels
sys.modules["cuda.bindings"] = None
kernels = common_kernels.common_kernels(120)
print({jit.compile(*kernel, 120, 12080)[:4] for kernel in kernels}, len(kernels))
"""
    out = run(
        sys.executable,
        "-c",
        code,
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
        FA_SM120_CACHE_DIR=str(tmp_path / "none"),
    )
    assert out.strip() == rf"{{b'\x7fELF'}} {len(kernels)}"
    assert not (tmp_path / "none").exists()


def test_import_is_light():
    """Neither the CUDA driver nor NVIDIA's Python packages are touched before the first CUDA call."""
    code = """
import sys, torch
libraries = lambda: {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
modules, before = set(sys.modules), libraries()
import flash_attn_sm120
new = {name.split(".")[0] for name in set(sys.modules) - modules}
print(sorted(new - set(sys.stdlib_module_names)))
print([path for path in libraries() - before if "nvrtc" in path or "libcuda" in path])
"""
    lines = run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT)).splitlines()
    assert lines == ["['flash_attn_sm120']", "[]"]


def test_two_interpreters_keep_their_own_state():
    """Loading the extension twice gives two modules, both of which work."""
    code = """
import importlib.util, torch
import flash_attn_sm120
spec = importlib.util.find_spec("flash_attn_sm120._C")
second = importlib.util.module_from_spec(spec)
spec.loader.exec_module(second)
assert second is not flash_attn_sm120._C
q = torch.randn(1, 4, 1, 8)
print(torch.equal(second.forward(q, q, q)[0], flash_attn_sm120._C.forward(q, q, q)[0]))
del second
"""
    assert run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT)).strip() == "True"


def test_calls_survive_a_fork():
    """The CPU implementation keeps no threads between calls, so a child can call it at once."""
    code = """
import os, torch
from flash_attn_sm120 import flash_attn_func
q = torch.randn(1, 64, 2, 16)
out = flash_attn_func(q, q, q)[0]
child = os.fork()
if not child:
    os._exit(0 if torch.equal(flash_attn_func(q, q, q)[0], out) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT)).strip() == "0"


def test_calls_from_many_threads_agree():
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from flash_attn_sm120 import flash_attn_func

    q = torch.randn(2, 65, 4, 32)
    expected = flash_attn_func(q, q, q, causal=True)[0]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: flash_attn_func(q, q, q, causal=True)[0], range(64)))
    assert all(torch.equal(out, expected) for out in results)
