"""Quantised attention on CUDA devices: which can run a recipe, and the launch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_sm120 import _C, recipe_tiles
from flash_attn_sm120.loaded_kernel import LoadedKernel
from flash_attn_sm120.quantized import kernel, reference
from flash_attn_sm120.quantized.formats import E4M3_ARCH, FORMATS
from flash_attn_sm120.quantized.layout import Quantized
from flash_attn_sm120.quantized.recipes import RECIPES
from flash_attn_sm120.static_model import GB10, GEFORCE, Device
from flash_attn_sm120.static_model import PRO as PRO_6000
from flash_attn_sm120.tuned_tiles import KINDS, PRO

TUNED = "first row of tune that serves the call"
BLOCK_SCALES_MAJOR = 12  # of those with block-scaled products


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    options: dict[str, Any],
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fills ``out`` and ``lse`` of checked operands on a CUDA device that :func:`check` has let
    pass. A graph of torch.compile ends here."""
    if not out.numel() or not k.seqlen:
        reference.fill_without_keys(out, lse, options["learnable_sink"])
        return
    index = out.device.index or 0
    splits = options["num_splits"]
    card = card_of(index)
    dims, rows = (q.head_dim, v.head_dim), q.batch * q.heads * q.seqlen
    tile = tile_of(card, (q.format, v.format), dims, rows, options["causal"])[0]
    parts = kernel.parts_of(kernel.blocks_of(out.shape[:3], tile), k.seqlen, card.sms, splits)
    if parts == 1:
        _launch(q, k, v, options, out, lse, tile)
        return
    of_parts = out.new_empty((parts, *out.shape), dtype=torch.float32)
    lse_of_parts = out.new_empty((parts, q.batch, q.heads, q.seqlen), dtype=torch.float32)
    _launch(q, k, v, options, of_parts, lse_of_parts, tile)
    _C.combine(of_parts, lse_of_parts.transpose(2, 3), out, lse, None, None)


def _launch(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    options: dict[str, Any],
    out: Tensor,
    lse: Tensor | None,
    tile: recipe_tiles.Tile,
) -> None:
    index = out.device.index or 0
    with torch.cuda.device(index):
        launch = kernel.prepare(q, k, v, options, out, lse, card_of(index).target, tile)
        loaded = _loaded(launch.variant, index)
        loaded((launch.blocks, 1), launch.variant.threads, launch.parameters)


def tile_of(
    card: Card, formats: tuple[str, str], head_dims: tuple[int, int], rows: int, causal: bool
) -> tuple[recipe_tiles.Tile, str]:
    """The tile of a call with so many query rows of all heads, and why."""
    qk, pv = (FORMATS[name] for name in formats)
    rows_per_sm = rows / card.sms
    call = recipe_tiles.Key(card.arch, qk, pv, *head_dims, rows_per_sm, int(bool(causal)))
    tuned = recipe_tiles.find(call)
    tile = tuned or kernel.TILE
    if kernel.shared_bytes(*formats, *head_dims, tile) > card.smem_per_sm - kernel.SHARED_RESERVED:
        return kernel.TILE, "that of all calls: the row of tune has more than the shared memory"
    if tuned is None:
        return kernel.TILE, "that of all calls: no row of tune serves the call"
    return tile, TUNED


def check(recipe: str, index: int) -> None:
    """Refuses a recipe that a device cannot run.

    Raises:
        RuntimeError: it says which devices can.
    """
    reason = _refusal(recipe, index)
    if reason:
        raise RuntimeError(reason)


@functools.cache
def _refusal(recipe: str, index: int) -> str:
    device = _C.devices()[1][index]
    reason = why_not(recipe, device["arch"])
    return reason and f"{reason}; {device['name']} has {device['arch'] / 10:.1f}"


def why_not(recipe: str, arch: int) -> str:
    """Why compute capability ``arch`` has no kernel of a recipe; empty where it has."""
    if arch // 10 == BLOCK_SCALES_MAJOR:
        return ""
    if _needs_block_scales(recipe):
        others = ", ".join(repr(name) for name in RECIPES if not _needs_block_scales(name))
        return (
            f"recipe {recipe!r} needs the block-scaled products of compute capability "
            f"{BLOCK_SCALES_MAJOR}.x (from 8.9 on there are {others})"
        )
    if arch < E4M3_ARCH:
        return f"recipe {recipe!r} needs compute capability 8.9 or newer"
    return ""


def _needs_block_scales(recipe: str) -> bool:
    chosen = RECIPES[recipe]
    return bool({"mxfp8", "nvfp4"} & {chosen.qk, chosen.pv})


class Card(NamedTuple):
    """What of a device decides about plans."""

    arch: int
    sms: int
    smem_per_sm: int
    target: kernel.Target
    model: Device | None  # what its speed is predicted for; None outside 12.x


def card_of_arch(arch: int) -> Card:
    """Of the card that stands for a compute capability."""
    name, model = "", None
    if arch // 10 == BLOCK_SCALES_MAJOR:
        model = GEFORCE if arch == GEFORCE.rows else GB10
        name = "" if model is GEFORCE else "GB10"
    device = _C.device_of_arch(arch)
    return Card(arch, device["sms"], device["smem_per_sm"], _target(name, arch), model)


@functools.cache
def card_of(index: int) -> Card:
    """Of a device."""
    device = _C.devices()[1][index]
    arch, target = device["arch"], _target(device["name"], device["arch"])
    model = None
    if arch // 10 == BLOCK_SCALES_MAJOR:
        like = GEFORCE if target.mx_e4m3 else GB10 if device["sms"] <= GB10.sms else PRO_6000
        model = dataclasses.replace(like, sms=device["sms"])
    return Card(arch, device["sms"], device["smem_per_sm"], target, model)


def _target(name: str, arch: int) -> kernel.Target:
    """12.x cards of unknown names count as GeForce-like, as in the forward."""
    if arch // 10 != BLOCK_SCALES_MAJOR:
        return kernel.Target(transposes_bytes=False, mx_e4m3=False)
    is_pro = KINDS[_C.card_kind(name, arch)] == PRO
    return kernel.Target(transposes_bytes=True, mx_e4m3=not is_pro)


@functools.cache
def _loaded(variant: kernel.Variant, index: int) -> LoadedKernel:
    """On the current device, which is ``index``."""
    return LoadedKernel(kernel.KERNEL, variant.name, variant.options, variant.shared_bytes)
