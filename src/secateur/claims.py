"""One process at a time writes a target: a lock beside it that a dead process does not keep."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path

from secateur.errors import InputError
from secateur.files import recover

if sys.platform != "win32":
    import fcntl

_HELD: ContextVar[ExitStack | None] = ContextVar("claims of the running command", default=None)


@contextmanager
def holding_claims() -> Iterator[None]:
    """Within the block, `claim` holds its targets; they are released at the end of it."""
    with ExitStack() as stack:
        before = _HELD.set(stack)
        try:
            yield
        finally:
            _HELD.reset(before)


def claim(target: Path) -> None:
    """Hold a target until the command ends; without a command (`holding_claims`), nothing is held.

    Raises:
        InputError: as `claimed`.
    """
    stack = _HELD.get()
    if stack is not None:
        stack.enter_context(claimed(target))


@contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Hold a target within the block, and remove what killed processes left beside it.

    The lock is the system's (`flock`), which ends with the process; the file only says who holds it. Folders above the
    target are made, and removed again if nothing was written.

    Raises:
        InputError: another process holds it, or nothing can be written there.
    """
    target = target.resolve()
    made = [folder for folder in target.parents if not folder.exists()]
    lock = target.with_name(f".{target.name}.lock")
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle = _locked(lock, target)
            recover(target)
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror}).") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            os.close(handle)
    finally:
        _remove_empty(made)


def _locked(lock: Path, target: Path) -> int:
    """Open and lock a file; it may be removed by who held it between the two, then there is a new one."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if sys.platform != "win32":
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(_who()).encode(), 0)
                return handle
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                lock.unlink(missing_ok=True)  # not another's: what failed is to write who holds it
                raise
            raise InputError(
                f"{target}: {holder} is writing it; wait until it has ended, or name another folder with -o."
            ) from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _who() -> dict[str, str | int]:
    words = " ".join(sys.argv[1:2])
    since = datetime.now().isoformat(sep=" ", timespec="seconds")
    return {"command": words, "process": os.getpid(), "machine": platform.node(), "since": since}


def _holder(handle: int) -> str:
    try:
        who = json.loads(os.pread(handle, 4096, 0))
        return f"`secateur {who['command']}`, process {who['process']} on {who['machine']} since {who['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders as far as they are empty, the lowest first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
