"""The repository for Hugging Face's `kernels`: its layout, and that it can be loaded, beside the
package and without it."""

import importlib.util
import json
import platform
import re
import zipfile
from pathlib import Path

import pytest

import flash_attn_sm120
from helpers.children import run_python

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "hub/build.py"
if not SCRIPT.exists():
    pytest.skip("runs in a checkout alone", allow_module_level=True)

pytestmark = pytest.mark.quick

_spec = importlib.util.spec_from_file_location("hub_build", SCRIPT)
hub = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub)

NAMES = [f"{hub.TORCH}-{backend}-{{}}-linux" for backend in ("cpu", "cu128", "cu130")]


def make_wheel(target, tag):
    """What a wheel holds, from the package in place; the module is the same on any platform."""
    path = target / f"flash_attn_sm120-0.1.0-cp310-abi3-{tag}.whl"
    package = Path(flash_attn_sm120.__file__).parent
    with zipfile.ZipFile(path, "w") as archive:
        for folder, files in (("", package.rglob("*")), ("kernels/", ROOT.glob("kernels/*"))):
            base = package if not folder else ROOT / "kernels"
            for file in files:
                if file.is_file():
                    archive.write(file, f"{hub.PACKAGE}/{folder}{file.relative_to(base)}")
        archive.writestr("flash_attn_sm120-0.1.0.dist-info/METADATA", "Name: flash_attn_sm120")
    return path


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    target = tmp_path_factory.mktemp("hub")
    machine = platform.machine()
    other = "aarch64" if machine == "x86_64" else "x86_64"
    tags = (f"linux_{machine}", f"manylinux_2_17_{other}.manylinux2014_{other}")
    hub.build([make_wheel(target, tag) for tag in tags], target / "hub")
    return target / "hub"


# ---- the layout ----------------------------------------------------------------------------------


def test_layout(repository):
    assert {path.name for path in repository.iterdir()} == {"README.md", "LICENSE", "build"}
    variants = {path.name for path in (repository / "build").iterdir()}
    assert variants == {name.format(cpu) for name in NAMES for cpu in ("x86_64", "aarch64")}
    for variant in (repository / "build").iterdir():
        files = {str(p.relative_to(variant)) for p in variant.rglob("*") if p.is_file()}
        package = {"_C.abi3.so", "fa2/attention.py", "interface.py", "kernels/forward.cu"}
        assert {"__init__.py", "metadata.json"} <= files
        assert {f"flash_attn_sm120/{name}" for name in package} <= files
        assert not [name for name in files if re.search(r"pyc$|dist-info|commands|__main__", name)]


def test_metadata(repository):
    """Names that `kernels` takes; an id for each backend, under which the module is imported."""
    ids = {}
    for path in (repository / "build").glob("*/metadata.json"):
        metadata = json.loads(path.read_text())
        backend = metadata["backend"]["type"]
        assert backend == ("cpu" if "-cpu-" in path.parent.name else "cuda")
        assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", metadata["name"])
        assert metadata["id"].isidentifier() and metadata["python-depends"] == []
        assert isinstance(metadata["version"], int) and metadata["license"] == "BSD-3-Clause"
        ids.setdefault(backend, set()).add(metadata["id"])
    assert len(ids["cpu"]) == len(ids["cuda"]) == 1 and ids["cpu"] != ids["cuda"]


def test_card(repository):
    text = (repository / "README.md").read_text()
    head = re.match(r"---\n(.*?)\n---\n", text, flags=re.S)
    assert head and "license: bsd-3-clause" in head[1] and "- kernel" in head[1]
    assert "flash" in hub.NAME and f"/{hub.NAME}" in text


def test_imports_are_relative():
    made = hub.made_relative
    assert made("a.py", "from flash_attn_sm120 import _C") == "from . import _C"
    assert made("a.py", "    from flash_attn_sm120.b import c") == "    from .b import c"
    assert made("x/a.py", "from flash_attn_sm120.b.d import (") == "from ..b.d import ("
    assert made("a.py", "from flash_attn_sm120s import c") == "from flash_attn_sm120s import c"
    for text in ("import flash_attn_sm120.b", 'import_module("flash_attn_sm120.b")'):
        with pytest.raises(ValueError, match=r"a\.py imports the package by its name"):
            made("a.py", text)


@pytest.mark.parametrize(
    "tag, name",
    [
        ("linux_x86_64", "x86_64-linux"),
        ("manylinux_2_17_aarch64.manylinux2014_aarch64", "aarch64-linux"),
        ("win_amd64", "x86_64-windows"),
    ],
)
def test_platforms(tag, name):
    assert hub.platform_of(Path(f"flash_attn_sm120-0.1.0-cp310-abi3-{tag}.whl")) == name


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "flash_attn_sm120-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("flash_attn_sm120/__init__.py", "")
    with pytest.raises(ValueError, match="is of no platform"):
        hub.platform_of(path)
    with pytest.raises(ValueError, match="has no extension module"):
        hub.package_of(path)


