"""Run a recipe, or compare methods on one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import InputError
from secateur.evaluation.catalogue import require_known
from secateur.experiments.grid import check_healing, rows_of, study_of
from secateur.experiments.outcome import CellOutcome, outcome_of
from secateur.experiments.recipe import Recipe, Study, read_recipe
from secateur.experiments.stages import go
from secateur.experiments.stages_run import Run
from secateur.experiments.study import Engine, begin, run_study
from secateur.jobs.runs import run_folder
from secateur.methods.sequence import read_sequence, whole_budget
from secateur.progress import SILENT, Progress


def run(
    recipe: Recipe | Study | str | Path,
    out: str | Path | None = None,
    *,
    on: Engine = "local",
    address: str | None = None,
    workers: int | None = None,
    keep: bool = True,
    stage: Callable[[str], object] = lambda _: None,
    finished: Callable[[CellOutcome], object] = lambda _: None,
    progress: Progress = SILENT,
) -> list[CellOutcome]:
    """Run a recipe from its file: prune, heal, measure; or a whole study.

    Stages that are finished in the folder with the same settings are skipped.

    Args:
        recipe: the recipe, or its YAML file.
        out: folder to write; None makes a new one under `secateur-runs/`.
        on, address, workers, keep, finished: for a study, see `compare`.
        stage: told the name of each stage of a single run before it begins.
        progress: shows how far it is.

    Returns:
        What came of the run, or of each cell of the study, with its folder.

    Raises:
        InputError: an unknown key, method or setting, or a folder that is none of ours.
        SecateurError: a stage of a single run cannot be done. In a study that is noted in the cell's folder.
    """
    asked = recipe if isinstance(recipe, Recipe | Study) else read_recipe(recipe)
    require_runnable(asked)
    command = "compare" if isinstance(asked, Study) else "run"
    folder = Path(out) if out is not None else run_folder(asked.model, command)
    if isinstance(asked, Study):
        return run_study(
            asked, folder, on=on, address=address, workers=workers, keep=keep, finished=finished, progress=progress
        )
    if on != "local" or address is not None or workers is not None or not keep:
        raise InputError("a single run has no cells: --on, --address, --workers and --no-keep are for studies.")
    begin(folder, command, asked.to_yaml(), {"model": asked.model})
    for name in go(Run(asked, folder, progress=progress)):
        stage(name)
    return [outcome_of(folder)]


def require_runnable(asked: Recipe | Study) -> None:
    """Find mistakes in a recipe before anything is done.

    Raises:
        InputError: an unknown method, way of healing, task or setting, or an amount that is none.
    """
    if isinstance(asked, Study):
        rows_of(asked)
    else:
        parts = read_sequence(asked.prune.method, asked.prune.settings)
        whole_budget(parts, asked.prune.amount())
        if asked.heal is not None:
            check_healing(asked.heal)
    if asked.eval is not None and asked.eval.tasks is not None:
        require_known(asked.eval.tasks if isinstance(asked.eval.tasks, str) else ",".join(asked.eval.tasks))


def compare(
    model: str,
    *,
    methods: Sequence[str | dict[str, Any]],
    remove: Sequence[float | str],
    heal: Sequence[str | dict[str, Any]] = (),
    out: str | Path | None = None,
    on: Engine = "local",
    address: str | None = None,
    workers: int | None = None,
    keep: bool = True,
    finished: Callable[[CellOutcome], object] = lambda _: None,
    progress: Progress = SILENT,
    **settings: Any,
) -> list[CellOutcome]:
    """Compare methods × amounts × ways of healing on one model, each cell in a process of its own.

    Args:
        model: a checkpoint folder, a hub name, or `bundled`.
        methods: names, or `{"method": …, "settings": {…}, "name": …}`.
        remove: shares of all parameters, 0.25 or "25%".
        heal: `none`, or `{"with": "lora", "tokens": "1M", …}`; nothing is `none`.
        out: folder to write; None makes a new one. Finished stages of an earlier study there are not done again.
        on: `local`: a queue over the devices here; `ray`: over a cluster, every node of which sees the folder.
        address: of the Ray cluster; None starts one here.
        workers: processes at a time; None is one per GPU, or one.
        keep: whether the checkpoints stay when they are measured.
        finished: told of each cell when it is over.
        progress: shows how far it is.
        settings: what else a recipe may say: `texts`, `windows`, `seed`, `eval`, `bench`, `generate`, …

    Returns:
        What came of each cell, failed ones included.

    Raises:
        InputError: an unknown method, setting or amount, or a folder that is none of ours.
        SecateurError: the dense model cannot be opened or measured.
    """
    study = study_of(model, list(methods), list(remove), list(heal), settings)
    return run(study, out, on=on, address=address, workers=workers, keep=keep, finished=finished, progress=progress)
