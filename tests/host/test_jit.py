"""From a variant to its cubin: shipped, cached or compiled. Tiny kernels, and no GPU."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flash_attn_sm120 import cache, jit
from helpers.children import run_command

KERNELS = {
    "params.h": """
        struct tiny_params { float *x; };
    """,
    "scale.cuh": """
        #pragma once
        __device__ float scaled(float x) { return x * FACTOR; }
    """,
    "tiny.cu": """
        #include "params.h"
        #include "scale.cuh"
        extern "C" __global__ void tiny(const __grid_constant__ tiny_params params)
        {
            __shared__ float reversed[33];
            reversed[threadIdx.x] = scaled(params.x[threadIdx.x]);
            __syncthreads();
            params.x[threadIdx.x] = reversed[32 - threadIdx.x];
        }
        extern "C" __global__ void another(int *x) { *x = 0; }
    """,
    # 1024 threads leave 64 registers to each, and 200 values are alive at the barrier.
    "crowded.cu": """
        extern "C" __global__ void __launch_bounds__(1024) crowded(float *x)
        {
            float values[200];
        #pragma unroll
            for (int i = 0; i < 200; i++) values[i] = x[threadIdx.x + 1024 * i];
            __syncthreads();
        #pragma unroll
            for (int i = 0; i < 200; i++) x[threadIdx.x + 1024 * i] = values[199 - i];
        }
    """,
    "misnamed.cu": """
        extern "C" __global__ void another_name(int *x) { *x = 0; }
    """,
    "wrong.cu": """
        extern "C" __global__ void wrong(int *x) { *x = no_such_name; }
    """,
}

NAME = "tiny_f3"
OPTIONS = ("-DFACTOR=3",)


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A directory of tiny kernels in place of the package's, and an empty cache and prebuilt."""
    directory = tmp_path / "kernels"
    directory.mkdir()
    for name, text in KERNELS.items():
        (directory / name).write_text(text)
    monkeypatch.setattr(jit, "kernel_directory", lambda: directory)
    monkeypatch.setattr(jit, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("FA_SM120_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_warned", False)
    return directory


@pytest.fixture
def nvrtc():
    """The version of NVRTC, one that knows sm_120f."""
    pytest.importorskip("cuda.bindings.nvrtc")
    _, version = jit.load_nvrtc()
    if version < (12, 9):
        pytest.skip(f"needs NVRTC 12.9, found {version}")
    return version


@pytest.fixture
def compilations(nvrtc, monkeypatch):
    """The flags of every call of NVRTC, as they come."""
    module, version = jit.load_nvrtc()
    calls = []

    def compile_program(program, count, flags):
        assert count == len(flags)
        calls.append([flag.decode() for flag in flags])
        return module.nvrtcCompileProgram(program, count, flags)

    recorder = SimpleNamespace(**{**vars(module), "nvrtcCompileProgram": compile_program})
    pretend_nvrtc(monkeypatch, recorder, version)
    return calls


def pretend_nvrtc(monkeypatch, module, version):
    monkeypatch.setattr(jit, "load_nvrtc", lambda: (module, version))
    monkeypatch.setattr(jit, "nvrtc_version", lambda: version)


def without_nvrtc(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)


def compile_tiny(compute_capability=120, driver_version=0, name=NAME, options=OPTIONS, ptx=False):
    return jit.compile("tiny", name, options, compute_capability, driver_version, ptx)


def architecture_of(cubin):
    """The compute capability in the ELF header: CUDA 13, and sm_120 from the start, moved it."""
    assert cubin[:4] == b"\x7fELF"
    assert int.from_bytes(cubin[18:20], "little") == 190  # EM_CUDA
    flags = int.from_bytes(cubin[48:52], "little")
    return flags >> 8 & 0xFF if cubin[7] == 0x41 else flags & 0xFF


# ---- architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compute_capability, nvrtc_version, expected",
    [
        (80, (12, 8), "sm_80"),
        (86, (13, 0), "sm_86"),
        (89, (13, 0), "sm_89"),
        (90, (12, 8), "sm_90a"),
        (100, (13, 0), "sm_100"),
        (120, (12, 8), "sm_120a"),
        (120, (12, 9), "sm_120f"),
        (121, (12, 9), "sm_120f"),
        (120, (13, 0), "sm_120f"),
        (121, (13, 0), "sm_120f"),
    ],
)
def test_architecture(compute_capability, nvrtc_version, expected):
    assert jit.architecture(compute_capability, nvrtc_version) == expected
    of_ptx = jit.architecture(compute_capability, nvrtc_version, ptx=True)
    assert of_ptx == expected.replace("sm_", "compute_")


