"""Explain how a call of some shape would run, and why. Needs no GPU.

For example, decoding with Llama 3 8B on an RTX 5090:

    python -m flash_attn_sm120 explain --seqlen 1 --seqlen-k 8192 --heads 32 --heads-kv 8 --arch 120

With --packed, --seqlen and --seqlen-k are what the lengths of the sequences are at most.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch

from flash_attn_sm120 import _C, cards
from flash_attn_sm120.commands.info import dotted
from flash_attn_sm120.plan import Plan, explain, explain_backward
from flash_attn_sm120.quantized import RECIPES, explain_quantized

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=4096, help="queries of each (%(default)s)")
    parser.add_argument("--seqlen-k", type=int, help="keys of each (as many as queries)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (%(default)s)")
    parser.add_argument("--heads-kv", type=int, help="KV heads (as many as query heads)")
    parser.add_argument("--head-dim", type=int, default=128, help="of Q and K (%(default)s)")
    parser.add_argument("--head-dim-v", type=int, help="of V (that of Q and K)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(%(default)s)")
    parser.add_argument("--causal", action="store_true", help="a query sees no later key")
    parser.add_argument(
        "--window",
        nargs=2,
        type=_bound,
        default=(None, None),
        metavar=("LEFT", "RIGHT"),
        help="keys that a query sees on either side of it; none: all",
    )
    parser.add_argument("--softcap", type=float, default=0.0, help="bound of the scores; 0: none")
    parser.add_argument("--sink", action="store_true", help="with a learnable sink")
    parser.add_argument("--num-splits", type=int, default=0, help="of the keys; 0: as many as pay")
    parser.add_argument(
        "--packed", action="store_true", help="sequences of any lengths, one after the other"
    )
    parser.add_argument("--page-size", type=int, help="K and V in pages of so many keys")
    parser.add_argument("--recipe", choices=RECIPES, help="by quantized_attention, in 8 or 4 bits")
    parser.add_argument("--backward", action="store_true", help="the gradients, not the forward")
    parser.add_argument("--deterministic", action="store_true", help="of the gradients")
    parser.add_argument(
        "--arch",
        type=int,
        help="compute capability, for example 120; default: that of the GPU, 120 without one",
    )


def _bound(text: str) -> int | None:
    return None if text == "none" else int(text)


def run(arguments: argparse.Namespace) -> int:
    a = arguments
    on_gpu = a.arch is None and torch.cuda.is_available()
    arch = None if on_gpu else a.arch or 120
    heads_kv, seqlen_k = a.heads_kv or a.heads, a.seqlen_k or a.seqlen
    of_batch = (lambda rows: (a.batch * rows,)) if a.packed else (lambda rows: (a.batch, rows))
    pages = -(-seqlen_k // a.page_size) if a.page_size else 0  # of a sequence
    keys = (a.batch * pages, a.page_size) if pages else of_batch(seqlen_k)
    shapes = {
        "q": (*of_batch(a.seqlen), a.heads, a.head_dim),
        "k": (*keys, heads_kv, a.head_dim),
        "v": (*keys, heads_kv, a.head_dim_v or a.head_dim),
    }
    make = functools.partial(torch.empty, dtype=DTYPES[a.dtype], device="cuda" if on_gpu else "cpu")
    lengths: dict[str, Any] = {}
    if a.packed:
        ends = make(a.batch + 1, dtype=torch.int32)
        lengths = {"cu_seqlens_q": ends, "max_seqlen_q": a.seqlen, "max_seqlen_k": seqlen_k}
        lengths |= {} if pages else {"cu_seqlens_k": ends}
    if pages:
        lengths["page_table"] = make((a.batch, pages), dtype=torch.int32)
        lengths["seqused_k"] = make(a.batch, dtype=torch.int32)
    of_direction = explain_backward if a.backward else explain
    if a.recipe:
        of_direction = functools.partial(explain_quantized, recipe=a.recipe)
    try:
        if a.recipe and a.backward:
            raise NotImplementedError(f"recipe {a.recipe!r} has no backward")
        plan = of_direction(
            *map(make, shapes.values()),
            arch=arch,
            causal=a.causal,
            window_size=a.window,
            softcap=a.softcap,
            learnable_sink=make(a.heads) if a.sink else None,
            num_splits=a.num_splits,
            deterministic=a.deterministic,
            **lengths,
        )
    except (ValueError, NotImplementedError) as error:  # of what the command line asks for
        raise RuntimeError(str(error)) from error
    described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    print(f"{described}, {a.dtype}")
    device = dotted(arch) if arch else torch.cuda.get_device_name()
    print(f"on {device}{_planned_for(plan, arch)}\n\n{plan}")
    return 0


def _planned_for(plan: Plan, arch: int | None) -> str:
    """What stands for an architecture; of a device, its reasons say which class it is of."""
    sms = _C.device_of_arch(arch)["sms"] if arch else 0
    example = next((card for card in cards.CARDS if card.sms == sms), None)
    kind = plan.reasons.get("class", "").partition(":")[0]
    return f", planned for {example.sms} SMs: {kind}" if example else ""
