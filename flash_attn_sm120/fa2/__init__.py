"""FlashAttention-2's functions, by their own signatures and returns.

``from flash_attn_sm120.fa2 import flash_attn_func`` takes the place of ``from flash_attn import
flash_attn_func``, and ``flash_attn_sm120.fa2.bert_padding`` that of ``flash_attn.bert_padding``.
Tensors are torch's. What is not built raises NotImplementedError by name: ``dropout_p`` above 0,
``alibi_slopes``. Errors are those of :func:`flash_attn_sm120.flash_attn_func`, of more kinds than
FlashAttention-2's RuntimeError.
"""

from flash_attn_sm120.fa2.attention import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn_sm120.fa2.kv_cache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
