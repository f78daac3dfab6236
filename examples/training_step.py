"""A few training steps of one attention block, with grouped-query attention and checkpointing.

    python examples/training_step.py

Runs on the GPU where there is one, else on the CPU in about a second.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flash_attn_sm120 import flash_attn_func

BATCH, SEQLEN, HEADS, HEADS_KV, HEAD_DIM = 2, 64, 4, 2, 32
DIM = HEADS * HEAD_DIM
STEPS = 8


class CausalAttention(nn.Module):
    """Pre-norm causal self-attention; two query heads share each KV head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.to_q = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.to_kv = nn.Linear(DIM, 2 * HEADS_KV * HEAD_DIM, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seqlen, _ = x.shape
        normed = self.norm(x)
        q = self.to_q(normed).view(batch, seqlen, HEADS, HEAD_DIM)
        # k and v are views of one tensor: they are read where they lie, without a copy.
        k, v = self.to_kv(normed).view(batch, seqlen, 2, HEADS_KV, HEAD_DIM).unbind(dim=2)
        out, _ = flash_attn_func(q, k, v, causal=True)
        return x + self.to_out(out.flatten(2))


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = CausalAttention().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    # Each position is to output the input of the position before it, which only attention can do.
    x = torch.randn(BATCH, SEQLEN, DIM, device=device)
    target = x.roll(1, dims=1)
    target[:, 0] = 0

    losses = []
    for step in range(STEPS):
        # Under autocast q, k and v reach the kernel in bfloat16; checkpointing runs it twice.
        with torch.autocast(device, dtype=torch.bfloat16):
            out = checkpoint(model, x, use_reentrant=False)
        loss = (out.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")
    assert losses[-1] < losses[0], "the loss must fall"


if __name__ == "__main__":
    main()
