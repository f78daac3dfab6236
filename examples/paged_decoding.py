"""Decoding of sequences of different lengths from a paged KV cache, with rotary embedding.

    python examples/paged_decoding.py

One call a step appends the new keys and values to the pages, rotates them and the queries by their
positions, and attends. Lengths and pages are tensors on the device: the loop never waits for them,
and a CUDA graph of the call can be replayed. Runs on the GPU where there is one, else on the CPU.
"""

import torch

from flash_attn_sm120 import flash_attn_func
from flash_attn_sm120.fa2 import flash_attn_with_kvcache

HEADS, HEADS_KV, HEAD_DIM = 8, 2, 64
PROMPTS, TOKENS = (5, 100, 37), 20
LENGTH, PAGE = 128, 16  # of the longest sequence, and of a page


def rotary_tables(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of each position: [LENGTH, HEAD_DIM / 2]."""
    frequencies = 10000 ** -(torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM)
    angles = torch.arange(LENGTH, device=device)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch, of a whole sequence [1, length, heads, HEAD_DIM]: dims i and i + half."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = (table[: x.shape[1], None].float() for table in (cos, sin))
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@torch.no_grad()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, batch = torch.bfloat16, len(PROMPTS)
    torch.manual_seed(0)

    def randn(heads: int) -> list[torch.Tensor]:
        """What a model's projections would compute of each sequence: [1, length, heads, dim]."""
        lengths = [prompt + TOKENS for prompt in PROMPTS]
        return [torch.randn(1, n, heads, HEAD_DIM, device=device).to(dtype) for n in lengths]

    q, k, v = randn(HEADS), randn(HEADS_KV), randn(HEADS_KV)
    cos, sin = rotary_tables(device, dtype)
    rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": False, "causal": True}

    # Pages in any order, each sequence with as many as the longest may need.
    pages = batch * LENGTH // PAGE
    cache = torch.empty(2, pages, PAGE, HEADS_KV, HEAD_DIM, device=device, dtype=dtype)
    table = torch.randperm(pages, device=device).to(torch.int32).view(batch, -1)

    # Prefill: each prompt in one call.
    outs = []
    for i, n in enumerate(PROMPTS):
        new = [x[i][:, :n] for x in (k, v)]
        own = {"cache_seqlens": 0, "block_table": table[i : i + 1]}
        outs.append([flash_attn_with_kvcache(q[i][:, :n], *cache, *new, **own, **rotary)])

    # Decoding: a token of each sequence in one call.
    lengths = torch.tensor(PROMPTS, dtype=torch.int32, device=device)
    for step in range(TOKENS):
        row, *new = (
            torch.cat([own[:, n + step, None] for own, n in zip(x, PROMPTS, strict=True)])
            for x in (q, k, v)
        )
        out = flash_attn_with_kvcache(
            row, *cache, *new, cache_seqlens=lengths, block_table=table, **rotary
        )
        for own, x in zip(outs, out.split(1), strict=True):
            own.append(x)
        lengths += 1

    # The same as one causal call over each whole sequence, but for rounding.
    error = 0.0
    for i, own in enumerate(outs):
        whole, _ = flash_attn_func(
            rotated(q[i], cos, sin), rotated(k[i], cos, sin), v[i], causal=True
        )
        error = max(error, (torch.cat(own, dim=1).float() - whole.float()).abs().max().item())
    print(f"{TOKENS} tokens of {batch} sequences; largest difference from one call: {error:.1e}")
    assert error < 2**-5


if __name__ == "__main__":
    main()
