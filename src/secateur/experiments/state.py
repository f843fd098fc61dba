"""The state of a run, saved in its folder, and the file names of runs and studies.

A finished stage is valid only for the settings it was run with.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import InputError
from secateur.files import replace_file

FORMAT = 1
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
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found, version = cls(folder, data["name"], data["stages"], data["failed"]), data["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not the state of a run ({error}); remove it to start over.") from error
        if version != FORMAT:
            raise InputError(f"{path}: written by another version of secateur (format {version}); use another folder.")
        return found

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


RECIPE, STATE = "recipe.yaml", "state.json"
PLAN, CUT, HEALED = "plan.json", "cut", "healed"
SPEEDS, SAMPLES = "bench.jsonl", "generations.json"
CELLS, DENSE, SCORES = "cells", "dense", "scores.json"
"""Names in the folder of a study: its cells, each a run; measurements of the dense model; its scores."""
