"""The 8- and 4-bit instructions that the emulator takes, as NVRTC writes and assembles them."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from test_small_mma import PLAIN, SPELLINGS

from emulator import EmulatorError, emulator, unavailable
from flash_attn_sm120 import jit

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

SPACES = ("shared", "shared::cta")
LOADS = {  # -> registers
    f"ldmatrix.sync.aligned.m16n16.x{n}.trans.{space}.b8": 2 * n for n in (1, 2) for space in SPACES
} | {
    f"ldmatrix.sync.aligned.m8n16.x{n}.{space}.b8x16.b4x16_p64": n
    for n in (1, 2, 4)
    for space in SPACES
}
STORES = {
    f"stmatrix.sync.aligned.m16n8.x{n}.trans.{space}.b8": n for n in (1, 2, 4) for space in SPACES
}


def statement(name, outputs, inputs, braces=False):
    """A CUDA C statement of one instruction. Operands: vectors "r4", registers, or PTX text."""
    texts, constraints, numbers = [], ([], []), iter(range(99))
    for kind, operands in enumerate((outputs, inputs)):
        for operand in operands:
            if not re.fullmatch(r"\[?[rfhl]\d*\]?", operand):
                texts.append(operand)
                continue
            letter, count = operand.strip("[]")[0], operand.strip("[]")[1:]
            registers = [f"%{next(numbers)}" for _ in range(int(count or 1))]
            constraints[kind].extend([letter] * len(registers))
            text = ", ".join(registers)
            texts.append("{" + text + "}" if count else f"[{text}]" if "[" in operand else text)
    used = iter(range(99))
    groups = (
        ", ".join(f'"{prefix}{letter}"({letter}[{next(used)}])' for letter in letters)
        for prefix, letters in zip(("=", ""), constraints, strict=True)
    )
    return f'    asm volatile("{name} {", ".join(texts)};" : {" : ".join(groups)} : "memory");\n'


def mma_statement(mma):
    c = "f4" if mma.c == "f32" else "r2"
    scale = "r1" if mma.braces else "r"
    scales = [scale, "{0, 1}", scale, "{0, 2}"] if mma.scale else []
    return statement(mma.name, [c], ["r4", "r2", c, *scales])


def nibbles_statement(name):
    """With e2m1x2, which is in a register of 8 bits, on its way from or to a larger one."""
    if name.endswith("x2.e2m1x2"):
        return (
            '    asm volatile("{ .reg .b8 n; mov.b32 {n, _, _, _}, %1; '
            f'{name} %0, n; }}" : "=r"(r[0]) : "r"(r[1]));\n'
            '    asm volatile("{ .reg .b8 n, m; mov.b16 {n, m}, %1; '
            f'{name} %0, m; }}" : "=r"(r[0]) : "h"(h[1]));\n'
        )
    sources, letter = ("%1, %2", "f") if name.endswith(".f32") else ("%1", "r")
    inputs = f'"{letter}"({letter}[0]), "{letter}"({letter}[1])'
    ends = ("mov.b32 %0, {n, n, n, n}", "r"), ("mov.b16 %0, {n, 0}", "h")
    ends += ("cvt.u32.u8 %0, n", "r"), ("cvt.u16.u8 %0, n", "h")
    return "".join(
        f'    asm volatile("{{ .reg .b8 n; {name} n, {sources}; {end}; }}" '
        f': "={d}"({d}[0]) : {inputs});\n'
        for end, d in ends
    )


def conversions():
    """Name -> registers of the destination and of the sources."""
    for relu, small in itertools.product(("", ".relu"), ("e4m3x2", "e5m2x2", "e2m1x2")):
        yield f"cvt.rn.satfinite{relu}.{small}.f32", "h", ["f", "f"]
        yield f"cvt.rn.satfinite{relu}.{small}.f16x2", "h", ["r"]
        yield f"cvt.rn{relu}.f16x2.{small}", "r", ["h"]
    for mode, finite in itertools.product(("rz", "rp"), ("", ".satfinite")):
        yield f"cvt.{mode}{finite}.ue8m0x2.f32", "h", ["f", "f"]
        yield f"cvt.{mode}{finite}.ue8m0x2.bf16x2", "h", ["r"]
    yield "cvt.rn.bf16x2.ue8m0x2", "r", ["h"]


def conversion_statement(name, destination, sources):
    if "e2m1x2" in name:
        return nibbles_statement(name)
    return statement(name, [destination], sources)


STATEMENTS = (
    {str(mma): mma_statement(mma) for mma in PLAIN + SPELLINGS}
    | {name: statement(name, [f"r{n}"], ["[r]"]) for name, n in LOADS.items()}
    | {name: statement(name, [], ["[r]", f"r{n}"]) for name, n in STORES.items()}
    | {name: conversion_statement(name, d, sources) for name, d, sources in conversions()}
)


def compiled(statements, architecture):
    """The PTX of a kernel of these statements, assembled where the architecture is a real one."""
    api, _ = jit.load_nvrtc()
    source = 'extern "C" __global__ void test(unsigned *words)\n{\n'
    source += "    unsigned r[40];\n    float f[40];\n    unsigned short h[40];\n"
    source += "    unsigned long long l[40];\n"
    source += "    for (int i = 0; i < 40; i++)\n"
    source += "        r[i] = words[i], f[i] = words[i], h[i] = words[i], l[i] = words[i];\n"
    source += "".join(statements)
    source += "    for (int i = 0; i < 40; i++)\n"
    source += "        words[i] = r[i] + (unsigned)f[i] + h[i] + (unsigned)l[i];\n}\n"
    _, program = api.nvrtcCreateProgram(source.encode(), b"test.cu", 0, [], [])
    options = [f"--gpu-architecture={architecture}".encode(), b"--no-cache"]
    (failed,) = api.nvrtcCompileProgram(program, len(options), options)
    _, size = api.nvrtcGetProgramLogSize(program)
    log = b" " * size
    api.nvrtcGetProgramLog(program, log)
    assert not failed, log.decode()
    _, size = api.nvrtcGetPTXSize(program)
    ptx = b" " * size
    api.nvrtcGetPTX(program, ptx)
    api.nvrtcDestroyProgram(program)
    return ptx.rstrip(b"\0").decode()


def test_the_assembler_takes_every_name():
    compiled(STATEMENTS.values(), "sm_120f")


def test_the_emulator_takes_what_nvrtc_makes_of_every_name():
    """It is read as a whole; what stops the launch is a matrix's address, or nothing."""
    ptx = compiled(STATEMENTS.values(), "compute_120f")
    assert all(name.partition(" ")[0] in ptx for name in STATEMENTS)
    with pytest.raises(EmulatorError, match="shared"):
        emulator().run(ptx, np.zeros(40, np.uint32))
