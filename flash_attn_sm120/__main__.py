"""``python -m flash_attn_sm120 info | demo | check | warmup | tune``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flash_attn_sm120 import _C, __version__, cache, common_kernels, explain, flash_attn_func, jit
from flash_attn_sm120 import tune as tuner


def _devices() -> tuple[int, list[Any], str]:
    """The driver's version and devices, or none of them and the reason."""
    try:
        version, devices = _C.devices()
        return version, list(devices), "" if devices else "the driver has no device"
    except RuntimeError as error:
        return 0, [], str(error)


def _dotted(arch: int) -> str:
    return f"compute capability {arch // 10}.{arch % 10}"


def _compiler() -> str:
    """NVRTC's version, or why there is none."""
    try:
        return "NVRTC {}.{}".format(*jit.nvrtc_version())
    except RuntimeError as error:
        return str(error)


def _normal(
    device: str, dtype: torch.dtype, seqlen: int, heads: tuple[int, ...], head_dim: int
) -> list[torch.Tensor]:
    """Random tensors with a mean that is not zero, (1, seqlen, h, head_dim) for each h of heads."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(1, seqlen, h, head_dim, generator=generator, device=device).add_(0.5).to(dtype)
        for h in heads
    ]


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Plain PyTorch, every step in the dtype of the inputs, for seqlen_q == seqlen_k."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    scores = (q.transpose(1, 2) * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    if causal:
        visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


def _doubles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().double() for x in tensors]


def info() -> int:
    """What the machine offers and which path the common calls would take on it."""
    print(
        f"flash_attn_sm120 {__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}")
    version, devices, problem = _devices()
    print(f"driver: {f'CUDA {version // 1000}.{version % 1000 // 10}' if version else problem}")
    for i, device in enumerate(devices):
        arch, sms, smem = device["arch"], device["sms"], device["smem_per_block"] >> 10
        print(f"  cuda:{i} {device['name']}: {_dotted(arch)}, {sms} SMs, {smem} KB per block")
    print(f"compiler: {_compiler()}")
    print(f"kernel cache: {cache.directory()}")
    print(f"tuned tiles: {tuner.describe()}")
    settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith("FA_SM120_")}
    print(f"environment: {settings or 'no FA_SM120_ variable is set'}")
    for arch in sorted({device["arch"] for device in devices} or {120}):
        print(f"\ncommon calls on {_dotted(arch)}:")
        for plan in (*common_kernels.common_plans(arch), *common_kernels.decoding_plans(arch)):
            smem, parts = (plan.smem_bytes or 0) >> 10, plan.num_splits or 1
            split = f", keys in {parts} parts" if parts > 1 else ""
            print(f"  {plan.variant:52} tile {plan.tile_m} x {plan.tile_n}, {smem} KB{split}")
        print("gradients of common calls:")
        for backward in common_kernels.backward_plans(arch):
            smem, main = (backward.smem_bytes or 0) >> 10, backward.main
            name = main.variant if main else ""
            print(f"  {name:52} tile {backward.tile_m} x {backward.tile_n}, {smem} KB")
    return 0


def demo() -> int:
    """Attention of a Llama-3-8B layer on the best device there is, beside torch's."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    seqlen, dtype = (4096, torch.bfloat16) if on_gpu else (512, torch.float32)
    q, k, v = _normal(device, dtype, seqlen, (32, 8, 8), 128)
    print("causal attention, 32 query heads over 8 KV heads, head_dim 128,")
    print(f"seqlen {seqlen}, {dtype} on {device}\n")
    print(explain(q, k, v, causal=True), end="\n\n")
    out, _ = flash_attn_func(q, k, v, causal=True)
    reference = _attention(q.float(), k.float(), v.float(), causal=True)
    print(f"largest error against fp32: {(out - reference).abs().max().item():.2e}")
    if dtype != torch.float32:
        torch_error = (_attention(q, k, v, causal=True) - reference).abs().max().item()
        print(f"plain PyTorch in {dtype}:   {torch_error:.2e}")
    seconds = _seconds_per_call(lambda: flash_attn_func(q, k, v, causal=True), on_gpu)
    flops = 4 * 32 * seqlen * seqlen * 128 / 2
    print(f"{seconds * 1e3:.3f} ms per call, {flops / seconds / 1e12:.3g} TFLOPS")
    return 0


def _seconds_per_call(call: Callable[[], object], on_gpu: bool) -> float:
    """Mean over enough calls to fill a third of a second."""
    call()
    torch.cuda.synchronize() if on_gpu else None
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.3:
        for _ in range(10 if on_gpu else 1):
            call()
            calls += 1
        torch.cuda.synchronize() if on_gpu else None
    return (time.perf_counter() - start) / calls


CHECK_HEAD_DIMS = (64, 96, 128, 256)


def check() -> int:
    """A self-test against torch, to paste into a report. 0 where all is right."""
    info()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.float16, torch.bfloat16) + ((torch.float32,) if device == "cpu" else ())
    failures = 0
    print(f"\n{'check':44} {'error':>9} {'allowed':>9}")
    for dtype in dtypes:
        for head_dim in CHECK_HEAD_DIMS:
            for causal in (False, True):
                for seqlen in (1, 127, 512):
                    failures += not _check_forward(device, dtype, head_dim, seqlen, causal)
                failures += not _check_gradients(device, dtype, head_dim, 129, causal)
    print(f"\n{failures} failed" if failures else "\nall passed")
    return 1 if failures else 0


