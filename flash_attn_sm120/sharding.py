"""How DTensor carries out the operators: each shard by a call of its own, without communication."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from flash_attn_sm120.ops import BACKWARD, FORWARD

# What each device has: sequences of the batch, or heads, or all. By kind of tensor.
_BATCH: dict[str, Any] = {"qkv": Shard(0), "lse": Shard(0), "sink": Replicate(), "dsink": Partial()}
_HEADS: dict[str, Any] = {"qkv": Shard(2), "lse": Shard(1), "sink": Shard(0), "dsink": Shard(0)}
_ALL: dict[str, Any] = dict.fromkeys(_BATCH, Replicate())
for _kinds in (_BATCH, _HEADS, _ALL):
    _kinds["none"] = Replicate()


def register() -> None:
    """Tells DTensor which placements the operators take."""
    register_sharding(FORWARD)(_forward)
    register_sharding(BACKWARD)(_backward)


def _forward(q: Any, k: Any, v: Any, sink: Any, **_: Any) -> Any:
    _check(q=q, k=k, v=v)
    return _placements(["qkv", "lse"], ["qkv", "qkv", "qkv"] + ["sink"] * (sink is not None))


def _backward(dout: Any, dlse: Any, q: Any, k: Any, v: Any, sink: Any, *_: Any, **__: Any) -> Any:
    _check(q=q, k=k, v=v)
    outputs = ["qkv", "qkv", "qkv", "dsink" if sink is not None else "none"]
    kinds = ("qkv", "lse", "qkv", "qkv", "qkv", "sink", "qkv", "lse")
    tensors = (dout, dlse, q, k, v, sink, *_)
    return _placements(
        outputs, [kind for kind, x in zip(kinds, tensors, strict=True) if x is not None]
    )


def _placements(outputs: list[str], inputs: list[str]) -> Any:
    """Pairs of the outputs' and the inputs' placements."""
    return [([by[x] for x in outputs], [by[x] for x in inputs]) for by in (_ALL, _BATCH, _HEADS)]


def _check(**tensors: Any) -> None:
    """Refuses what would need communication, which is for the caller to ask for."""
    heads_q, heads_kv = tensors["q"].shape[2], tensors["k"].shape[2]
    for name, x in tensors.items():
        by_heads = 1  # devices that share the heads
        for size, placement in zip(x.mesh.shape, x.placements, strict=True):
            if placement == Shard(2):
                by_heads *= size
            elif placement not in (Replicate(), Shard(0)):
                raise ValueError(
                    f"{name} is {placement}, but attention needs whole sequences and head dims: "
                    f"redistribute() {name} to Shard(0) (batch), Shard(2) (heads) or Replicate()"
                )
        if heads_q != heads_kv and heads_kv % by_heads != 0:
            raise ValueError(
                f"{name} is Shard(2) over {by_heads} devices, which part query heads from their "
                f"{heads_kv} KV heads: redistribute() {name} to Shard(0) (batch) or Replicate()"
            )
