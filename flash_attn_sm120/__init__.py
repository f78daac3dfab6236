"""FlashAttention for consumer Blackwell and every NVIDIA GPU since Ampere."""

from flash_attn_sm120 import tiles
from flash_attn_sm120.interface import (
    BackwardPlan,
    Plan,
    explain,
    explain_backward,
    flash_attn_func,
)
from flash_attn_sm120.variants import warmup

__version__ = "0.1.0"

__all__ = ["BackwardPlan", "Plan", "explain", "explain_backward", "flash_attn_func", "warmup"]

tiles.load()
