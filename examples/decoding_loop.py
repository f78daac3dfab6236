"""Prefill and decoding with a preallocated KV cache, one new token per call.

    python examples/decoding_loop.py

The cache is a tensor for the longest sequence. Each call gets a slice of it, which is read in
place. The new query is the last one, and masks are aligned to the bottom right: it sees every key
of the slice. Runs on the GPU where there is one, else on the CPU in about a second.
"""

import torch

from flash_attn_sm120 import flash_attn_func

BATCH, HEADS, HEADS_KV, HEAD_DIM = 2, 8, 2, 64
PROMPT, TOKENS = 100, 20
LENGTH = PROMPT + TOKENS


@torch.no_grad()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16
    torch.manual_seed(0)

    def randn(heads: int) -> torch.Tensor:
        """What a model's projections would compute: [batch, length, heads, head_dim]."""
        return torch.randn(BATCH, LENGTH, heads, HEAD_DIM, device=device).to(dtype)

    q, k, v = randn(HEADS), randn(HEADS_KV), randn(HEADS_KV)
    k_cache, v_cache = torch.empty_like(k), torch.empty_like(v)

    # Prefill: the whole prompt in one causal call.
    k_cache[:, :PROMPT], v_cache[:, :PROMPT] = k[:, :PROMPT], v[:, :PROMPT]
    prompt_out, _ = flash_attn_func(
        q[:, :PROMPT], k_cache[:, :PROMPT], v_cache[:, :PROMPT], causal=True
    )
    outs = [prompt_out]

    # Decoding: append one key and value, then attend with one query. On a GPU the keys are split
    # among blocks, and the query heads of a KV head share a block.
    for n in range(PROMPT, LENGTH):
        k_cache[:, n], v_cache[:, n] = k[:, n], v[:, n]
        out, _ = flash_attn_func(
            q[:, n : n + 1], k_cache[:, : n + 1], v_cache[:, : n + 1], causal=True
        )
        outs.append(out)

    # The same as one causal call over the whole sequence, but for rounding.
    whole, _ = flash_attn_func(q, k, v, causal=True)
    error = (torch.cat(outs, dim=1).float() - whole.float()).abs().max().item()
    print(f"{TOKENS} tokens decoded; largest difference from one causal call: {error:.1e}")
    assert error < 2**-6


if __name__ == "__main__":
    main()
