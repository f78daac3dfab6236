"""Another revision of this project beside this one, in one process: the same bits, the same speed?

    git worktree add /tmp/other REVISION
    FA_SM120_LIMITS=120 python benchmarks/versus.py /tmp/other

Builds the other checkout under another name, compares the results of random calls bit by bit
(gradients with deterministic=True), then times forward, backward and the host's part of a call,
round-robin. A ratio above 1 means that this checkout is faster.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import grid
import harness
import torch

import flash_attn_sm120

OTHER = "flash_attn_other"  # the name under which the other checkout is imported
ROUNDS = 20


def build(checkout: Path) -> ModuleType:
    """The package of another checkout, built and imported as OTHER."""
    root = Path(tempfile.mkdtemp(prefix="versus-"))
    for name in ("csrc", "kernels", "flash_attn_sm120", "setup.py", "pyproject.toml"):
        source = checkout / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, root / name.replace("flash_attn_sm120", OTHER))
    for path in (*root.rglob("*.py"), *root.rglob("*.[ch]"), *root.rglob("*.toml")):
        path.write_text(path.read_text().replace("flash_attn_sm120", OTHER))
    for path in root.rglob("*.so"):
        path.unlink()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=root, check=True)
    sys.path.insert(0, str(root))
    return importlib.import_module(OTHER)


# ---- bits ----------------------------------------------------------------------------------------

OPTIONS = (
    {},
    {"causal": True},
    {"window_size": (100, 20)},
    {"window_size": (None, -7)},
    {"causal": True, "softcap": 20.0},
    {"num_splits": 3},
    {"pack_gqa": True, "num_splits": 1},
)
HEAD_DIMS = ((64, 64), (128, 128), (96, 96), (192, 128), (256, 256), (40, 72))
HEADS = ((8, 8), (8, 2), (6, 1))
SEQLENS = ((1, 700), (129, 129), (300, 500), (511, 64), (1024, 1024), (64, 2049))


def calls(count: int) -> Iterator[tuple[list[torch.Tensor], dict[str, Any]]]:
    """Random calls, the same in every run: ([q, k, v, sink], options)."""
    draw, generator = random.Random(0), torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).add_(0.3).to(dtype)

    every = list(itertools.product(HEAD_DIMS, OPTIONS))
    for i in range(count):
        (dim, dim_v), options = every[i % len(every)]
        heads, seqlens = draw.choice(HEADS), draw.choice(SEQLENS)
        batch = draw.choice((1, 2, 5))
        dtype = torch.bfloat16 if i % 3 else torch.float16
        shapes = ((seqlens[0], heads[0], dim), (seqlens[1], heads[1], dim))
        q, k = (randn(batch, *shape, dtype=dtype) for shape in shapes)
        v = randn(batch, seqlens[1], heads[1], dim_v, dtype=dtype)
        sink = {"learnable_sink": randn(heads[0], dtype=torch.float32)} if i % 4 == 0 else {}
        yield [q, k, v], {**options, **sink}


def results(package: ModuleType, qkv: list[torch.Tensor], options: dict[str, Any]) -> list:
    """out, lse and the gradients of q, k, v (and the sink) of a call."""
    inputs = [x.detach().requires_grad_() for x in qkv]
    options = {
        n: x.detach().requires_grad_() if n == "learnable_sink" else x for n, x in options.items()
    }
    out, lse = package.flash_attn_func(*inputs, **options, deterministic=True, return_lse=True)
    wanted = [*inputs, options["learnable_sink"]] if "learnable_sink" in options else inputs
    factor = torch.linspace(-1, 1, out.numel(), device="cuda").reshape(out.shape).to(out.dtype)
    gradients = torch.autograd.grad([out, lse], wanted, [factor, torch.ones_like(lse)])
    return [out, lse, *gradients]


def compile_ahead(package: ModuleType, count: int) -> None:
    """All kernels of the calls, over all cores."""
    kernels = set()
    for qkv, options in calls(count):
        both = {n: x for n, x in options.items() if n not in ("num_splits", "pack_gqa")}
        kernels |= set(package.explain(*qkv, **options).kernels)
        kernels |= set(package.explain_backward(*qkv, **both, deterministic=True).kernels)
    version, devices = package._C.devices()
    compile_one = functools.partial(_compile, package, devices[0]["arch"], version)
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, kernels))


def _compile(package: ModuleType, arch: int, version: int, kernel: Any) -> None:
    importlib.import_module(package.__name__ + ".jit").compile(*kernel, arch, version)


def compare_bits(other: ModuleType, count: int) -> int:
    """How many of the calls differ in any bit; names the first few."""
    different = 0
    for i, (qkv, options) in enumerate(calls(count)):
        pairs = zip(
            results(flash_attn_sm120, qkv, options), results(other, qkv, options), strict=True
        )
        if not all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs):
            different += 1
            if different <= 5:
                print(f"call {i} differs: {[tuple(x.shape) for x in qkv]}, {[*options]}")
    return different


# ---- times ---------------------------------------------------------------------------------------


def contestants(
    packages: dict[str, ModuleType], problem: harness.Problem, backward: bool
) -> list[harness.Contestant]:
    """The forward, or the backward alone, of each package."""

    def forward(package: ModuleType) -> torch.Tensor:
        q, k, v = problem.q, problem.k, problem.v
        return package.flash_attn_func(q, k, v, causal=problem.causal)[0]

    def backward_of(package: ModuleType) -> Callable[[], Any]:
        inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        out, _ = package.flash_attn_func(*inputs, causal=problem.causal)
        dout = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

    return [
        harness.Contestant(
            name,
            backward_of(package) if backward else functools.partial(forward, package),
            functools.partial(head_start, problem.q),
        )
        for name, package in packages.items()
    ]


@contextmanager
def head_start(x: torch.Tensor) -> Iterator[None]:
    """Keeps the GPU busy for a millisecond before a call: autograd takes the host longer than the
    write of the L2 takes the GPU, and would be timed with short calls."""
    if x.is_cuda:
        torch.cuda._sleep(2_000_000)  # cycles
    yield


def compare_times(
    packages: dict[str, ModuleType], name: str, backward: bool, device: str = "cuda"
) -> None:
    """The geomean and the extremes of other / this over a grid."""
    ratios = {}
    for cell in (cell for part in grid.GRIDS[name] for cell in part.cells()):
        label = f"{cell.fields['presets'][0]} S {cell.seqlen}{' causal' if cell.causal else ''}"
        problem = cell.problem(device)
        entrants = contestants(packages, problem, backward)
        timings, absent = harness.time_interleaved(entrants, device, ROUNDS)
        for package, reason in absent.items():
            print(f"{label}: {package} is absent: {reason}")
        if not absent:
            this, other = (timings[n].ms for n in packages)
            ratios[label] = other / this
    ordered = sorted(ratios.items(), key=lambda item: item[1])
    print(
        f"\n{'backward' if backward else 'forward'}, {len(ratios)} cells of {name}, other / this:"
    )
    print(f"  geomean {statistics.geometric_mean(ratios.values()):.4f}")
    for label, ratio in (*ordered[:4], ordered[-1]):
        print(f"  {ratio:.3f} {label}")


def host_times(packages: dict[str, ModuleType]) -> None:
    """Microseconds of the host for a call that the GPU hardly notices."""
    q = torch.randn(1, 64, 1, 64, device="cuda", dtype=torch.bfloat16)
    samples: dict[str, list[float]] = {name: [] for name in packages}
    for _ in range(40):
        for name, package in packages.items():
            call = functools.partial(package.flash_attn_func, q, q, q, causal=True)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(200):
                call()
            samples[name].append((time.perf_counter() - begin) / 200 * 1e6)
    print("\nhost time of a call, us:")
    for name, times in samples.items():
        print(f"  {name:6} {statistics.median(times):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of the other revision")
    parser.add_argument("--calls", type=int, default=300, help="random calls compared bit by bit")
    parser.add_argument("--no-times", action="store_true", help="bits alone")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: both revisions are measured on one")
    packages = {"this": flash_attn_sm120, "other": build(args.checkout)}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for package in packages.values():
        compile_ahead(package, args.calls)
    different = compare_bits(packages["other"], args.calls)
    print(f"{args.calls} calls and their gradients: {different} differ")
    if not args.no_times:
        with torch.no_grad():
            compare_times(packages, "shapes", backward=False)
            host_times(packages)
        compare_times(packages, "training", backward=True)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
