"""Attention of numpy arrays: arrays in, arrays out, computed on the CPU in fp32.

    python examples/from_numpy.py

Any object with __dlpack__ is accepted. CuPy and JAX arrays are read in place too, and give torch
tensors, which their from_dlpack() reads without a copy.
"""

import numpy as np

from flash_attn_sm120 import flash_attn_func

BATCH, SEQLEN, HEADS, HEAD_DIM = 1, 48, 2, 32


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention as it is defined, in fp64."""
    q, k, v = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(HEAD_DIM)
    scores = np.where(np.tri(SEQLEN, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True) @ v).transpose(0, 2, 1, 3)


def main() -> None:
    rng = np.random.default_rng(0)
    shape = (BATCH, SEQLEN, HEADS, HEAD_DIM)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))

    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)

    print(f"out {out.dtype} {out.shape}, lse {lse.dtype} {lse.shape}")
    assert isinstance(out, np.ndarray)
    error = np.abs(out - attention(q, k, v)).max()
    print(f"largest error against fp64: {error:.1e}")
    assert error < 1e-5


if __name__ == "__main__":
    main()
