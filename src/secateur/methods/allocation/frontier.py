"""One level for each branch at the least expected loss, for every budget at once: dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MOST_BUCKETS = 200_000
"""Amounts that are counted exactly; with more of them, parts."""
_BUCKETS = 20_000
"""Parts of the most that can be saved."""
_NEAR = 400
"""A little more is this part of the most that can be saved."""
_ANSWERS = 5_000
"""Amounts for which a choice is returned, about."""


@dataclass(frozen=True)
class Option:
    """A level of a branch.

    Attributes:
        saved: what it saves: parameters, bytes or seconds.
        loss: loss in nats it is expected to cost.
    """

    saved: float
    loss: float


@dataclass(frozen=True)
class Chosen:
    """One option of each branch.

    Attributes:
        levels: their numbers.
        saved: what they save together.
        loss: loss in nats they are expected to cost together.
    """

    levels: tuple[int, ...]
    saved: float
    loss: float


def best_choices(branches: Sequence[Sequence[Option]]) -> list[Chosen]:
    """Return the choices of one option per branch at the least loss for each amount, from the least saved on.

    Amounts are counted in the largest unit of which all options save a multiple, so that every amount is found at its
    least loss; if the unit is too small, or there is none, in parts of the most that can be saved, each option rounded
    down. Where a little more can be saved at no more loss, the choice that saves less is left out.

    Args:
        branches: the options of each branch; none saves less than nothing.
    """
    unit = _unit(branches)
    best = np.zeros(1)
    taken: list[np.ndarray] = []
    for options in branches:
        steps = [_steps(one, unit) for one in options]
        size = len(best) + max(steps)
        padded = np.full(size, np.inf)
        choice = np.zeros(size, dtype=np.int16)
        for number, (one, offset) in enumerate(zip(options, steps, strict=True)):
            candidate = np.full(size, np.inf)
            candidate[offset : offset + len(best)] = best + one.loss
            better = candidate < padded
            padded[better], choice[better] = candidate[better], number
        best, taken = padded, [*taken, choice]
    near = int(sum(max(one.saved for one in options) for options in branches) / unit / _NEAR)
    amounts = np.isfinite(best).nonzero()[0]
    beaten = np.array([best[amount + 1 : amount + 1 + near].min(initial=np.inf) for amount in amounts])
    amounts = amounts[best[amounts] < beaten]
    apart = len(amounts) // _ANSWERS + 1
    found = [_traced(branches, taken, unit, int(amount)) for amount in amounts[::-1][::apart]]
    return sorted(found, key=lambda one: (one.saved, one.loss))


def _unit(branches: Sequence[Sequence[Option]]) -> float:
    """Return the unit in which savings are counted."""
    savings = [one.saved for options in branches for one in options]
    most = sum(max(one.saved for one in options) for options in branches)
    if all(float(one).is_integer() for one in savings):
        unit = math.gcd(*map(int, savings))
        if most <= unit * _MOST_BUCKETS:
            return max(1, unit)
    return most / _BUCKETS


def _steps(option: Option, unit: float) -> int:
    return int(option.saved / unit + 1e-9)


def _traced(branches: Sequence[Sequence[Option]], taken: Sequence[np.ndarray], unit: float, amount: int) -> Chosen:
    """Follow the choices for an amount back to the first branch."""
    found: list[tuple[int, Option]] = []
    for options, choice in zip(reversed(branches), reversed(taken), strict=True):
        level = int(choice[amount])
        found.append((level, options[level]))
        amount -= _steps(options[level], unit)
    found.reverse()
    return Chosen(
        tuple(level for level, _ in found), sum(one.saved for _, one in found), sum(one.loss for _, one in found)
    )
