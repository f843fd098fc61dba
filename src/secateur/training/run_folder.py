"""The folder of a training run: its recipe, its log, the best state so far, and the state to resume from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from secateur.errors import InputError, first_line
from secateur.files import put_in_place, replace_file
from secateur.ownership import remove, scratch_folder
from secateur.reading import MIB, FileKind, from_json

_ADVICE = "Remove the folder to start over."
RECIPE_FILE = FileKind("recipe of a training run", 16 * MIB, advice=_ADVICE)
LOG_FILE = FileKind("log of training", 256 * MIB, advice=_ADVICE)
FACTS_FILE = FileKind("state of training", 16 * MIB, advice=_ADVICE)

_RECIPE, _LOG, _FACTS, _PARTIAL = "recipe.json", "log.jsonl", "facts.json", ".part"
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
            path = scratch_folder("training", self)
        self.path, self.writes = path, writes
        written = path / _RECIPE
        asked = json.loads(json.dumps(recipe))
        if written.is_file():
            _require_same(path, RECIPE_FILE.parsed(written, _object), asked)
        elif path.is_dir() and any(one for one in path.iterdir() if not one.name.startswith(f".{_RECIPE}.")):
            raise InputError(f"{path}: not the folder of a training run; choose another, or remove it.")
        if writes and not written.is_file():
            replace_file(written, json.dumps(asked, indent=1) + "\n")
        if writes:
            for partial in path.glob(f"*{_PARTIAL}"):
                remove(partial)

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
        lines = LOG_FILE.text(file).splitlines() if file.is_file() else []
        entries = [LOG_FILE.parsed_text(file, line, _object) for line in lines if line.endswith("}")]
        if not all(isinstance(entry.get("step"), int) for entry in entries):
            raise InputError(f"{file}: not a valid log of training: an entry has no step. Remove {self.path}.")
        return entries

    def forget_after(self, step: int) -> None:
        """Remove what an interrupted run logged after its last saved state."""
        if self.writes:
            kept = [entry for entry in self.log_entries() if entry["step"] <= step]
            replace_file(self.path / _LOG, "".join(json.dumps(entry) + "\n" for entry in kept))

    def _newest(self, kind: str) -> Path | None:
        found = sorted(self.path.glob(f"{kind}-*[0-9]"))
        return found[-1] if found else None

    def _save(self, kind: str, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        target = self.path / f"{kind}-{step:09d}"
        partial = self.path / f"{kind}-{step:09d}{_PARTIAL}"
        if self.writes:
            remove(partial)
        try:
            write(tensors, partial)
            if not self.writes:
                return
            (partial / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
            put_in_place(partial, target)
        except BaseException:
            if self.writes:
                remove(partial)
            raise
        for older in self.path.glob(f"{kind}-*"):
            if older != target:
                remove(older)


def write(tensors: dict[str, Any], folder: Path) -> None:
    """Write tensors; every process must call this and writes its part.

    Raises:
        InputError: they cannot be written, because the disk is full, for example.
        KeyboardInterrupt: it was stopped meanwhile.
    """
    try:
        with _quiet():
            dcp.save(tensors, checkpoint_id=folder, no_dist=not _together())
    except CheckpointException as error:
        raise _plain(error, folder) from error
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError) as error:
        raise _unwritable(folder, error) from error


def _plain(error: CheckpointException, folder: Path) -> BaseException:
    """Return what happened to the processes that were writing, instead of the report about all of them."""
    causes = [cause for cause, _ in error.failures.values()]
    interrupted = next((one for one in causes if isinstance(one, KeyboardInterrupt)), None)
    return interrupted or _unwritable(folder, causes[0] if causes else error)


def _unwritable(folder: Path, error: BaseException) -> InputError:
    return InputError(
        f"{folder.parent}: the state of the training cannot be written ({first_line(error)}). Free some space, or "
        "choose another disk; started again, it resumes from the last state that was written whole."
    )


def read(tensors: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read saved values into tensors of the same names and shapes; return the facts saved with them.

    Raises:
        InputError: the state is damaged.
    """
    facts = FACTS_FILE.parsed(folder / _FACTS, _object)
    try:
        with _quiet():
            dcp.load(tensors, checkpoint_id=folder, no_dist=not _together())
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if any(isinstance(one, KeyboardInterrupt) for one in causes):
            raise KeyboardInterrupt from error
        raise _damaged(folder, causes[0] if causes else error) from error
    except Exception as error:  # what unpickling raises at a damaged file is not known beforehand
        raise _damaged(folder, error) from error
    return facts


def _damaged(folder: Path, error: BaseException) -> InputError:
    return InputError(
        f"{folder}: a damaged state of training ({first_line(error)}); remove {folder.parent} to start over."
    )


def _object(text: str) -> dict[str, Any]:
    found = from_json(text)
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}")
    return found


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
