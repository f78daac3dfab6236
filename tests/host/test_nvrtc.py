"""Which NVRTC serves, what to install, and where wheels put it. No GPU, and of NVRTC only its wheel."""

import itertools
import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from flash_attn_sm120 import jit, nvrtc

# Of NVRTC and of cuda-bindings.
RELEASES = [*((12, minor) for minor in range(10)), *((13, minor) for minor in range(6))]
DRIVERS = [0, 12000, 12020, 12040, 12060, 12080, 12090, 13000, 13020, 13050, 14000]
CAPABILITIES = [80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121]
WHEELS = {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}


def test_which_nvrtc_serves():
    """The whole table, spelled another way: NVRTC from the first on, up to the driver's major."""
    first = {88: 130, 100: 128, 101: 128, 103: 129, 110: 130, 120: 128, 121: 129}
    for version, driver, capability in itertools.product(RELEASES, DRIVERS, CAPABILITIES):
        serves = version[0] * 10 + version[1] >= first.get(capability, 120)
        serves &= driver == 0 or version[0] <= driver // 1000
        assert (nvrtc.why_not(version, capability, driver) == "") == serves


def after(advice):
    """The releases of NVRTC with which pip could leave someone who follows the advice."""
    wanted = dict(re.findall(r"(cuda-bindings|nvidia-cuda-nvrtc(?:-cu12)?)([<>=,.\d]*)", advice))
    (wheel,) = wanted.keys() - {"cuda-bindings"}
    releases = [
        [r for r in RELEASES if nvrtc.dotted(r) in SpecifierSet(text)] for text in wanted.values()
    ]
    if "--upgrade" in advice:
        releases = [[max(found)] for found in releases]
    assert {r[0] for r in releases[0]} == {r[0] for r in releases[1]}, "they belong together"
    assert {WHEELS[r[0]] for r in releases[0]} == {wheel}
    return releases[1]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_advice_is_never_a_circle(capability, driver):
    """Whatever was installed, and whatever pip makes of the advice, there is none after it."""
    advice = nvrtc.advice(capability, driver)
    if update := re.fullmatch(r"update the driver to one for CUDA (\d+)\.(\d+) or newer", advice):
        driver = int(update[1]) * 1000 + int(update[2]) * 10
        assert all(nvrtc.why_not(r, capability, driver) for r in RELEASES if r[0] < int(update[1]))
        advice = nvrtc.advice(capability, driver)
    assert advice.startswith("pip install ")
    for version in after(advice):
        assert nvrtc.why_not(version, capability, driver) == ""


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_messages_are_one_line_that_ends_in_the_advice(capability, driver):
    reasons = {nvrtc.why_not(version, capability, driver) for version in RELEASES} - {""}
    reasons.add(str(nvrtc.Missing("no library\n  attachments: " + 1000 * "x", capability, driver)))
    for reason in reasons:
        assert len(reason) <= 200 and "\n" not in reason
        assert reason.endswith(": " + nvrtc.advice(capability, driver))


@pytest.mark.parametrize(
    "version, capability, driver, message",
    [
        ((12, 6), 120, 12080, "needs NVRTC 12.8 or newer, found 12.6: pip install 'cuda-bindings>=12,<13' 'nvidia-cuda-nvrtc-cu12>=12.8,<13'"),
        ((13, 5), 120, 12080, "NVRTC 13.5 makes kernels that a driver for CUDA 12.8 cannot load: pip install 'cuda-bindings>=12,<13' 'nvidia-cuda-nvrtc-cu12>=12.8,<13'"),
        ((12, 9), 110, 12090, "needs NVRTC 13.0 or newer, found 12.9: update the driver to one for CUDA 13.0 or newer"),
        ((12, 8), 121, 0, "needs NVRTC 12.9 or newer, found 12.8: pip install --upgrade"),
    ],
)  # fmt: skip
def test_messages(version, capability, driver, message):
    assert message in nvrtc.why_not(version, capability, driver)


def test_the_advice_of_a_call_is_for_its_driver(monkeypatch):
    """Where NVRTC is missing, and where it is of another version."""

    def missing():
        raise nvrtc.Missing("no such library")

    monkeypatch.setattr(jit, "nvrtc_version", missing)
    with pytest.raises(RuntimeError, match=r"no such library\): pip .*nvrtc-cu12>=12.8,<13"):
        jit.compile("combine", "a name", (), 120, 12080)
    monkeypatch.setattr(jit, "nvrtc_version", lambda: (13, 5))
    with pytest.raises(RuntimeError, match=r"NVRTC 13.5 .* CUDA 12.8 .*nvrtc-cu12>=12.8,<13"):
        jit.compile("combine", "a name", (), 120, 12080)


