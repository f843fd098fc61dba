"""Search over splits between depth, experts and width: single methods first, then what lies next to the best.

A plan that removes one block more than a good one, or lets another method do one part of it, is likelier to be good
than one drawn from all. So what is measured next is a neighbour of the best plan that still has one, until several in a
row were no better than the best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from secateur.progress import Progress

SHARES = (0.25, 0.5, 0.75)
"""What experts may take of what is left to remove, if a width method takes the rest."""


class Split(NamedTuple):
    """One way to divide the amount.

    Attributes:
        depth: method that removes blocks; None for none.
        width: method that slices or prunes the widths of the rest; None for none.
        blocks: number of blocks to remove if another method follows; 0 if none are removed, or as many as it takes.
        experts: method that leaves fewer experts, after blocks and before widths; None for none.
        share: what it takes of what is left to remove, if a width method takes the rest; 1 without one.
    """

    depth: str | None
    width: str | None
    blocks: int = 0
    experts: str | None = None
    share: float = 1.0

    @property
    def methods(self) -> set[str]:
        """The methods involved."""
        return {one for one in (self.depth, self.experts, self.width) if one}


def all_splits(
    depth: Sequence[str | None], width: Sequence[str | None], most: int, experts: Sequence[str | None] = (None,)
) -> tuple[Split, ...]:
    """List single methods first, then those of several methods, with 1 to `most` blocks removed if any are."""
    found = [
        Split(d, w, blocks, e, share)
        for blocks in range(most + 1)
        for e in experts
        for d in depth
        for w in width
        for share in (SHARES if e and w else (1.0,))
        if bool(blocks) == bool(d and (e or w))
    ]
    single = {
        side: [one for one in found if one.methods == {getattr(one, side)}] for side in ("depth", "experts", "width")
    }
    return (*itertools.chain(*single.values()), *(one for one in found if len(one.methods) > 1))


def search(
    splits: Sequence[Split],
    measure: Callable[[Split], float | None],
    *,
    trials: int,
    patience: int,
    progress: Progress,
) -> None:
    """Measure up to `trials` of the splits: single methods, then neighbours of the best so far.

    Args:
        splits: all of them, each once, single methods first.
        measure: returns the loss of a split, or None if it has none; that does not count as a trial.
        trials: maximum number of losses.
        patience: losses of several methods together, one after the other, that are no lower than the lowest, before the
            search ends.
        progress: reports progress.
    """
    left, found, missed = list(splits), dict[Split, float](), 0
    most = min(trials, len(splits))
    for _ in progress(range(most), "trying plans", most):
        if missed == patience:
            return
        loss = None
        while left and loss is None:
            split = _next(left, found)
            left.remove(split)
            loss = measure(split)
        if loss is None:
            return
        better = loss < min(found.values(), default=math.inf)
        missed = 0 if better or len(split.methods) == 1 else missed + 1
        found[split] = loss


def _next(left: Sequence[Split], found: Mapping[Split, float]) -> Split:
    """Return the first single method that is left, else a neighbour of the best that has one, else the first."""
    if len(left[0].methods) > 1:
        most = max(one.blocks for one in (*left, *found))
        for best in sorted(found, key=lambda one: found[one]):
            near = [one for one in left if _steps_between(best, one, most) == 1]
            if near:
                return near[0]
    return left[0]


def _steps_between(one: Split, other: Split, most: int) -> int:
    """Return how far apart two splits are: blocks, shares of the experts, and other methods for the same part."""
    pairs = ((one.depth, other.depth), (one.experts, other.experts), (one.width, other.width))
    swapped = sum(bool(own and its and own != its) for own, its in pairs)
    return swapped + sum(abs(own - its) for own, its in zip(_amounts(one, most), _amounts(other, most), strict=True))


def _amounts(split: Split, most: int) -> tuple[int, int]:
    """Return how much blocks and experts take: nothing, some, or, after the most that leaves something to do, all."""
    alone = most + 1 if split.methods == {split.depth} else 0
    shares = (*SHARES, 1.0)
    return split.blocks or alone, shares.index(split.share) + 1 if split.experts else 0