def test_architecture_is_of_a_recent_nvrtc_by_default():
    assert jit.architecture(120) == jit.architecture(121) == "sm_120f"


@pytest.mark.parametrize(
    "compute_capability, nvrtc_version, message",
    [
        (120, (12, 7), r"capability 12\.0 needs NVRTC 12\.8 or newer, found 12\.7"),
        (120, (11, 8), r"capability 12\.0 needs NVRTC 12\.8 or newer, found 11\.8"),
        (121, (12, 8), r"capability 12\.1 needs NVRTC 12\.9 or newer, found 12\.8"),
    ],
)
def test_nvrtc_that_is_older_than_the_device(compute_capability, nvrtc_version, message):
    with pytest.raises(RuntimeError, match=message):
        jit.architecture(compute_capability, nvrtc_version)


# ---- compiling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compute_capability, elf", [(120, 120), (121, 120), (90, 90), (80, 80)])
def test_compile_makes_a_cubin_for_the_device(kernels, nvrtc, compute_capability, elf):
    assert architecture_of(compile_tiny(compute_capability)) == elf


def test_a_variant_is_compiled_once_for_12_0_and_12_1(kernels, nvrtc, compilations):
    first = compile_tiny(120)
    assert compile_tiny(120) == compile_tiny(121) == first
    assert len(compilations) == 1
    assert compile_tiny(80) != first
    assert len(compilations) == 2


def test_flags(kernels, nvrtc, compilations):
    compile_tiny(90)
    (flags,) = compilations
    assert flags[0] == "--gpu-architecture=sm_90a"
    assert {*jit.OPTIONS, *OPTIONS} <= {*flags}


@pytest.mark.parametrize("compute_capability, target", [(120, "120f"), (121, "120f"), (90, "90a")])
def test_ptx(kernels, nvrtc, compilations, compute_capability, target):
    """Text that ends with a NUL, and names the lines of the source."""
    ptx = compile_tiny(compute_capability, ptx=True)
    (flags,) = compilations
    assert flags[0] == f"--gpu-architecture=compute_{target}"
    assert ptx.endswith(b"\0") and ptx.count(b"\0") == 1
    text = ptx.decode()
    assert f".target sm_{target}" in text and ".entry tiny(" in text
    assert ".loc" in text and "scale.cuh" in text


def test_ptx_and_cubins_have_files_of_their_own(kernels, nvrtc, compilations):
    cubin, ptx = compile_tiny(), compile_tiny(ptx=True)
    assert cubin[:4] == b"\x7fELF"
    assert compile_tiny() == cubin and compile_tiny(ptx=True) == ptx
    assert len(compilations) == 2


@pytest.mark.parametrize("version, cached_by_nvrtc", [((12, 8), False), ((12, 9), True)])
def test_nvrtc_cache_is_off_where_there_is_one(
    kernels, nvrtc, compilations, monkeypatch, version, cached_by_nvrtc
):
    """12.8 does not know the option, and later ones would hide ptxas's log behind a hit."""
    pretend_nvrtc(monkeypatch, jit.load_nvrtc()[0], version)
    compile_tiny(120)
    assert ("--no-cache" in compilations[0]) == cached_by_nvrtc
    assert compilations[0][0] == f"--gpu-architecture={jit.architecture(120, version)}"


@pytest.mark.parametrize("file", ["tiny.cu", "scale.cuh", "params.h"])
def test_an_edited_source_is_compiled_again(kernels, nvrtc, compilations, file):
    compile_tiny()
    path = kernels / file
    path.write_text(path.read_text() + "// edited\n")
    compile_tiny()
    compile_tiny()
    assert len(compilations) == 2


def test_what_the_program_cannot_include_does_not_matter(kernels, nvrtc, compilations):
    compile_tiny()
    (kernels / "wrong.cu").write_text("// edited")
    (kernels / "README.md").write_text("# new")
    compile_tiny()
    assert len(compilations) == 1


