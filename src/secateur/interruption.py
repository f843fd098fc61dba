"""Signals that end a command as Ctrl-C does, and children that end with their parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ENDING = ("SIGTERM", "SIGHUP")


@contextmanager
def ending_as_ctrl_c() -> Iterator[list[int]]:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt within the block, so that everything is cleaned up.

    Yields a list that holds the signals that came. Signals that are ignored, as under `nohup`, stay ignored; outside
    the main thread nothing changes, because Python handles signals there alone.
    """
    came: list[int] = []

    def interrupt(number: int, _frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in _ENDING if hasattr(signal, name)):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, interrupt)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """End this process group when the parent does: its end of the pipe that is our standard input is closed then.

    The process has to lead a group of its own, and to be started with a pipe as its standard input.
    """
    threading.Thread(target=_end_when_closed, daemon=True).start()


def _end_when_closed() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass  # nothing is sent
    os.killpg(os.getpgrp(), signal.SIGKILL)
