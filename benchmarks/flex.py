"""The peer of mods.py and sparse.py: FlexAttention of torch, compiled.

It takes seconds to compile for each mod, direction and head dim: where that takes longer than
``--peer-limit``, flex_attention is absent from the cell, and the run goes on.
"""

from __future__ import annotations

import argparse
import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import harness
import torch
import torch._functorch.config
from harness import Contestant
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

NAME = "flex_attention, compiled"
# What it raises where it cannot compile a call; of others than these the run ends.
CANNOT = (NotImplementedError, RuntimeError, TimeoutError)

torch._functorch.config.donated_buffer = False  # gradients of one forward are taken many times


def add_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    harness.add_choices(parser, what, "flex")
    parser.add_argument(
        "--peer-limit",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds that flex_attention may take to compile a call (default: %(default)s)",
    )


def contestant(
    inputs: Sequence[Tensor],
    dout: Tensor,
    direction: str,
    limit_s: float,
    block_mask: BlockMask,
    score_mod: Callable[..., Any] | None = None,
) -> Contestant:
    heads_first = [x.transpose(1, 2) for x in inputs]

    def flex() -> Tensor:
        attend = compiled(score_mod, block_mask.mask_mod)
        return attend(*heads_first, score_mod=score_mod, block_mask=block_mask).transpose(1, 2)

    call = harness.call_of(flex, direction, inputs, dout)
    return Contestant(NAME, limited_at_first(call, limit_s), cannot=CANNOT)


@functools.lru_cache(maxsize=1)
def compiled(score_mod: Any, mask_mod: Any) -> Callable[..., Any]:
    """For these mods, and in place of what was compiled for others: torch keeps few versions of a
    function. With ``fullgraph`` it raises where else it would go on uncompiled, with all scores in
    memory."""
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


# ---- the time limit ------------------------------------------------------------------------------


class _Late(BaseException):
    """No Exception: the compiler catches those."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Of the main thread, by SIGALRM.

    Raises:
        TimeoutError: what is inside took longer.
    """

    def raise_late(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, raise_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Late:
        raise TimeoutError(f"compiling took longer than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limited_at_first(call: Callable[[], Any], seconds: float) -> Callable[[], Any]:
    """The call, of which the first one, which compiles, has so many seconds."""
    is_compiled = False

    def run() -> Any:
        nonlocal is_compiled
        if is_compiled:
            return call()
        with time_limit(seconds):
            result = call()
        is_compiled = True
        return result

    return run
