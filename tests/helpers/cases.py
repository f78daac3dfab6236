"""The cases that the tests of the forward and of the backward go through: sizes, masks, options, numbers.

Lists of cases are in capitals. Decorators that make a test of each have small letters, and are named
after the argument that the test takes.
"""

import math

import pytest
import torch

from helpers.reference import visible_keys
from helpers.shapes import EVERY_HEAD_DIM

# ---- sizes ---------------------------------------------------------------------------------------

# Lengths around the edges of every tile there may be.
EDGES = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 257]

# MHA, GQA with 2, 4 and 7 query heads per KV head, MQA
HEADS = [(3, 3), (4, 2), (8, 2), (14, 2), (5, 1)]

HEAD_DIMS = [(d, d) for d in (8, 40, 64, 72, 80, 96, 128, 136, 200, 256)]
HEAD_DIMS += [(64, 128), (128, 64), (192, 128), (8, 256), (256, 8), (72, 40)]

heads = pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}to{heads[1]}")
head_dims = pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=lambda d: f"{d[0]}x{d[1]}")
head_dim = pytest.mark.parametrize("head_dim", EVERY_HEAD_DIM)
seqlen_q = pytest.mark.parametrize("seqlen_q", EDGES)

# ---- masks ---------------------------------------------------------------------------------------

MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 3)},
    "below": {"window_size": (None, -10)},  # the rows at the top see no key
}

# For hundreds of keys: with tiles beyond the window on each side, and whole ones within it.
WIDE_MASKS = {
    **MASKS,
    "window": {"window_size": (100, 20)},
    "left": {"window_size": (70, None)},
}

WINDOWS = [
    (0, 0),
    (5, 0),
    (None, 3),
    (3, None),
    (15, 16),  # both sides at edges of tiles, where no pair may count twice
    (16, 16),
    (31, 32),
    (64, 31),
    (64, 63),
    (1000, 1000),
    (2**31 - 1, 2**31 - 1),
    (None, -1),  # from here on the diagonal is outside
    (-1, None),
    (-2, 20),
    (20, -2),
    (-40, None),
    (None, -40),
    (-3, 2),  # nothing would be visible: no window
    (2, -3),
    (-1, -1),
    (-1000, 2000),
    (-(2**31) + 1, None),
]

WINDOWED_SEQLENS = ((65, 65), (33, 150), (150, 33))  # of queries, of keys


def mask(masks):
    return pytest.mark.parametrize("mask", masks.values(), ids=masks)


causal = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
window_size = pytest.mark.parametrize("window_size", WINDOWS, ids=str)

# ---- softcap and sink ----------------------------------------------------------------------------

softcap = pytest.mark.parametrize("softcap", [0.3, 5.0, 50.0, 1e4])
sink = pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
sink_dtype = pytest.mark.parametrize(
    "sink_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


def sinks_of_every_kind(device, dtype):
    """For six heads: among the scores, without effect, taking all, and ordinary ones; strided."""
    sinks = torch.tensor([0.0, -math.inf, 300.0, -300.0, 3.0, -1.5]).repeat_interleave(2)
    return device.place(sinks.to(dtype))[::2]


# ---- numbers -------------------------------------------------------------------------------------

mean = pytest.mark.parametrize("mean", [0.5, -1.0, 3.0])
softmax_scale = pytest.mark.parametrize("scale", [0.0, 1.0, -0.125, 1e-6, 1e-30, 2.0])
score_of_spike = pytest.mark.parametrize("score", [200.0, -1000.0])
poison = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)


key_of_spike = pytest.mark.parametrize(
    "key", [slice(None), 1, 66, 198], ids=["all", "early", "middle", "late"]
)


def add_spike(q, k, key, score):
    """Every query gives this score to a key, or to a slice of keys; head_dim must be 64."""
    q[..., 0] = 8  # and the default scale is 1/8
    k[..., 0] = 0
    k[:, key, :, 0] = score


# Of calls of 150 queries and keys, the first 30 and last 20 of which are NaN or inf.
hiding_window = pytest.mark.parametrize(
    "window_size", [(None, 0), (10, None), (10, 0), (-5, 20), (None, -5)], ids=str
)


def bad_keys(window_size, seqlen=150, device="cpu"):
    """(bad [keys], visible [queries, keys]): keys that many queries do not see, and who sees what."""
    bad = torch.zeros(seqlen, dtype=torch.bool, device=device)
    bad[:30] = window_size[0] is not None
    bad[-20:] = window_size[1] is not None
    return bad, visible_keys(torch.arange(seqlen, device=device), seqlen, *window_size)


# ---- layouts -------------------------------------------------------------------------------------

layout = pytest.mark.parametrize(
    "layout", ["heads_first", "sequence_first", "in_nan", "last_dim_strided"]
)
head_dims_of_layouts = pytest.mark.parametrize("head_dims", [(64, 64), (72, 40)], ids=str)
far_dimension = pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "sequence", "heads"])


def far_apart(device, dimension, count):
    """`count` tensors with two batch entries, keys or heads that lie 2^31 elements apart."""
    far = 2**31
    shape = [(2, 16, 2, 64), (1, 2, 2, 64), (1, 16, 2, 64)][dimension]
    room = math.prod(shape)
    try:
        storage = torch.empty(far + count * room, dtype=torch.bfloat16, device=device.torch_device)
        storage = device.place(storage)
    except RuntimeError as error:
        pytest.skip(f"not enough memory: {error}")
    strides = list(torch.empty(shape).stride())
    strides[dimension] = far
    tensors = [storage.as_strided(shape, strides, storage_offset=i * room) for i in range(count)]
    for x in tensors:
        x.copy_(torch.randn(shape))
    return tensors
