"""Groups of cells, and the local queue that runs them over the devices of this machine.

A group is a list of cells of a study that run one after the other in a process of their own. Memory is freed when the
process ends, and if a cell is killed (by the system, for lack of memory), that is recorded and the others continue. A
group runs wherever the study's folder can be reached.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch

from secateur.experiments.state import CELLS, State

LOG = "log.txt"
_PATIENCE_SECONDS = 5.0
DONE = "finished"
"""Printed by a group's process, with the name of a cell, when the cell is done or has failed."""


@dataclass(frozen=True)
class CellGroup:
    """Some cells of a study.

    Attributes:
        study: its folder.
        first: the first cell of their row, whose plan and pruned model they reuse if theirs would be the same.
        cells: their names.
        stages: which stages to run; None means all.
    """

    study: Path
    first: str
    cells: tuple[str, ...]
    stages: tuple[str, ...] | None = None


def run_group(
    group: CellGroup,
    environment: Mapping[str, str],
    started: Callable[[subprocess.Popen[str]], object] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Run a group until each of its cells is done or recorded as failed.

    Args:
        group: the cells.
        environment: additional environment variables of its processes, such as the device they may use.
        started: called with each process, which leads a process group of its own.
        stopped: returns whether the study was stopped, in which case a process that ended has not failed.
    """
    remaining = group.cells
    while remaining:
        with (group.study / CELLS / remaining[0] / LOG).open("a", encoding="utf-8") as log:
            command = [sys.executable, "-m", "secateur.experiments.cell", str(group.study), *remaining]
            command += ["--first", group.first] + (["--stages", ",".join(group.stages)] if group.stages else [])
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end tells the process that this one is gone
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **environment},
                start_new_session=True,
            )
            started(process)
            with process:
                assert process.stdout is not None, "a pipe"
                output = process.stdout.read()
            code = process.returncode
        if stopped():
            return
        over = [line.removeprefix(f"{DONE} ") for line in output.splitlines() if line.startswith(f"{DONE} ")]
        remaining = tuple(name for name in remaining if name not in over)
        if remaining:
            _note_death(group.study / CELLS / remaining[0], code)
            remaining = remaining[1:]


def _note_death(folder: Path, code: int) -> None:
    why = f"its process ended with code {code}; see {LOG}"
    if code < 0:
        why = f"its process was killed by {signal.Signals(-code).name}"
        why += "; was there too little memory?" if -code == signal.SIGKILL else ""
    State.of(folder).fail("process", RuntimeError(why))


def default_workers(device: str) -> int:
    """Return the number of processes at a time: one per GPU, but one if a device is named or there is none."""
    return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1


def run_groups(groups: Sequence[CellGroup], workers: int, device: str = "auto") -> Iterator[CellGroup]:
    """Run groups and yield each when it is done; groups still running when the generator is closed are stopped.

    One worker sees all devices. Several workers split the GPUs, unless one is named, or the cores.
    """
    slots: SimpleQueue[dict[str, str]] = SimpleQueue()
    for number in range(workers):
        slots.put(_environment(number, workers, device))
    running: set[subprocess.Popen[str]] = set()
    stop = threading.Event()

    def work(group: CellGroup) -> CellGroup:
        slot = slots.get()
        try:
            run_group(group, slot, running.add, stop.is_set)
        finally:
            slots.put(slot)
        return group

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, group) for group in groups]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            _end(running)


def _end(running: Collection[subprocess.Popen[str]]) -> None:
    """End processes and their children: first so that they can clean up, then at once."""
    for number, patience in ((signal.SIGTERM, _PATIENCE_SECONDS), (signal.SIGKILL, None)):
        left = [process for process in running if process.poll() is None]
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        until = time.monotonic() + (patience or 0)
        while patience and time.monotonic() < until and any(process.poll() is None for process in left):
            time.sleep(0.05)


def _environment(number: int, workers: int, device: str = "auto") -> dict[str, str]:
    """Return the environment variables that assign a device to a worker's processes."""
    if workers == 1:
        return {}
    if device in ("auto", "cuda") and torch.cuda.device_count():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = seen.split(",")
        return {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
