"""The interface through which long-running functions report progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Passes items through and reports progress."""

    def __call__(self, items: Iterable[Item], description: object, total: int, /) -> Iterable[Item]:
        """Yield the items unchanged; `total` is their number. `str(description)` may change over time."""


def _silent(items: Iterable[Item], description: object, total: int, /) -> Iterator[Item]:
    return iter(items)


SILENT: Progress = _silent
