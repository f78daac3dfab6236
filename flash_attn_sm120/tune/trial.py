"""A contest in a child process: a tile that hangs, or breaks the GPU, costs itself alone.

The child says which candidate it is about to run for the first time. If it then dies, or says
nothing for LIMIT_S, that candidate is noted, and the contest starts again without it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from flash_attn_sm120 import tuned_tiles
from flash_attn_sm120.tune.candidates import Choices
from flash_attn_sm120.tune.contest import Contest
from flash_attn_sm120.tune.grid import Cell
from flash_attn_sm120.tune.machine import Machine

LIMIT_S = 120.0  # between two messages: the longest step is a kernel's compilation

Progress = Callable[[str], None]
Note = Callable[[str, str], None]  # of a broken candidate: its name, and why


def in_process(contest: Contest, progress: Progress, note: Note) -> dict[str, Any]:
    """The record of a contest that runs here."""
    return contest.run(progress)


def in_child(contest: Contest, progress: Progress, note: Note) -> dict[str, Any]:
    """The record of a contest that runs in children, as many as it takes.

    Raises:
        RuntimeError: the GPU fails where no candidate is to blame.
    """
    while True:
        arguments = (contest.cell, contest.choices, contest.stopped)
        outcome, begun = watch(_run, arguments, progress, LIMIT_S)
        if isinstance(outcome, dict):
            return outcome
        if not begun:
            raise RuntimeError(f"{contest.cell}: {outcome}")
        note(begun, outcome)
        contest.stopped[begun] = outcome


def watch(
    target: Callable[..., None], arguments: tuple[Any, ...], progress: Progress, limit_s: float
) -> tuple[dict[str, Any] | str, str]:
    """Runs ``target(connection, *arguments)`` in a child.

    Returns:
        What it sent as its record, or why it did not; and which candidate it had begun by then.
    """
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=target, args=(theirs, *arguments), daemon=True)
    child.start()
    theirs.close()
    begun = ""
    try:
        while ours.poll(limit_s):
            kind, value = ours.recv()
            if kind in ("record", "error"):
                return value, begun
            if kind == "begin":
                begun = value
            else:
                progress(value)
        return f"HANGS: nothing happened for {limit_s:.0f} s", begun
    except EOFError:
        child.join()
        return f"BREAKS its process, which ends with {child.exitcode}", begun
    finally:
        child.kill()
        child.join()


def _run(theirs: Connection, cell: Cell, choices: Choices, stopped: dict[str, str]) -> None:
    """In the child."""
    try:
        contest = Contest(Machine(), cell, choices)
        contest.stopped = dict(stopped)
        contest.begin = lambda name: theirs.send(("begin", name))
        with tuned_tiles.using(()):
            theirs.send(("record", contest.run(lambda text: theirs.send(("progress", text)))))
    except RuntimeError as error:
        theirs.send(("error", str(error)))
