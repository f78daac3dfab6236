"""The house rules, as far as a program can check them: style, types, and where things may stand."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = sorted(ROOT.glob("csrc/**/*.[ch]"))
DRIVERS = sorted([*ROOT.glob("emulator/*.[ch]"), *ROOT.glob("tests/helpers/*.[ch]")])
KERNELS = sorted(
    [*ROOT.glob("kernels/*.cu"), *ROOT.glob("kernels/*.cuh"), *ROOT.glob("kernels/*.h")]
)
PYTHON = sorted(
    path
    for folder in ("flash_attn_sm120", "emulator", "tests", "benchmarks", "hub")
    for path in ROOT.glob(f"{folder}/**/*.py")
)

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not HOST, reason="runs in a checkout alone"),
]


def tool(name):
    """The command of a tool, from the environment that runs the tests."""
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.exists() else shutil.which(name)
    if not path:
        pytest.skip(f"{name} is not installed")
    return path


def code_of(path):
    """The text without comments and strings."""
    text = path.read_text()
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', " ", text, flags=re.S)


def test_python_style():
    files = [*map(str, PYTHON), str(ROOT / "conftest.py"), str(ROOT / "setup.py")]
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [tool("ruff"), *arguments, *files], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_c_style():
    done = subprocess.run(
        [tool("clang-format"), "--dry-run", "-Werror", *map(str, [*HOST, *DRIVERS, *KERNELS])],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path", [*HOST, *DRIVERS, *KERNELS], ids=lambda p: str(p.relative_to(ROOT))
)
def test_lines_are_short(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 100] == []


def test_types():
    tool("mypy")
    done = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stubs_are_exact():
    """_C.pyi has the signatures that the extension has; CallOptions has those of the calls."""
    import ast
    import inspect

    from flash_attn_sm120 import _C
    from flash_attn_sm120.plan import CallOptions

    def parameters(arguments):
        """[(name, kind, default), ...] of a stub."""
        only = arguments.posonlyargs
        positional = [(x.arg, "positional-only") for x in only]
        positional += [(x.arg, "positional or keyword") for x in arguments.args]
        defaults = [ast.literal_eval(x) for x in arguments.defaults]
        empty = [inspect.Parameter.empty] * (len(positional) - len(defaults))
        found = [(*x, default) for x, default in zip(positional, empty + defaults, strict=True)]
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            found.append((argument.arg, "keyword-only", ast.literal_eval(default)))
        return found

    tree = ast.parse((ROOT / "flash_attn_sm120/_C.pyi").read_text())
    stubs = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(stubs) == {name for name in dir(_C) if not name.startswith("_")}
    for name, node in stubs.items():
        real = inspect.signature(getattr(_C, name)).parameters.values()
        assert parameters(node.args) == [(p.name, p.kind.description, p.default) for p in real]
    options = [
        p
        for p in inspect.signature(_C.backward).parameters.values()
        if p.kind.name != "POSITIONAL_ONLY"
    ]
    assert {p.name for p in options} == set(CallOptions.__annotations__)


MODS = {"score_mod", "mask_mod", "mod"}


def asked_for_truth(tree):
    """The names and attributes of which a program asks whether they are true."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield node.test
        elif isinstance(node, ast.BoolOp):
            yield from node.values
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node.operand


def test_mods_are_compared_with_none():
    """Before torch 2.13 Dynamo follows no truth value of a function."""
    for path in ROOT.glob("flash_attn_sm120/**/*.py"):
        for node in asked_for_truth(ast.parse(path.read_text())):
            name = getattr(node, "id", getattr(node, "attr", ""))
            assert name not in MODS, f"{path}:{node.lineno}"


