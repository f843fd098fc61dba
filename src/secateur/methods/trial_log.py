"""What a search has measured so far, in a folder: the same search, begun again after a kill, does none of it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from secateur.calibration.processes import as_the_first
from secateur.errors import InputError, ModelError, NumericsError, SecateurError
from secateur.files import replace_file
from secateur.launcher import leads
from secateur.methods.method import Evidence
from secateur.methods.split_search import Split
from secateur.methods.trials import Made, Steps
from secateur.versions import digest, versions

FAILURES = (InputError, ModelError, NumericsError)
"""What can come of a candidate instead of a model."""

_STEPS: TypeAdapter[Steps] = TypeAdapter(Steps)


class TrialLog:
    """Candidates and what came of them, one small file each; of several processes the first reads and writes."""

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

    def known(self, split: Split) -> Made | SecateurError | None:
        """Give what came of a candidate when it was tried before; None if it was not, or its file is damaged."""
        path = self._path(split)
        if path is None:
            return None
        found: Made | SecateurError | None = as_the_first(_read(path) if leads() else None)
        return found

    def add(self, split: Split, found: Made | SecateurError) -> None:
        """Keep what came of a candidate.

        Raises:
            InputError: the folder cannot be written.
        """
        path = self._path(split)
        if path is None or not leads():
            return
        if isinstance(found, Made):
            entry = found._asdict() | {"steps": [step.model_dump(mode="json") for step in found.steps]}
        else:
            entry = {"failed": type(found).__name__, "why": str(found)}
        replace_file(path, json.dumps(entry) + "\n")

    def _path(self, split: Split) -> Path | None:
        name = f"{split.depth or 'none'}-{split.blocks}-{split.width or 'none'}.json"
        return None if self._folder is None else self._folder / name


def _read(path: Path) -> Made | SecateurError | None:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        failure = next((kind for kind in FAILURES if kind.__name__ == entry.get("failed")), None)
        return failure(entry["why"]) if failure else Made(**entry | {"steps": _STEPS.validate_python(entry["steps"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
        return None
