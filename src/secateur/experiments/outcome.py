"""The outcome of a cell, read from its folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.evaluation.reference import RESULTS
from secateur.evaluation.results import read_results
from secateur.experiments.state import SPEEDS, State


@dataclass(frozen=True)
class CellOutcome:
    """The outcome of a cell.

    Attributes:
        name: of the cell.
        folder: its folder.
        removed: share of the parameters that the plan removes; None if there is no plan.
        perplexity: on held-out text; None if it was not measured.
        tasks: values of `acc`, `stability` and the like, by task and measure.
        speedup: tokens per second relative to the dense model, of `prefill` and `decode`, for the first request.
        seconds: total time of its stages.
        failed: the stage that failed, and why.
    """

    name: str
    folder: Path
    removed: float | None
    perplexity: float | None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failed: dict[str, str] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as plain data."""
        return asdict(self) | {"folder": str(self.folder)}


def outcome_of(folder: Path) -> CellOutcome:
    """Read the outcome of the cell in a folder.

    Raises:
        InputError: a file there is of another version.
    """
    state = State.of(folder)
    results = read_results(folder / RESULTS) if "eval" in state.stages else ()
    speeds = read_results(folder / SPEEDS) if "bench" in state.stages else ()
    own = [one for one in results if one.role == "model"]
    tasks: dict[str, dict[str, float]] = {}
    for one in own:
        if one.task is not None:
            tasks.setdefault(one.task, {})[one.measure] = one.value
    speedup: dict[str, float] = {}
    for one in speeds:
        if one.role == "model" and one.ratio is not None and one.measure.endswith("tokens_per_second"):
            speedup.setdefault(one.measure.split("_")[0], one.ratio)
    return CellOutcome(
        name=state.name,
        folder=folder,
        removed=state.stages.get("plan", {}).get("removed"),
        perplexity=next((one.value for one in own if one.measure == "perplexity"), None),
        tasks=tasks,
        speedup=speedup,
        seconds=sum(stage["seconds"] for stage in state.stages.values()),
        failed=state.failed,
    )
