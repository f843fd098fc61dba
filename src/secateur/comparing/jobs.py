"""A job: some cells of a study, run one after the other in a process of their own.

Memory is free again when the process ends, and what kills one cell (the system, for want of memory) is noted and
stops no other. A job runs wherever the study's folder can be reached.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.pipeline.layout import CELLS
from secateur.pipeline.state import State

LOG = "log.txt"
DONE = "finished"
"""What a job's process prints, with the name of a cell, when it has done or failed it."""


@dataclass(frozen=True)
class Job:
    """Some cells of a study.

    Attributes:
        study: its folder.
        first: the first cell of their row, whose plan and cut they take over where theirs would be the same.
        cells: their names.
        stages: which stages are done; None means all.
    """

    study: Path
    first: str
    cells: tuple[str, ...]
    stages: tuple[str, ...] | None = None


def run_job(
    job: Job,
    environment: Mapping[str, str],
    started: Callable[[subprocess.Popen[str]], object] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Run a job until every cell of it is done or noted as failed.

    Args:
        job: the cells.
        environment: what its processes find in theirs besides, such as the device they may use.
        started: told of each process, which leads a group of its own.
        stopped: whether the study was stopped, so that a process that ended has not failed.
    """
    left = job.cells
    while left:
        with (job.study / CELLS / left[0] / LOG).open("a", encoding="utf-8") as log:
            command = [sys.executable, "-m", "secateur.comparing.cell", str(job.study), *left]
            command += ["--first", job.first] + (["--stages", ",".join(job.stages)] if job.stages else [])
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **environment},
                start_new_session=True,
            )
            started(process)
            output, _ = process.communicate()
            code = process.returncode
        if stopped():
            return
        over = [line.removeprefix(f"{DONE} ") for line in output.splitlines() if line.startswith(f"{DONE} ")]
        left = tuple(name for name in left if name not in over)
        if left:
            _note_death(job.study / CELLS / left[0], code)
            left = left[1:]


def _note_death(folder: Path, code: int) -> None:
    why = f"its process ended with code {code}; see {LOG}"
    if code < 0:
        why = f"its process was killed by {signal.Signals(-code).name}"
        why += "; was there too little memory?" if -code == signal.SIGKILL else ""
    State.of(folder).fail("process", RuntimeError(why))
