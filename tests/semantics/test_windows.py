"""Both conventions of windows: None is unbounded, and a window that hides all from all is none."""

import pytest
import torch

from flash_attn_sm120 import flash_attn_func
from helpers.checks import attend, check_forward, check_gradients, dout_for
from helpers.reference import resolved_window

# As they are given, without and with causal, and what they mean: docs/numerics.md has this table.
CONVENTIONS = [
    ((None, None), (None, None), (None, 0)),
    ((-1, -1), (None, None), (None, 0)),  # FlashAttention-2 and -3: no window
    ((-1, 0), (None, None), (None, 0)),
    ((0, -1), (None, None), (0, 0)),
    ((-1, None), (-1, None), (None, 0)),
    ((None, -1), (None, -1), (None, 0)),
    ((7, -1), (7, -1), (7, 0)),
    ((-1, 7), (-1, 7), (None, 0)),
    ((7, -8), (None, None), (7, 0)),
    ((-8, 7), (None, None), (None, 0)),
    ((-5, 20), (-5, 20), (None, 0)),
    ((7, 0), (7, 0), (7, 0)),
    ((0, 0), (0, 0), (0, 0)),
    ((-3, 2), (None, None), (None, 0)),
    ((-1000, -1000), (None, None), (None, 0)),
    ((-(2**31), -(2**31)), (None, None), (None, 0)),
    ((-(2**40), 2**39), (-(2**31), None), (None, 0)),
]
conventions = pytest.mark.parametrize("given, full, causal", CONVENTIONS, ids=str)


@conventions
def test_the_oracle_knows_them(given, full, causal):
    if abs(given[0] or 0) < 2**40:
        assert resolved_window(False, given) == full
    assert resolved_window(True, given) == causal


@pytest.mark.quick("cpu-*(-1, -1)*")
@conventions
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_both_directions(device, make_qkv, given, full, causal, is_causal):
    if not device.takes(CONVENTIONS.index((given, full, causal)) + is_causal):
        pytest.skip("the other size of tiles has this case")
    q, k, v = make_qkv(1, 40, 33, 2, 1, 64, dtype=device.dtypes[0])
    meant = causal if is_causal else full
    if abs(given[0] or 0) < 2**40:
        check_forward(q, k, v, causal=is_causal, window_size=given)
        check_gradients(q, k, v, dout_for(device, q, v), causal=is_causal, window_size=given)
    out, lse = attend(q, k, v, causal=is_causal, window_size=given)
    same, same_lse = attend(q, k, v, window_size=meant)
    assert torch.equal(out, same) and torch.equal(lse, same_lse)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_no_window_by_either_convention_sees_something(causal):
    """The instance that trained on zeros: (-1, -1) hid every key."""
    q, k, v = (torch.randn(1, 5, 1, 16) for _ in range(3))
    out, lse = flash_attn_func(q, k, v, causal=causal, window_size=(-1, -1), return_lse=True)
    assert out.abs().sum(-1).all() and lse.isfinite().all()
