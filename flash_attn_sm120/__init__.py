"""FlashAttention for consumer Blackwell and every NVIDIA GPU since Ampere."""

from flash_attn_sm120 import tuned_tiles
from flash_attn_sm120.combine import flash_attn_combine
from flash_attn_sm120.common_kernels import warmup
from flash_attn_sm120.interface import flash_attn_func, flash_attn_varlen_func
from flash_attn_sm120.mods import operators as _operators  # noqa: F401, exported programs have them
from flash_attn_sm120.plan import Kernel, Plan, Step, explain, explain_backward

__version__ = "0.1.0"

__all__ = [
    "Kernel",
    "Plan",
    "Step",
    "explain",
    "explain_backward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "warmup",
]

tuned_tiles.load()
