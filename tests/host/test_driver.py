"""The way to a launch, on a driver that launches nothing: what is asked of it, and every way it can fail."""

import _ctypes
import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest

from flash_attn_sm120 import _C, jit
from helpers.children import run_python

HELPERS = Path(__file__).parents[1] / "helpers"

# numpy arrays that say they are on a GPU, and calls over them.
PREAMBLE = """
import numpy as np
from helpers.capsules import Capsule
from flash_attn_sm120 import flash_attn_func, frameworks, _C

made = []  # capsules must outlive their use

class CudaArray(np.ndarray):
    device_id = 0
    def __dlpack_device__(self):
        return (2, self.device_id)
    def __dlpack__(self, *, stream=None, max_version=None):
        assert stream == (7 * self.device_id or 1)
        code = 0 if self.dtype.kind == "i" else 2
        made.append(Capsule(np.asarray(self), code=code, device_type=2, device_id=self.device_id))
        return made[-1].capsule

frameworks.current_stream = lambda device_id: 7 * device_id

def on_device(array, device_id):
    array = array.view(CudaArray)
    array.device_id = device_id
    return array

empty = frameworks.empty
def empty_on_device(*args):
    return on_device(empty(*args), args[-1])
frameworks.empty = empty_on_device

def cuda(*shape, device_id=0):
    return on_device(np.zeros(shape, np.float16), device_id)

def call(seqlen_q=130, device_id=0, **kwargs):
    q = cuda(2, seqlen_q, 6, 64, device_id=device_id)
    k = cuda(2, 200, 2, 64, device_id=device_id)
    return flash_attn_func(q, k, k, **kwargs)

def error_of(f, *args, **kwargs):
    try:
        f(*args, **kwargs)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
    else:
        print("no error")
"""


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory):
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("driver") / "libfake.so"
    source = HELPERS / "fake_driver.c"
    subprocess.run([compiler, "-Wall", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.fixture
def run(fake_driver, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc")
    launches = tmp_path / "launches"

    def run(code, **environment):
        """The lines that ``code`` printed and the launches that it made."""
        launches.unlink(missing_ok=True)
        settings = {
            "FA_SM120_DRIVER": str(fake_driver),
            "FAKE_LAUNCHES": str(launches),
            "FA_SM120_CACHE_DIR": str(tmp_path / "cache"),
        }
        done = run_python(PREAMBLE + code, tmp_path, **settings | environment)
        assert done.returncode == 0, done.stderr
        made = launches.read_text().splitlines() if launches.exists() else []
        return done.stdout.splitlines(), [json.loads(line) for line in made]

    return run


def test_launch_parameters(run):
    code = """
from flash_attn_sm120 import explain
q, k = cuda(2, 130, 6, 64), cuda(2, 200, 2, 64)
print(explain(q, k, k).tile_m, explain(q, k, k).smem_request)
call(return_lse=True, pack_gqa=False)
call(causal=True, softmax_scale=0.5, pack_gqa=False)
call(pack_gqa=True)
"""
    (line,), (dense, causal, packed) = run(code)
    tile_m, smem_request = map(int, line.split())
    assert dense["m_blocks"] == math.ceil(130 / tile_m)
    assert dense["grid"] == dense["m_blocks"] * 2 * 6
    assert dense["shared"] == smem_request
    assert (dense["batch"], dense["heads"], dense["heads_per_kv"]) == (2, 6, 3)
    assert (packed["batch"], packed["heads"], packed["heads_per_kv"]) == (2, 2, 3)
    assert packed["m_blocks"] == math.ceil(130 * 3 / tile_m)
    assert packed["grid"] == packed["m_blocks"] * 2 * 2
    assert (dense["seqlen_q"], dense["seqlen_k"]) == (130, 200)
    assert dense["q_stride"] == [130 * 6 * 64, 6 * 64, 64]
    assert dense["scale_log2"] == pytest.approx(math.log2(math.e) / 8, rel=1e-6)
    assert causal["scale_log2"] == pytest.approx(math.log2(math.e) / 2, rel=1e-6)
    assert (dense["lse"], causal["lse"]) == (True, False)
    assert (dense["window_left"], dense["window_right"]) == (2**31 - 1, 2**31 - 1)
    assert (causal["window_left"], causal["window_right"]) == (2**31 - 1, 0)


def test_numbers_that_kernels_divide_by(run):
    """n / number = (n * multiplier) >> (31 + shift) for all n below 2^31, see params.h."""
    numbers = [1, 2, 3, 5, 7, 12, 64, 71, 4097, 2**20 - 1, 2**20, 2**20 + 1, 2**27 - 1]
    code = f"""
for heads in {numbers}:
    q = cuda(1, 1, heads, 8)
    flash_attn_func(q, q, q, num_splits=1)
"""
    _, launches = run(code)
    divisors = {tuple(divisor) for launch in launches for divisor in launch["divisors"]}
    assert {number for number, *_ in divisors} >= set(numbers)
    for number, multiplier, shift in divisors:
        assert 0 < multiplier < 2**32
        last = (2**31 - 1) // number
        for quotient in {0, 1, 2, 1000, last // 2, last - 1, last}:
            for n in range(quotient * number - 2, quotient * number + 3):
                if 0 <= n < 2**31:
                    assert n * multiplier >> (31 + shift) == n // number


def test_context_and_stream_are_those_of_the_tensors(run):
    """The context of the tensors' device is current for the launch alone."""
    _, launches = run("call()\ncall(device_id=1)\ncall()\n")
    assert [(x["device"], x["depth"], x["stream"]) for x in launches] == [
        (0, 1, 0),
        (1, 1, 7),
        (0, 1, 0),
    ]


def test_stream_where_torch_never_used_cuda(run):
    """Then nobody can have set one, and a torch without CUDA has no word for it."""
    code = """
import importlib
importlib.reload(frameworks)
frameworks.empty = empty_on_device
call()
print(frameworks.torch.cuda.is_initialized())
"""
    lines, launches = run(code)
    assert lines == ["False"] and [x["stream"] for x in launches] == [0]


def test_a_variant_is_compiled_once(run):
    code = """
from flash_attn_sm120 import _C, jit
compiled, compile = [], jit.compile
jit.compile = lambda *args: compiled.append(args[1]) or compile(*args)
for _ in range(3):
    call(), call(causal=True), call(device_id=1)
print(len(compiled), len(set(compiled)))
"""
    (line,), launches = run(code)
    assert line == "3 2", "two variants on device 0, one of them on device 1 too"
    assert len(launches) == 9


def test_a_library_in_place_of_the_driver_is_given_ptx(run):
    code = """
from flash_attn_sm120 import _C, jit
compile = jit.compile
jit.compile = lambda *args: print(args[5], compile(*args)[:2]) or compile(*args)
call()
"""
    lines, launches = run(code)
    assert lines == ["True b'//'"] and len(launches) == 1


def test_hundreds_of_variants(run):
    """The table of kernels grows, and finds every kernel again."""
    code = """
from flash_attn_sm120 import _C, jit
compiled, ptx = [], b".entry forward("
jit.compile = lambda *args: compiled.append(args[1]) or ptx
for _ in range(2):
    for d in range(8, 257, 8):
        for dv in range(8, 257, 32):
            flash_attn_func(cuda(1, 1, 1, d), cuda(1, 1, 1, d), cuda(1, 1, 1, dv))
print(len(compiled), len(set(compiled)))
"""
    (line,), launches = run(code)
    assert line == "256 256" and len(launches) == 512


def test_a_repeated_call_is_launched_as_the_first_time(run):
    """Many more shapes than plans are kept, so that shapes share a slot, in orders that meet all of it."""
    code = """
import random
from flash_attn_sm120 import explain
shapes = [(s, h) for s in range(100, 140) for h in (1, 2, 3, 4)]
random.seed(0)
for seqlen, heads in shapes * 2 + random.sample(shapes, len(shapes)):
    q = cuda(1, seqlen, heads, 64)
    print(seqlen, heads, explain(q, q, q).blocks)
    flash_attn_func(q, q, q)
    flash_attn_func(q, q, q)
"""
    lines, launches = run(code)
    expected = [tuple(map(int, line.split())) for line in lines for _ in range(2)]
    assert [(x["seqlen_q"], x["heads"], x["grid"]) for x in launches] == expected
    assert len(set(expected)) == 160


def test_a_repeated_call_sees_what_has_changed(run):
    """Everything that one call can differ in from the call before, there and back."""
    code = """
from helpers.tiles import tile_row, use_tiles
q, k, v = cuda(2, 130, 6, 64), cuda(2, 200, 2, 64), cuda(2, 200, 2, 72)
other = cuda(2, 130, 6, 64, device_id=1)
calls = [
    lambda: flash_attn_func(q, k, k),
    lambda: flash_attn_func(q, k, k, causal=True),
    lambda: flash_attn_func(q, k, k, window_size=(3, 4)),
    lambda: flash_attn_func(q, k, k, softmax_scale=2.0),
    lambda: flash_attn_func(q, q, q),
    lambda: flash_attn_func(q, k, v),
    lambda: flash_attn_func(other, other, other),
]
tile = dict(tile_n=32, sub_n=16, warp_m=16, stages=2)
for rows in ([], [tile_row(**tile, warps=2)], [tile_row(**tile, warps=8)], []):
    with use_tiles(*rows):
        for call in calls * 2:
            call()
"""
    _, launches = run(code)
    keys = ("device", "seqlen_k", "window_left", "window_right", "scale_log2", "shared", "block")
    rounds = [[tuple(x[key] for key in keys) for x in launches[i : i + 7]] for i in range(0, 56, 7)]
    assert rounds[0::2] == rounds[1::2], "each call twice"
    built_in, two_warps, eight_warps, again = rounds[0::2]
    assert built_in == again and len(set(built_in)) == 7
    assert {x[-1] for x in two_warps} == {64} and {x[-1] for x in eight_warps} == {256}
    assert [x[:5] for x in two_warps] == [x[:5] for x in built_in]


def test_rows_that_change_while_a_kernel_is_compiled(run):
    """The plan of before is carried out, and not kept."""
    code = """
from flash_attn_sm120 import _C, jit
from helpers.tiles import tile_row
compile = jit.compile
def compile_and_change(*args):
    _C.use_tiles([tile_row(tile_n=32, sub_n=16, warps=8, warp_m=16, stages=2)])
    return compile(*args)
_C.use_tiles([tile_row(tile_n=32, sub_n=16, warps=2, warp_m=16, stages=2)])
jit.compile = compile_and_change
call()
jit.compile = compile
call()
"""
    _, launches = run(code)
    assert [x["block"] for x in launches] == [64, 256]


def test_rows_of_sm120_where_there_is_no_tma(run):
    """FA_SM120_PLAN_AS plans with other rows, not for another machine."""
    code = "from flash_attn_sm120 import explain\nq = cuda(1, 64, 1, 64)\nprint(explain(q, q, q).kernel)\n"
    assert run(code, FAKE_ARCH="120")[0] == ["forward_tma"]
    assert run(code, FAKE_ARCH="89", FA_SM120_PLAN_AS="120")[0] == ["forward"]
    assert run(code, FAKE_ARCH="90", FA_SM120_PLAN_AS="120")[0] == ["forward_tma"]


def test_a_split_call_is_two_launches(run):
    """Beside each other on the stream, with a workspace between them."""
    code = (
        "call(num_splits=3, return_lse=True, device_id=1)\ncall(num_splits=3)\ncall(num_splits=1)\n"
    )
    _, (first, second, *others) = run(code)
    assert (first["device"], first["stream"]) == (second["device"], second["stream"]) == (1, 7)
    assert first["parts"] == second["parts"] == 3
    assert first["grid"] == 3 * first["m_blocks"] * 2 * first["heads"]
    assert second["rows"] == 2 * 6 * 130 and second["shared"] == 0
    assert first["out"] == second["out_parts"]
    assert second["lse_parts"] - second["out_parts"] == 3 * second["rows"] * 64 * 4
    assert second["out_stride"] == [130 * 6 * 64, 6 * 64, 64]
    assert second["lse"] and not others[1]["lse"], "lse where it is wanted"
    assert first["lse"] and others[0]["lse"], "its parts always"
    assert [x["parts"] for x in others] == [3, 3, 1]


def test_combine_may_start_before_the_forward_has_ended(run):
    """From 9.0 on, where the driver captures that, too; the first kernel of a call never does."""
    code = """
from flash_attn_sm120 import jit
jit.compile = lambda kernel, *_: f".entry {kernel}(".encode()  # for drivers of any version
call(num_splits=3)
"""
    for environment, overlaps in (
        ({}, True),
        ({"FAKE_ARCH": "90"}, True),
        ({"FAKE_ARCH": "89"}, False),
        ({"FAKE_ARCH": "89", "FA_SM120_PLAN_AS": "120"}, False),
        ({"FAKE_VERSION": "12020"}, False),
    ):
        _, launches = run(code, **environment)
        assert [x["overlaps"] for x in launches] == [False, overlaps], environment


def test_capture_needs_both_kernels_of_a_split_call(run):
    code = """
import os
from flash_attn_sm120 import _C, jit
compile, fail = jit.compile, ["combine"]
jit.compile = lambda *args: compile(*args) if args[0] not in fail else 1 / 0
error_of(call, num_splits=3)
os.environ["FAKE_CAPTURING"] = "1"
error_of(call, num_splits=3)
os.environ["FAKE_CAPTURING"] = "0"
fail.clear()
call(num_splits=3)
os.environ["FAKE_CAPTURING"] = "1"
error_of(call, num_splits=3)
"""
    lines, launches = run(code)
    assert lines[0].startswith("ZeroDivisionError")
    assert "the kernel combine_fp16_of_fp32_dv64_w8 is not loaded yet" in lines[1]
    assert lines[2] == "no error" and len(launches) == 4, "nothing was launched before"


def test_nothing_to_do_launches_nothing(run):
    _, launches = run("call(seqlen_q=0)\n")
    assert launches == []


def test_driver_too_old(run):
    lines, launches = run("error_of(call)\n", FAKE_VERSION="11040")
    assert lines == [
        "RuntimeError: the NVIDIA driver supports CUDA 11.4; at least CUDA 12.0 is needed: update the driver"
    ]
    assert launches == []


def test_driver_older_than_the_compiler(run):
    if jit.nvrtc_version() < (13, 0):
        pytest.skip("every driver for CUDA 12 loads what an NVRTC of CUDA 12 makes")
    lines, _ = run("error_of(call)\n", FAKE_VERSION="12040")
    assert lines[0].startswith("RuntimeError") and "12" in lines[0] and "NVRTC" in lines[0]


def test_no_such_device(run):
    lines, _ = run("error_of(call, device_id=2)\nerror_of(call)\n")
    assert lines == ["ValueError: there is no CUDA device 2; the driver has 2", "no error"]


def test_no_device_at_all(run):
    lines, _ = run("error_of(call)\n", FAKE_DEVICES="0")
    assert lines == ["ValueError: there is no CUDA device 0; the driver has 0"]


def test_no_driver(run, tmp_path):
    lines, _ = run("error_of(call)\n", FA_SM120_DRIVER=str(tmp_path / "none.so"))
    assert lines[0].startswith(
        f"RuntimeError: no CUDA driver: {tmp_path / 'none.so'} cannot be opened"
    )


@pytest.mark.parametrize("library", ["libm.so.6", _ctypes.__file__, _C.__file__])
def test_a_library_that_is_no_driver(run, library):
    lines, _ = run("error_of(call)\n", FA_SM120_DRIVER=library)
    assert lines == [f"RuntimeError: {library} is not a CUDA driver: no symbol cuInit"]


@pytest.mark.parametrize("content", [b"", b"text", b"\x7fELF" + bytes(100)])
def test_a_file_that_is_no_library(run, tmp_path, content):
    path = tmp_path / "libcuda.so.1"
    path.write_bytes(content)
    (line,), _ = run("error_of(call)\n", FA_SM120_DRIVER=str(path))
    shown = str(path) if len(str(path)) <= 80 else f"...{str(path)[-80:]}"
    assert line.startswith(f"RuntimeError: no CUDA driver: {shown} cannot be opened (")
    assert line.count(path.name) == 1 and len(line) <= 200


@pytest.mark.parametrize("library", ["none.so", "libm.so.6"])
def test_warmup_without_a_driver(run, library):
    code = """
import sys
from flash_attn_sm120 import warmup
from flash_attn_sm120.__main__ import main
error_of(warmup)
sys.stderr = sys.stdout
print(main(["warmup"]))
"""
    (line, printed, status), _ = run(code, FA_SM120_DRIVER=library)
    assert line.startswith("RuntimeError: ") and line.endswith(
        "name an architecture to compile for"
    )
    assert printed.endswith(line.removeprefix("RuntimeError: ")) and status == "1"


@pytest.mark.parametrize(
    "entry",
    [
        "cuInit",
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuLibraryLoadData",
        "cuLibraryGetKernel",
        "cuKernelSetAttribute",
        "cuLaunchKernelEx",
    ],
)
def test_failing_driver_call_is_named_and_passes(run, entry):
    """The error names the call; when the driver is well again, so are we, and the context stack is clean."""
    code = """
import os
error_of(call)
del os.environ["FAKE_FAIL"]
error_of(call)
"""
    lines, launches = run(code, FAKE_FAIL=entry)
    assert lines == [
        f"RuntimeError: {entry} failed: unknown error (CUDA_ERROR_UNKNOWN, error 999)",
        "no error",
    ]
    assert [x["depth"] for x in launches] == [1]


def test_a_tensor_map_that_the_driver_refuses(run):
    code = """
import os
from helpers.tiles import tile_row, use_tiles
tile = dict(tile_n=64, sub_n=32, warps=4, warp_m=32, stages=3)
with use_tiles(tile_row(**tile, kernel="forward_tma", producer="thread")):
    error_of(call)
    del os.environ["FAKE_FAIL"]
    error_of(call)
"""
    entry = "cuTensorMapEncodeTiled"
    lines, launches = run(code, FAKE_FAIL=entry)
    assert lines[0].startswith(f"RuntimeError: {entry} failed") and lines[1] == "no error"
    assert len(launches) == 1 and launches[0]["depth"] == 1


def test_fork_is_explained(run):
    lines, _ = run("error_of(call)\n", FAKE_FAIL="cuLaunchKernelEx", FAKE_ERROR="3")
    assert "initialization error" in lines[0] and 'start worker processes with "spawn"' in lines[0]


def test_capture_needs_a_loaded_kernel(run):
    code = """
import os
os.environ["FAKE_CAPTURING"] = "1"
error_of(call)
os.environ["FAKE_CAPTURING"] = "0"
call()
os.environ["FAKE_CAPTURING"] = "1"
error_of(call)
"""
    lines, launches = run(code)
    assert "not loaded yet, and a stream under graph capture cannot load it" in lines[0]
    assert lines[1] == "no error" and len(launches) == 2


def test_lengths_are_checked_before_a_launch(run):
    """FA_SM120_CHECK=1, which a capture cannot have."""
    code = """
import os
lengths = on_device(np.array([3, 201], np.int32), 0)
error_of(call, seqused_k=lengths)
os.environ["FAKE_CAPTURING"] = "1"
error_of(call, seqused_k=lengths)
os.environ["FAKE_CAPTURING"] = "0"
for entry in ("cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"):
    os.environ["FAKE_FAIL"] = entry
    error_of(call, seqused_k=lengths)
os.environ["FAKE_FAIL"] = ""
call()
"""
    lines, launches = run(code, FA_SM120_CHECK="1")
    assert lines[0].startswith("ValueError: seqused_k must be from 0 to the length: sequence 1 has")
    assert lines[1].startswith("RuntimeError: FA_SM120_CHECK=1 waits for lengths")
    assert all("reading lengths for FA_SM120_CHECK failed" in line for line in lines[2:])
    assert len(lines) == 4 and len(launches) == 1


def test_compiler_failure_passes_through(run):
    code = """
from flash_attn_sm120 import _C, jit
compile, jit.compile = jit.compile, lambda *args: "text"
error_of(call)
jit.compile = compile
error_of(call)
"""
    lines, _ = run(code)
    assert lines == ["TypeError: jit.compile must return bytes, got 'text'", "no error"]


def test_threads_that_meet_a_new_variant_together(run):
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    print(len(list(pool.map(lambda i: call(causal=i % 2 == 0), range(64)))))
"""
    lines, launches = run(code)
    assert lines == ["64"] and len(launches) == 64


def test_devices_are_listed(run):
    code = "version, devices = _C.devices()\nprint(version, [(d['name'], d['arch'], d['sms']) for d in devices])\n"
    lines, _ = run(code, FAKE_ARCH="121")
    assert lines == ["13000 [('Fake 0', 121, 170), ('Fake 1', 121, 170)]"]


def test_output_is_on_the_device_of_a_bare_capsule(run):
    """A consumed capsule says nothing of its device any more; the tensor read from it does."""
    code = """
class torch:
    Tensor, device = frameworks.torch.Tensor, frameworks.torch.device
    empty = lambda shape, dtype, device: print(device) or np.empty(shape, dtype)
frameworks.torch, frameworks._TORCH_DTYPES = torch, (np.float32, np.float16)
array = cuda(1, 8, 1, 64, device_id=1)
flash_attn_func(array.__dlpack__(stream=7), array, array)
"""
    lines, launches = run(code)
    assert lines == ["cuda:1"] and len(launches) == 1


def test_warmup_without_a_device(run):
    code = "from flash_attn_sm120 import warmup\nerror_of(warmup)\n"
    lines, _ = run(code, FAKE_DEVICES="0")
    assert lines == ["RuntimeError: there is no CUDA device to compile for: name an architecture"]


def test_float32_is_refused_before_any_launch(run):
    code = "q = np.zeros((1, 4, 1, 64), np.float32).view(CudaArray)\nerror_of(flash_attn_func, q, q, q)\n"
    lines, launches = run(code)
    assert lines[0].startswith("NotImplementedError: float32") and launches == []


CARDS = {
    "5090": ("NVIDIA GeForce RTX 5090", 120, 170, 96, 14001, 512),
    "PRO 6000": ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 120, 188, 128, 14001, 512),
    "GB10": ("NVIDIA GB10", 121, 48, 24, 0, 0),
}
PLANS = """
from flash_attn_sm120 import _C, explain, explain_backward
def tensor(seqlen, heads):
    return on_device(np.empty((1, seqlen, heads, 128), np.float16), 0)
def both(seqlen, heads):
    call = 3 * [tensor(seqlen, heads)]
    return explain(*call, num_splits=1), explain_backward(*call)
device = _C.devices()[1][0]
forward, backward = both(8192, 128)
print(device["sms"], device["l2_bytes"] >> 20, forward.reasons["class"])
print(forward.group_heads, backward.group_heads)
decoding = explain(tensor(1, 32), tensor(8192, 8), tensor(8192, 8))
short = both(512, 4)[1]
print(decoding.num_splits, decoding.blocks_per_sm, short.q_splits, short.blocks)
def taken(use, fields, rows, tile, **bounds):
    use([tuple((dict.fromkeys(fields, -1) | tile | bounds).values())])
    return ["use_" in both(own * sms, 1)[use is _C.use_backward_tiles].reasons["tile"] for sms in (48, 170, 188) for own in rows]
small = {"tile_n": 16, "sub_n": 16, "warps": 2, "warp_m": 16, "stages": 7, "kernel": 0, "producer": 0}
of_backward = {"head_dim": 256, "warps": 4, "warp_n": 16, "tile_m": 32, "sub_m": 16, "stages": 1}
print(taken(_C.use_tiles, _C.tile_fields(), (256, 257), small, rows_per_sm=256))
print(taken(_C.use_backward_tiles, _C.backward_tile_fields(), (256, 257), of_backward, keys_per_sm=256))
print(any(taken(_C.use_tiles, _C.tile_fields(), (256,), small, kind=2)), any(taken(_C.use_backward_tiles, _C.backward_tile_fields(), (256,), of_backward, kind=2)))
"""


@pytest.mark.parametrize("card", CARDS)
def test_plans_of_real_cards(run, card):
    """Multiprocessors, L2 and class are those of the device: parts and blocks fill it, heads share
    its L2, and rows of tiles serve it by what each multiprocessor has to do, and by its class."""
    name, arch, sms, l2_mb, mhz, bits = CARDS[card]
    figures = {"SMS": sms, "L2_MB": l2_mb, "MHZ": mhz, "BITS": bits, "ARCH": arch}
    environment = {f"FAKE_{figure}": str(value) for figure, value in figures.items()}
    lines, _ = run(PLANS, FAKE_NAME=name, **environment)
    kind = "GeForce-like" if card == "5090" else "PRO-like"
    assert lines[0] == f"{sms} {l2_mb} {kind}: by the name of the device"

    half = l2_mb << 19
    of_keys, of_queries = 8192 * 2 * 128 * 2, 8192 * (4 * 128 + 2 * 2 * 128)
    forward = max(heads for heads in (1, 2, 4, 8, 16) if heads <= half // of_keys)
    limit = max(half // of_queries, sms * 128 // 512)
    assert lines[1] == f"{forward} {math.ceil(128 / math.ceil(128 / limit))}"
    splits, blocks_per_sm, q_splits, blocks = map(int, lines[2].split())
    assert sms / 2 <= 8 * (splits + 1) and 8 * splits <= 3 * sms * blocks_per_sm
    assert q_splits > 1 and sms < 2 * blocks <= 4 * sms
    within = [rows * others <= 256 * sms for others in (48, 170, 188) for rows in (256, 257)]
    assert lines[3] == lines[4] == str(within)
    assert lines[5] == f"{kind == 'PRO-like'} {kind == 'PRO-like'}"
