"""The recipes: which formats the operands of both products have, and what is smoothed before."""

from __future__ import annotations

from typing import NamedTuple


class Treatment(NamedTuple):
    """What a recipe does with one operand."""

    format: str
    subtracts_mean: bool
    rotates: bool

    def rotation(self, head_dim: int) -> int:
        """The size of the Hadamard blocks; 1 is none."""
        return head_dim & -head_dim if self.rotates else 1


class Recipe(NamedTuple):
    """One way to quantise attention. Subtracting K's mean over the tokens changes all scores of a
    row by one number, which the softmax does not see. V's mean is added to the output again. A
    rotation of Q and K by the same Hadamard matrix leaves the scores as they are."""

    qk: str  # format of Q and K
    pv: str  # format of P and V; "16bit": V as it is, P in the type of V
    subtracts_k_mean: bool  # over the tokens, of each head and dim
    subtracts_v_mean: bool  # over the tokens, of each head and dim
    rotates: bool  # Q and K by blocks of a Hadamard matrix along the head dim
    error: float  # relative L2 against fp64, N(0, 1), 4096 tokens: by benchmarks/accuracy.py

    def treatment(self, operand: str) -> Treatment:
        """Of "q", "k" or "v"."""
        if operand == "v":
            return Treatment(self.pv, self.subtracts_v_mean, False)
        return Treatment(self.qk, operand == "k" and self.subtracts_k_mean, self.rotates)


#                        qk       pv       K mean V mean rotation error
RECIPES = {
    "int8_fp8": Recipe("int8", "fp8", True, False, False, 0.040),
    "fp8": Recipe("fp8", "fp8", True, False, False, 0.055),
    "mxfp8": Recipe("mxfp8", "fp8", True, False, False, 0.055),
    "nvfp4_bf16": Recipe("nvfp4", "16bit", True, False, True, 0.128),
    "nvfp4_fp8": Recipe("nvfp4", "fp8", True, False, True, 0.134),
    "int8_nvfp4": Recipe("int8", "nvfp4", True, True, False, 0.130),
    "nvfp4": Recipe("nvfp4", "nvfp4", True, True, True, 0.182),
}


def recipe_of(name: str) -> Recipe:
    if name not in RECIPES:
        known = ", ".join(map(repr, RECIPES))
        raise ValueError(f"recipe must be one of {known}, got {name!r}")
    return RECIPES[name]
