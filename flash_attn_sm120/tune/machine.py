"""The GPU that is tuned: what it is, its tensors, its compiler and its clock."""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch

from flash_attn_sm120 import _C, _measure, cards, jit
from flash_attn_sm120.plan import Plan
from flash_attn_sm120.tune.candidates import Candidate
from flash_attn_sm120.tuned_tiles import DIRECTIONS

SOAK_S = 0.15  # clocks and caches of code settle before anything counts
MIN_FLUSH_BYTES = 256 << 20  # so that a flush takes longer than the host needs for a call


class Machine:
    """The first GPU.

    Raises:
        RuntimeError: there is none, or none that can be tuned.
    """

    def __init__(self) -> None:
        if os.environ.get("FA_SM120_PLAN_AS"):
            raise RuntimeError("tune measures a GPU by its own rules: unset FA_SM120_PLAN_AS")
        try:
            self.driver_version, devices = _C.devices()
        except RuntimeError as error:
            raise RuntimeError(f"tune measures on a GPU, and finds none: {error}") from error
        if not devices:
            raise RuntimeError("tune measures on a GPU, and the driver has none")
        self.device = devices[0]
        self.arch = self.device["arch"]

    # ---- what it is

    def identity(self) -> dict[str, Any]:
        """What measurements must have in common to stand in one table."""
        from flash_attn_sm120 import __version__

        kernels = hashlib.sha256(repr([d.fields for d in DIRECTIONS]).encode())
        for file in sorted(jit.kernel_directory().glob("*.*")):
            kernels.update(file.read_bytes())
        return {
            "gpu": self.device["name"],
            "arch": self.arch,
            "sms": self.device["sms"],
            "flash_attn_sm120": __version__,
            "kernels": kernels.hexdigest()[:12],
            "tensor_repeat": int(os.environ.get("FA_SM120_TENSOR_REPEAT") or 1),
            "limits": os.environ.get("FA_SM120_LIMITS") or None,
            "samples": "single calls, cold L2",
        }

    def kind(self) -> cards.Kind:
        """The class of a 12.x card, measured where its name is unknown."""
        found = cards.kind_of(self.device["name"], self.arch)
        if found.kind or self.arch // 10 != 12 or not torch.cuda.is_available():
            return found
        return cards.kind_of(self.device["name"], self.arch, cards.measured_half_rate())

    def facts(self) -> dict[str, Any]:
        """What else a reader of the measurements wants to know; None where it is not known."""
        clocks = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
        return {
            **_measure.nvidia_smi("driver_version", *clocks),
            "driver_cuda": self.driver_version,
            "torch": torch.__version__,
            "nvrtc": ".".join(map(str, jit.nvrtc_version())),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }

    # ---- what it does

    def tensor(self, *shape: int) -> Any:
        """Random: zeros would draw less power and run faster than real data."""
        if not torch.cuda.is_available():
            raise RuntimeError("tune needs a torch that can use the GPU: torch.cuda says it cannot")
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    def integers(self, numbers: Sequence[int]) -> Any:
        """int32, beside those tensors."""
        return torch.tensor(numbers, dtype=torch.int32, device="cuda")

    def compile(self, plan: Plan) -> None:
        """Has the kernels of a plan compiled into the cache.

        Raises:
            RuntimeError: one does not compile.
        """
        for kernel in plan.kernels:
            jit.compile(*kernel, self.arch, self.driver_version)

    def samples(self, candidates: Sequence[Candidate], i: int, rounds: int) -> list[list[float]]:
        """Milliseconds of the call ``i`` with a cold L2, for each candidate and round."""
        timed = [_measure.Timed(c.name, functools.partial(c.run, i)) for c in candidates]
        flush_bytes = max(MIN_FLUSH_BYTES, 4 * self.device["l2_bytes"])
        _measure.soak(timed, "cuda", SOAK_S)
        flush = _measure.flush_buffer("cuda", flush_bytes)
        return _measure.round_robin(timed, "cuda", rounds, flush)
