"""How quantised tensors lie: one table of shapes and types, which calls are checked against."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_sm120.quantized.formats import E4M3, E8M0
from flash_attn_sm120.quantized.recipes import Treatment

MX_GROUP = 32  # elements of a head dim that share an e8m0 scale
NV_GROUP = 16  # elements that share an e4m3 scale
INT8_ROWS = {"q": 32, "k": 64}  # that share a scale
V_TOKENS = 32  # tokens of V that are permuted among themselves; their number is padded to it

_TYPES = (torch.bfloat16, torch.float16)


class Quantized(NamedTuple):
    """A quantised Q, K or V. ``docs/quantized.md`` has the shapes by operand and format."""

    operand: str  # "q", "k" or "v"
    format: str  # "int8", "fp8", "mxfp8", "nvfp4" or, of V, "16bit"
    data: Tensor  # int8, e4m3, two e2m1 in a byte (uint8), or V as it was
    scale: Tensor | None  # of blocks or groups
    head_scale: Tensor | None  # (batch, heads) float32
    mean: Tensor | None  # (batch, heads, head_dim) float32 of K and V: of rotated ones, rotated
    rotation: int  # size of the Hadamard blocks; 1 is none
    seqlen: int
    head_dim: int
    dtype: torch.dtype  # of what was quantised: bfloat16 or float16

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.data.shape[0]

    @property
    def heads(self) -> int:
        """Heads: K's and V's are those of keys."""
        return self.data.shape[1 if self.operand == "v" and self.format == "nvfp4" else 2]


Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def layout_of(x: Quantized) -> Layout:
    """Shape and type of each tensor that the format has; `mean` may be there or not."""
    return _layout(x.operand, x.format, (x.batch, x.seqlen, x.heads, x.head_dim), x.dtype)


def empty(x: Tensor, operand: str, treatment: Treatment) -> Quantized:
    """What ``x`` becomes, with whatever its memory holds."""
    batch, seqlen, heads, head_dim = x.shape
    layout = _layout(operand, treatment.format, (batch, seqlen, heads, head_dim), x.dtype)
    if treatment.subtracts_mean:
        layout["mean"] = (batch, heads, head_dim), torch.float32
    tensors = {
        field: torch.empty(size, dtype=dtype, device=x.device)
        for field, (size, dtype) in layout.items()
    }
    return Quantized(
        operand,
        treatment.format,
        tensors["data"],
        tensors.get("scale"),
        tensors.get("head_scale"),
        tensors.get("mean"),
        treatment.rotation(head_dim),
        seqlen,
        head_dim,
        x.dtype,
    )


def _layout(
    operand: str, format: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Layout:
    b, s, h, d = shape
    per_head = {"head_scale": ((b, h), torch.float32)}
    if format == "16bit":
        return {"data": ((b, s, h, d), dtype)}
    if format == "int8":
        blocks = -(-s // INT8_ROWS[operand])
        return {
            "data": ((b, s, h, d), torch.int8),
            "scale": ((b, h, blocks), torch.float32),
        }
    if format == "fp8":
        return {"data": ((b, s, h, d), E4M3), **per_head}
    if format == "mxfp8":
        groups = d // MX_GROUP
        return {"data": ((b, s, h, d), E4M3), "scale": ((b, s, h, groups), E8M0)}
    if operand == "v":
        tokens = padded(s)
        return {
            "data": ((b, h, d, tokens // 2), torch.uint8),
            "scale": ((b, h, d, tokens // NV_GROUP), E4M3),
            **per_head,
        }
    return {
        "data": ((b, s, h, d // 2), torch.uint8),
        "scale": ((b, s, h, d // NV_GROUP), E4M3),
        **per_head,
    }


def padded(tokens: int) -> int:
    return -(-tokens // V_TOKENS) * V_TOKENS


def v_tokens(stored: int, device: torch.device) -> Tensor:
    """The token at each stored position of V in 4 bits. Then the accumulators of four blocks of 8
    keys are, in order, the operand P of the second product, and masks are those of natural keys."""
    p = torch.arange(stored, device=device)
    return (p & ~31) + 8 * (p >> 1 & 3) + 2 * (p >> 3 & 3) + (p & 1)


# ---- what is checked -----------------------------------------------------------------------------


def check_input(name: str, x: Any) -> None:
    """A tensor that is to be quantised."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor or Quantized, got {type(x).__name__}")
    if x.dtype not in _TYPES:
        raise TypeError(f"{name} must be bfloat16 or float16, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(
            f"{name} must be (batch, seqlen, heads, head_dim), got {x.dim()} dimensions"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise NotImplementedError(
            f"{name} requires a gradient: quantised attention is forward only"
        )


def step_of_head_dims(format: str) -> int:
    """Of which they are multiples."""
    return MX_GROUP if format == "mxfp8" else NV_GROUP


def check_head_dim(name: str, format: str, head_dim: int) -> None:
    step = step_of_head_dims(format)
    if head_dim % step or not step <= head_dim <= 256:
        raise ValueError(
            f"head dims of {name} in {format} are multiples of {step} from {step} to 256, "
            f"got {head_dim}"
        )


def check_quantized(name: str, x: Quantized, operand: str, format: str) -> None:
    """A Quantized that a caller gives as ``operand``, which the recipe has in ``format``."""
    if x.operand != operand:
        raise ValueError(f"{name} must be quantised as {operand!r}, got {x.operand!r}")
    if x.format != format:
        raise ValueError(f"{name} must be in {format}, as the recipe is, got {x.format}")
    if x.dtype not in _TYPES:
        raise TypeError(f"{name}.dtype must be bfloat16 or float16, got {x.dtype}")
    if not isinstance(x.data, Tensor):
        raise TypeError(f"{name}.data must be a tensor, got {type(x.data).__name__}")
    if x.data.dim() != 4:
        raise ValueError(f"{name}.data must have 4 dimensions, got {x.data.dim()}")
    check_head_dim(name, format, x.head_dim)
    rotation = x.rotation
    if rotation < 1 or rotation & (rotation - 1) or x.head_dim % rotation:
        raise ValueError(
            f"{name}.rotation must be a power of two that divides {x.head_dim}, got {rotation}"
        )
    layout = layout_of(x)
    for field in ("data", "scale", "head_scale"):
        check_field(f"{name}.{field}", getattr(x, field), layout.get(field), x.data.device)
    if x.mean is not None:
        if operand == "q":
            raise ValueError(f"{name}.mean must be None: Q has no mean")
        shape = (x.batch, x.heads, x.head_dim)
        check_field(f"{name}.mean", x.mean, (shape, torch.float32), x.data.device)
    _check_values(name, x)


def check_field(
    name: str, x: Any, wanted: tuple[tuple[int, ...], torch.dtype] | None, device: torch.device
) -> None:
    """Refuses another shape, dtype or device; ``wanted`` None: there must be no tensor."""
    if wanted is None:
        if x is not None:
            raise ValueError(f"{name} must be None in this format")
        return
    shape, dtype = wanted
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def _check_values(name: str, x: Quantized) -> None:
    """Of scales in float32, where they can be seen."""
    for field in ("scale", "head_scale"):
        scale = getattr(x, field)
        if scale is None or scale.dtype != torch.float32 or scale.device.type != "cpu":
            continue
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(f"{name}.{field} must be positive and finite")
