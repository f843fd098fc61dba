"""Atomic writes of folders: into a temporary folder next to the target, which is then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from secateur.errors import InputError
from secateur.files import umask

MARKER = "secateur.json"
"""Every folder written by secateur contains this file; a folder without it is never replaced."""


def check_target(target: Path, *, reads: Path | None = None, replaces: bool = True) -> None:
    """Refuse a target whose replacement would destroy something that secateur did not create.

    Args:
        target: the folder to be written.
        reads: a folder that is being read meanwhile.
        replaces: whether the target is replaced as a whole, or written into.

    Raises:
        InputError: a file, a folder not written by secateur, the folder that is being read, or, if it would be
            replaced, the current folder or one of its parents.
    """
    if replaces and target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{target}: is the current folder, or contains it; name a new one, such as {target}/out.")
    if target.is_file():
        raise InputError(f"{target}: is a file; name a folder.")
    if target.is_dir() and any(target.iterdir()) and not is_ours(target):
        raise InputError(f"{target}: exists and was not written by secateur; choose another folder, or remove it.")
    if reads is not None and target.exists() and target.resolve() == reads.resolve():
        raise InputError(f"{target}: is the model being read; choose another folder for the result.")


def is_ours(folder: Path) -> bool:
    """Return whether secateur wrote this folder."""
    try:
        return "secateur" in json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def replacing(target: str | Path, *, reads: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder that replaces the target if the block succeeds, and is deleted otherwise.

    Raises:
        InputError: the target must not be replaced.
    """
    target = Path(target)
    check_target(target, reads=reads)
    target = target.resolve()  # if it is a link, the folder it points to is replaced
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}).") from error
    try:
        yield temporary
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, target: Path) -> None:
    temporary.chmod(0o777 & ~umask())
    for file in filter(Path.is_file, temporary.iterdir()):
        file.chmod(0o666 & ~umask())
    if not target.exists():
        temporary.rename(target)
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(aside)
    temporary.rename(target)
    shutil.rmtree(aside)
