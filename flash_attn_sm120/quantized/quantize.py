"""bf16 and fp16 tensors to quantised ones: by torch operations, or kernels where there are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_attn_sm120.quantized import device_quantize
from flash_attn_sm120.quantized.formats import (
    E2M1_MAX,
    E4M3_MAX,
    INT8_MAX,
    from_e2m1,
    from_e8m0,
    groups_of,
    pack,
    to_e2m1,
    to_e4m3,
    to_e8m0,
)
from flash_attn_sm120.quantized.layout import (
    INT8_ROWS,
    MX_GROUP,
    NV_GROUP,
    Quantized,
    check_head_dim,
    check_input,
    padded,
    v_tokens,
)
from flash_attn_sm120.quantized.mean import mean_of
from flash_attn_sm120.quantized.recipes import Recipe, recipe_of


def quantize(x: Tensor, recipe: str = "int8_fp8", operand: str = "k") -> Quantized:
    """One operand of :func:`quantized_attention`, quantised ahead: what the call itself would do.

    Args:
        x: ``(batch, seqlen, heads, head_dim)`` bfloat16 or float16, any strides; rows that do not
            begin at multiples of 16 bytes are copied first. CUDA devices of compute capability
            8.9 or newer have kernels, older ones and the CPU torch operations. Means and
            scales of heads are over all of its tokens. A NaN or an infinity makes its whole head
            NaN, or the blocks that share its scale.
        recipe: a name in ``RECIPES``.
        operand: ``"q"``, ``"k"`` or ``"v"``.

    Returns:
        A :class:`Quantized`: its layout is in ``docs/quantized.md``.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: an unknown recipe or operand, a shape or head dim that the recipe does not take.
        NotImplementedError: ``x`` requires a gradient.
    """
    return quantize_together({operand: x}, recipe)[operand]


def quantize_kv(k: Tensor, v: Tensor, recipe: str = "int8_fp8") -> tuple[Quantized, Quantized]:
    """K and V of a cache that is read often, quantised once.

    Both means are over the tokens that are there, so a cache that grows is quantised again, or as
    another part whose result :func:`flash_attn_combine` puts beside.

    Args:
        k, v: ``(batch, seqlen_k, heads_kv, head_dim)``, as in :func:`quantize`.
        recipe: a name in ``RECIPES``.

    Returns:
        ``(k, v)`` as :func:`quantized_attention` takes them.

    Raises:
        The exceptions of :func:`quantize`.
    """
    narrow = quantize_together({"k": k, "v": v}, recipe)
    return narrow["k"], narrow["v"]


def quantize_together(operands: dict[str, Tensor], recipe: str) -> dict[str, Quantized]:
    """Those of Q, K and V that are given: on a CUDA device, in one launch of the kernel."""
    chosen = recipe_of(recipe)
    for name, x in operands.items():
        if name not in ("q", "k", "v"):
            raise ValueError(f"operand must be 'q', 'k' or 'v', got {name!r}")
        check_input(name, x)
        check_head_dim(name, chosen.treatment(name).format, x.shape[3])
    has_kernel = {
        name: x
        for name, x in operands.items()
        if device_quantize.has_kernel(x, chosen.treatment(name).format)
    }
    narrow = device_quantize.quantize(has_kernel, chosen) if has_kernel else {}
    with torch.no_grad():
        return {
            name: narrow[name] if name in narrow else _quantize(x, chosen, name)
            for name, x in operands.items()
        }


def _quantize(x: Tensor, recipe: Recipe, operand: str) -> Quantized:
    """By torch operations: what the kernels are to compute, bit for bit."""
    treatment = recipe.treatment(operand)
    format, seqlen, head_dim = treatment.format, x.shape[1], x.shape[3]
    if format == "16bit":
        return Quantized(operand, format, x, None, None, None, 1, seqlen, head_dim, x.dtype)
    rotation = treatment.rotation(head_dim)
    values, mean = rotate(x.float(), rotation), None
    if treatment.subtracts_mean and x.shape[1]:
        mean = mean_of(values)
        values = values - mean[:, None]
    if operand == "v" and format == "nvfp4":
        values = _stored(values)
    data, scale, head_scale = _ENCODERS[format](values, operand)
    return Quantized(
        operand, format, data, scale, head_scale, mean, rotation, seqlen, head_dim, x.dtype
    )


def rotate(x: Tensor, size: int) -> Tensor:
    """By the Hadamard matrix of ``size``, block by block along the last dimension."""
    blocks = groups_of(x, size)
    step = 1
    while step < size:
        pairs = groups_of(blocks, 2 * step)
        first, second = pairs[..., :step], pairs[..., step:]
        blocks = torch.cat([first + second, first - second], dim=-1).reshape(blocks.shape)
        step *= 2
    return blocks.flatten(-2) * (1 / math.sqrt(size))


# ---- formats -------------------------------------------------------------------------------------
# Each takes float32 (batch, seqlen, heads, head_dim), V in 4 bits as it is stored, and returns
# (data, scale, head_scale).

_Encoded = tuple[Tensor, Tensor | None, Tensor | None]


def _int8(x: Tensor, operand: str) -> _Encoded:
    rows = INT8_ROWS[operand]
    seqlen = x.shape[1]
    blocks = -(-seqlen // rows)
    missing = blocks * rows - seqlen
    largest = torch.nn.functional.pad(x.abs().amax(dim=3).transpose(1, 2), (0, missing))
    scale = _positive(groups_of(largest, rows).amax(dim=3) / INT8_MAX)  # (batch, heads, blocks)
    of_row = scale.repeat_interleave(rows, dim=2)[..., :seqlen].transpose(1, 2)[..., None]
    codes = _divided(x, of_row).round().clamp(-INT8_MAX, INT8_MAX)
    return codes.nan_to_num(0).to(torch.int8), scale, None


def _fp8(x: Tensor, operand: str) -> _Encoded:
    head_scale = _head_scale(x, heads=2, largest=E4M3_MAX)
    return to_e4m3(_divided(x, head_scale[:, None, :, None])), None, head_scale


def _mxfp8(x: Tensor, operand: str) -> _Encoded:
    groups = groups_of(x, MX_GROUP)
    scale = to_e8m0(groups.abs().amax(dim=-1) / E4M3_MAX)  # rounded up: nothing saturates
    codes = to_e4m3(_divided(groups, from_e8m0(scale)[..., None]))
    return codes.flatten(-2), scale, None


def _nvfp4(x: Tensor, operand: str) -> _Encoded:
    """Groups of 16 in e2m1, their scales in e4m3 in units of the head's scale. The largest of a
    group becomes 6 or 4, whichever has the smaller error."""
    heads = 1 if operand == "v" else 2
    head_scale = _head_scale(x, heads, E4M3_MAX * E2M1_MAX)
    shape = (-1, 1, *head_scale.shape[1:]) if heads == 2 else head_scale.shape
    unit = head_scale.reshape(*shape, *(1,) * (4 - len(shape)))
    groups = groups_of(_divided(x, unit), NV_GROUP)
    largest = groups.abs().amax(dim=-1)
    by_six = _group_codes(groups, largest / E2M1_MAX)
    by_four = _group_codes(groups, largest / 4)
    is_better = by_four[2] < by_six[2]
    scale = torch.where(is_better, by_four[0].float(), by_six[0].float()).to(by_six[0].dtype)
    codes = torch.where(is_better[..., None], by_four[1], by_six[1])
    return pack(codes.flatten(-2)), scale, head_scale


def _group_codes(groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded scales, codes, and the sum of the squares of the errors."""
    rounded = to_e4m3(scale)
    factor = rounded.float()[..., None]
    codes = to_e2m1(groups * (1 / factor).masked_fill(factor == 0, 0))
    errors = (from_e2m1(codes) * factor - groups).square()
    while errors.shape[-1] > 1:  # added in a tree, whose order kernels have, too
        errors = errors[..., 0::2] + errors[..., 1::2]
    return rounded, codes, errors[..., 0]


_ENCODERS = {"int8": _int8, "fp8": _fp8, "mxfp8": _mxfp8, "nvfp4": _nvfp4}


def _head_scale(x: Tensor, heads: int, largest: float) -> Tensor:
    """What takes the largest element of a head to ``largest``: (batch, heads)."""
    dims = [d for d in (1, 2, 3) if d != heads]
    if not x.numel():
        return x.new_ones((x.shape[0], x.shape[heads]))
    return _positive(x.abs().amax(dim=dims) / largest)


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    """By products, as in kernels; where a scale is tiny, after both are lifted by 2^64."""
    lift = torch.where(scale < 2.0**-64, 2.0**64, 1.0)
    return x * lift * (1 / (scale * lift))


def _positive(scale: Tensor) -> Tensor:
    """1 where all elements are 0."""
    return scale.masked_fill(scale == 0, 1)


def _stored(v: Tensor) -> Tensor:
    """V as the second product reads it in 4 bits: (batch, heads, head_dim, tokens), zeros behind
    the last token, tokens permuted in 32s."""
    tokens = padded(v.shape[1])
    v = torch.nn.functional.pad(v.permute(0, 2, 3, 1), (0, tokens - v.shape[1]))
    return v[..., v_tokens(tokens, v.device)]
