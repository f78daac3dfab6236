"""The masks that the tests of the forward and of the backward go through."""

import torch

from helpers.reference import visible_keys

MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 3)},
    "below": {"window_size": (None, -10)},  # the rows at the top see no key
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
    (-3, 2),  # nothing is visible
    (2, -3),
    (-1000, 2000),
    (-(2**31) + 1, None),
]

WINDOWED_SEQLENS = ((65, 65), (33, 150), (150, 33))  # of queries, of keys

# Of calls of 150 queries and keys, the first 30 and last 20 of which are NaN or inf.
HIDING_WINDOWS = [(None, 0), (10, None), (10, 0), (-5, 20), (None, -5)]


def bad_keys(window_size, device="cpu"):
    """(bad [keys], visible [queries, keys]): keys that many queries do not see, and who sees what."""
    bad = torch.zeros(150, dtype=torch.bool, device=device)
    bad[:30] = window_size[0] is not None
    bad[-20:] = window_size[1] is not None
    return bad, visible_keys(torch.arange(150, device=device), 150, *window_size)
