"""Tensors in every layout that a caller may hand over."""

import torch


def _contiguous(shape, dtype):
    return torch.empty(shape, dtype=dtype)


def _heads_first(shape, dtype):
    """(B, S, H, D) as a view of (B, H, S, D): what a model in SDPA's layout hands over."""
    batch, seqlen, heads, head_dim = shape
    return torch.empty(batch, heads, seqlen, head_dim, dtype=dtype).transpose(1, 2)


def _sequence_first(shape, dtype):
    """(B, S, H, D) as a view of (S, B, H, D)."""
    batch, seqlen, heads, head_dim = shape
    return torch.empty(seqlen, batch, heads, head_dim, dtype=dtype).transpose(0, 1)


def _in_nan(shape, dtype):
    """A slice, in all four dimensions, of a larger tensor that is NaN everywhere else."""
    margins = (1, 3, 1, 8)  # 8 elements keep the last dimension aligned to 16 bytes in every type
    larger = torch.full(
        [n + 2 * margin for n, margin in zip(shape, margins, strict=True)], torch.nan, dtype=dtype
    )
    return larger[
        tuple(slice(margin, margin + n) for n, margin in zip(shape, margins, strict=True))
    ]


def _last_dim_strided(shape, dtype):
    """Every second element of rows twice as long: cannot be read in place."""
    return torch.empty(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


LAYOUTS = {
    "contiguous": _contiguous,
    "heads_first": _heads_first,
    "sequence_first": _sequence_first,
    "in_nan": _in_nan,
    "last_dim_strided": _last_dim_strided,
}


def random_tensor(device, shape, dtype, mean, layout):
    """Normal around `mean`, drawn on the CPU: the same on every device."""
    with torch.device(device.torch_device):
        tensor = device.place(LAYOUTS[layout](shape, dtype))
    return tensor.copy_(torch.randn(shape, device="cpu") + mean)
