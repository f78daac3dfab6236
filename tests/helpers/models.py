"""A small transformer, to be trained with any attention."""

import torch
from torch import nn

from flash_attn_sm120 import flash_attn_func


def causal(q, k, v):
    return flash_attn_func(q, k, v, causal=True)[0]


def causal_of_torch(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width, heads, heads_kv, mlp, attention):
        super().__init__()
        self.heads, self.heads_kv, self.attention = heads, heads_kv, attention
        self.head_dim = width // heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.qkv = nn.Linear(width, (heads + 2 * heads_kv) * self.head_dim, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp * width), nn.GELU(), nn.Linear(mlp * width, width)
        )

    def forward(self, x):
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (-1, self.head_dim))
        out = self.attention(*qkv.split([self.heads, self.heads_kv, self.heads_kv], dim=2))
        x = x + self.project(out.flatten(2))
        return x + self.mlp(self.norms[1](x))


# Of 124M parameters, as GPT-2's smallest.
GPT2_SMALL = {
    **{"vocabulary": 50257, "seqlen": 1024, "width": 768, "layers": 12},
    **{"heads": 12, "heads_kv": 12, "mlp": 4, "is_tied": True},
}


class Transformer(nn.Module):
    """``is_tied``: the head has the weights of the tokens."""

    def __init__(
        self,
        attention,
        vocabulary=16,
        seqlen=40,
        width=64,
        layers=2,
        heads=4,
        heads_kv=2,
        mlp=2,
        is_tied=False,
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(seqlen, width))
        blocks = [Block(width, heads, heads_kv, mlp, attention) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))
        if is_tied:
            self.head[1].weight = self.tokens.weight
            nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens):
        return self.head(self.blocks(self.tokens(tokens) + self.positions[: tokens.shape[1]]))
