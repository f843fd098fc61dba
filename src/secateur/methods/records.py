"""Measurements kept in small JSON files of the cache, so that they are made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from secateur.distributed import from_main_process, is_main_process
from secateur.errors import InputError
from secateur.files import replace_file
from secateur.reading import MIB, FileKind

Measured = TypeVar("Measured")
_RECORD = FileKind("record of measurements", 64 * MIB)


def recorded(path: Path, kind: TypeAdapter[Measured], measure: Callable[[], Measured]) -> Measured:
    """Return what a file holds; if there is none, or a damaged one, measure it and write the file.

    Args:
        path: the file; its name says of what the measurement is.
        kind: what it holds; anything else counts as damage.
        measure: makes the measurement, in every process of a run of several; that of the main process counts.

    Raises:
        InputError: the file cannot be written.
    """
    found = from_main_process(_read(path, kind))
    if found is None:
        found = from_main_process(measure())
        if is_main_process():
            replace_file(path, kind.dump_json(found) + b"\n")
    return found


def _read(path: Path, kind: TypeAdapter[Measured]) -> Measured | None:
    if not path.exists():
        return None
    try:
        return _RECORD.parsed(path, kind.validate_json)
    except InputError:
        return None
