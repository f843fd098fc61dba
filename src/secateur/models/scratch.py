"""Room for what is kept in temporary files."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

_SPARE_BYTES = 1 << 30


def require_room(folder: Path, needed: int, what: str) -> None:
    """Stop before so many bytes are written that less than a gibibyte of the disk would stay free.

    Raises:
        OSError: naming what there is no room for.
    """
    if shutil.disk_usage(folder).free < needed + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"no space left for {what}; set TMPDIR to a larger disk")
