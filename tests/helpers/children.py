"""Other processes for tests. Python is forked from one that has imported torch, which takes seconds."""

import multiprocessing
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["numpy", "torch"])


def _run(code, environment, outputs):
    os.environ.clear()
    os.environ.update(environment)
    for fd, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})


def run_python(code, directory, timeout=300, **environment):
    """What came of ``code``; its outputs go to files in ``directory``. The package is not imported yet."""
    outputs = [directory / "stdout", directory / "stderr"]
    for path in outputs:
        path.write_text("")
    arguments = (code, {**os.environ, **environment}, outputs)
    process = _processes.Process(target=_run, args=arguments, daemon=True)
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    return subprocess.CompletedProcess(
        code, process.exitcode, *(path.read_text() for path in outputs)
    )


def run_command(*command, cwd=None, timeout=600, **environment):
    """What came of a command."""
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# What the code of a rank begins with; DEVICE is set before.
BEGIN_RANK = """
import os
import torch
import torch.distributed as dist

torch.set_num_threads(1)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if DEVICE == "cuda":
    torch.cuda.set_device(rank)
dist.init_process_group(
    "nccl" if DEVICE == "cuda" else "gloo",
    init_method=os.environ["INIT"],
    rank=rank,
    world_size=size,
)
"""


def run_ranks(code, size, directory, timeout=300, **environment):
    """What came of ``code`` in each of ``size`` processes, which torch.distributed brings together
    through the environment variables of torchrun and a file store at INIT."""

    def run(rank):
        own = directory / f"rank{rank}"
        own.mkdir()
        ranks = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        where = {"INIT": f"file://{directory}/store", "GLOO_SOCKET_IFNAME": "lo"}
        return run_python(code, own, timeout, **ranks, **where, **environment)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
