"""Temporary files and folders that carry their owner in their name, so that those of dead processes can be removed.

A name ends in the machine, the process and the second it started: `.cut.1f3a99b2-4711-1789000000.c3f2a1.part`. A
process that is gone, or whose number belongs to a younger process by now, cannot come back for what it left.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

_OWNED = re.compile(r"\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-(?P<started>\d+)\.[0-9a-f]+\.(?P<kind>part|tmp|old)$")
_CLOCK_SECONDS = 2
"""How far the start of a process may seem to move when the machine's clock is corrected."""
_ABANDONED_SECONDS = 24 * 3600
"""Age at which what a process of another machine left counts as abandoned: whether it runs cannot be asked here."""
_SCRATCH = "secateur-"


def owned_name(stem: str, kind: str) -> str:
    """Return a new name with this process as its owner.

    Args:
        stem: what the name begins with.
        kind: `part` of something that is being made, `tmp`, or `old` for what is being replaced.
    """
    return f"{stem}.{_machine()}-{os.getpid()}-{_started(os.getpid())}.{secrets.token_hex(3)}.{kind}"


def litter(folder: Path, stem: str, *kinds: str) -> Iterator[Path]:
    """Find what processes that are gone left in a folder under names that begin with `stem`, of some kinds or all."""
    try:
        inside = [Path(entry.path) for entry in os.scandir(folder) if entry.name.startswith(stem)]
    except OSError:
        return  # no such folder: nothing was left there
    for path in inside:
        found = _OWNED.search(path.name)
        if found and (not kinds or found["kind"] in kinds) and _is_gone(found, path):
            yield path


def remove_litter(folder: Path, stem: str, *kinds: str) -> None:
    """Remove what `litter` finds."""
    for path in litter(folder, stem, *kinds):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder as far as it can be; another process may be doing the same."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def scratch_folder(what: str, owner: Any = None) -> Path:
    """Return a new folder under `TMPDIR`; the next run removes it if this process dies.

    Args:
        what: what it holds, for its name.
        owner: an object with which it is deleted; without one the caller deletes it.

    Raises:
        OSError: it cannot be made.
    """
    place = Path(tempfile.gettempdir())
    _clear_once(place)
    folder = place / owned_name(f"{_SCRATCH}{what}", "tmp")
    folder.mkdir(mode=0o700)
    if owner is not None:
        weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def scratch(what: str) -> Iterator[Path]:
    """Yield a new folder under `TMPDIR`, and delete it."""
    folder = scratch_folder(what)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _clear_once(place: Path) -> None:
    remove_litter(place, _SCRATCH)


def is_alive(process: int, started: int) -> bool:
    """Return whether the process of this number that started in this second still runs on this machine."""
    now = _started(process)
    return now is not None and abs(now - started) <= _CLOCK_SECONDS


def _is_gone(found: re.Match[str], path: Path) -> bool:
    if found["machine"] == _machine():
        return not is_alive(int(found["process"]), int(found["started"]))
    try:
        return time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS
    except OSError:
        return False  # removed meanwhile


def _started(process: int) -> int | None:
    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else int(found.create_time())
    except psutil.Error:
        return None


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"
