"""The C code for compilers and machines other than this one, and how setup.py builds it.

`make cross-compilers` installs what compiles for Windows and aarch64, and runs the latter.
"""

import importlib.util
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from helpers.children import run_command

ROOT = Path(__file__).parents[2]
CSRC = sorted(ROOT.glob("csrc/**/*.c"))
HELPERS = ROOT / "tests/helpers"

pytestmark = pytest.mark.skipif(not CSRC, reason="runs in a checkout alone")

CROSS = ["-include", HELPERS / "pyconfig.h"]
COMPILERS = {
    "gcc": ["gcc"],
    "clang": ["clang"],
    "aarch64": ["aarch64-linux-gnu-gcc", *CROSS],
    "windows": ["x86_64-w64-mingw32-gcc", *CROSS],
}
RUNNERS = {
    "aarch64": ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"],
    "windows": ["/usr/lib/wine/wine64"],
}
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wvla", "-Werror"]

# What needs neither Python nor a GPU.
PORTABLE = [
    HELPERS / "portable.c",
    *(
        ROOT / "csrc" / name
        for name in (
            "cpu/rows.c",
            "device.c",
            "overlap.c",
            "plan.c",
            "plan_backward.c",
            "plan_forward.c",
            "platform.c",
            "split.c",
            "tiles.c",
            "variant.c",
        )
    ),
]

# Absent from MSVC's C11, or there under other names. What platform.c does about it is behind its _WIN32.
NOT_IN_MSVC = (
    r"__builtin_\w+|__sync_\w+|__atomic_\w+|__attribute__|__extension__|__typeof__|\btypeof\b|__int128|\b_Float16\b"
    r"|\b_Atomic\b|\batomic_\w+|<stdatomic\.h>|\b_Complex\b|<complex\.h>|<threads\.h>|\b_Thread_local\b"
    r"|<(?:unistd|pthread|dlfcn|sched|strings)\.h>|<sys/\w+\.h>|\bssize_t\b|\bM_PI\b|\baligned_alloc\b"
    r"|\(\{|\bcase [^:\n]+\.\.\.|\[[^\]\n]+\.\.\.[^\]\n]+\] ="
)


def setup_script():
    """setup.py as a module: nothing is built."""
    specification = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script


def compiler(target):
    """The command that compiles for a target as setup.py would, with warnings as errors."""
    command = COMPILERS[target]
    headers = sysconfig.get_path("include")
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed (make cross-compilers)")
    if not Path(headers, "Python.h").exists():
        pytest.skip("Python's headers are not installed")
    flags = [*setup_script().compile_flags("unix"), *WARNINGS]
    return [*command, *flags, "-DPy_LIMITED_API=0x030A0000", "-isystem", headers]


def run(*command, **environment):
    done = run_command(*command, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compile_all(target, directory):
    """Objects of all of csrc."""
    command = compiler(target)
    objects = []
    for path in CSRC:
        # Python itself has functions in void pointers, in the slots of a module.
        pedantic = ["-Wno-pedantic"] if path.name == "module.c" else []
        objects.append(directory / f"{path.relative_to(ROOT / 'csrc')}.o".replace("/", "_"))
        run(*command, *pedantic, "-c", path, "-o", objects[-1])
    return objects


@pytest.mark.parametrize("target", ["gcc", "clang", "aarch64"])
def test_compiles_without_warnings(target, tmp_path):
    compile_all(target, tmp_path)


def test_links_for_windows(tmp_path):
    """All that the extension needs there is in Windows, or Python's own."""
    objects = compile_all("windows", tmp_path)
    prefix = "x86_64-w64-mingw32-"
    undefined = run(f"{prefix}nm", "-u", *objects).split()
    names = {
        name.removeprefix("__imp_") for name in undefined if re.match(r"(__imp_)?_?Py[A-Z_]", name)
    }
    definition = tmp_path / "python3.def"
    definition.write_text("\n".join(["LIBRARY python3.dll", "EXPORTS", *sorted(names), ""]))
    python = tmp_path / "python3.lib"
    run(f"{prefix}dlltool", "-d", definition, "-l", python)
    library = tmp_path / "_C.pyd"
    run(*compiler("windows"), "-shared", "-o", library, *objects, python)
    assert "PyInit__C" in run(f"{prefix}objdump", "-p", library)


@pytest.mark.parametrize("target", RUNNERS)
def test_answers_are_the_same(target, tmp_path):
    """Plans, overlaps, roundings and sums: bit by bit those of this machine."""
    runner = RUNNERS[target]
    if not shutil.which(runner[0]):
        pytest.skip(f"{Path(runner[0]).name} is not installed")

    def answers(target, *runner):
        program = tmp_path / f"{target}.exe"
        run(*compiler(target), *PORTABLE, "-o", program, "-pthread", "-lm")
        wine = {"WINEPREFIX": str(tmp_path / "wine"), "WINEDEBUG": "-all"}
        return run(*runner, program, **wine).splitlines()

    here = answers("gcc")
    overlaps = {line.split(": ")[1] for line in here if line.startswith("overlap")}
    assert overlaps == {"0 0", "1 0"} and sum("_tma" in line for line in here) > 20
    assert answers(target, *runner) == here


@pytest.mark.quick
@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("csrc/**/*.[ch]")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_c_is_what_msvc_takes(path):
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.S)
    if path.name == "platform.c":
        windows, others = text.split("#else\n", 1)
        text = windows + others.split("#endif\n", 1)[1]
    assert re.findall(NOT_IN_MSVC, text) == []


# ---- setup.py ------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("compiler_type", ["unix", "mingw32", "msvc"])
def test_warnings_never_stop_a_user(compiler_type, monkeypatch):
    monkeypatch.delenv("FA_SM120_CFLAGS", raising=False)
    flags = setup_script().compile_flags(compiler_type)
    assert [flag for flag in flags if flag.startswith(("-W", "/W"))] == []
    assert flags[0] == ("/std:c11" if compiler_type == "msvc" else "-std=c11")
    assert {flag[0] for flag in flags} == {"/" if compiler_type == "msvc" else "-"}


@pytest.mark.quick
def test_developers_add_flags(monkeypatch):
    monkeypatch.setenv("FA_SM120_CFLAGS", "-Wall -Werror")
    script = setup_script()
    assert script.compile_flags("unix")[-2:] == ["-Wall", "-Werror"]
    assert script.extension().extra_link_args == ["-Wall", "-Werror"]


def test_make_build_has_warnings_as_errors():
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    said = run("make", "-C", ROOT, "-s", "build", "VENV=", "PYTHON=printenv FA_SM120_CFLAGS #")
    assert said.split()[:3] == ["-Wall", "-Wextra", "-Werror"]


def test_pip_refuses_free_threaded_python(tmp_path):
    """In one line, before it compiles: an interpreter that says it is one, so that pip itself is run."""
    site = tmp_path / "sitecustomize.py"
    site.write_text("import sysconfig\nsysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1\n")
    source = tmp_path / "source"
    for name in ("csrc", "kernels", "flash_attn_sm120"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = run_command(*pip, "-w", tmp_path, source, PYTHONPATH=str(tmp_path))
    said = [line for line in (done.stdout + done.stderr).splitlines() if "GIL" in line]
    assert done.returncode != 0
    assert [line.strip() for line in said] == [setup_script().FREE_THREADED]
    assert not list(source.rglob("*.o"))
