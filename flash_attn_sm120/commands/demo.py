"""Run one attention layer of Llama 3 8B here: how it runs, how exact it is, how fast it is."""

from __future__ import annotations

import argparse

import torch

from flash_attn_sm120 import _measure, explain, flash_attn_func
from flash_attn_sm120.commands import inputs

HEADS_Q, HEADS_KV, HEAD_DIM = 32, 8, 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    seqlen, dtype = (4096, torch.bfloat16) if on_gpu else (512, torch.float32)
    q, k, v = inputs.normal(device, dtype, seqlen, (HEADS_Q, HEADS_KV, HEADS_KV), HEAD_DIM)
    print(f"causal attention, {HEADS_Q} query heads, {HEADS_KV} KV heads, head_dim {HEAD_DIM},")
    print(f"seqlen {seqlen}, {dtype} on {device}\n")
    print(explain(q, k, v, causal=True), end="\n\n")
    out, _ = flash_attn_func(q, k, v, causal=True)
    reference = inputs.plain(q.float(), k.float(), v.float(), causal=True)
    print(f"largest error against fp32: {_measure.max_error(out, reference).item():.2e}")
    if dtype != torch.float32:
        plain = inputs.plain(q, k, v, causal=True)
        error = _measure.max_error(plain, reference).item()
        print(f"plain PyTorch in {dtype}:   {error:.2e}")
    ms = _ms_per_call(device, q, k, v)
    flops = 4 * HEADS_Q * seqlen * seqlen * HEAD_DIM / 2
    print(f"{ms:.3f} ms per call, {flops / ms * 1e-9:.3g} TFLOPS")
    return 0


def _ms_per_call(device: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """The median over a third of a second, with a cold L2."""
    call = _measure.Timed("ours", lambda: flash_attn_func(q, k, v, causal=True))
    rounds = max(3, round(330 / _measure.soak([call], device, 0.3)))
    flush = _measure.flush_buffer(device, 256 << 20)
    (samples,) = _measure.round_robin([call], device, rounds, flush)
    return _measure.Timing.of(samples).ms
