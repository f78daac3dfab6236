from collections.abc import Sequence
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
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    learnable_sink: Any | None,
    num_splits: int,
    pack_gqa: bool | None,
    return_lse: bool,
    /,
) -> tuple[Any, Any | None]: ...
def backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    learnable_sink: Any | None,
    deterministic: bool,
    /,
) -> tuple[Any, Any, Any, Any]: ...
def explain(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    learnable_sink: Any | None,
    num_splits: int,
    pack_gqa: bool | None,
    arch: int,
    /,
) -> dict[str, Any]: ...
def explain_backward(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    learnable_sink: Any | None,
    deterministic: bool,
    arch: int,
    /,
) -> dict[str, Any]: ...
def devices() -> tuple[int, list[Device]]: ...
def use_tiles(rows: Sequence[tuple[int, ...]], /) -> None: ...
def tiles() -> list[tuple[int, ...]]: ...
def tile_fields() -> tuple[str, ...]: ...
