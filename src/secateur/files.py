"""Files written whole or not at all, and room on the disk for them."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from secateur.errors import InputError

_SPARE_BYTES = 1 << 30


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: the place cannot be written.
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
    """Return the permissions that new files do not get."""
    current = os.umask(0)
    os.umask(current)
    return current


def require_room(folder: Path, needed: int, what: str) -> None:
    """Stop before so many bytes are written that less than a gibibyte of the disk would stay free.

    Raises:
        OSError: naming what there is no room for.
    """
    if shutil.disk_usage(folder).free < needed + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"no space left for {what}; set TMPDIR to a larger disk")