def test_options_and_compilers_have_files_of_their_own(kernels, nvrtc, compilations, monkeypatch):
    three = compile_tiny()
    four = compile_tiny(options=("-DFACTOR=4",))
    assert three != four and len(compilations) == 2
    monkeypatch.setattr(jit, "OPTIONS", (*jit.OPTIONS, "--use_fast_math"))
    compile_tiny()
    assert len(compilations) == 3
    recorder, (major, minor) = jit.load_nvrtc()
    pretend_nvrtc(monkeypatch, recorder, (major, minor + 1))
    compile_tiny()
    assert len(compilations) == 4


def test_version_is_that_of_the_library(nvrtc):
    """The wheel's version, read without loading, is what the library says of itself."""
    assert jit.nvrtc_version() == jit.load_nvrtc()[1]


def test_version_of_an_nvrtc_without_a_wheel(nvrtc, monkeypatch):
    """conda and toolkits install no distribution of that name: then the library is asked."""
    from importlib import metadata

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(jit, "load_nvrtc", lambda: (None, (12, 9)))
    assert jit.nvrtc_version() == (12, 9)


def test_cached_kernels_need_no_nvrtc(kernels, nvrtc, monkeypatch):
    cubin = compile_tiny()
    without_nvrtc(monkeypatch)
    assert compile_tiny() == cubin


def test_an_unusable_cache_compiles_every_time(kernels, nvrtc, compilations, monkeypatch):
    monkeypatch.setenv("FA_SM120_CACHE_DIR", str(kernels / "tiny.cu"))
    with pytest.warns(RuntimeWarning, match="not cached"):
        first = compile_tiny()
    assert compile_tiny() == first
    assert len(compilations) == 2


# ---- what ptxas says -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_120f", "sm_90a", "sm_80"])
def test_build_reports_resources(kernels, nvrtc, arch):
    made = jit.build("tiny", NAME, OPTIONS, arch)
    assert made.cubin[:4] == b"\x7fELF"
    assert 0 < made.registers < 64
    assert made.spill_bytes == 0
    assert made.shared_bytes == 33 * 4
    assert f"'tiny' for '{arch}'" in made.log
    assert made.seconds > 0


@pytest.mark.parametrize("arch", ["sm_120f", "sm_90a", "sm_80"])
def test_build_sees_spills(kernels, nvrtc, arch):
    made = jit.build("crowded", "crowded", (), arch)
    assert made.registers == 64
    assert made.spill_bytes >= 2 * 4 * (200 - 64)  # each is stored once and loaded once
    assert made.shared_bytes == 0


