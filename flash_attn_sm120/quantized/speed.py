"""How long a recipe takes on a card of 12.x, and our bf16 kernel, by the static model."""

from __future__ import annotations

from flash_attn_sm120.plan import Plan
from flash_attn_sm120.quantized import kernel
from flash_attn_sm120.quantized.recipes import RECIPES
from flash_attn_sm120.static_model import LAUNCH_S, PRO, Device, Grid, Loop, predict

PLAIN = "bf16"

# Instructions of 16 x 64 scores of a warp beside products and NOPs, at the head dims 64 and 128, as
# `benchmarks/sass_report.py --low` counts them; a test holds them to it.
HEAD_DIMS = 64, 128
ISSUED = {
    PLAIN: (159, 259),
    "int8_fp8": (241, 276),
    "fp8": (226, 260),
    "mxfp8": (247, 287),
    "nvfp4_bf16": (243, 285),
    "nvfp4_fp8": (231, 272),
    "int8_nvfp4": (270, 295),
    "nvfp4": (256, 294),
}
MMA_CYCLES = 16  # of 8 and 4 bits, as a card's variant has them, and of 16 bits on PRO-like cards


def seconds(name: str, grid: Grid, plan: Plan, card: Device) -> float:
    """Of attention alone, in bf16 or by a recipe."""
    assert plan.warps and plan.tile_m and plan.tile_n and plan.blocks_per_sm
    head_dim_v = int(_constant(plan, "HEAD_DIM_V"))
    steps = plan.tile_m / plan.warps / 16 * plan.tile_n / 64  # of a warp in a tile
    units = plan.warps * plan.blocks_per_sm / 4 * steps  # of a sub-partition
    loop = Loop(
        tensor=units * _tensor_cycles(name, (grid.head_dim, head_dim_v), card),
        issue=units * _issued(name, (grid.head_dim + head_dim_v) / 2),
        slowest=0,
        sub_tiles=plan.tile_n // int(_constant(plan, "SUB_N") or plan.tile_n),
        is_backward=False,
        blocks_per_sm=plan.blocks_per_sm,
    )
    return predict(loop, grid, card).seconds + (LAUNCH_S if grid.parts > 1 else 0)


def quantising_seconds(launches: int, bytes_moved: int, card: Device) -> float:
    """Of what comes before."""
    return launches * LAUNCH_S + bytes_moved / (card.gb_per_s * 1e9)


def _issued(name: str, head_dim: float) -> float:
    """In between and beyond on the line through both."""
    (low, high), (first, last) = HEAD_DIMS, ISSUED[name]
    return first + (last - first) * (head_dim - low) / (high - low)


def _tensor_cycles(name: str, head_dims: tuple[int, int], card: Device) -> float:
    of_16_bits = MMA_CYCLES * (1 if card.rows == PRO.rows else 2)
    if name == PLAIN:
        return of_16_bits * (8 * -(-head_dims[0] // 16) + 4 * head_dims[1] // 8)
    recipe = RECIPES[name]
    scores, values = kernel.products_of(recipe.qk, recipe.pv, *head_dims)
    return MMA_CYCLES * scores + (of_16_bits if recipe.pv == "16bit" else MMA_CYCLES) * values


def _constant(plan: Plan, name: str) -> str:
    """Of the main kernel; empty where it has not got it."""
    prefix = f"-D{name}="
    return next((x.removeprefix(prefix) for x in plan.options if x.startswith(prefix)), "")
