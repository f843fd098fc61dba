"""Default output folders of commands, folders for training states, and markers of secateur's own folders."""

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
    """Return the path of a new folder `secateur-runs/<model>-<command>-<time>`."""
    stem = f"{Path(model.rstrip('/')).name or 'model'}-{command}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RUNS / stem
    number = 1
    while folder.exists():
        number += 1
        folder = RUNS / f"{stem}-{number}"
    return folder


def training_folder(target: Path) -> Path:
    """Return the folder next to a target in which training saves its states until the target is written."""
    return target.with_name(f"{target.name}.training")


def write_marker(folder: Path, command: str, details: dict[str, Any]) -> None:
    """Write the file that marks a folder as created by secateur."""
    record = {"secateur": versions()["secateur"], "command": command, **details, "versions": versions()}
    replace_file(folder / MARKER, json.dumps(record, indent=2) + "\n")
