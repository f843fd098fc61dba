"""Write a folder whole or not at all: into a temporary one beside the target, then rename."""

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
"""Every folder written by secateur holds this file; a folder without it is never replaced."""


def check_target(target: Path, *, reads: Path | None = None, replaces: bool = True) -> None:
    """Refuse a target that would destroy something that is not ours.

    Args:
        target: the folder to be written.
        reads: one that is being read meanwhile.
        replaces: whether the target is replaced as a whole, or written into.

    Raises:
        InputError: a file, a folder not written by secateur, the folder that is being read, or, where it would be
            replaced, the one we stand in or one above it.
    """
    if replaces and target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{target}: is the folder you are in, or holds it; name one to be made, such as {target}/out.")
    if target.is_file():
        raise InputError(f"{target}: is a file; name a folder.")
    if target.is_dir() and any(target.iterdir()) and not is_ours(target):
        raise InputError(f"{target}: exists and was not written by secateur; choose another folder, or remove it.")
    if reads is not None and target.exists() and target.resolve() == reads.resolve():
        raise InputError(f"{target}: is the model being read; choose another folder for the result.")


def is_ours(folder: Path) -> bool:
    """Whether secateur wrote this folder."""
    try:
        return "secateur" in json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def replacing(target: str | Path, *, reads: Path | None = None) -> Iterator[Path]:
    """Return a temporary folder that takes the target's place if the block ends well, and goes away if not.

    Raises:
        InputError: the target must not be replaced.
    """
    target = Path(target)
    check_target(target, reads=reads)
    target = target.resolve()  # of a link to a folder, the folder is replaced
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
