"""Studies: work that cells share is done once, then the cells go through a queue, each with its own folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from accelerate.utils.memory import clear_device_cache

from secateur.checkpoints.folders import check_target, read_record
from secateur.data.local_files import stamp_of
from secateur.errors import InputError, unknown
from secateur.evaluation.gate import accuracies_in
from secateur.evaluation.reference import Reference
from secateur.experiments import queue as local
from secateur.experiments.grid import Cell, parts_of, rows_of
from secateur.experiments.queue import CellGroup
from secateur.experiments.recipe import Study
from secateur.experiments.stages import keep_samples
from secateur.experiments.stages_run import Run, fingerprint_of, measuring_key
from secateur.experiments.state import (
    CELLS,
    CUT,
    DENSE,
    HEALED,
    RECIPE,
    SAMPLES,
    SCORES,
    CellOutcome,
    State,
    outcome_of,
)
from secateur.files import replace_file
from secateur.jobs.evaluate import measure_reference
from secateur.jobs.runs import write_marker
from secateur.jobs.score import score
from secateur.models.decoder import Decoder
from secateur.models.fetch import BUNDLED
from secateur.models.opening import open_model
from secateur.progress import SILENT, Progress
from secateur.scores.profile import ONE_PASS, Kind
from secateur.versions import digest

Engine = Literal["local", "ray"]
ENGINES = get_args(Engine)


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Where the cells of a study run, and whether their checkpoints are kept.

    Attributes:
        on: `local`, the devices of this machine, or `ray`, a cluster all of whose nodes see the folder.
        address: address of the Ray cluster; None starts one here.
        workers: processes at a time; None is one per GPU, or one.
        keep: whether checkpoints are kept after they are measured.
    """

    on: Engine = "local"
    address: str | None = None
    workers: int | None = None
    keep: bool = True

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: an unknown engine, or fewer than one worker.
        """
        if self.on not in ENGINES:
            raise unknown("engine", self.on, list(ENGINES))
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers {self.workers}: must be at least 1.")


HERE = Queue()


def run_study(
    study: Study,
    folder: Path,
    *,
    queue: Queue = HERE,
    finished: Callable[[CellOutcome], object] = lambda _: None,
    progress: Progress = SILENT,
) -> list[CellOutcome]:
    """Run the unfinished cells of a study.

    Args:
        study: the grid and how its cells are measured.
        folder: the output folder; an earlier study there is resumed.
        queue: where the cells run, and whether their checkpoints are kept.
        finished: called with the outcome of each cell.
        progress: reports progress.

    Raises:
        InputError: an unknown method or setting, a folder secateur did not create, or unavailable texts.
        SecateurError: the dense model cannot be opened or measured. Failures of cells are recorded in their folders.
    """
    study, folder = _placed(study), folder.resolve()
    rows = rows_of(study)
    kinds = _kinds(study)
    begin(folder, "compare", study.to_yaml(), {"model": study.model, "cells": sum(map(len, rows))})
    fingerprint = fingerprint_of(study)
    gate = study.asked_gate()
    _share(study, folder, fingerprint, kinds, progress)
    for cell in (cell for row in rows for cell in row):
        begin(folder / CELLS / cell.name, "run", cell.recipe.to_yaml(), {"model": study.model})
    count = queue.workers or (local.default_workers(study.device) if queue.on == "local" else None)
    phases = _phases(rows[0][0], count)
    for number, stages in enumerate(phases):
        names = [_pending(row, folder, fingerprint, stages, failed=number == 0) for row in rows]
        groups = [
            CellGroup(folder, row[0].name, cells, stages) for row, cells in zip(rows, names, strict=True) if cells
        ]
        what, at_a_time = "cells", count
        if number:  # one process for all, because nothing runs in parallel and starting one takes seconds
            cells = tuple(name for group in groups for name in group.cells)
            what, at_a_time, groups = (
                "speed of all cells",
                1,
                [CellGroup(folder, cells[0], cells, stages)] if cells else [],
            )
        for group in progress(_run_groups(queue, groups, at_a_time, study.device), what, len(groups)):
            for name in group.cells:
                outcome = outcome_of(folder / CELLS / name, gate, folder / DENSE)
                if number == 0 or outcome.failed:
                    finished(outcome)
            if not queue.keep and len(phases) == 1:
                _discard(next(row for row in rows if row[0].name == group.first), folder, fingerprint)
    if not queue.keep:
        for row in rows:
            _discard(row, folder, fingerprint)
    return [outcome_of(folder / CELLS / cell.name, gate, folder / DENSE) for row in rows for cell in row]


def begin(folder: Path, command: str, recipe: str, details: dict[str, Any]) -> None:
    """Create the folder of a run or study, or resume in an existing one.

    Raises:
        InputError: a folder secateur did not create, or one of another command.
    """
    check_target(folder, replaces=False)
    record = read_record(folder)
    if record and (found := record.get("command")) != command:
        raise InputError(f"{folder}: holds what `secateur {found or 'prune'}` wrote; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_marker(folder, command, details)
    replace_file(folder / RECIPE, recipe)


def _placed(study: Study) -> Study:
    """Return the study with absolute paths, which are valid wherever the cells run."""
    named = {name: Path(getattr(study, name)) for name in ("model", "texts") if getattr(study, name) != BUNDLED}
    return study.model_copy(update={name: str(path.resolve()) for name, path in named.items() if path.exists()})


def _kinds(study: Study) -> tuple[Kind, ...]:
    """Return the scores that are measured once for all cells: those of one pass, and others that the methods use."""
    slow = [kind for part in parts_of(study) for kind in part.method.scores(part.settings)]
    return tuple(dict.fromkeys((*ONE_PASS, *slow)))


def _share(study: Study, folder: Path, fingerprint: str, kinds: tuple[Kind, ...], progress: Progress) -> None:
    """Score and measure the dense model, unless that was done before with the same settings."""
    state = State.of(folder)
    opened: list[Decoder] = []

    def dense() -> Decoder:
        if not opened:
            opened.append(open_model(study.model, **study.opening()))
        return opened[0]

    @contextmanager
    def stage(name: str, *depends_on: Any) -> Iterator[bool]:
        key, begun = digest(fingerprint, study.opening(), *depends_on), time.perf_counter()
        pending = not state.finished(name, key)
        if pending:
            state.begin(name)
        yield pending
        if pending:
            state.finish(name, key, time.perf_counter() - begun)

    with stage("scores", study.reading(), stamp_of(study.texts), kinds) as pending:
        if pending:
            scores = score(dense(), **study.reading(), kinds=kinds, options=study.options(progress))
            scores.write(folder / SCORES)
    (folder / DENSE).mkdir(exist_ok=True)
    if study.eval is not None:
        with stage("dense", measuring_key(study)) as pending:
            if pending:
                found = measure_reference(dense(), **study.measuring(), options=study.options(progress))
                found.write(folder / DENSE)
        if (gate := study.asked_gate()) is not None:
            gate.require(accuracies_in(Reference.read(folder / DENSE).results))
    if study.generate is not None:
        with stage("generate", study.generate.model_dump(mode="json"), study.measuring()["texts"]) as pending:
            if pending:
                keep_samples(folder / DENSE / SAMPLES, dense(), study.measuring()["texts"], study.generate)
    opened.clear()
    clear_device_cache(garbage_collection=True)  # the cells' processes need the memory


def _phases(cell: Cell, workers: int | None) -> list[tuple[str, ...] | None]:
    """Return which stages run together: speed is measured when nothing else runs."""
    if cell.recipe.bench is None or workers == 1:
        return [None]
    return [("plan", "prune", "heal", "eval", "generate"), ("bench",)]


def _pending(
    row: Sequence[Cell], folder: Path, fingerprint: str, stages: Sequence[str] | None, *, failed: bool
) -> tuple[str, ...]:
    """Return the cells with pending stages; failed ones only if they are to be retried."""
    runs = {cell.name: Run(cell.recipe, folder / CELLS / cell.name, fingerprint=fingerprint) for cell in row}
    for run in runs.values():
        if not run.pending():
            run.state.clear_failure()
    return tuple(name for name, run in runs.items() if run.pending(stages) and (failed or not run.state.failed))


def _discard(row: Sequence[Cell], folder: Path, fingerprint: str) -> None:
    """Delete the checkpoints of cells that share a pruned model once all are measured; results are kept."""
    if any(Run(cell.recipe, folder / CELLS / cell.name, fingerprint=fingerprint).pending() for cell in row):
        return
    for cell in row:
        for name in (CUT, HEALED):
            shutil.rmtree(folder / CELLS / cell.name / name, ignore_errors=True)


def _run_groups(queue: Queue, groups: Sequence[CellGroup], workers: int | None, device: str) -> Iterator[CellGroup]:
    if queue.on == "local":
        return local.run_groups(groups, workers or 1, device)
    try:
        from secateur.experiments import on_ray
    except ImportError as error:
        raise InputError("ray is not installed: pip install 'secateur[ray]'.") from error
    return on_ray.run_groups(groups, workers, queue.address)
