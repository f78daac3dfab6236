"""The number formats: e4m3, e2m1, e8m0. Rounding is that of sm_120's conversions.

e4m3  1 sign, 4 exponent and 3 fraction bits, largest 448, no infinity (torch.float8_e4m3fn)
e2m1  0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; two in a byte, the first in the low nibble
e8m0  powers of two from 2^-127 to 2^127; the byte 255 is NaN (torch.float8_e8m0fnu)
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = {"16bit": 0, "int8": 1, "fp8": 2, "mxfp8": 3, "nvfp4": 4}  # enum quantized_format
E4M3 = torch.float8_e4m3fn
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)  # a type since torch 2.7
E4M3_ARCH = 89  # the first compute capability with conversions to e4m3, and its products
E4M3_MAX = 448.0
E2M1_MAX = 6.0
INT8_MAX = 127
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Between neighbours; a tie goes to the code that is even, so every other bound counts as above it.
_E2M1_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
_E2M1_TIES_UP = (0.75, 1.75, 3.5)


def to_e4m3(x: Tensor) -> Tensor:
    """Round to nearest even; what is beyond 448 becomes 448, NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def to_e2m1(x: Tensor) -> Tensor:
    """The codes, one in a byte. Round to nearest even; infinities become 6, NaN +6."""
    size = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for bound in _E2M1_TIES_DOWN:
        code += size > bound
    for bound in _E2M1_TIES_UP:
        code += size >= bound
    code += torch.signbit(x).to(torch.uint8) << 3
    return code.masked_fill_(x.isnan(), 7)


def from_e2m1(code: Tensor) -> Tensor:
    """float32 of codes that have a byte each."""
    table = torch.tensor([*_E2M1, *(-x for x in _E2M1)], device=code.device)
    return table[code.int()]


def pack(code: Tensor) -> Tensor:
    """Two codes of the last dimension in a byte."""
    return code[..., 0::2] | code[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def groups_of(x: Tensor, size: int) -> Tensor:
    """The last dimension in groups: (..., groups, size)."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def to_e8m0(x: Tensor) -> Tensor:
    """The smallest power of two that is not less than ``x``, which is not negative."""
    fraction, exponent = torch.frexp(x)  # x = fraction * 2^exponent, fraction in [0.5, 1)
    code = exponent + 127 - (fraction == 0.5).int()
    code = code.clamp(0, 254).masked_fill(x == 0, 0).masked_fill(x.isinf(), 254)
    return code.masked_fill(x.isnan(), 255).to(torch.uint8).view(E8M0)


def from_e8m0(x: Tensor) -> Tensor:
    """float32; 2^-127 is a subnormal of it."""
    code = x.view(torch.uint8).int()
    bits = torch.where(code == 0, 1 << 22, code << 23)
    return bits.view(torch.float32).masked_fill(code == 255, torch.nan)
