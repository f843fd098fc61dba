"""What of a run is finished, in a file of its folder: a stage counts only for the settings it was done with."""

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
"""Stages that work on what an earlier one made."""


@dataclass
class State:
    """The state of one folder.

    Attributes:
        folder: where it is kept.
        name: of the run; that of its folder.
        stages: each finished stage with its `key` (what it depends on), its `seconds` and what else is to be known.
        failed: the stage that could not be done and why, as it was tried last; None where nothing failed.
    """

    folder: Path
    name: str
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] | None = None

    @classmethod
    def of(cls, folder: Path) -> State:
        """Read the state of a folder; a new one where there is none.

        Raises:
            InputError: the file is of another version, or something else.
        """
        path = folder / STATE
        if not path.exists():
            return cls(folder, folder.name)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found, version = cls(folder, data["name"], data["stages"], data["failed"]), data["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not the state of a run ({error}); remove it to begin again.") from error
        if version != FORMAT:
            raise InputError(f"{path}: written by another version of secateur (format {version}); take another folder.")
        return found

    def finished(self, stage: str, key: str) -> bool:
        """Whether a stage was done with these settings."""
        return self.stages.get(stage, {}).get("key") == key

    def begin(self, stage: str, keys: Mapping[str, str] | None = None) -> None:
        """Note that a stage is being done: it, and what was made of what it made before, is not finished.

        What was done with these keys stays: the stage makes the same again.
        """
        outdated = {name for name in _LATER.get(stage, ()) if not self.finished(name, (keys or {}).get(name, ""))}
        self.forget({stage} | outdated)

    def forget(self, stages: Collection[str]) -> None:
        """Note that these are not finished."""
        self.stages = {name: done for name, done in self.stages.items() if name not in stages}
        self.write()

    def clear_failure(self) -> None:
        """Note that nothing is left to do, so that no failure concerns anyone any more."""
        if self.failed is not None:
            self.failed = None
            self.write()

    def finish(self, stage: str, key: str, seconds: float, **more: Any) -> None:
        """Note that a stage is done."""
        self.stages[stage] = {"key": key, "seconds": round(seconds, 1), **more}
        self.failed = None
        self.write()

    def fail(self, stage: str, error: BaseException) -> None:
        """Note that a stage could not be done."""
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
"""In the folder of a study: its cells, each a run; what was measured of the dense model; its scores."""
