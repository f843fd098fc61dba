"""Atomic file writes, the permissions of new files, and a check for free disk space."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from secateur.errors import InputError

_SPARE_BYTES = 1 << 30


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
