"""The plan of a quantised call: its launches, those that quantise included, and how its time on
12.x compares with that of our bf16 kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from flash_attn_sm120 import plan as plans
from flash_attn_sm120.plan import Plan, Step
from flash_attn_sm120.quantized import device, device_quantize, kernel, speed
from flash_attn_sm120.quantized.attention import Call, Operand, checked_call, sizes_of
from flash_attn_sm120.quantized.device import Card
from flash_attn_sm120.quantized.layout import Quantized
from flash_attn_sm120.quantized.mean import THREADS
from flash_attn_sm120.quantized.recipes import Recipe, recipe_of
from flash_attn_sm120.static_model import Grid


def explain_quantized(
    q: Operand,
    k: Operand,
    v: Operand,
    recipe: str = "int8_fp8",
    *,
    arch: int | None = None,
    **options: Any,
) -> Plan:
    """The plan of ``quantized_attention(q, k, v, recipe, **options)``, with reasons.

    Nothing is computed. On 12.x ``reasons["speed"]`` says how long a static model expects the call
    to take, what quantises included, and our bf16 kernel; where the call is slower, it says so.

    Args:
        q, k, v, recipe, options: as in :func:`quantized_attention`.
        arch: plan for this compute capability (120, 121, 90, ...) instead of the device of ``q``,
            which needs no GPU.

    Raises:
        The exceptions of :func:`quantized_attention`.
    """
    call = checked_call(q, k, v, recipe, **options)
    if arch is None and call.device.type == "cpu":
        why = "CPU tensors are computed rounding by rounding, by torch operations"
        return Plan("forward", threads=torch.get_num_threads(), reasons={"kernel": why})
    card = device.card_of_arch(arch) if arch else device.card_of(call.device.index or 0)
    if reason := device.why_not(recipe, card.arch):
        raise RuntimeError(reason)
    quantisers = _quantisers(call, recipe_of(recipe), card.sms)
    plan = _plan(call, recipe_of(recipe), card, quantisers)
    if card.model:
        plan.reasons["speed"] = _speed(call, recipe, card, plan, quantisers)
    return plan


# ---- launches ------------------------------------------------------------------------------------


class Quantisers(NamedTuple):
    """What quantises the operands that are not quantised yet."""

    names: str  # of the operands
    steps: tuple[Step, ...]
    launches: int  # with that of zeros, which torch launches
    bytes_moved: int

    @property
    def why(self) -> str:
        """For the plan's reasons."""
        if not self.names:
            return "nothing: q, k and v are quantised already"
        return f"{self.names}: {self.launches} launches, {self.bytes_moved / 1e6:.3g} MB"


def _quantisers(call: Call, recipe: Recipe, multiprocessors: int) -> Quantisers:
    shapes = {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        for name, x in zip("qkv", call.operands, strict=True)
        if not isinstance(x, Quantized) and recipe.treatment(name).format != "16bit" and x.numel()
    }
    if not shapes:
        return Quantisers("", (), 0, 0)
    plan = device_quantize.prepare(shapes, recipe, multiprocessors)
    name = device_quantize.KERNEL
    step = Step(name, name, plan.options, plan.blocks, THREADS)
    return Quantisers(", ".join(shapes), (step,), plan.launches, plan.bytes_moved())


def _plan(call: Call, recipe: Recipe, card: Card, quantisers: Quantisers) -> Plan:
    (batch, seqlen_q, heads, dim_v), dims = call.out_shape, _head_dims(call)
    seqlen_k = sizes_of(call.operands[1])[1]
    tile, why_tile = device.tile_of(
        card, (recipe.qk, recipe.pv), dims, batch * heads * seqlen_q, call.options["causal"]
    )
    blocks = kernel.blocks_of(call.out_shape[:3], tile)
    if not blocks or not seqlen_k:
        return Plan("forward", reasons={"kernel": "no queries or no keys: nothing is launched"})
    asked = call.options["num_splits"]
    parts = kernel.parts_of(blocks, seqlen_k, card.sms, asked)
    scores = kernel.Steps(call.options["softcap"] > 0, call.options["learnable_sink"] is not None)
    v_dtype = call.operands[2].dtype if recipe.pv == "16bit" else torch.bfloat16
    out_dtype = call.out_dtype if parts == 1 else torch.float32
    variant = kernel.variant_of(
        recipe.qk, recipe.pv, dims, v_dtype, out_dtype, scores, card.target, tile
    )
    attention = Step(kernel.KERNEL, variant.name, variant.options, blocks * parts, variant.threads)
    why = (
        f"so that {blocks} blocks of queries fill {card.sms} SMs"
        if parts > 1
        else "more would not pay"
    )
    split = f"{parts}: {'as asked' if asked else why}"
    rows = batch * heads * seqlen_q
    return Plan(
        "forward",
        (*quantisers.steps, attention),
        main_step=len(quantisers.steps),
        tile_m=tile.rows,
        tile_n=kernel.TILE_N * tile.stage_tiles,
        warps=tile.warps,
        stages=kernel.STAGES,
        tma=False,
        num_splits=parts,
        pack_gqa=False,
        smem_bytes=variant.shared_bytes,
        blocks_per_sm=kernel.resident_blocks(variant, card.smem_per_sm),
        workspace_bytes=rows * parts * 4 * (dim_v + 1) if parts > 1 else 0,
        reasons={"tile": why_tile, "quantise": quantisers.why, "num_splits": split},
    )


def _head_dims(call: Call) -> tuple[int, int]:
    return sizes_of(call.operands[0])[3], call.out_shape[3]


# ---- speed ---------------------------------------------------------------------------------------


def _speed(call: Call, recipe: str, card: Card, plan: Plan, quantisers: Quantisers) -> str:
    """By the model, which knows causal masks and no windows."""
    assert card.model
    if any(x is not None for x in call.options["window_size"]):
        return "not predicted where there is a window"
    if not plan.steps:
        return "nothing is computed"
    bf16 = _bf16_plan(call, card)
    ours = speed.seconds(recipe, _grid_of(call, plan), plan, card.model)
    plain = speed.seconds(speed.PLAIN, _grid_of(call, bf16), bf16, card.model)
    before = speed.quantising_seconds(quantisers.launches, quantisers.bytes_moved, card.model)
    said = f"by the static model, not measured: {ours * 1e6:.1f} us"
    if quantisers.names:
        said += f", quantising {quantisers.names} {before * 1e6:.1f} us more"
    said += f"; our bf16 kernel {plain * 1e6:.1f} us"
    if ours > plain:
        return f"{said}: SLOWER than bf16, even with q, k and v quantised before"
    if ours + before > plain:
        return f"{said}: SLOWER than bf16 unless quantised before: {quantisers.names}"
    return f"{said}: {plain / (ours + before):.2f} times as fast"


def _grid_of(call: Call, plan: Plan) -> Grid:
    batch, seqlen_q, heads, _ = call.out_shape
    assert plan.tile_m and plan.tile_n
    return Grid(
        own=plan.tile_m,
        tile=plan.tile_n,
        seqlen=seqlen_q,
        causal=bool(call.options["causal"]),
        heads=batch * heads,
        head_dim=_head_dims(call)[0],
        keys=sizes_of(call.operands[1])[1],
        parts=plan.num_splits or 1,
    )


def _bf16_plan(call: Call, card: Card) -> Plan:
    """Of tensors whose memory is never touched."""
    assert card.model
    q, k, v = (torch.empty(sizes_of(x), dtype=torch.bfloat16) for x in call.operands)
    return plans.explain(q, k, v, arch=card.model.rows, causal=call.options["causal"])
