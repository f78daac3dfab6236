"""Lengths of packed sequences that make no sense: kernels stay within the tensors, and end."""

import random

import pytest
import torch

from emulator import EmulatedTensor, emulator
from flash_attn_sm120 import _C
from helpers.tiles import LARGE_TILES, use_tiles

TOTAL_Q, TOTAL_K, BATCH = 300, 210, 4
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)

# Of both sides, unless a side is named.
GARBAGE = {
    "decreasing": {"cu_seqlens": [150, 90, 60, 20, 0]},
    "in and out of order": {"cu_seqlens": [0, 100, 30, 120, 60]},
    "negative": {"cu_seqlens": [-5, -1, 40, -70, 90]},
    "beyond the total": {"cu_seqlens": [0, 70, 1000, 2000, 3000]},
    "all beyond it": {"cu_seqlens": [400, 401, 402, 403, 404]},
    "the largest and smallest numbers": {"cu_seqlens": [INT_MIN, INT_MAX, INT_MIN, INT_MAX, 7]},
    "late begin": {"cu_seqlens": [160, 170, 170, 190, 200]},
    "the same rows twice": {"cu_seqlens": [0, 300, 0, 300, 300]},
    "negative seqused": {"cu_seqlens": [0, 30, 60, 90, 120], "seqused": [-1, INT_MIN, 5, 30]},
    "more used than there is": {"cu_seqlens": [0, 30, 60, 90, 120], "seqused": [31, INT_MAX, 500, 0]},
    "sides that do not fit": {
        "cu_seqlens_q": [0, 300, 300, 300, 300],
        "cu_seqlens_k": [210, 0, 0, 0, 210],
    },
}  # fmt: skip

RESULTS = ("out", "lse", "dq", "dk", "dv", "dsink")

CALLS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (40, 10)},
    "splits": {"num_splits": 3, "causal": True},
    "packed": {"pack_gqa": True, "causal": True},
    "sink": {"learnable_sink": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "deterministic": {"deterministic": True, "causal": True},
}


def place(x):
    return x.as_subclass(EmulatedTensor)


def lengths_of(garbage):
    both = [f"{name}_{side}" for name in ("cu_seqlens", "seqused") for side in "qk"]
    return {
        name: place(torch.tensor(garbage.get(name, garbage.get(name[:-2])), dtype=torch.int32))
        for name in both
        if name in garbage or name[:-2] in garbage
    }


def inputs(head_dim=64, heads=4, heads_kv=2):
    torch.manual_seed(0)
    shapes = [(TOTAL_Q, heads, head_dim), *[(TOTAL_K, heads_kv, head_dim)] * 2]
    return [place(torch.randn(shape).bfloat16()) for shape in shapes]


def run(lengths, options, tiles=(), hidden=0, **bounds):
    """out, lse and the gradients of a call past the Python that checks lengths where it can.

    The first `hidden` rows, which no sequence has, hold NaN, and their lse anything.
    """
    q, k, v = inputs()
    q[:hidden] = torch.nan
    options = {name: place(x) if name == "learnable_sink" else x for name, x in options.items()}
    options |= lengths | bounds
    with use_tiles(*tiles):
        out, lse = _C.forward(q, k, v, return_lse=True, **options)
        dout = place(torch.ones_like(out))
        dout[:hidden] = torch.nan
        lse[:, :hidden] = 0.0
        gradients = _C.backward(dout, q, k, v, out, lse, None, **options)
    return [out, lse, *gradients]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_stays_within_the_tensors(garbage, call):
    tiles = LARGE_TILES if (list(GARBAGE).index(garbage) + list(CALLS).index(call)) % 2 else ()
    run(lengths_of(GARBAGE[garbage]), CALLS[call], tiles)


@pytest.mark.parametrize("seed", range(8))
def test_random_garbage(seed):
    draw = random.Random(seed)

    def number():
        return draw.choice([draw.randint(-10, 220), draw.randint(-10, 220), INT_MIN, INT_MAX])

    garbage = {f"cu_seqlens_{side}": [number() for _ in range(BATCH + 1)] for side in "qk"}
    garbage |= {
        f"seqused_{side}": [number() for _ in range(BATCH)] for side in draw.choice(["", "q", "qk"])
    }
    bounds = {
        f"max_seqlen_{side}": draw.randint(1, 100) for side in draw.choice(["", "q", "k", "qk"])
    }
    options = CALLS[draw.choice(list(CALLS))]
    with emulator().settings(seed=seed, late_copies=seed % 2):
        run(lengths_of(garbage), options, (), **bounds)


def test_results_of_good_lengths_do_not_depend_on_the_schedule():
    good = lengths_of({"cu_seqlens": [0, 70, 70, 71, 150], "seqused": [60, 0, 1, 79]})
    options = {"causal": True, "deterministic": True, "learnable_sink": torch.zeros(4)}
    results = []
    for seed in range(3):
        with emulator().settings(seed=seed, late_copies=seed % 2):
            results.append(run(good, options))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_tiles_before_the_first_sequence_add_nothing():
    """Of a sink's gradient, which sums over all tiles."""
    lengths = lengths_of(
        {"cu_seqlens_q": [140, 150, 150, 170, 300], "cu_seqlens_k": [0, 9, 9, 60, 200]}
    )
    results = [run(lengths, CALLS["sink"], hidden=hidden) for hidden in (0, 140)]
    for name, x, y in zip(RESULTS, *results, strict=True):
        assert torch.equal(x, y) or name == "lse", name


def test_no_sequences():
    """All rows are no sequence's."""
    lengths = {f"cu_seqlens_{side}": place(torch.zeros(1, dtype=torch.int32)) for side in "qk"}
    out, lse, *gradients = run(lengths, {})
    assert (
        not out.any()
        and (lse == -torch.inf).all()
        and not any(x.any() for x in gradients if x is not None)
    )
