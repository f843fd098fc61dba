"""The folder of a training run: its recipe, its log, the best state so far, and the state to resume from."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import distributed

from secateur.errors import InputError

_RECIPE, _LOG = "recipe.json", "log.jsonl"
_STATE, _BEST = "state", "best"


class RunFolder:
    """A folder from which an interrupted run resumes; every part is written atomically.

    Tensors are written by `torch.distributed.checkpoint`, each process writing its part.

    Attributes:
        path: the folder.
        lasting: whether it stays after the run, so that a later call can resume.
        writes: whether this process writes the files that are written once.
    """

    def __init__(self, path: Path | None, recipe: dict[str, Any], *, writes: bool = True) -> None:
        """Open a folder, or a temporary one that is deleted with the object.

        Args:
            path: the folder; None takes a temporary one.
            recipe: what identifies this run: settings, data, model.
            writes: whether this process writes the files that are written once.

        Raises:
            InputError: the folder belongs to another run, or is not the folder of a run.
        """
        self.lasting = path is not None
        if path is None:
            path = Path(tempfile.mkdtemp(prefix="secateur-training-"))
            self._removal = weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
        self.path, self.writes = path, writes
        written = path / _RECIPE
        asked = json.loads(json.dumps(recipe))
        if written.is_file():
            _require_same(path, json.loads(written.read_text(encoding="utf-8")), asked)
        elif path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path}: not the folder of a training run; choose another, or remove it.")
        if writes and not written.is_file():
            path.mkdir(parents=True, exist_ok=True)
            written.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")

    def last_state(self) -> Path | None:
        """Return the newest complete state to resume from, if there is one."""
        return self._newest(_STATE)

    def best_state(self) -> Path | None:
        """Return the best state so far, if there is one."""
        return self._newest(_BEST)

    def save_state(self, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """Save a state to resume from, replacing the one before."""
        self._save(_STATE, step, tensors, facts)

    def save_best(self, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """Save the best state, replacing the one before."""
        self._save(_BEST, step, tensors, facts)

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to the log."""
        if self.writes:
            with (self.path / _LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def log_entries(self) -> list[dict[str, Any]]:
        """Return the log, line by line."""
        file = self.path / _LOG
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def forget_after(self, step: int) -> None:
        """Remove what an interrupted run logged after its last saved state."""
        if self.writes:
            kept = [entry for entry in self.log_entries() if entry["step"] <= step]
            (self.path / _LOG).write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def _newest(self, kind: str) -> Path | None:
        found = sorted(self.path.glob(f"{kind}-*[0-9]"))
        return found[-1] if found else None

    def _save(self, kind: str, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        target = self.path / f"{kind}-{step:09d}"
        partial = self.path / f"{kind}-{step:09d}.part"
        if self.writes:
            shutil.rmtree(partial, ignore_errors=True)
        write(tensors, partial)
        if not self.writes:
            return
        (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for older in self.path.glob(f"{kind}-*"):
            if older != target:
                shutil.rmtree(older, ignore_errors=True)


def write(tensors: dict[str, Any], folder: Path) -> None:
    """Write tensors; every process must call this and writes its part."""
    with _quiet():
        dcp.save(tensors, checkpoint_id=folder, no_dist=not _together())


def read(tensors: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read saved values into tensors of the same names and shapes; return the facts saved with them."""
    with _quiet():
        dcp.load(tensors, checkpoint_id=folder, no_dist=not _together())
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return facts


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _require_same(path: Path, written: dict[str, Any], asked: dict[str, Any]) -> None:
    if written == asked:
        return
    differing = sorted(key for key in written.keys() | asked.keys() if written.get(key) != asked.get(key))
    raise InputError(
        f"{path}: holds a run of another recipe (other {', '.join(differing)}); give the settings it was begun with to "
        "resume, or remove the folder to start over."
    )
