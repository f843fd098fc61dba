"""What a search has measured so far, in a folder: the same search, begun again after a kill, does none of it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from secateur.errors import InputError, ModelError, NumericsError, SecateurError
from secateur.files import replace_file
from secateur.launcher import leads
from secateur.methods.method import Evidence
from secateur.methods.split_search import Split
from secateur.methods.trials import Made, Steps
from secateur.versions import digest, versions

_STEPS: TypeAdapter[Steps] = TypeAdapter(Steps)
_FAILURES: tuple[type[SecateurError], ...] = (InputError, ModelError, NumericsError)


class TrialLog:
    """Candidates and what came of them, one small file each."""

    def __init__(self, evidence: Evidence, *asked: Any) -> None:
        """Open the log of one search; without a folder to work in nothing is kept.

        Args:
            evidence: about the dense model, with all calibration windows.
            asked: what else the search depends on: settings, amount.
        """
        self._folder: Path | None = None
        if evidence.work is not None:
            decoder, windows = evidence.decoder, evidence.need_windows()
            place = (str(decoder.module.dtype), decoder.device.type)
            key = digest(decoder.fingerprint, place, windows.fingerprint, evidence.seed, versions(), *asked)
            self._folder = evidence.work / f"search-{key}"

    def known(self, split: Split) -> Made | None:
        """Give what came of a candidate when it was tried before; None if it was not, or its file is damaged.

        Raises:
            InputError: as it did then; likewise ModelError and NumericsError.
        """
        path = self._path(split)
        if path is None or not path.is_file():
            return None
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            failure = next((kind for kind in _FAILURES if kind.__name__ == entry.get("failed")), None)
            made = None if failure else Made(**entry | {"steps": _STEPS.validate_python(entry["steps"])})
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError):
            return None
        if failure is not None:
            raise failure(entry["why"])
        return made

    def add(self, split: Split, made: Made) -> None:
        """Keep what came of a candidate."""
        steps = [step.model_dump(mode="json") for step in made.steps]
        self._write(split, made._asdict() | {"steps": steps})

    def add_failure(self, split: Split, error: SecateurError) -> None:
        """Keep why a candidate could not be made."""
        self._write(split, {"failed": type(error).__name__, "why": str(error)})

    def _write(self, split: Split, entry: dict[str, Any]) -> None:
        path = self._path(split)
        if path is not None and leads():
            replace_file(path, json.dumps(entry) + "\n")

    def _path(self, split: Split) -> Path | None:
        name = f"{split.depth or 'none'}-{split.blocks}-{split.width or 'none'}.json"
        return None if self._folder is None else self._folder / name
