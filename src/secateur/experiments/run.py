"""Run a recipe, or compare methods on one model; both are one job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.claims import claimed
from secateur.errors import InputError
from secateur.evaluation.catalogue import require_known
from secateur.experiments.grid import check_healing, rows_of, study_of
from secateur.experiments.recipe import Recipe, Study, read_recipe
from secateur.experiments.stages import run_stages
from secateur.experiments.stages_run import Run, open_shapes_of
from secateur.experiments.state import CellOutcome, outcome_of
from secateur.experiments.study import HERE, Queue, begin, run_study
from secateur.jobs.job import Job, JobCost, describe_model, function_of
from secateur.jobs.runs import run_folder
from secateur.methods.sequence import read_sequence, whole_budget
from secateur.progress import SILENT, Progress


@dataclass(frozen=True)
class RunJob(Job[list[CellOutcome]]):
    """A run or a study in a folder.

    Attributes:
        recipe: the recipe.
        folder: the output folder; stages that are finished there with the same settings are skipped.
        queue: where the cells of a study run, and whether their checkpoints are kept.
        stage: called with the name of each stage of a single run before it begins.
        finished: called with the outcome of each cell of a study.
        progress: reports progress.
    """

    recipe: Recipe | Study
    folder: Path
    queue: Queue
    stage: Callable[[str], object]
    finished: Callable[[CellOutcome], object]
    progress: Progress

    @classmethod
    def prepare(
        cls,
        recipe: Recipe | Study | str | Path,
        out: str | Path | None = None,
        *,
        queue: Queue = HERE,
        stage: Callable[[str], object] = lambda _: None,
        finished: Callable[[CellOutcome], object] = lambda _: None,
        progress: Progress = SILENT,
    ) -> RunJob:
        """Run a recipe from its file: prune, heal, measure; or a whole study.

        Stages that are finished in the folder with the same settings are skipped.

        Args:
            recipe: the recipe, or its YAML file.
            out: folder to write; None makes a new one under `secateur-runs/`.
            queue: for a study: where its cells run, and what stays of them.
            stage: told the name of each stage of a single run before it begins.
            finished: told of each cell of a study when it is over.
            progress: shows how far it is.

        Returns:
            What came of the run, or of each cell of the study, with its folder.

        Raises:
            InputError: an unknown key, method or setting, or a folder secateur did not create.
            SecateurError: a stage of a single run cannot be done. In a study that is noted in the cell's folder.
        """
        asked = recipe if isinstance(recipe, Recipe | Study) else read_recipe(recipe)
        _require_runnable(asked)
        if isinstance(asked, Recipe) and queue != HERE:
            raise InputError("a single run has no cells: --on, --address, --workers and --no-keep are for studies.")
        command = "compare" if isinstance(asked, Study) else "run"
        folder = Path(out) if out is not None else run_folder(asked.model, command)
        return cls(asked, folder, queue, stage, finished, progress)

    def cost(self) -> JobCost:
        """Return the cells of a recipe, and the disk space of their checkpoints."""
        dense = open_shapes_of(self.recipe)
        if isinstance(self.recipe, Recipe):
            what = (f"{self.recipe.prune.method}, then {', '.join(_stages(self.recipe))}",)
            return JobCost(models=(describe_model(dense), *what))
        rows = rows_of(self.recipe)
        cells = [cell.name for row in rows for cell in row]
        most = len(cells) * dense.checkpoint_bytes / 2**30
        each = ", ".join(_stages(rows[0][0].recipe))
        lines = f"{len(cells)} cells: {', '.join(cells)}"
        room = f"each: {each}; at most {most:,.2f} GiB on the disk (--no-keep: less)"
        return JobCost(models=(describe_model(dense), lines), disk=(room,))

    def run(self) -> list[CellOutcome]:
        """Run what is not finished.

        Raises:
            InputError: another process is writing the folder.
        """
        with claimed(self.folder):
            return self._outcomes()

    def _outcomes(self) -> list[CellOutcome]:
        if isinstance(self.recipe, Study):
            return run_study(self.recipe, self.folder, queue=self.queue, finished=self.finished, progress=self.progress)
        begin(self.folder, "run", self.recipe.to_yaml(), {"model": self.recipe.model})
        for name in run_stages(Run(self.recipe, self.folder, progress=self.progress)):
            self.stage(name)
        return [outcome_of(self.folder, self.recipe.asked_gate())]


run = function_of(RunJob.prepare, "run")


def compare(
    model: str,
    *,
    methods: Sequence[str | dict[str, Any]],
    remove: Sequence[float | str],
    heal: Sequence[str | dict[str, Any]] = (),
    out: str | Path | None = None,
    queue: Queue = HERE,
    finished: Callable[[CellOutcome], object] = lambda _: None,
    progress: Progress = SILENT,
    **settings: Any,
) -> list[CellOutcome]:
    """Compare methods × amounts × healing recipes on one model, each cell in its own process.

    Args:
        model: a checkpoint folder, a Hub name, or `bundled`.
        methods: names, or `{"method": …, "settings": {…}, "name": …}`.
        remove: shares of all parameters, 0.25 or "25%".
        heal: `none`, or `{"with": "lora", "tokens": "1M", …}`; empty means `none`.
        out: output folder; None creates one. Finished stages of an earlier study there are not run again.
        queue: where the cells run, and whether their checkpoints are kept.
        finished: called with the outcome of each cell.
        progress: reports progress.
        settings: other keys of a recipe: `texts`, `windows`, `seed`, `eval`, `bench`, `generate`, …

    Returns:
        The outcome of each cell, including failed ones.

    Raises:
        InputError: an unknown method, setting or amount, or a folder secateur did not create.
        SecateurError: the dense model cannot be opened or measured.
    """
    study = study_of(model, list(methods), list(remove), list(heal), settings)
    return run(study, out, queue=queue, finished=finished, progress=progress)


def _require_runnable(asked: Recipe | Study) -> None:
    """Check a recipe before anything is run.

    Raises:
        InputError: an unknown method, healing recipe, task or setting, or an invalid amount.
    """
    if isinstance(asked, Study):
        rows_of(asked)
    else:
        parts = read_sequence(asked.prune.method, asked.prune.settings)
        whole_budget(parts, asked.prune.amount())
        if asked.heal is not None:
            check_healing(asked.heal)
    request = asked.eval.request() if asked.eval is not None else None
    if request is not None:
        require_known(",".join(request.names))


def _stages(recipe: Recipe) -> list[str]:
    asked = {"heal": recipe.heal, "eval": recipe.eval, "bench": recipe.bench, "generate": recipe.generate}
    return ["prune", *(name for name, section in asked.items() if section is not None)]
