"""How DTensor carries out the operators: each shard by a call of its own, without communication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from flash_attn_sm120.ops import BACKWARDS, BIAS, FORWARDS, SLOPES, by_name

Placements = dict[str, Any]  # of a device, by kind of tensor

_ALL: Placements = dict.fromkeys(
    ("q", "kv", "lse", "sink", "dsink", "none", "lengths"), Replicate()
)
_BATCH: Placements = {**_ALL, **dict.fromkeys(("q", "kv", "lse"), Shard(0)), "dsink": Partial()}


def _heads(q: Any, k: Any) -> Placements:
    """Heads are the last dimension but one of q, k, v and of the log-sum-exp."""
    by_q, by_k = len(q.shape) - 2, len(k.shape) - 2
    of_heads = {"q": Shard(by_q), "kv": Shard(by_k), "lse": Shard(by_q - 1)}
    return {**_ALL, **of_heads, "sink": Shard(0), "dsink": Shard(0)}


def register() -> None:
    """Tells DTensor which placements the operators take."""
    for op in FORWARDS:
        register_sharding(op)(_forward)
    for op in BACKWARDS:
        register_sharding(op)(_backward)


def _forward(q: Any, k: Any, v: Any, sink: Any, *lengths: Any, **options: Any) -> Any:
    if options.get("dropout_p"):  # every shard would drop what the first one does
        raise NotImplementedError("dropout_p is not supported yet for DTensor")
    kinds = ("q", "kv", "kv", "sink")
    return _strategies(["q", "lse"], kinds, (q, k, v, sink), lengths, (q, k, v))


def _backward(dout: Any, dlse: Any, q: Any, k: Any, v: Any, *others: Any, **_: Any) -> Any:
    sink, out, lse, *lengths = others
    kinds = ("q", "lse", "q", "kv", "kv", "sink", "q", "lse")
    tensors = (dout, dlse, q, k, v, sink, out, lse)
    results = ["q", "kv", "kv", "none" if sink is None else "dsink"]
    return _strategies(results, kinds, tensors, lengths, (q, k, v))


def _strategies(
    results: list[str],
    kinds: tuple[str, ...],
    tensors: tuple[Any, ...],
    lengths: Sequence[Any],
    qkv: tuple[Any, Any, Any],
) -> Any:
    """Pairs of the results' and the inputs' placements: all, batch, heads.

    A call with lengths has no batch to share: the devices would need different lengths.
    """
    named = {name: x for name, x in by_name(tuple(lengths)).items() if x is not None}
    if BIAS in named:
        raise NotImplementedError("attn_bias is not supported yet for DTensor")
    slopes = named.pop(SLOPES, None)
    _check(*qkv, has_batch=not named)
    inputs = [kind for kind, x in zip(kinds, tensors, strict=True) if x is not None]
    inputs += ["lengths" for _ in named]
    ways = [_ALL, *(() if named else (_BATCH,)), _heads(*qkv[:2])]
    if slopes is not None:
        inputs.append("slopes")
        ways = [_with_slopes(by, len(slopes.shape)) for by in ways]
    return [([by[x] for x in results], [by[x] for x in inputs]) for by in ways]


def _with_slopes(by: Placements, ndim: int) -> Placements:
    """Slopes are shared as the batch and the heads are that they have."""
    if by is _BATCH:
        return {**by, "slopes": Shard(0) if ndim == 2 else Replicate()}
    return {**by, "slopes": Shard(ndim - 1) if by["sink"] == Shard(0) else Replicate()}


def _check(q: Any, k: Any, v: Any, has_batch: bool) -> None:
    """Refuses what would need communication, which is for the caller to ask for."""
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    without_heads = "Shard(0) (batch) or Replicate()" if has_batch else "Replicate()"
    for name, x in (("q", q), ("k", k), ("v", v)):
        of_heads, by_heads = len(x.shape) - 2, 1  # devices that share the heads
        for size, placement in zip(x.mesh.shape, x.placements, strict=True):
            if placement == Shard(of_heads):
                by_heads *= size
            elif placement != Replicate() and not (has_batch and placement == Shard(0)):
                raise ValueError(
                    f"{name} is {placement}, but attention needs whole sequences and head dims: "
                    f"redistribute() {name} to Shard({of_heads}) (heads), {without_heads}"
                )
        if heads_q != heads_kv and heads_kv % by_heads != 0:
            raise ValueError(
                f"{name} is Shard({of_heads}) over {by_heads} devices, which part query heads from "
                f"their {heads_kv} KV heads: redistribute() {name} to {without_heads}"
            )
