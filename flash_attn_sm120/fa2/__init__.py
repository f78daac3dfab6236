"""FlashAttention-2's functions, by their own signatures and returns.

``from flash_attn_sm120.fa2 import flash_attn_func`` takes the place of ``from flash_attn import
flash_attn_func``, and ``flash_attn_sm120.fa2.bert_padding`` that of ``flash_attn.bert_padding``.
They differ from the functions above in names, order and returns:

- Tensors are torch's.
- A side of ``window_size`` that is negative is unbounded.
- Head dims that are no multiples of 8 are padded with zeros, which copies q, k and v; those of a KV
  cache are refused.
- They return ``out``, or with ``return_attn_probs`` ``(out, lse, S_dmask)``, of which the last is
  empty, as FlashAttention-2's is without dropout.
- Where a query sees no key its lse is +inf, as in FlashAttention-2, and not -inf. That takes a pass
  over the lse where it is asked for. Gradients flow through it, which FlashAttention-2's ignores.
- Pages may be of any size, the head dims of K and V may differ, and ``learnable_sink`` is one more
  parameter of the functions whose q, k and v are apart.
- ``dropout_p`` above 0 and ``alibi_slopes`` raise NotImplementedError. Errors are of more kinds
  than FlashAttention-2's RuntimeError.

Programs that import ``flash_attn`` itself find these functions after
:func:`install_as_flash_attn`.
"""

from flash_attn_sm120.fa2.alias import install_as_flash_attn
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
    "install_as_flash_attn",
]
