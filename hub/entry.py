"""FlashAttention for consumer Blackwell and every NVIDIA GPU since Ampere, and for CPUs.

The functions are FlashAttention-2's, with its parameters and returns; ``learnable_sink`` is one
more. ``flash_attn_sm120`` is the package with all of its functions.
"""

from . import flash_attn_sm120
from .flash_attn_sm120.fa2 import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_sm120",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
