"""What all tests share: command line, time limits, and the fixtures of devices and inputs."""

import fnmatch
import importlib.util
import os
import zlib
from collections import Counter

import pytest
import torch

from flash_attn_sm120 import explain, frameworks
from helpers.devices import CUDA, DEVICES, is_on_a_gpu, params_of, why_left_out
from helpers.inputs import random_tensor
from helpers.tiles import use_tiles
from helpers.watchdog import time_limit

# Tensors here are small: threads that wait for each other would only slow torch down.
torch.set_num_threads(1)

STDERR = pytest.StashKey[int]()  # the real one, which pytest does not capture
LEFT_OUT = pytest.StashKey[Counter]()  # why -> how many tests
UNMATCHED = pytest.StashKey[dict]()  # quick test -> patterns that no case of it matches


def pytest_addoption(parser):
    parser.addoption(
        "--examples", type=int, help="random calls of test_together.py, others in every run"
    )
    parser.addoption(
        "--large", action="store_true", help="models of real sizes on the CPU, too: minutes"
    )
    parser.addoption(
        "--gpu-time-limit",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds after which a test on a GPU ends the process (default: %(default)s)",
    )


def pytest_configure(config):
    config.stash[STDERR] = os.dup(2)
    config.stash[LEFT_OUT] = Counter()
    config.stash[UNMATCHED] = {}
    config.addinivalue_line(
        "markers", "quick(*cases): part of `-m quick`; with patterns, the cases whose ids match one"
    )


# ---- which tests run -----------------------------------------------------------------------------


def pytest_itemcollected(item):
    """A quick test of many cases is quick in those that its mark names."""
    mark = item.get_closest_marker("quick")
    if mark and mark.args:
        matching = {x for x in mark.args if fnmatch.fnmatch(item.callspec.id, x)}
        name = item.nodeid.removesuffix(f"[{item.callspec.id}]")
        item.config.stash[UNMATCHED].setdefault(name, set(mark.args)).difference_update(matching)
        if not matching:
            item.own_markers.remove(mark)


# Files of tests that need a package besides those of every test, and the package.
NEEDED = {"test_transformers.py": "transformers"}


def pytest_ignore_collect(collection_path, config):
    package = NEEDED.get(collection_path.name)
    if package is None or importlib.util.find_spec(package):
        return None
    config.stash[LEFT_OUT][f"{collection_path.name}: {package} is not installed"] += 1
    return True


# Files of tests that take longest.
LONGEST = ("test_sanitizers.py", "test_resources.py", "test_package.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leaves out what this machine cannot run. Processes that share the tests start with the
    longest: short ones fill up the end evenly."""
    if not any("::" in argument for argument in config.args):  # else cases alone may be collected
        for name, patterns in config.stash[UNMATCHED].items():
            if patterns:
                raise pytest.UsageError(f"no case of {name} matches its quick {sorted(patterns)}")
    why = {item: why_left_out(item) for item in items}
    left_out = [item for item in items if why[item]]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        config.stash[LEFT_OUT].update(why[item] for item in left_out)
        items[:] = [item for item in items if not why[item]]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.name not in LONGEST)
        config.workeroutput["left_out"] = dict(config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Every process of xdist has collected the same tests."""
    node.config.stash[LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out"))


def pytest_terminal_summary(terminalreporter, config):
    for why, count in config.stash[LEFT_OUT].items():
        terminalreporter.write_line(f"LEFT OUT [{count}] {why}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A kernel that never ends is named by its test, and does not keep the GPU."""
    if not is_on_a_gpu(item):
        return (yield)
    seconds = item.config.getoption("--gpu-time-limit")
    with time_limit(seconds, item.nodeid, item.config.stash[STDERR]):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def driver_is_settled():
    """The C code reads its environment once; processes that tests start have other drivers."""
    q = torch.empty(0, 1, 1, 8, dtype=torch.float16)
    explain(q, q, q, arch=120)
    os.environ.pop("FA_SM120_DRIVER", None)


# ---- devices and inputs --------------------------------------------------------------------------


@pytest.fixture(params=params_of(*DEVICES))
def device(request):
    with use_tiles(*request.param.tiles):
        yield request.param


@pytest.fixture
def cuda():
    """For tests of torch's CUDA alone: they are left out where it is missing."""
    return CUDA


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request, device):
    """Each that the device is tested with."""
    return request.param


@pytest.fixture(autouse=True)
def seed(request):
    """Every test draws the same numbers in every run and in every order of tests."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def outputs_full_of_nan(monkeypatch):
    """Memory that no kernel wrote shows, whatever the allocator returns."""
    empty = frameworks.empty
    monkeypatch.setattr(frameworks, "empty", lambda *args: empty(*args).fill_(torch.nan))


@pytest.fixture
def make_qkv(device):
    """make_qkv(...) -> q, k, v on the test's device: normal around `mean`, in one of LAYOUTS."""

    def make(
        batch=2,
        seqlen_q=64,
        seqlen_k=None,
        heads=4,
        heads_kv=None,
        head_dim=64,
        head_dim_v=None,
        *,
        dtype=torch.bfloat16,
        mean=0.0,
        layout="contiguous",
    ):
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        heads_kv = heads if heads_kv is None else heads_kv
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        shapes = (
            (batch, seqlen_q, heads, head_dim),
            (batch, seqlen_k, heads_kv, head_dim),
            (batch, seqlen_k, heads_kv, head_dim_v),
        )
        return [random_tensor(device, shape, dtype, mean, layout) for shape in shapes]

    return make
