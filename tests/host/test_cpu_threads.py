"""Calls on the CPU: how many threads they have, and that signals reach Python in the middle of one."""

import os
import sys

import pytest
import torch

from flash_attn_sm120 import explain, flash_attn_func
from helpers.children import run_python

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")


@pytest.fixture
def torch_threads():
    """torch_threads(n) sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def planned_threads():
    q = torch.zeros(1, 64, 2, 16)
    return explain(q, q, q).threads


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_torch_says_how_many_threads_there_are(torch_threads, count):
    torch_threads(count)
    assert planned_threads() == count


@pytest.mark.parametrize(
    "text, count",
    [("3", 3), ("5,2", 5), ("1", 1), ("100000", 256)],
)
def test_openmp_says_it_where_there_is_no_torch(monkeypatch, text, count):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert planned_threads() == count


@pytest.mark.parametrize("text", ["", "0", "-2", "many"])
def test_a_number_that_is_none_leaves_the_cores(monkeypatch, text):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    cores = planned_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert planned_threads() == cores == len(os.sched_getaffinity(0))


def test_an_error_of_torch_is_passed_on(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 / 0)
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ZeroDivisionError):
        flash_attn_func(q, q, q)


@pytest.mark.parametrize("causal", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(torch_threads, causal):
    inputs = [torch.randn(1, 100, heads, 24, requires_grad=True) for heads in (4, 2, 2)]
    results = []
    for count in (1, 2, 5):
        torch_threads(count)
        out, _ = flash_attn_func(*inputs, causal=causal)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# Calls that take hours; `signal_soon(number)` sends a signal to the process while one runs.
PREAMBLE = """
import os, signal, sys, threading, time
import torch
from flash_attn_sm120 import _C, flash_attn_func

signal.signal(signal.SIGINT, signal.default_int_handler)

def signal_soon(number=signal.SIGINT, times=1):
    def send():
        for _ in range(times):
            time.sleep(0.3)
            os.kill(os.getpid(), number)
    threading.Thread(target=send, daemon=True).start()

def tensor(seqlen, heads=8):
    return torch.zeros(256).expand(1, seqlen, heads, 256)

def many_tasks():
    flash_attn_func(tensor(1 << 20), tensor(1 << 20), tensor(1 << 20))

def few_queries_of_many_batches():
    q, k = torch.zeros(256).expand(1 << 20, 1, 1, 256), torch.zeros(256).expand(1 << 20, 4096, 1, 256)
    flash_attn_func(q, k, k)

def gradients():
    q, k = tensor(1 << 20, 1), tensor(64, 1)
    lse = torch.zeros(1).expand(1, 1, 1 << 20)
    _C.backward(q, q, k, k, q, lse, None)

def after(function):
    try:
        function()
    except BaseException as error:
        q = torch.zeros(1, 4, 1, 8)
        print(type(error).__name__, error, torch.equal(flash_attn_func(q, q, q)[0], q))
    else:
        print("not interrupted")
"""


@pytest.fixture
def lines(tmp_path):
    """lines(code, ...) -> what the code printed, in a process that is killed after a minute."""

    def run(code, **environment):
        done = run_python(PREAMBLE + code, tmp_path, timeout=60, **environment)
        assert done.returncode == 0, (done.returncode, done.stderr)
        return done.stdout.splitlines()

    return run


CALLS = ["many_tasks", "few_queries_of_many_batches", "gradients"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_ends_a_call(lines, call, threads):
    code = f"torch.set_num_threads({threads})\nsignal_soon()\nafter({call})\n"
    assert lines(code) == ["KeyboardInterrupt  True"]


@pytest.mark.parametrize("call", ["many_tasks", "gradients"])
def test_what_any_handler_raises_ends_a_call(lines, call):
    """As timeouts by SIGALRM do."""
    code = f"""
def handler(*_):
    raise TimeoutError("too long")
signal.signal(signal.SIGALRM, handler)
signal_soon(signal.SIGALRM)
after({call})
"""
    assert lines(code) == ["TimeoutError too long True"]


def test_a_handler_that_raises_nothing_runs_and_the_call_goes_on(lines):
    code = """
seen = []
def handler(*_):
    seen.append(1)
    if len(seen) == 3:
        raise KeyboardInterrupt
signal.signal(signal.SIGINT, handler)
signal_soon(times=3)
after(many_tasks)
print(len(seen))
"""
    assert lines(code) == ["KeyboardInterrupt  True", "3"]


def test_ctrl_c_while_the_last_task_of_another_thread_runs(lines):
    """The caller's thread has nothing left to do, and asks all the same."""
    code = """
torch.set_num_threads(2)
q, k = tensor(33, 1), tensor(1 << 22, 1)
signal_soon()
after(lambda: flash_attn_func(q, k, k, causal=False))
"""
    assert lines(code) == ["KeyboardInterrupt  True"]


def test_threads_of_python_run_beside_a_call(lines):
    """The GIL is released between looks at the signals."""
    code = """
count = 0
def count_up():
    global count
    while count < 1000:
        count += 1
        time.sleep(1e-4)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=count_up, daemon=True).start()
after(many_tasks)
print(count)
"""
    assert lines(code) == ["KeyboardInterrupt  True", "1000"]


def test_a_daemon_in_a_call_does_not_disturb_the_end_of_the_process(lines):
    code = """
threading.Thread(target=many_tasks, daemon=True).start()
time.sleep(0.3)
print("end")
"""
    assert lines(code) == ["end"]


@needs_proc
def test_as_many_threads_run_as_torch_says(lines):
    code = """
def count_threads():
    time.sleep(0.3)
    print(len(os.listdir("/proc/self/task")) - before)
    os.kill(os.getpid(), signal.SIGINT)
for count in (1, 4, 2):
    torch.set_num_threads(count)
    before = len(os.listdir("/proc/self/task"))
    threading.Thread(target=count_threads, daemon=True).start()
    after(many_tasks)
"""
    assert lines(code, OMP_NUM_THREADS="1") == [
        line for count in (1, 4, 2) for line in (str(count), "KeyboardInterrupt  True")
    ]
