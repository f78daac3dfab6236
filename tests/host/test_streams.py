"""What a launch shares with the rest of a process: streams, graphs, threads, devices, forks, memory."""

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flash_attn_sm120 import explain, flash_attn_func
from helpers.children import run_command
from helpers.tiles import KERNELS, tile_row, use_tiles

pytestmark = pytest.mark.usefixtures("cuda")

SLOW = 50_000_000  # clocks that a stream sleeps: long after every host call has returned


def qkv(seqlen=256, heads=4, head_dim=64, device="cuda"):
    shape = (1, seqlen, heads, head_dim)
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3)]


def test_work_goes_to_the_current_stream():
    """The inputs are only written on a busy side stream: any other stream would read the old ones."""
    q, k, v = qkv()
    expected, _ = flash_attn_func(q, k, v)
    late = [torch.zeros_like(x) for x in (q, k, v)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLOW)
        for x, source in zip(late, (q, k, v), strict=True):
            x.copy_(source)
        out, _ = flash_attn_func(*late)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_no_call_waits_for_the_gpu():
    q, k, v = qkv()
    flash_attn_func(q, k, v)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLOW)
    slept = torch.cuda.Event()
    slept.record()
    flash_attn_func(q, k, v, return_lse=True)
    assert not slept.query(), "the call returned while the stream was still asleep"


def test_outputs_are_the_caching_allocators():
    """record_stream() must keep an output from being reused while another stream reads it."""
    q, k, v = qkv(4096)
    out, _ = flash_attn_func(q, k, v)
    expected = out.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLOW)
        copy = torch.empty_like(out)
        copy.copy_(out)
        out.record_stream(side)
    del out
    for _ in range(8):
        torch.empty_like(expected).fill_(7)
    torch.cuda.synchronize()
    assert torch.equal(copy, expected)


def test_graph_capture_and_replay():
    q, k, v = qkv()
    flash_attn_func(q, k, v, causal=True, return_lse=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    for _ in range(3):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        expected, expected_lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_capture_of_a_kernel_that_is_not_loaded():
    """Says what to do; the capture can go on, and so can the process."""
    q, k, v = qkv(head_dim=56)  # no other test uses it
    graph = torch.cuda.CUDAGraph()
    kept = torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="run the same call once before the capture"):
            flash_attn_func(q, k, v)
        kept.add_(1)
    graph.replay()
    assert kept.item() == 1
    flash_attn_func(q, k, v)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        flash_attn_func(q, k, v)


def test_threads_on_streams_of_their_own():
    inputs = [qkv(seqlen) for seqlen in (64, 100, 256, 300)]
    expected = [flash_attn_func(*x, causal=True)[0] for x in inputs]

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            outs = [flash_attn_func(*inputs[i], causal=True)[0] for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(out, expected[i]) for out in outs)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, [0, 1, 2, 3] * 4))


def test_a_thread_that_never_used_cuda():
    """Such a thread has no current context: the launch brings its own, and leaves none behind."""
    q, k, v = qkv()
    expected, _ = flash_attn_func(q, k, v)
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(lambda: flash_attn_func(q, k, v)[0]).result()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
def test_tensors_decide_the_device():
    first, second = qkv(device="cuda:0"), qkv(device="cuda:1")
    with torch.cuda.device(0):
        out, _ = flash_attn_func(*second)
        assert out.device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
    moved, _ = flash_attn_func(*(x.to("cuda:0") for x in second))
    assert torch.equal(out.to("cuda:0"), moved)
    with pytest.raises(ValueError, match="k must be on q's device, cuda:0, got cuda:1"):
        flash_attn_func(first[0], second[1], first[2])
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(flash_attn_func, *x) for x in (first, second) for _ in range(20)]
        outs = [future.result()[0] for future in futures]
    assert all(torch.equal(x.to("cuda:0"), moved) for x in outs[20:])


@two_gpus
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_second_gpu_computes_the_same(kernel):
    """By cp.async and by the TMA, split or not, and gradients, from autograd's threads too."""

    def results(device):
        torch.manual_seed(0)
        inputs = qkv(seqlen=300, device=device)
        plan = explain(*inputs, causal=True, num_splits=3)
        with use_tiles(tile_row(plan, kernel=kernel, producer="thread")):
            parts, _ = flash_attn_func(*inputs, causal=True, num_splits=3)
            leaves = [x.requires_grad_() for x in inputs]
            out, _ = flash_attn_func(*leaves, causal=True, deterministic=True)
        out.backward(torch.ones_like(out))
        return [x.cpu() for x in (parts, out, *(leaf.grad for leaf in leaves))]

    with torch.cuda.device(0):
        first, second = results("cuda:0"), results("cuda:1")
        assert torch.cuda.current_device() == 0
    assert all(map(torch.equal, first, second))


def test_fork_after_cuda_is_explained():
    code = """
import os, torch
from flash_attn_sm120 import flash_attn_func
q = torch.randn(1, 8, 1, 64, device="cuda", dtype=torch.float16)
flash_attn_func(q, q, q)
torch.cuda.synchronize()
child = os.fork()
if not child:
    try:
        flash_attn_func(q, q, q)
    except RuntimeError as error:
        os._exit(0 if "fork" in str(error) or "CUDA" in str(error) else 1)
    os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_command(sys.executable, "-c", code, timeout=120)
    assert done.stdout.strip() == "0", done.stderr


def test_memcheck():
    """compute-sanitizer finds no access out of bounds, with every tensor in an allocation of its own."""
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer:
        pytest.skip("needs compute-sanitizer")
    code = """
import os, torch
from flash_attn_sm120 import flash_attn_func
for head_dim, head_dim_v in ((64, 64), (96, 96), (128, 128), (40, 72), (192, 128), (256, 256)):
    for seqlen_q, seqlen_k in ((1, 1), (65, 129), (129, 33), (7, 0)):
        for options in ({}, {"causal": True}, {"window_size": (20, 10)}):
            q = torch.randn(1, seqlen_q, 2, head_dim, device="cuda", dtype=torch.bfloat16)
            k = torch.randn(1, seqlen_k, 1, head_dim, device="cuda", dtype=torch.bfloat16)
            v = torch.randn(1, seqlen_k, 1, head_dim_v, device="cuda", dtype=torch.bfloat16)
            flash_attn_func(q, k, v, return_lse=True, **options)
torch.cuda.synchronize()
print("ran")
"""
    memcheck = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9"]
    command = [*memcheck, sys.executable, "-c", code]
    done = run_command(*command, timeout=500, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0 and "ran" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
