"""Tensors whose elements lie further apart than 32-bit offsets reach, in memory of which little is
touched."""

import mmap
import sys

import pytest
import torch

SPAN = 1 << 32  # elements
ALIGNED = 1 << 10  # elements, at which each row begins
NORESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python names from 3.11 on


def reserved(device, elements, dtype):
    """Memory that a system gives when it is touched, and a GPU at once, where it has it."""
    size = elements * dtype.itemsize
    in_gib = f"{size / 2**30:.0f} GiB"
    if device.torch_device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        if size > 0.9 * free:
            pytest.skip(f"it takes {in_gib} of a GPU, of which {free / 2**30:.0f} are free")
        return torch.empty(elements, dtype=dtype, device="cuda")
    if sys.platform != "linux":
        pytest.skip(f"{in_gib} that are not used are reserved on Linux alone")
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)
    except OSError as error:
        pytest.skip(f"the system does not reserve {in_gib}: {error}")


def apart(device, tensors, axis):
    """Copies in one piece of memory, in which the first and the last index along `axis`, of equal
    length in all, lie more than SPAN elements apart."""
    (count,) = {x.shape[axis] for x in tensors}
    rooms = [-(-x[(slice(None),) * axis + (0,)].numel() // ALIGNED) * ALIGNED for x in tensors]
    step = max(-(-SPAN // (count - 1) // ALIGNED) * ALIGNED + ALIGNED, sum(rooms))
    memory = reserved(device, step * (count - 1) + sum(rooms), tensors[0].dtype)
    copies, begin = [], 0
    for x, room in zip(tensors, rooms, strict=True):
        inner = x.select(axis, 0).contiguous().stride()
        stride = (*inner[:axis], step, *inner[axis:])
        copy = memory.as_strided(x.shape, stride, begin)
        copy.copy_(x)
        copies.append(device.place(copy))
        begin += room
    return copies
