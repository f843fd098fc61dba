"""Atomic writes of folders: into a temporary folder next to the target, which is then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.errors import InputError, SecateurError, first_line
from secateur.files import is_full_disk, new_part, put_in_place
from secateur.ownership import remove
from secateur.reading import MIB, FileKind, from_json

RECORD_FILE = FileKind("record of secateur", 64 * MIB)
MARKER = "secateur.json"
"""Every folder written by secateur contains this file; a folder without it is never replaced."""


def check_target(target: Path, *, reads: Path | None = None, replaces: bool = True, ours: bool = True) -> None:
    """Refuse a target whose replacement would destroy something that secateur did not create.

    Args:
        target: the folder to be written.
        reads: a folder that is being read meanwhile.
        replaces: whether the target is replaced as a whole, or written into.
        ours: whether it has to be one that secateur wrote, if it exists and is not empty.

    Raises:
        InputError: a file, a folder not written by secateur, the folder that is being read, one that cannot be
            written, or, if it would be replaced, the current folder or one of its parents.
    """
    if replaces and target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{target}: is the current folder, or contains it; name a new one, such as {target}/out.")
    if target.is_file():
        raise InputError(f"{target}: is a file; name a folder.")
    if ours and target.is_dir() and any(target.iterdir()) and not is_ours(target):
        raise InputError(f"{target}: exists and was not written by secateur; choose another folder, or remove it.")
    place = target.resolve()
    if (nearest := _nearest(place.parent if replaces else place)) is None or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{target}: cannot be written ({nearest or target.parent} allows no new files).")
    if reads is not None and target.exists() and target.resolve() == reads.resolve():
        raise InputError(f"{target}: is the model being read; choose another folder for the result.")


def _nearest(folder: Path) -> Path | None:
    """Return the folder, or the nearest above it that exists; None if that is a file."""
    found = next(one for one in (folder, *folder.parents) if one.exists())
    return found if found.is_dir() else None


def is_ours(folder: Path) -> bool:
    """Return whether secateur wrote this folder."""
    try:
        return bool(read_record(folder))
    except InputError:
        return False


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record in a folder's `secateur.json`; an empty one if the folder has none.

    Raises:
        InputError: the file is not such a record.
    """
    path = folder / MARKER
    return RECORD_FILE.parsed(path, _record) if path.is_file() else {}


def _record(text: str) -> dict[str, Any]:
    found = from_json(text)
    if not isinstance(found, dict) or not isinstance(found.get("secateur"), str):
        raise ValueError("not what secateur writes into a folder")
    history = found.get("history", [])
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError("its history is no list of entries")
    for name, kind in (("check", dict), ("versions", dict), ("command", str), ("model", str), ("base_model", str)):
        if not isinstance(found.get(name), kind | None):
            raise ValueError(f"'{name}' is a {type(found[name]).__name__}")
    return found


@contextlib.contextmanager
def replacing(target: str | Path, *, reads: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder that replaces the target if the block succeeds, and is deleted otherwise.

    Raises:
        InputError: the target must not be replaced, or there is no space left.
    """
    target = Path(target)
    check_target(target, reads=reads)
    target = target.resolve()  # if it is a link, the folder it points to is replaced
    try:
        temporary = new_part(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}).") from error
    try:
        yield temporary
        put_in_place(temporary, target)
    except SecateurError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise InputError(
            f"{target}: no space left ({getattr(error, 'strerror', None) or first_line(error)}); what was there is "
            "kept. Free some space, or choose another disk (TMPDIR for temporary files)."
        ) from error
    finally:
        remove(temporary)
