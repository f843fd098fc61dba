"""Which calibration windows a fit is made on and which evaluate it, and the weight of each token.

A fit made on one kind of text can be worse than none on another. So each source of a mixture counts the same as any
other, however many windows it has, and a share of each source's windows is held out of the fit to choose its ridge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.data.windows import Windows

EVERY = 4
"""One window in this many of each source is held out."""


@dataclass(frozen=True, eq=False)
class Folds:
    """How calibration windows count in a fit.

    Attributes:
        weight: of each token of a window, (W,) float64: 1 / (tokens of its source), so that sources weigh the same.
        held_out: whether a window evaluates the fit instead of taking part in it, (W,) bool.
    """

    weight: torch.Tensor
    held_out: torch.Tensor

    def slice(self, first: int, count: int) -> Folds:
        """Return the folds of `count` neighbouring windows."""
        return self.some(range(first, first + count))

    def some(self, numbers: Sequence[int]) -> Folds:
        """Return the folds of the windows of these numbers."""
        rows = list(numbers)
        return Folds(self.weight[rows], self.held_out[rows])


def folds_of(windows: Windows) -> Folds:
    """Hold out every fourth window of each source: none of a source with fewer than four."""
    source_of = torch.zeros(len(windows), dtype=torch.int64) if windows.part_of is None else windows.part_of
    per_source = torch.zeros(int(source_of.max()) + 1, dtype=torch.float64)
    per_source.index_add_(0, source_of, windows.token_counts().double())
    held_out = torch.zeros(len(windows), dtype=torch.bool)
    for source in source_of.unique():
        held_out[(source_of == source).nonzero().flatten()[EVERY - 1 :: EVERY]] = True
    return Folds(1 / per_source[source_of], held_out)