def test_build_compiles_always(kernels, nvrtc, compilations, tmp_path):
    compile_tiny()
    assert jit.build("tiny", NAME, OPTIONS, "sm_120f").cubin == compile_tiny()
    assert len(compilations) == 2


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_120f'
ptxas info    : Function properties for other
ptxas         .     0 bytes stack frame, 1000 bytes spill stores, 1000 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 4096 bytes smem
ptxas info    : Compiling entry function 'mine' for 'sm_120f'
ptxas info    : Function properties for mine
ptxas         .     56 bytes stack frame, 52 bytes spill stores, 104 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 56 bytes cumulative stack size
ptxas info    : Function properties for a function that mine calls
ptxas         .     0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
"""


def test_resources_are_those_of_one_kernel_and_what_it_calls():
    assert jit._resources(LOG, "mine") == (32, 52 + 104 + 4 + 8, 0)
    assert jit._resources(LOG, "other") == (255, 2000, 4096)


@pytest.mark.parametrize("missing", ["registers", "spill", "entry function"])
def test_a_log_without_resources_is_an_error(missing):
    with pytest.raises(RuntimeError, match="does not say what the kernel mine uses"):
        jit._resources(LOG.replace(missing, ""), "mine")


def test_a_kernel_without_its_function_is_an_error(kernels, nvrtc):
    with pytest.raises(RuntimeError, match=r"(?s)kernel misnamed uses.*'another_name'"):
        jit.build("misnamed", "misnamed", (), "sm_80")


# ---- errors --------------------------------------------------------------------------------------


def test_a_source_that_does_not_compile(kernels, nvrtc, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        jit.compile("wrong", "wrong_d64", (), 120, 0)
    message = str(caught.value)
    assert "wrong_d64 for sm_120f" in message
    assert f"NVRTC {nvrtc[0]}.{nvrtc[1]}" in message
    assert 'wrong.cu(2): error: identifier "no_such_name" is undefined' in message
    assert "\0" not in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_architecture_that_nvrtc_does_not_know(kernels, nvrtc):
    with pytest.raises(RuntimeError, match=r"(?s)tiny_f3 for sm_999.*gpu-architecture"):
        jit.build("tiny", NAME, OPTIONS, "sm_999")


def test_a_driver_that_is_too_old(kernels, nvrtc, compilations):
    major, minor = nvrtc
    pattern = rf"NVRTC {major}\.{minor} .* driver for CUDA {major - 1}\.8 cannot load"
    with pytest.raises(RuntimeError, match=pattern):
        compile_tiny(driver_version=(major - 1) * 1000 + 80)
    assert compilations == []


@pytest.mark.parametrize("newer", [0, 1])
def test_a_driver_of_the_same_or_a_newer_major_version(kernels, nvrtc, newer):
    assert architecture_of(compile_tiny(driver_version=(nvrtc[0] + newer) * 1000)) == 120


def test_missing_cuda_bindings(kernels, monkeypatch):
    without_nvrtc(monkeypatch)
    with pytest.raises(RuntimeError, match="pip install --upgrade cuda-bindings nvidia-cuda-nvrtc"):
        compile_tiny()


def test_missing_library(kernels, monkeypatch):
    def version():
        raise RuntimeError("Failed to dlopen libnvrtc.so.13")

    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", SimpleNamespace(nvrtcVersion=version))
    with pytest.raises(RuntimeError, match=r"libnvrtc\.so\.13.*pip install .* nvidia-cuda-nvrtc"):
        compile_tiny()


def test_a_failing_call_names_the_function_and_the_status():
    def nvrtcVersion():
        status = type("Status", (int,), {"name": "NVRTC_ERROR_INTERNAL_ERROR"})(11)
        return status, None, None

    with pytest.raises(RuntimeError, match="nvrtcVersion failed: NVRTC_ERROR_INTERNAL_ERROR"):
        jit._call(nvrtcVersion)


# ---- shipped cubins ------------------------------------------------------------------------------

FOUR = ("tiny", "tiny_f4", ("-DFACTOR=4",))
THREE = ("tiny", NAME, OPTIONS)


def test_a_shipped_cubin_needs_neither_nvrtc_nor_a_cache(kernels, nvrtc, monkeypatch, tmp_path):
    paths = jit.prebuild(jit.PREBUILT, [THREE, FOUR, THREE], "sm_120f")
    assert sorted(paths) == sorted(jit.PREBUILT.iterdir()) and len(paths) == 2
    assert [path.name.split(".")[0] for path in paths] == [NAME, "tiny_f4"]
    without_nvrtc(monkeypatch)
    driver_version = nvrtc[0] * 1000
    assert compile_tiny(120, driver_version) == paths[0].read_bytes()
    assert compile_tiny(121, driver_version) == paths[0].read_bytes()
    assert compile_tiny(120, 0) == paths[0].read_bytes()
    assert not (tmp_path / "cache").exists()


def test_a_shipped_cubin_is_what_nvrtc_makes(kernels, nvrtc):
    (path,) = jit.prebuild(kernels / "not there yet", [THREE], "sm_90a")
    assert path.read_bytes() == compile_tiny(90)


def test_a_shipped_cubin_does_not_depend_on_the_version_of_nvrtc(kernels, nvrtc, monkeypatch):
    module, (major, minor) = jit.load_nvrtc()
    with monkeypatch.context() as patch:
        patch.setattr(jit, "load_nvrtc", lambda: (module, (major, minor + 1)))
        (path,) = jit.prebuild(jit.PREBUILT, [THREE], "sm_120f")
    path.write_bytes(b"shipped")
    assert compile_tiny() == b"shipped"


@pytest.mark.parametrize(
    "change", ["source", "header", "option", "base option", "architecture", "name"]
)
def test_a_shipped_cubin_of_something_else_is_not_used(kernels, nvrtc, monkeypatch, change):
    (path,) = jit.prebuild(jit.PREBUILT, [THREE], "sm_120f")
    path.write_bytes(b"shipped")
    assert compile_tiny() == b"shipped"
    arguments = {}
    if change in ("source", "header"):
        edited = kernels / {"source": "tiny.cu", "header": "scale.cuh"}[change]
        edited.write_text(edited.read_text() + "// edited\n")
    elif change == "base option":
        monkeypatch.setattr(jit, "OPTIONS", (*jit.OPTIONS, "--use_fast_math"))
    else:
        arguments = {
            "option": {"options": ("-DFACTOR=4",)},
            "architecture": {"compute_capability": 80},
            "name": {"name": "tiny_f"},
        }[change]
    assert compile_tiny(**arguments)[:4] == b"\x7fELF"


def test_ptx_is_never_shipped(kernels, nvrtc, compilations):
    jit.prebuild(jit.PREBUILT, [THREE], "sm_120f")
    assert b".entry tiny(" in compile_tiny(ptx=True)
    assert compile_tiny()[:4] == b"\x7fELF"
    assert len(compilations) == 2, "the one shipped, and PTX"


def shipped_for(major, nvrtc):
    """A prebuilt file that claims to be of a CUDA major version."""
    (path,) = jit.prebuild(jit.PREBUILT, [THREE], "sm_120f")
    renamed = path.with_name(path.name.replace(f".cuda{nvrtc[0]}.", f".cuda{major}."))
    path.rename(renamed)
    renamed.write_bytes(f"of CUDA {major}".encode())


def test_nvrtc_is_preferred_to_a_cubin_that_is_newer_than_the_driver(kernels, nvrtc):
    shipped_for(nvrtc[0] + 1, nvrtc)
    assert compile_tiny(driver_version=nvrtc[0] * 1000)[:4] == b"\x7fELF"
    assert compile_tiny(driver_version=(nvrtc[0] + 1) * 1000)[:4] == b"of C"


def test_a_cubin_that_is_newer_than_the_driver_is_better_than_none(kernels, nvrtc, monkeypatch):
    shipped_for(nvrtc[0], nvrtc)
    old_driver = (nvrtc[0] - 1) * 1000 + 80
    assert compile_tiny(driver_version=old_driver)[:4] == b"of C"  # NVRTC is too new, too
    without_nvrtc(monkeypatch)
    assert compile_tiny(driver_version=old_driver)[:4] == b"of C"


def test_the_shipped_cubin_of_the_oldest_cuda_serves_all_drivers(kernels, nvrtc):
    for major in (100, 9, 11):
        shipped_for(major, nvrtc)
    assert compile_tiny(driver_version=13000) == b"of CUDA 9"
    assert compile_tiny() == b"of CUDA 9"


# ---- where things are ----------------------------------------------------------------------------


def test_the_package_has_its_sources():
    files = jit.sources("forward")
    assert {"forward.cu", "params.h"} <= files.keys()
    assert [name for name in files if name.endswith(".cu")] == ["forward.cu"]


def installed(site, monkeypatch):
    package = site / "flash_attn_sm120"
    package.mkdir()
    monkeypatch.setattr(jit, "__file__", str(package / "jit.py"))
    return package


def test_the_kernels_of_another_project_are_not_ours(tmp_path, monkeypatch):
    """PyPI has a distribution named kernels, which lies beside ours in site-packages."""
    package = installed(tmp_path, monkeypatch)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    with pytest.raises(RuntimeError, match="reinstall flash_attn_sm120"):
        jit.kernel_directory()
    (package / "kernels").mkdir()
    (package / "kernels" / "params.h").touch()
    assert jit.kernel_directory() == package / "kernels"


def test_a_checkout_has_its_kernels_beside_the_package(tmp_path, monkeypatch):
    installed(tmp_path, monkeypatch)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "params.h").touch()
    assert jit.kernel_directory() == tmp_path / "kernels"


def test_importing_jit_loads_no_cuda():
    code = """
import sys
import torch
before = set(sys.modules)
import flash_attn_sm120.jit
print([name for name in set(sys.modules) - before if name.split(".")[0] == "cuda"])
"""
    here = Path(jit.__file__).parent.parent
    done = run_command(sys.executable, "-c", code, cwd=here, timeout=60, PYTHONPATH="")
    assert done.stdout.strip() == "[]", done.stderr
