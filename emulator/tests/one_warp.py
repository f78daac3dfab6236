"""PTX of one warp: registers from arrays [blocks, registers, lanes] and back."""

from __future__ import annotations

import pytest

from emulator import EmulatorError, emulator, ptx_module

LANES = 32


def kernel(parameters, body):
    """%r0 is the lane, %rd0 four times that, %r1 shared memory, %r2 the block."""
    preamble = """
    .reg .pred %p<2>;
    .reg .b32 %r<8>;
    .reg .b32 %a<8>;
    .reg .b32 %b<8>;
    .reg .b32 %c<8>;
    .reg .b32 %d<8>;
    .reg .b64 %rd<8>;
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd0, %r0, 4;
    mov.u32 %r1, smem;
    mov.u32 %r2, %ctaid.x;
"""
    return ptx_module(
        [f".param .u64 {name}" for name in parameters],
        preamble + body,
        ".extern .shared .align 1024 .b8 smem[];",
    )


def vector(name, count):
    return "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"


def address(name, count):
    """%rd2: where the lane's words of this block are in parameter `name`, `count` per lane."""
    return f"""
    ld.param.u64 %rd2, [{name}];
    mul.wide.u32 %rd3, %r2, {4 * LANES * count};
    add.s64 %rd2, %rd2, %rd3;
    add.s64 %rd2, %rd2, %rd0;
"""


def load(name, count):
    """Registers %{name}0... from an array [blocks, count, lanes]."""
    loads = (f"    ld.global.b32 %{name}{i}, [%rd2+{128 * i}];\n" for i in range(count))
    return address(name, count) + "".join(loads)


def store(name, count, register=None):
    register = register or name
    stores = (f"    st.global.b32 [%rd2+{128 * i}], %{register}{i};\n" for i in range(count))
    return address(name, count) + "".join(stores)


def refusal(body, parameters=(), *arguments, **launch):
    """The report of a launch that must not succeed."""
    with pytest.raises(EmulatorError) as caught:
        emulator().run(kernel(parameters, body), *arguments, **launch)
    return str(caught.value)
