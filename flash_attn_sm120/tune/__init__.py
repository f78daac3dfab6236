"""``python -m flash_attn_sm120 tune``: the tile table of this GPU, measured.

A cell (``grid.py``) is what one row of the table can tell apart: the direction, head dims, causal
or full, and a bucket of query rows, in the backward of keys, per multiprocessor. Packed sequences
are served by the same rows, by the rows of the longest, and are measured in each cell, too. In each
cell every tile that may be fast (``candidates.py``) is compiled, run once and compared with the
fallback, the tile that csrc/tiles.c chooses: out and lse, or the gradients. Those that are right
are timed beside it (``contest.py``, on the GPU of ``machine.py``):

- Round-robin, so that drifting clocks hit all alike; what counts is each candidate's ratio to the
  fallback in the same round. A soak goes before. A sample is one call whose L2 was overwritten: of
  calls in a row all but the first find K and V there, which flatters the TMA.
- In rounds of elimination: few samples of many candidates, then many of few. Tiles compete with K
  and V brought by cp.async; the best of them then also by the TMA, where there is one. The backward
  has no such choice.
- A candidate is accepted at MIN_GAIN over the calls of the cell, if it makes none of them slower
  and its ratios scatter by no more than MAX_SPREAD.

Tiles that spill registers are not sought out: they compile, and lose against the clock.

The command runs every contest in a child process (``trial.py``): a tile that hangs or breaks
the GPU is noted, and is not run again.

Every cell is appended to ``<gpu>-<arch>.jsonl`` (``journal.py``) as soon as it is done.
``tiles.json`` (``table.py``) is made of all cells in that file, those of earlier runs included, and
is loaded at import from then on.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flash_attn_sm120 import tuned_tiles
from flash_attn_sm120.tune import table, trial
from flash_attn_sm120.tune.candidates import BACKWARD_CHOICES, Choices
from flash_attn_sm120.tune.contest import Contest
from flash_attn_sm120.tune.grid import Cell
from flash_attn_sm120.tune.journal import Journal
from flash_attn_sm120.tune.machine import Machine
from flash_attn_sm120.tuned_tiles import BACKWARD


def tune(
    machine: Machine,
    wanted: Sequence[Cell],
    choices: Choices,
    where: Path,
    run: Callable[[Contest, trial.Progress, trial.Note], dict[str, Any]] = trial.in_process,
    backward_choices: Choices = BACKWARD_CHOICES,
) -> int:
    """Measures the cells that are not in the journal yet, and writes the table.

    Returns:
        An exit status: 0, 1 where a kernel was wrong, 130 if interrupted.

    Raises:
        RuntimeError: a file cannot be written, or the GPU fails.
    """
    name = re.sub(r"\W+", "-", machine.device["name"]).strip("-").lower()
    journal = Journal(where / f"{name}-{machine.arch}.jsonl", machine)
    status = 0
    with tuned_tiles.using(()), tqdm(wanted, unit="cell", dynamic_ncols=True) as bar:
        try:
            for cell in bar:
                bar.set_description(str(cell))
                own = backward_choices if cell.direction == BACKWARD else choices
                contest = Contest(machine, cell, own)
                if not journal.has(contest):
                    contest.stopped = journal.broken(cell)
                    note = functools.partial(journal.add_broken, cell)
                    record = run(contest, bar.set_postfix_str, note)
                    journal.add(cell, record)
                    bar.write(table.summary(cell, record))
                    if any("WRONG" in why for why in record["stopped"].values()):
                        status = 1
        except KeyboardInterrupt:
            bar.write(f"interrupted: {bar.n} of {len(wanted)} cells are done, and kept")
            status = 130
    if journal.cells:  # else the table of an older version stays
        table.publish(where / "tiles.json", journal)
    return status
