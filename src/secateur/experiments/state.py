"""Where a run's files are, which of its stages are finished, and what came of it, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from secateur.errors import InputError
from secateur.evaluation.gate import Gate, accuracies_in
from secateur.evaluation.metrics.perplexity import mean_over_sources
from secateur.evaluation.reference import RESULTS
from secateur.evaluation.results import Result, read_results
from secateur.files import replace_file
from secateur.reading import MIB, FileKind, from_json

FORMAT = 1
STATE_FILE = FileKind("state of a run", 16 * MIB, advice="Remove it to start over.")
_MEASURED = ("eval", "bench", "generate")
_LATER = {"plan": ("prune", "heal", *_MEASURED), "prune": ("heal", *_MEASURED), "heal": _MEASURED}
"""For each stage, the stages that use its result."""


@dataclass
class State:
    """The state of one folder.

    Attributes:
        folder: the folder.
        name: name of the run, which is that of its folder.
        stages: each finished stage with its `key` (what it depends on), its `seconds` and other facts.
        failed: the stage that failed last and why; None if nothing failed.
    """

    folder: Path
    name: str
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] | None = None

    @classmethod
    def of(cls, folder: Path) -> State:
        """Read the state of a folder, or return a new one.

        Raises:
            InputError: the file is of another version, or not a state.
        """
        path = folder / STATE
        if not path.exists():
            return cls(folder, folder.name)
        data = STATE_FILE.json(path)
        version = data.get("format") if isinstance(data, dict) else None
        if version != FORMAT and isinstance(version, int):
            raise InputError(f"{path}: written by another version of secateur (format {version}); use another folder.")
        written = STATE_FILE.parsed(path, lambda text: _Written.model_validate(from_json(text)))
        failed = None if written.failed is None else written.failed.model_dump()
        stages = {name: stage.model_dump(exclude_unset=True) for name, stage in written.stages.items()}
        return cls(folder, written.name, stages, failed)

    def finished(self, stage: str, key: str) -> bool:
        """Return whether a stage was done with these settings."""
        return self.stages.get(stage, {}).get("key") == key

    def begin(self, stage: str, keys: Mapping[str, str] | None = None) -> None:
        """Record that a stage is starting: it and the stages that use its earlier result are no longer finished.

        Stages done with these keys stay finished, because the stage will produce the same result again.
        """
        outdated = {name for name in _LATER.get(stage, ()) if not self.finished(name, (keys or {}).get(name, ""))}
        self.forget({stage} | outdated)

    def forget(self, stages: Collection[str]) -> None:
        """Record that these stages are not finished."""
        self.stages = {name: done for name, done in self.stages.items() if name not in stages}
        self.write()

    def clear_failure(self) -> None:
        """Record that nothing is left to do, and clear an earlier failure."""
        if self.failed is not None:
            self.failed = None
            self.write()

    def finish(self, stage: str, key: str, seconds: float, **more: Any) -> None:
        """Record that a stage is done."""
        self.stages[stage] = {"key": key, "seconds": round(seconds, 1), **more}
        self.failed = None
        self.write()

    def fail(self, stage: str, error: BaseException) -> None:
        """Record that a stage failed."""
        self.failed = {"stage": stage, "kind": type(error).__name__, "error": str(error) or type(error).__name__}
        self.write()

    def write(self) -> None:
        """Write the file."""
        data = {"format": FORMAT, "name": self.name, "stages": self.stages, "failed": self.failed}
        replace_file(self.folder / STATE, json.dumps(data, indent=2) + "\n")


class _Stage(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    key: str
    seconds: float
    removed: float | None = None
    cut: str | None = Field(None, pattern=r"^(\.\./[^/]+/)?[^/]+$")
    facts: dict[str, Any] | None = None


class _Failed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    stage: str
    kind: str
    error: str


class _Written(BaseModel):
    """The file of a state."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    name: str
    stages: dict[str, _Stage]
    failed: _Failed | None


RECIPE, STATE = "recipe.yaml", "state.json"
PLAN, CUT, HEALED = "plan.json", "cut", "healed"
SPEEDS, SAMPLES = "bench.jsonl", "generations.json"
CELLS, DENSE, SCORES = "cells", "dense", "scores.json"
"""Names in the folder of a study: its cells, each a run; measurements of the dense model; its scores."""


@dataclass(frozen=True)
class CellOutcome:
    """The outcome of a cell.

    Attributes:
        name: of the cell.
        folder: its folder.
        removed: share of the parameters that the plan removes; None if there is no plan.
        perplexity: on held-out text, the geometric mean over several sources; None if it was not measured.
        tasks: values of `acc`, `stability` and the like, by task and measure.
        speedup: tokens per second relative to the dense model, of `prefill` and `decode`, for the first request.
        seconds: total time of its stages.
        failed: the stage that failed, and why.
        fails: why it does not pass the gate; None if it does, or nothing was held against one.
    """

    name: str
    folder: Path
    removed: float | None
    perplexity: float | None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failed: dict[str, str] | None = None
    fails: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as plain data."""
        return asdict(self) | {"folder": str(self.folder)}


def outcome_of(folder: Path, gate: Gate | None = None, dense: Path | None = None) -> CellOutcome:
    """Read the outcome of the cell in a folder.

    Args:
        folder: of the cell.
        gate: what its accuracies are held against, once it and the dense model were asked the probes.
        dense: folder with the results of the dense model; None if they stand beside its own.

    Raises:
        InputError: a file there is of another version.
    """
    state = State.of(folder)
    results = read_results(folder / RESULTS) if "eval" in state.stages else ()
    speeds = read_results(folder / SPEEDS) if "bench" in state.stages else ()
    own = [one for one in results if one.role == "model"]
    read = [one.value for one in own if one.measure == "perplexity"]
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
        perplexity=mean_over_sources(read) if read else None,
        tasks=tasks,
        speedup=speedup,
        seconds=sum(stage["seconds"] for stage in state.stages.values()),
        failed=state.failed,
        fails=_failing(gate, own, read_results(dense / RESULTS) if dense and gate and own else results),
    )


def _failing(gate: Gate | None, own: Sequence[Result], others: Sequence[Result]) -> str | None:
    """Return why a cell does not pass; None if it does, or it or the dense model was not asked."""
    before, after = accuracies_in(one for one in others if one.role == "against"), accuracies_in(own)
    if gate is None or not set(gate.probes) <= set(before) or not set(gate.able(before)) <= set(after):
        return None
    return gate.failing(before, after)