# ---- loading -------------------------------------------------------------------------------------

PRELUDE = """
import importlib.util, sys
import torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "flash_attn_sm120":
            raise ModuleNotFoundError(name)

def load(name):
    spec = importlib.util.spec_from_file_location(name, VARIANT + "/__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def check(kernel, compiled=False):
    q, k, v = (torch.randn(2, 9, 4, 16, requires_grad=True) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    call = lambda q, k, v: kernel.flash_attn_func(q, k, v, causal=True)
    if compiled:
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    out = call(q, k, v)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    like = torch.autograd.grad(expected.sum(), (q, k, v))
    for x, y in zip(found, like):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
"""


@pytest.fixture
def run(repository, tmp_path):
    """Runs code after PRELUDE, in a process with the variant for this machine."""

    def run(code, **environment):
        variant = repository / "build" / NAMES[0].format(platform.machine())
        text = f"VARIANT, REPOSITORY = {str(variant)!r}, {str(repository)!r}\n{PRELUDE}{code}"
        done = run_python(text, tmp_path, **environment)
        assert done.returncode == 0, done.stderr

    return run


def local(repository):
    """The variable by which `kernels` takes a repository from a directory."""
    return f"owner/flash-sm120={repository}"


def test_without_the_package(run):
    """Under any name; what C imports is the package's own, too: numpy arrays need it."""
    run("""
sys.meta_path.insert(0, Absent())
kernel = load("some_name")
check(kernel)
import numpy
x = numpy.ones((1, 3, 2, 8), numpy.float32)
out, _ = kernel.flash_attn_sm120.flash_attn_func(x, x, x)
assert isinstance(out, numpy.ndarray) and (out == 1).all()
assert not any(name.partition(".")[0] == "flash_attn_sm120" for name in sys.modules)
assert "kernels" in kernel.flash_attn_sm120.jit.kernel_directory().parts[-1]
assert kernel.flash_attn_sm120.jit.kernel_directory().is_relative_to(VARIANT)
""")


@pytest.mark.parametrize("first", ["package", "kernel"])
def test_beside_the_package(run, first):
    """Operators, modules and state are two; each still works."""
    steps = ["import flash_attn_sm120.fa2 as package", "kernel = load('some_name')"]
    order = steps if first == "package" else steps[::-1]
    compiled = first == "package"  # which takes seconds: one order will do
    run(
        "; ".join(order)
        + f"\nCOMPILED = {compiled}"
        + """
assert kernel.flash_attn_func is not package.flash_attn_func
assert kernel.flash_attn_sm120.ops.NAMESPACE == "some_name_flash_attn_sm120"
assert sys.modules["flash_attn_sm120.ops"].NAMESPACE == "flash_attn_sm120"
assert kernel.flash_attn_sm120._C is not sys.modules["flash_attn_sm120._C"]
other = load("other_name")
for x in (kernel, package, other):
    check(x)
    if COMPILED:
        check(x, compiled=True)
"""
    )


def test_by_kernels(run, repository):
    pytest.importorskip("kernels.utils", reason="kernels is not installed")
    run(
        """
sys.meta_path.insert(0, Absent())
from kernels import get_kernel, get_local_kernel, get_loaded_kernels
from pathlib import Path
kernel = get_kernel("owner/flash-sm120", version=1)
assert Path(kernel.__file__).parent == Path(VARIANT)
check(kernel)
assert get_local_kernel(Path(REPOSITORY)) is kernel
(loaded,) = get_loaded_kernels()
assert loaded.metadata.name.python_name == "flash_sm120" and loaded.module is kernel
from kernels.variants import get_variants_local
assert len(get_variants_local(Path(REPOSITORY) / "build")) == 6
""",
        LOCAL_KERNELS=local(repository),
    )


def test_by_transformers(run, repository):
    pytest.importorskip("kernels.utils", reason="kernels is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    run(
        """
sys.meta_path.insert(0, Absent())
from transformers import AutoConfig, AutoModelForCausalLM

def make(attention):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = AutoConfig.for_model("llama", **sizes, **heads, pad_token_id=0, eos_token_id=None)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()

ours, eager = make("owner/flash-sm120"), make("eager")
prompts = torch.randint(3, 64, (2, 11))
mask = torch.ones_like(prompts)
mask[0, :4] = 0
for cache in ("dynamic", "static"):
    options = dict(max_new_tokens=8, do_sample=False, cache_implementation=cache, disable_compile=True)
    found, like = (x.generate(prompts, attention_mask=mask, **options) for x in (ours, eager))
    assert torch.equal(found, like), cache
used = [name for name in sys.modules if name.startswith("_flash_sm120_cpu_")]
assert used
""",
        LOCAL_KERNELS=local(repository),
    )