# ---- wheels --------------------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(name, version, *files): a distribution in a directory of PYTHONPATH, as pip leaves it."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, version, *files):
        about = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        line = "" if version is None else f"Version: {version}\n"
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n{line}")
        (about / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()

    return make


def refuse_to_load(monkeypatch):
    monkeypatch.setattr(jit, "load_nvrtc", lambda: (None, (99, 9)))


@pytest.mark.parametrize(
    "bindings, name, library",
    [
        ("12.9.4", "nvidia-cuda-nvrtc-cu12", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
        ("12", "nvidia-cuda-nvrtc-cu12", "nvidia/cuda_nvrtc/bin/nvrtc64_120_0.dll"),
        ("13.0.1", "nvidia-cuda-nvrtc", "nvidia/cu13/lib/libnvrtc.so.13"),
        ("13.1rc1", "nvidia-cuda-nvrtc", "nvidia/cu13/bin/x86_64/nvrtc64_130_0.dll"),
    ],
)
def test_the_wheel_is_that_of_cuda_bindings(
    install, monkeypatch, tmp_path, bindings, name, library
):
    refuse_to_load(monkeypatch)
    install("cuda-bindings", bindings)
    install(name, "12.9.86", library.replace("libnvrtc", "libnvrtc-builtins"), library)
    assert nvrtc.installed() == nvrtc.Wheel((12, 9), tmp_path / library)
    assert jit.nvrtc_version() == (12, 9)


@pytest.mark.parametrize(
    "text, version",
    [("13", (13, 0)), ("13.0rc1", (13, 0)), ("13.1", (13, 1)), ("13.2.post1", (13, 2)), ("14a1", (14, 0))],
)  # fmt: skip
def test_versions_of_every_form_are_read(install, monkeypatch, text, version):
    refuse_to_load(monkeypatch)
    install("nvidia-cuda-nvrtc", text, "nvidia/lib/libnvrtc.so.13")
    install("cuda-bindings", "13")
    assert jit.nvrtc_version() == version


@pytest.mark.parametrize("text", ["unknown", None])
def test_a_version_that_is_none_is_asked_of_the_library(install, monkeypatch, text):
    refuse_to_load(monkeypatch)
    install("nvidia-cuda-nvrtc", text, "nvidia/lib/libnvrtc.so.13")
    install("cuda-bindings", "13.0.0")
    assert jit.nvrtc_version() == (99, 9)


@pytest.mark.parametrize("files", [(), ("nvidia/lib/libnvrtc-builtins.so.13.0",)])
def test_a_wheel_without_its_library_is_none(install, monkeypatch, files):
    """What is left of an uninstalled one, say."""
    refuse_to_load(monkeypatch)
    install("nvidia-cuda-nvrtc", "13.0.0", *files)
    install("cuda-bindings", "13.0.0")
    assert jit.nvrtc_version() == (99, 9)


def test_an_nvrtc_that_pip_put_into_a_target_directory(tmp_path):
    """pip install --target DIR, PYTHONPATH=DIR: its metadata is found, and so is the library."""
    pytest.importorskip("cuda.bindings.nvrtc")
    wheel = nvrtc.installed()
    if wheel is None:
        pytest.skip("NVRTC is not of a wheel here")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    target = tmp_path / "target"
    target.mkdir()
    about = metadata.distribution(nvrtc._wheel(wheel.version[0]))._path
    for entry in about.parent.iterdir():
        if entry.suffix != ".pth" and "flash_attn_sm120" not in entry.name:
            is_nvrtc = entry.name == "nvidia" or entry == about
            (target if is_nvrtc else site).joinpath(entry.name).symlink_to(entry)
    code = """
from flash_attn_sm120 import common_kernels, jit, nvrtc
print(nvrtc.installed().library)
print(jit.nvrtc_version() == jit.load_nvrtc()[1])
kernel = next(x for x in common_kernels.common_kernels(120) if x.kernel == "combine")
print(jit.compile(*kernel, 120, 0)[:4])
"""
    checkout = Path(jit.__file__).parent.parent
    environment = {
        "PYTHONPATH": f"{target}{os.pathsep}{checkout}",
        "FA_SM120_CACHE_DIR": str(tmp_path / "c"),
    }
    done = subprocess.run(
        [python, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    library, agree, cubin = done.stdout.splitlines() or [done.stderr] * 3
    assert Path(library).is_relative_to(target), done.stderr
    assert (agree, cubin) == ("True", r"b'\x7fELF'")


def test_what_cuda_bindings_says_at_length_is_one_line(monkeypatch):
    """pathfinder lists every directory that it looked into."""

    class Failing:
        @staticmethod
        def nvrtcVersion():
            raise RuntimeError('Failure finding "nvrtc":\n' + "  no such directory\n" * 100)

    monkeypatch.setattr(nvrtc, "installed", lambda: None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", Failing)
    with pytest.raises(RuntimeError, match='Failure finding "nvrtc"') as caught:
        jit.load_nvrtc()
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 200
