"""What vLLM asks of an attention backend: what it can do, metadata of a batch, and the calls.

A layer's cache is ``(pages, heads_kv, page_size, 2 * head_dim)`` of any strides, K and V of a token
side by side. It is read and written in place, whatever order vLLM lays its dimensions out in.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar

import torch
import vllm
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from flash_attn_sm120.interface import flash_attn_varlen_func
from flash_attn_sm120.vllm import _NEWEST_TRIED, _OLDEST_TRIED, NAME
from flash_attn_sm120.vllm.cache import keys_and_values, write

_FAST_PAGE, _LARGEST_PAGE = 64, 1024
_E4M3 = ("fp8", "fp8_e4m3")  # of caches
_ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)


class Backend(AttentionBackend):  # type: ignore[misc]
    """What this attention can do."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        *("auto", "float16", "bfloat16"),
        *_E4M3,
    ]
    forward_includes_kv_cache_update = False
    supports_kv_cache_update_bypass = True  # attention reads what the cache holds alone

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[Attention]:
        return Attention

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """All that a page can be: vLLM divides blocks that are larger."""
        return list(range(16, _LARGEST_PAGE + 1, 16))

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Pages of 16 rows are read at about nine tenths of the speed of larger ones."""
        return max(default_block_size, _FAST_PAGE)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and 8 <= head_size <= 256

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER, *_ENCODERS)

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return (capability.major, capability.minor) >= (8, 0)

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        *others: Any,
        **more: Any,
    ) -> str | None:
        if kv_cache_dtype in ("float16", "bfloat16") and getattr(torch, kv_cache_dtype) != dtype:
            return f"a KV cache of {kv_cache_dtype} with a model of {dtype} is not supported"
        if kv_cache_dtype in _E4M3 and head_size % 16:
            return f"a KV cache of {kv_cache_dtype} with head dims of {head_size} is not supported"
        return None


# ---- a batch -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Metadata(AttentionMetadata):  # type: ignore[misc]
    """Of a batch. Tensors are vLLM's own, which a CUDA graph reads again; numbers are bounds."""

    num_actual_tokens: int
    query_start_loc: Tensor  # (sequences + 1,) int32
    seq_lens: Tensor  # (sequences,) int32
    max_query_len: int
    max_seq_len: int
    block_table: Tensor  # (sequences, pages) int32
    slot_mapping: Tensor  # (tokens,) int64
    causal: bool


class Builder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Metadata of batches. Nothing is computed: lengths and pages stay where they are."""

    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True
    supports_draft_decode_metadata_update = True

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        common = common_attn_metadata
        _refuse(
            causal_per_sequence=isinstance(common.causal, Tensor) or None,
            mm_req_doc_ranges=getattr(common, "mm_req_doc_ranges", None),
            rswa_prefix_lens=getattr(common, "rswa_prefix_lens", None),
        )
        return Metadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
        )

    def update_block_table(
        self, metadata: Metadata, blk_table: Tensor, slot_mapping: Tensor
    ) -> Metadata:
        return dataclasses.replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)

    def update_draft_decode_metadata(self, metadata: Metadata) -> None:
        """All that changes from one draft to the next is in vLLM's own tensors."""


# ---- a layer -------------------------------------------------------------------------------------


class Attention(AttentionImpl):  # type: ignore[misc]
    """The attention of a layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **unsupported: Any,
    ) -> None:
        if kv_cache_dtype not in Backend.supported_kv_cache_dtypes:
            raise NotImplementedError(
                f"{NAME} does not support a KV cache of {kv_cache_dtype} yet, only of "
                f"{', '.join(Backend.supported_kv_cache_dtypes)}"
            )
        _refuse(**unsupported)
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = float(logits_soft_cap or 0.0)
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        # vLLM builds a model with its device as the default one.
        self.slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes).float()
        self.before = None if sliding_window is None else sliding_window - 1  # keys of a window

    def forward(
        self,
        layer: Any,
        query: Tensor,  # (tokens, heads, head_dim), padded, as key, value and output are
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes to ``output``: its rows of padding are left alone."""
        _refuse(output_scale=output_scale, output_block_scale=output_block_scale)
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        tokens = attn_metadata.num_actual_tokens
        query, out = query[:tokens], output[:tokens]
        is_encoder = self.attn_type in _ENCODERS
        lengths: dict[str, Any]
        if is_encoder:
            if key is None or value is None:
                raise ValueError("an encoder's attention needs key and value")
            key, value = key[:tokens], value[:tokens]
            lengths = {
                "cu_seqlens_k": attn_metadata.query_start_loc,
                "max_seqlen_k": attn_metadata.max_query_len,
            }
        else:
            key, value = keys_and_values(self._typed(kv_cache))
            lengths = {
                **self._descales(layer),
                "seqused_k": attn_metadata.seq_lens,
                "page_table": attn_metadata.block_table,
                "max_seqlen_k": attn_metadata.max_seq_len,
            }
        flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=attn_metadata.query_start_loc,
            max_seqlen_q=attn_metadata.max_query_len,
            softmax_scale=self.scale,
            causal=attn_metadata.causal and not is_encoder,
            window_size=(self.before, self.before),
            alibi_slopes=self.slopes,
            learnable_sink=self.sinks,
            softcap=self.softcap,
            out=out,
            **lengths,
        )
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes the rows of new tokens to their slots."""
        if self.attn_type not in _ENCODERS:
            scales = (layer._k_scale, layer._v_scale) if self.kv_cache_dtype in _E4M3 else ()
            write(key, value, self._typed(kv_cache), slot_mapping, *scales)

    def _typed(self, kv_cache: Tensor) -> Tensor:
        """vLLM allocates bytes."""
        return kv_cache.view(torch.float8_e4m3fn) if self.kv_cache_dtype in _E4M3 else kv_cache

    def _descales(self, layer: Any) -> dict[str, Tensor]:
        if self.kv_cache_dtype not in _E4M3:
            return {}
        return {"k_descale": layer._k_scale, "v_descale": layer._v_scale}


# ---- refusals ------------------------------------------------------------------------------------


def _refuse(**arguments: Any) -> None:
    asked = [name for name, value in arguments.items() if value is not None]
    if asked:
        raise NotImplementedError(f"{NAME} does not support {', '.join(asked)} yet")


def _warn_of_untried_version() -> None:
    version = tuple(vllm.__version_tuple__[:2])
    if not _OLDEST_TRIED <= version <= _NEWEST_TRIED:
        warnings.warn(
            f"flash_attn_sm120.vllm has been tried with vLLM 0.33, not with {vllm.__version__}",
            RuntimeWarning,
            stacklevel=2,
        )


_warn_of_untried_version()
