"""The report's data: cells of a study (or a single result) and the dense model, as read from folders."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.evaluation.gate import Gate
from secateur.evaluation.metrics.perplexity import GEOMEAN
from secateur.evaluation.results import Result
from secateur.plan.plan import Plan
from secateur.scores.profile import Scores

AVERAGE = "average"
ACCURACIES = ("acc_norm", "acc", "exact_match", "acc_per_token")
"""Measures that count as a task's accuracy, in order of preference."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A model's continuation of a prompt; `truth` is the real one."""

    prompt: str
    text: str
    truth: str = ""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a cell failed: the stage, the type of error, its message."""

    stage: str
    kind: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All measurements of one model."""

    results: tuple[Result, ...] = ()
    samples: tuple[Sample, ...] = ()

    def perplexities(self) -> dict[str, Result]:
        """Return the perplexity on each text, by source."""
        found: dict[str, Result] = {}
        for one in self.results:
            if one.measure == "perplexity" and one.task is None and one.texts:
                found.setdefault(one.texts.get("source", "text"), one)
        return found

    def ratios_to(self, dense: Measured) -> dict[str, float]:
        """Return the perplexities as multiples of the dense model's, by source; of the texts that both have read."""
        there = dense.perplexities()
        return {
            source: one.value / there[source].value
            for source, one in self.perplexities().items()
            if source in there and one.texts.get("fingerprint") == there[source].texts.get("fingerprint")
        }

    def metrics(self) -> dict[str, Result]:
        """Return what else was measured on held-out text, by metric; the first where several texts were read."""
        found: dict[str, Result] = {}
        for one in self.results:
            if one.task is None and one.texts and one.measure not in ("perplexity", GEOMEAN):
                found.setdefault(one.measure, one)
        return found

    def tasks(self) -> list[str]:
        """Return the names of the tasks, without their average."""
        return list(dict.fromkeys(one.task for one in self.results if one.task not in (None, AVERAGE)))

    def of_task(self, task: str, *measures: str) -> Result | None:
        """Return the first of these measures that a task has."""
        found = {one.measure: one for one in self.results if one.task == task}
        return next((found[name] for name in measures if name in found), None)

    def accuracy(self) -> float | None:
        """Return the mean accuracy over the tasks."""
        return self._over_tasks(*ACCURACIES)

    def stability(self) -> float | None:
        """Return the mean stability over the tasks."""
        return self._over_tasks("stability")

    def flips(self) -> float | None:
        """Return the mean share of changed answers over the tasks."""
        return self._over_tasks("flips")

    def ratio(self, measure: str) -> Result | None:
        """Return a measure of `bench` with a ratio, of the smallest request: fewest sequences, shortest prompt."""
        found = [one for one in self.results if one.measure == measure and one.ratio is not None]
        return min(found, key=lambda one: (one.settings.get("batch", 0), one.settings.get("prompt", 0)), default=None)

    def _over_tasks(self, *measures: str) -> float | None:
        found = [one.value for task in self.tasks() if (one := self.of_task(task, *measures)) is not None]
        return math.fsum(found) / len(found) if found else None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One pruned model, or the attempt to make it.

    Attributes:
        name: name of its folder.
        folder: its folder.
        method: the method, or several in order.
        amount: the requested amount as text; empty if unknown.
        healing: the healing recipe; None if it was not healed.
        plans: the applied plans, oldest first.
        healed: records of healing, oldest first.
        measured: measurements and samples of this model.
        removed: share of all parameters removed; None before it is known.
        parameters, blocks: of the result.
        seconds: time by stage.
        checked: result of the check in a fresh process; None if it was not run.
        recipe: the recipe file, if there is one.
        checkpoint: the folder of its final checkpoint, if there is one.
        failure: why it failed, if it did.
    """

    name: str
    folder: Path
    method: str
    amount: str = ""
    healing: str | None = None
    plans: tuple[Plan, ...] = ()
    healed: tuple[dict[str, Any], ...] = ()
    measured: Measured = field(default_factory=Measured)
    removed: float | None = None
    parameters: int | None = None
    blocks: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    checked: bool | None = None
    recipe: Path | None = None
    checkpoint: Path | None = None
    failure: Failure | None = None

    @property
    def label(self) -> str:
        """Return a label such as `sleb + lora`."""
        return f"{self.method} + {self.healing}" if self.healing else self.method


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Contents of an output folder.

    Attributes:
        kind: the command that wrote it, such as `compare`, `run`, `demo`, `prune`.
        folder: the folder.
        model: the dense model's path or Hub name.
        cells: the models made from it.
        dense: measurements of the dense model.
        scores: redundancy scores of the dense model, if measured.
        versions: versions of the software.
        gate: what the cells must not have lost, if anything.
    """

    kind: str
    folder: Path
    model: str
    cells: tuple[Cell, ...] = ()
    dense: Measured = field(default_factory=Measured)
    scores: Scores | None = None
    versions: dict[str, str] = field(default_factory=dict)
    gate: Gate | None = None

    @property
    def is_study(self) -> bool:
        """Return whether there are several cells to compare."""
        return len(self.cells) > 1

    @property
    def model_name(self) -> str:
        """Return the model's name without its parent folders; Hub names are kept whole."""
        return Path(self.model).name if self.model.startswith(("/", ".", "~")) else self.model

    def plan(self) -> Plan | None:
        """Return any plan for the dense model."""
        return next((cell.plans[0] for cell in self.cells if cell.plans), None)


def method_of(plans: tuple[Plan, ...]) -> str:
    """Return the unique methods of all steps, in order."""
    return ", then ".join(dict.fromkeys(step.method for plan in plans for step in plan.steps)) or "nothing"


def amount_of(requested: dict[str, Any]) -> str:
    """Return the requested amount as text: `20 %`, `4 blocks`, `20 % of directions`, `parameters 5.5B`."""
    for name, value in requested.items():
        if value is None:
            continue
        if name in ("remove", "slice"):
            share = percent(value)
            return share if name == "remove" else f"{share} of directions"
        if name == "blocks":
            return f"{value} blocks" if value != 1 else "1 block"
        if name.startswith("target_"):
            return f"{name.removeprefix('target_')} {value:,.0f}" if _large(value) else f"{name[7:]} {value}"
    return ""


def percent(value: float | str) -> str:
    """Format a fraction as a percentage; a value that is already text is returned unchanged."""
    if isinstance(value, str):
        return value if "%" not in value else value.replace("%", " %").replace("  ", " ")
    return f"{100 * value:.3g} %"


def _large(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 1000
