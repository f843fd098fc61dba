"""Where commands put what they make when no place was named."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from secateur.checkpoints.folders import MARKER
from secateur.files import replace_file
from secateur.versions import versions

RUNS = Path("secateur-runs")


def run_folder(model: str, command: str) -> Path:
    """Name a new folder `secateur-runs/<model>-<command>-<time>`."""
    stem = f"{Path(model.rstrip('/')).name or 'model'}-{command}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RUNS / stem
    number = 1
    while folder.exists():
        number += 1
        folder = RUNS / f"{stem}-{number}"
    return folder


def training_folder(target: Path) -> Path:
    """Name the folder beside a target in which training keeps its states until the target is there."""
    return target.with_name(f"{target.name}.training")


def write_marker(folder: Path, command: str, details: dict[str, Any]) -> None:
    """Leave the file by which a later run knows this folder as its own."""
    record = {"secateur": versions()["secateur"], "command": command, **details, "versions": versions()}
    replace_file(folder / MARKER, json.dumps(record, indent=2) + "\n")
