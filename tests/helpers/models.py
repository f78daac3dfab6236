"""A small transformer, to be trained with any attention."""

import torch
from torch import nn

from flash_attn_sm120 import flash_attn_func


def causal(q, k, v):
    return flash_attn_func(q, k, v, causal=True)[0]


class Block(nn.Module):
    def __init__(self, width, heads, heads_kv, attention):
        super().__init__()
        self.heads, self.heads_kv, self.attention = heads, heads_kv, attention
        self.head_dim = width // heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.qkv = nn.Linear(width, (heads + 2 * heads_kv) * self.head_dim, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (-1, self.head_dim))
        out = self.attention(*qkv.split([self.heads, self.heads_kv, self.heads_kv], dim=2))
        x = x + self.project(out.flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, attention, vocabulary=16, seqlen=40, width=64, layers=2):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(seqlen, width))
        self.blocks = nn.Sequential(*[Block(width, 4, 2, attention) for _ in range(layers)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens):
        return self.head(self.blocks(self.tokens(tokens) + self.positions[: tokens.shape[1]]))
