"""The 8- and 4-bit instructions that the emulator takes, as NVRTC writes and assembles them."""

from __future__ import annotations

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


STATEMENTS = (
    {str(mma): mma_statement(mma) for mma in PLAIN + SPELLINGS}
    | {name: statement(name, [f"r{n}"], ["[r]"]) for name, n in LOADS.items()}
    | {name: statement(name, [], ["[r]", f"r{n}"]) for name, n in STORES.items()}
)


def compiled(statements, architecture):
    """PTX or cubin of a kernel that nothing calls: registers have no values worth anything."""
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
