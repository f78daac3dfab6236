"""Mods that people write."""

import math

import torch

from flash_attn_sm120 import _C
from flash_attn_sm120.mods import attention
from flash_attn_sm120.mods.call import Call
from flash_attn_sm120.mods.capture import captured_by

SEQLEN = 150  # that tables have room for


def tensors_of(device, heads=4, seqlen=SEQLEN):
    """What the mods capture, on a device."""
    place = device.place
    return {
        "slopes": place(2.0 ** -torch.arange(1.0, heads + 1)),
        "table": place(torch.randn(heads, 2 * SEQLEN)),
        "bias": place(torch.randn(heads, SEQLEN, SEQLEN)),
        "half": place(torch.randn(SEQLEN).bfloat16()),
        "document": place(torch.arange(SEQLEN) // 37),
        "kind": place(torch.arange(SEQLEN, dtype=torch.int32) % 3),
        "offsets": place(torch.tensor([0, 40, 100, 150])),
        "padding": place(torch.arange(SEQLEN) % 7 != 3),
        "temperature": place(torch.tensor(0.7)),
        "prefix": place(torch.tensor([30, 90], dtype=torch.int32)),
    }


def t5(table):
    def score_mod(s, b, h, q, k):
        distance = torch.clamp(q - k, min=0)
        far = 8 + (torch.log(distance.float() / 8 + 1e-6) / math.log(16) * 8).to(torch.int32)
        return s + table[h, torch.where(distance < 8, distance, torch.clamp(far, 0, 15))]

    return score_mod


def _nested(bias, h, q, k):
    """Index by index; of the oracle's grids at once."""
    return bias[h, q, k] if h.dim() else bias[h][q][k]


def score_mods(x):
    """name -> score_mod over the tensors `x` of tensors_of()."""
    return {
        "alibi": lambda s, b, h, q, k: s + x["slopes"][h] * (k - q),
        "relative": lambda s, b, h, q, k: s + x["table"][h, q - k + SEQLEN],
        "bias": lambda s, b, h, q, k: s + _nested(x["bias"], h, q, k),
        "half": lambda s, b, h, q, k: s + x["half"][k] * 0.5,
        "cap": lambda s, b, h, q, k: 2 * torch.tanh(s / 2),
        "t5": t5(x["table"]),
        "temperature": lambda s, b, h, q, k: s * x["temperature"],
        "squared": lambda s, b, h, q, k: s * s.abs() + s**2 / 4,
        # torch's derivatives of these change numbers in place.
        "minimum": lambda s, b, h, q, k: (
            torch.minimum(s, 0.3 - s) + torch.maximum(s * 0.5, 0.1 * s)
        ),
        "gelu": lambda s, b, h, q, k: torch.nn.functional.gelu(s) - torch.sigmoid(s),
        "causal": lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
        # The kernel goes from the last key to the first: scores that rise within a tile beyond what
        # a sum holds, or less, and rows whose first key comes late, and is far from 0.
        "grows": lambda s, b, h, q, k: s + (SEQLEN - k) * 3.0,
        "rises": lambda s, b, h, q, k: s + (SEQLEN - k) * 0.5,
        "late_low": lambda s, b, h, q, k: torch.where(k < 60, s - 200.0, -float("inf")),
        "late_high": lambda s, b, h, q, k: torch.where(k < 60, s + 200.0, -float("inf")),
    }


def mask_mods(x):
    document, offsets = x["document"], x["offsets"]
    return {
        "causal": lambda b, h, q, k: q >= k,
        "sliding": lambda b, h, q, k: (q >= k) & (q - k <= 40),
        "document": lambda b, h, q, k: (document[q] == document[k]) & (q >= k),
        "prefix": lambda b, h, q, k: (k <= x["prefix"][b]) | (q >= k),
        "natten": lambda b, h, q, k: (
            ((q // 16 - k // 16).abs() <= 2) & ((q % 16 - k % 16).abs() <= 3)
        ),
        "padding": lambda b, h, q, k: x["padding"][k],
        "dilated": lambda b, h, q, k: (q - k) % 3 == 0,
        "kinds": lambda b, h, q, k: (x["kind"][q] != x["kind"][k]) | (h < 2),
        "jagged": lambda b, h, q, k: offsets[document[q].clamp(max=2)] <= k,
        "nothing": lambda b, h, q, k: (q < 20) & (k > 100) & ~(h == 1),
    }


def gradients(q, k, v, dout, mod, wanted=(), **options):
    """dq, dk, dv, and those of what a score_mod captures that are wanted; by _C, on any device but
    the CPU."""
    found = {name: captured_by(f, None) for name, f in mod.items()}
    forward = {name: attention.translate(name, f, *found[name]) for name, f in mod.items()}
    joint = {name: attention.translate(name, f, *found[name], True) for name, f in mod.items()}
    out, lse = _C.forward(q, k, v, return_lse=True, **forward, **options)
    captured = joint["score_mod"][1] if "score_mod" in joint else ()
    wants = [any(x is w for w in wanted) for x in captured]
    others = {name: x for name, x in options.items() if name != "learnable_sink"}
    call = Call(q, k, v, options.get("learnable_sink"), {}, others)
    dqkv, of_captured = attention.run_backward(joint, call, dout, None, out, lse, wants)
    by_id = {id(x): g for x, g in zip(captured, of_captured, strict=True)}
    return [*dqkv[:3], *(by_id[id(x)] for x in wanted)]
