"""Rows of the tile table, made in tests and used in place of the built-in ones."""

from contextlib import contextmanager

from flash_attn_sm120 import _C

KERNELS = ("forward", "forward_tma")
PRODUCERS = ("barrier", "thread", "warp")  # enum fa_producer, and kernels/forward_tma.cu


def constants(plan):
    """The compile-time constants of a plan: name -> number."""
    pairs = (option.removeprefix("-D").split("=") for option in plan.options)
    return {name: int(value) for name, value in pairs}


def tile_row(
    plan=None,
    *,
    tile_n=None,
    sub_n=None,
    warps=None,
    warp_m=None,
    stages=None,
    kernel="forward",
    producer="barrier",
):
    """A row for all head dims, with a tile of one's own or a plan's."""
    of = constants(plan) if plan else {}
    tile = (
        tile_n or of["TILE_N"],
        sub_n or of["SUB_N"],
        warps or of["WARPS"],
        warp_m or of["WARP_M"],
        stages or of["STAGES"],
    )
    return (256, 256, 0, *tile, KERNELS.index(kernel), PRODUCERS.index(producer))


@contextmanager
def use_tiles(*rows, extension=_C):
    """These rows, or without any the built-in ones, for the calls within."""
    extension.use_tiles(list(rows))
    try:
        yield
    finally:
        extension.use_tiles([])