def _check_forward(
    device: str, dtype: torch.dtype, head_dim: int, seqlen: int, causal: bool
) -> bool:
    """Whether out keeps to the tolerance rule."""
    q, k, v = _normal(device, dtype, seqlen, (8, 2, 2), head_dim)
    reference = _attention(*_doubles(q, k, v), causal=causal)
    plain = _attention(q, k, v, causal=causal)
    out, _ = flash_attn_func(q, k, v, causal=causal)
    return _is_close(_case("out", q, causal), out, reference, plain)


def _check_gradients(
    device: str, dtype: torch.dtype, head_dim: int, seqlen: int, causal: bool
) -> bool:
    """Whether dq, dk and dv do, by autograd."""
    *inputs, dout = _normal(device, dtype, seqlen, (8, 2, 2, 8), head_dim)

    def gradients(attend: Callable[..., Any], tensors: list[torch.Tensor]) -> Any:
        leaves = [x.requires_grad_() for x in tensors]
        out = attend(*leaves)
        return torch.autograd.grad(out, leaves, dout.to(out.dtype))

    plainly = partial(_attention, causal=causal)
    ours = gradients(lambda q, k, v: flash_attn_func(q, k, v, causal=causal)[0], inputs)
    reference, plain = gradients(plainly, _doubles(*inputs)), gradients(plainly, inputs)
    passed = [
        _is_close(_case(name, inputs[0], causal), *each)
        for name, *each in zip(("dq", "dk", "dv"), ours, reference, plain, strict=True)
    ]
    return all(passed)


def _case(name: str, q: torch.Tensor, causal: bool) -> str:
    _, seqlen, _, head_dim = q.shape
    causal_or_not = " causal" if causal else ""
    return f"{name} {str(q.dtype)[6:]} head_dim {head_dim} seqlen {seqlen}{causal_or_not}"


def _is_close(
    name: str, result: torch.Tensor, reference: torch.Tensor, plain: torch.Tensor
) -> bool:
    """The tolerance rule, and a row of the table: twice plain PyTorch's error, plus rounding."""
    error = (result - reference).abs().max().item()
    rounding = (reference.float() + 0.3 - 0.3 - reference.float()).abs().max().item()
    allowed = 2 * (plain - reference).abs().max().item() + 2 * rounding
    passed = bool(error <= allowed)  # NaN is not
    print(f"{name:44} {error:9.2e} {allowed:9.2e} {'' if passed else 'FAILED'}")
    return passed


def warmup(arch: int | None) -> int:
    """Compiles the common kernels into the disk cache."""
    total = len(common_kernels.common_kernels(arch or 120))

    progress = partial(tqdm, total=total, unit="kernel")
    print(f"{common_kernels.warmup(arch, progress)} kernels are ready in {cache.directory()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flash_attn_sm120", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (info, demo, check, warmup):
        sub = commands.add_parser(command.__name__, help=(command.__doc__ or "").split("\n")[0])
        sub.set_defaults(run=command)
    commands.choices["warmup"].add_argument(
        "--arch",
        type=int,
        help="compute capability to compile for, say 120; default: the first GPU's",
    )
    prebuild = commands.add_parser(
        "prebuild", help="Writes the common kernels for a wheel to ship."
    )
    prebuild.add_argument("directory", type=Path)
    prebuild.add_argument("architectures", nargs="+", help="as NVRTC names them: sm_120f sm_90a")
    prebuild.set_defaults(run=common_kernels.prebuild)
    _add_tune(commands)
    return parser


def _add_tune(commands: Any) -> None:
    doc = "Measures which tiles are fastest on this GPU, and uses them from then on."
    tune = commands.add_parser("tune", help=doc, description=doc)
    tune.add_argument(
        "--head-dims",
        nargs="+",
        type=_head_dims,
        metavar="D[,DV]",
        help="say 128 192,128; default: the common ones",
    )
    tune.add_argument("--quick", action="store_true", help="try fewer tiles")
    tune.add_argument(
        "--output", type=Path, help="directory of measurements and table; default: in the cache"
    )
    instead = tune.add_mutually_exclusive_group()
    instead.add_argument(
        "--show",
        dest="show_table",
        action="store_true",
        help="print the table in use, and how to contribute it",
    )
    instead.add_argument(
        "--reset", dest="remove_table", action="store_true", help="remove the table in use"
    )
    tune.set_defaults(run=tuner.command)


def _head_dims(text: str) -> tuple[int, int]:
    """ "192,128" -> (192, 128), "128" -> (128, 128)."""
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) > 2 or any(n % 8 or not 8 <= n <= 256 for n in numbers):
        raise argparse.ArgumentTypeError(f"head dims are multiples of 8 from 8 to 256, got {text}")
    return numbers[0], numbers[-1]


def main(argv: list[str] | None = None) -> int:
    arguments = vars(_parser().parse_args(argv))
    del arguments["command"]
    run = arguments.pop("run")
    return int(run(**arguments) or 0)


if __name__ == "__main__":
    sys.exit(main())
