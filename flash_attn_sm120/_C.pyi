from collections.abc import Callable, Sequence
from typing import Any, TypedDict

class Device(TypedDict):
    name: str
    arch: int
    sms: int
    smem_per_block: int
    smem_per_sm: int
    l2_bytes: int

def forward(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    cu_seqlens_q: Any | None = None,
    cu_seqlens_k: Any | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Any | None = None,
    seqused_k: Any | None = None,
    page_table: Any | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = (None, None),
    learnable_sink: Any | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    out: Any | None = None,
    lse: Any | None = None,
) -> tuple[Any, Any | None]: ...
def forward_if_plain(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    cu_seqlens_q: Any | None = None,
    cu_seqlens_k: Any | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Any | None = None,
    seqused_k: Any | None = None,
    page_table: Any | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = (None, None),
    learnable_sink: Any | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    out: Any | None = None,
    lse: Any | None = None,
) -> Any: ...
def backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any | None,
    /,
    *,
    cu_seqlens_q: Any | None = None,
    cu_seqlens_k: Any | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Any | None = None,
    seqused_k: Any | None = None,
    page_table: Any | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = (None, None),
    learnable_sink: Any | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
) -> tuple[Any, Any, Any, Any]: ...
def combine(
    out_parts: Any,
    lse_parts: Any,
    out: Any,
    lse: Any | None,
    cu_seqlens: Any | None,
    seqused: Any | None,
    /,
) -> None: ...
def explain(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    cu_seqlens_q: Any | None = None,
    cu_seqlens_k: Any | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Any | None = None,
    seqused_k: Any | None = None,
    page_table: Any | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = (None, None),
    learnable_sink: Any | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    arch: int | None = None,
) -> dict[str, Any]: ...
def explain_backward(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    cu_seqlens_q: Any | None = None,
    cu_seqlens_k: Any | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Any | None = None,
    seqused_k: Any | None = None,
    page_table: Any | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = (None, None),
    learnable_sink: Any | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    arch: int | None = None,
) -> dict[str, Any]: ...
def follow(
    plain_types: tuple[type, ...],
    questions: tuple[Callable[[], Any], ...],
    forward_ad: dict[str, Any],
    /,
) -> None: ...
def devices() -> tuple[int, list[Device]]: ...
def counts() -> dict[str, int]: ...
def use_tiles(rows: Sequence[tuple[int, ...]], /) -> None: ...
def tiles() -> list[tuple[int, ...]]: ...
def tile_fields() -> tuple[str, ...]: ...
