"""Rows of the tile table, made in tests and used in place of the built-in ones."""

from contextlib import contextmanager

from flash_attn_sm120 import _C

KERNELS = ("forward", "forward_tma")
PRODUCERS = ("barrier", "thread", "warp")  # enum fa_producer, and kernels/forward_tma.cu
FIELDS = _C.tile_fields()

# Tests are small, and the dispatcher gives small calls small tiles: the others are these.
LARGE_TILES = tuple(
    row
    for row in _C.tiles()
    if row[FIELDS.index("rows_per_sm")] == -1 and row[FIELDS.index("kernel")] == 0
)


def constants(plan):
    """The compile-time constants of a plan: name -> number."""
    pairs = (option.removeprefix("-D").split("=") for option in plan.options)
    return {name: int(value) for name, value in pairs}


def tile_row(plan=None, *, kernel=None, producer=None, **tile):
    """A row for all calls, with the tile of a plan where it is not named."""
    of = constants(plan) if plan else {}
    fields = {field: of[field.upper()] for field in FIELDS if field.upper() in of}
    for mask in ("mask_right", "mask_left", "head_dim", "head_dim_v"):
        fields.pop(mask, None)
    fields["kernel"] = KERNELS.index(kernel or (plan.kernel if plan else "forward"))
    if producer:
        fields["producer"] = PRODUCERS.index(producer)
    if not fields["kernel"] or "producer" not in fields:
        fields["producer"] = 0
    return tuple((fields | tile).get(field, -1) for field in FIELDS)


_used = [()]  # rows of the contexts that are open, the innermost last


@contextmanager
def use_tiles(*rows, extension=_C):
    """These rows before the built-in ones, or none, for the calls within."""
    _used.append(rows)
    extension.use_tiles(rows)
    try:
        yield
    finally:
        _used.pop()
        extension.use_tiles(_used[-1])
