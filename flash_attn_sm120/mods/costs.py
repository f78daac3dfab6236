"""What mods and lists of blocks cost: registers of the kernel, and PTX instructions of a score."""

from __future__ import annotations

import re
from typing import Any

from flash_attn_sm120 import jit
from flash_attn_sm120.mods import headers
from flash_attn_sm120.plan import Plan

# At the beginning of a line: an instruction, but what only names or fetches the kernel's arguments.
_INSTRUCTION = re.compile(r"^\s+(?:@!?%p\d+ )?(?!ld\.param|cvta|mov|ret)[a-z][\w.]*\s", re.M)


def costs_of(plan: Plan, without: Plan, options: dict[str, Any], compute_capability: int) -> str:
    """In words, of a plan beside that of the same call without mods and lists; ``options`` of _C.
    The main kernels are compiled, past every cache."""
    arch = jit.architecture(compute_capability, jit.nvrtc_version())
    steps = [x.steps[x.main_step] for x in (plan, without)]
    build, plain = (jit.build(*step[:3], arch) for step in steps)
    said = [
        f"{build.registers} registers per thread, {build.spill_bytes} bytes spilled",
        f"without mods and lists {plain.registers} and {plain.spill_bytes}",
    ]
    for name in ("score_mod", "mask_mod"):
        if name in options:
            count = instructions(name, options[name][0], plan.direction == "backward")
            said.append(f"{name} {count} PTX instructions per score")
    return "; ".join(said)


def instructions(name: str, number: int, backward: bool) -> int:
    """Those of the mod of that number; in the backward with its derivative."""
    return _count(name, number, backward) - _count(name, 0, backward)


def _count(name: str, number: int, backward: bool) -> int:
    constants = {**dict.fromkeys(headers.FILES, 0), name.upper(): number, "BACKWARD": int(backward)}
    constants |= {"DTYPE": 0, "BLOCK_SPARSE": 0}
    options = tuple(f"-D{constant}={value}" for constant, value in constants.items())
    variant = f"mod_cost_{name}{number:08x}{'_backward' * backward}"
    ptx = jit.compile("mod_cost", variant, options, 120, 0, ptx=True).decode()
    return len(_INSTRUCTION.findall(ptx.partition(".entry")[2]))
