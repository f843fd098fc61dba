"""Atomic writes of files and folders, permissions, a check for free disk space, and a cache of what can be rebuilt."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import InputError

_SPARE_BYTES = 1 << 30
_ABANDONED_SECONDS = 24 * 3600


def replace_file(path: Path, text: str) -> None:
    """Replace a file atomically.

    Raises:
        InputError: the path cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def umask() -> int:
    """Return the process's umask."""
    current = os.umask(0)
    os.umask(current)
    return current


def require_room(folder: Path, needed: int, what: str) -> None:
    """Refuse to write if less than one GiB of the disk would stay free.

    Raises:
        OSError: there is no room; the message names what does not fit.
    """
    if shutil.disk_usage(folder).free < needed + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"no space left for {what}; set TMPDIR to a larger disk")


def cache_folder(*parts: str) -> Path:
    """Return a folder for what can be made again: under `SECATEUR_CACHE`, or else under the user's cache."""
    root = os.environ.get("SECATEUR_CACHE")
    if root is None:
        root = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur")
    return Path(root).expanduser().joinpath(*parts)


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Return a folder beside the target that takes its name if the block ends well; a kill leaves no target.

    Where another process was faster its folder stays.

    Raises:
        InputError: the place cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f".{target.name}.*.part"):
            if time.time() - old.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target.parent}: cannot be written ({error.strerror}); set SECATEUR_CACHE.") from error
    try:
        yield folder
        if not target.exists():
            folder.chmod(0o777 & ~umask())
            for file in filter(Path.is_file, folder.iterdir()):
                file.chmod(0o666 & ~umask())
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
