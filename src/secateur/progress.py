"""How long-running functions report progress, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Passes items through while showing how far they are."""

    def __call__(self, items: Iterable[Item], description: object, total: int, /) -> Iterable[Item]:
        """Yield the items unchanged; `total` is how many there will be. What `str(description)` says may change."""


def _silent(items: Iterable[Item], description: object, total: int, /) -> Iterator[Item]:
    return iter(items)


SILENT: Progress = _silent
