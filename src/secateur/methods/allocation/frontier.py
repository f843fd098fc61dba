"""One level for each branch at the least expected loss, for every budget at once: dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NEAR = 400
"""A little more is this part of the most that can be saved."""


@dataclass(frozen=True)
class Option:
    """A level of a branch.

    Attributes:
        saved: what it saves: parameters, bytes or seconds.
        loss: loss in nats it is expected to cost.
    """

    saved: float
    loss: float


def best_choices(branches: Sequence[Sequence[Option]], buckets: int = 4000) -> list[tuple[int, ...]]:
    """Return, for amounts saved from 0 to the most, the choice of one option per branch whose losses add up to least.

    Amounts are counted in `buckets` equal parts of the most that can be saved, each option rounded down, so that a
    choice for an amount saves at least that. Where a little more can be saved at less loss, that is taken instead.

    Args:
        branches: the options of each branch; the first saves nothing and costs nothing.
        buckets: number of amounts.
    """
    most = sum(max(one.saved for one in options) for options in branches)
    if most <= 0:
        return [(0,) * len(branches)]
    unit = most / buckets
    best = np.zeros(1)
    taken: list[np.ndarray] = []
    for options in branches:
        steps = [int(one.saved / unit + 1e-9) for one in options]
        size = len(best) + max(steps)
        padded = np.full(size, np.inf)
        choice = np.zeros(size, dtype=np.int16)
        for number, (one, offset) in enumerate(zip(options, steps, strict=True)):
            candidate = np.full(size, np.inf)
            candidate[offset : offset + len(best)] = best + one.loss
            better = candidate < padded
            padded[better], choice[better] = candidate[better], number
        best, taken = padded, [*taken, choice]
    near = buckets // _NEAR + 1
    cheapest = [amount + int(best[amount : amount + near].argmin()) for amount in range(len(best))]
    return [_traced(branches, taken, unit, one) for one in dict.fromkeys(cheapest) if np.isfinite(best[one])]


def _traced(
    branches: Sequence[Sequence[Option]], taken: Sequence[np.ndarray], unit: float, amount: int
) -> tuple[int, ...]:
    """Follow the choices for an amount back to the first branch."""
    levels: list[int] = []
    for options, choice in zip(reversed(branches), reversed(taken), strict=True):
        levels.append(int(choice[amount]))
        amount -= int(options[levels[-1]].saved / unit + 1e-9)
    return tuple(reversed(levels))
