"""Attention of bf16 and fp16 tensors in 8- and 4-bit numbers, forward only.

On the CPU every recipe is computed as its kernel computes it, rounding by rounding.
`docs/quantized.md` has the recipes, their measured errors, the devices that run them, and the
layout of quantised tensors.
"""

from flash_attn_sm120.quantized.attention import quantized_attention
from flash_attn_sm120.quantized.explain import explain_quantized
from flash_attn_sm120.quantized.layout import Quantized
from flash_attn_sm120.quantized.quantize import quantize, quantize_kv
from flash_attn_sm120.quantized.recipes import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "Quantized",
    "Recipe",
    "explain_quantized",
    "quantize",
    "quantize_kv",
    "quantized_attention",
]