def test_functions_pass_every_option_on():
    """A row of csrc/options.h is a parameter of both functions, with the same default; lengths are
    of flash_attn_varlen_func alone, lists of blocks are made of block_sparse_tensors, and tensors
    with heads first are those of torch's operators."""
    import inspect

    from flash_attn_sm120 import _C, flash_attn_func, flash_attn_varlen_func

    dense = inspect.signature(flash_attn_func).parameters
    varlen = inspect.signature(flash_attn_varlen_func).parameters
    for name, parameter in inspect.signature(_C.forward).parameters.items():
        name = "block_sparse_tensors" if name in ("key_blocks", "query_blocks") else name
        if parameter.kind.name != "POSITIONAL_ONLY" and name != "heads_first":
            assert varlen[name].default == parameter.default, name
            is_length = name.startswith(("cu_seqlens", "max_seqlen", "seqused", "page_table"))
            assert is_length or dense[name].default == parameter.default, name


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_inline_assembly_is_in_ptx_cuh_alone(path):
    uses = re.search(r"\basm\b", code_of(path)) is not None
    assert uses == (path.name == "ptx.cuh")


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_include_no_toolkit_header(path):
    included = re.findall(r'#include\s+([<"][^>"]+[>"])', path.read_text())
    ours = {f'"{p.name}"' for p in KERNELS}
    assert set(included) <= ours | {"<stdint.h>"}
    assert "<stdint.h>" not in included or path.name == "params.h"


def test_kernels_never_use_wgmma():
    assert not [path for path in KERNELS if "wgmma" in code_of(path)]


def test_only_tensor_c_knows_dlpack():
    including = {path.name for path in HOST if '#include "dlpack.h"' in path.read_text()}
    assert including == {"tensor.c"}


def test_only_platform_c_asks_for_the_operating_system():
    asking = {
        path.name for path in HOST if re.search(r"_WIN32|__linux__|dlopen|pthread", code_of(path))
    }
    assert asking == {"platform.c"}


def test_code_that_runs_without_the_gil_calls_no_python():
    """As pure C does, which test_layers.py looks at."""
    named = [ROOT / "csrc" / name for name in ("tiles.c", "variant.c", "platform.c")]
    for path in [*named, *ROOT.glob("csrc/cpu/*.[ch]")]:
        calls = re.findall(r"\bPy[A-Z_]\w*\s*\(", code_of(path))
        assert not calls, (path.name, calls)


@pytest.mark.parametrize("path", HOST, ids=lambda p: str(p.relative_to(ROOT)))
def test_c_keeps_no_state_and_borrows_no_trouble(path):
    code = code_of(path)
    mutable = re.findall(
        r"^static (?!const|inline|struct PyModuleDef|PyM)[^()=;]+(?:=|;)", code, flags=re.M
    )
    assert [m for m in mutable if "const" not in m] == []
    assert not re.search(r"\b(exit|abort|printf|strcat|sprintf|gets|alloca)\s*\(", code)
    assert not re.search(
        r"PyTuple_GET_ITEM|PyList_GET_ITEM|PyTuple_SET_ITEM|Py_TYPE\([^)]*\)->", code
    )
    # These are macros that evaluate their argument twice: Py_CLEAR until Python 3.12.
    assert not re.search(r"\b(?:Py_CLEAR|Py_VISIT|MIN|MAX|CEIL_DIV)\([^;]*(?:\+\+|--)", code)


@pytest.mark.parametrize(
    "path",
    [p for p in (*HOST, *DRIVERS) if p.suffix == ".c"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_functions_are_short(path):
    """Tens of lines: a body starts and ends with a brace in the first column."""
    start = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line == "{":
            start = number
        elif line == "}" and start:
            assert number - start <= 60, f"{path.name}:{start}"
            start = None


def test_documents_list_every_environment_variable():
    sources = [*HOST, *PYTHON, ROOT / "setup.py", ROOT / "Makefile"]
    ours = [x for x in sources if x.relative_to(ROOT).parts[0] not in ("tests", "emulator")]
    text = "\n".join(path.read_text() for path in ours)
    used = set(re.findall(r"FA_SM120_[A-Z]+\w*", text)) - {"FA_SM120_"}
    table = set(
        re.findall(r"^\| `(FA_SM120_\w+)`", (ROOT / "docs/environment.md").read_text(), flags=re.M)
    )
    assert used == table


def test_version_is_in_one_place():
    import flash_attn_sm120

    assert f'version = "{flash_attn_sm120.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_kernels_have_no_switches_but_their_constants():
    """What is compiled is decided by the fields of csrc/variant.h: nothing is cut out for a measurement."""
    known = set(re.findall(r'X\(\w+, "([A-Z_0-9]+)"', (ROOT / "csrc/variant.h").read_text()))
    for path in KERNELS:
        tested = set(
            re.findall(r"^#(?:if|ifdef|ifndef|elif)\s+(\w+)", path.read_text(), flags=re.M)
        )
        assert tested <= known | {f"FA_{path.name.replace('.', '_').upper()}", "__CUDACC_RTC__"}, (
            path
        )
