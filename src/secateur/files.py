"""Atomic writes of files and folders, permissions, a check for free disk space, and a cache of what can be rebuilt."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import InputError
from secateur.ownership import litter, owned_name, remove, remove_litter

_SPARE_BYTES = 1 << 30
_ADVISED = 128 << 10
"""Bytes asked for at a time: of more Linux reads no further than the read-ahead of the disk, by default this much."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
"""What a kernel or file system says that cannot exchange two names."""


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace a file atomically; text is written in UTF-8.

    Raises:
        InputError: the path cannot be written.
    """
    stem = f".{path.name}"
    temporary = path.with_name(owned_name(stem, "tmp"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_litter(path.parent, f"{stem}.", "tmp")
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        remove(temporary)


def new_part(target: Path) -> Path:
    """Make a folder beside a target, to become it with `put_in_place`; what dead processes left there is removed first.

    Raises:
        OSError: it cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    part = target.with_name(owned_name(f".{target.name}", "part"))
    part.mkdir()
    return part


def put_in_place(part: Path, target: Path) -> None:
    """Rename a folder to its target, with ordinary permissions; where there is a target, the two change names at once.

    Where names cannot be exchanged, the target is moved aside first; if the process is killed between the two steps,
    `recover` moves it back.

    Raises:
        OSError: it cannot be renamed; the target is as it was.
    """
    part.chmod(0o777 & ~umask())
    for file in filter(Path.is_file, part.iterdir()):
        file.chmod(0o666 & ~umask())
    if not target.exists():
        part.rename(target)
        return
    if _exchanged(part, target):
        remove(part)
        return
    aside = target.with_name(owned_name(f".{target.name}", "old"))
    target.rename(aside)
    try:
        part.rename(target)
    except OSError:
        aside.rename(target)
        raise
    remove(aside)


def recover(target: Path) -> None:
    """Move back a target that a killed process had moved aside, and remove what else such processes left beside it.

    Raises:
        OSError: it cannot be moved.
    """
    stem = f".{target.name}."
    aside = sorted(litter(target.parent, stem, "old"), key=lambda path: path.stat().st_mtime)
    if aside and not target.exists():
        aside[-1].rename(target)
    remove_litter(target.parent, stem)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False where that cannot be done.

    Raises:
        OSError: it can be, but not with these two.
    """
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if exchange is None:
        return False
    if exchange(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def umask() -> int:
    """Return the process's umask."""
    current = os.umask(0o077)
    os.umask(current)
    return current


def require_room(folder: Path, needed: int, what: str) -> None:
    """Refuse to write if less than one GiB of the disk would stay free.

    Raises:
        OSError: there is no room; the message names what does not fit.
    """
    if shutil.disk_usage(folder).free < needed + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"no space left for {what}; set TMPDIR to a larger disk")


def read_ahead(file: Path, places: Iterable[tuple[int, int]]) -> None:
    """Ask the system to read parts of a file, from byte to byte, while something else is computed.

    They come to the system's page cache, from where they are read without a wait. Where the system takes no such
    advice, they are read when they are needed.
    """
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return
    with contextlib.suppress(OSError), file.open("rb") as opened:  # reading it for good says what is wrong
        for begin, end in places:
            for first in range(begin, end, _ADVISED):
                advise(opened.fileno(), first, min(_ADVISED, end - first), os.POSIX_FADV_WILLNEED)


def is_full_disk(error: BaseException | None) -> bool:
    """Return whether an error, or one it came of, is that a disk, a quota or the size of a file is exhausted.

    Libraries that write through other languages raise errors of their own, which only quote the system's.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(os.strerror(code) in str(error) for code in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


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
        folder = new_part(target)
    except OSError as error:
        raise InputError(f"{target.parent}: cannot be written ({error.strerror}); set SECATEUR_CACHE.") from error
    try:
        yield folder
        if not target.exists():
            put_in_place(folder, target)
    finally:
        remove(folder)
