"""Every block its own widths, at the least expected loss for a budget.

Kurtic et al. 2023, "ZipLM" (NeurIPS); Tang et al. 2025, "DarwinLM: Evolutionary Structured Pruning of Large Language
Models": one database of levels, then one level per branch under the budget. The expected loss of a level is
interpolated over its error between the losses with that branch alone at a level between, and without it. Losses of
several MLPs are taken to add up, and so is what attention costs. Without it in more and more blocks the loss rises
faster and faster: attention that goes as a whole goes in the order measured, and where single key/value groups may go,
none of them in a block costs what that attention did in this order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from secateur.methods.allocation.database import Database
from secateur.methods.allocation.frontier import Option, best_choices
from secateur.methods.allocation.levels import Levels
from secateur.methods.allocation.savings import NAMES, AllWidths, Savings

_NOISE = 1e-4
"""Nats below which a loss says nothing."""
_POWERS = (1.0, 2.0)


def expected_losses(branch: Levels, probe: float, removed: float) -> tuple[float, ...]:
    """Return the loss in nats that each level of a branch is expected to cost; it never falls from level to level.

    It follows a power of the error, a · Eᵖ with p from 1 to 2, through both losses.

    Args:
        branch: its levels.
        probe: loss at its level between.
        removed: loss without it.
    """
    between = max(probe, _NOISE)
    whole, middle = branch.errors[-1], branch.errors[branch.probe]
    if not 0 < middle < whole:
        return (0.0,) * (len(branch.errors) - 1) + (max(removed, 0.0),)
    power = math.log(max(removed, between) / between) / math.log(whole / middle)
    power = min(_POWERS[1], max(_POWERS[0], power))
    below = [between * (error / middle) ** power for error in branch.errors]
    above = [max(removed, between) * (error / whole) ** power for error in branch.errors]
    return tuple(
        low if error <= middle else max(high, between)
        for error, low, high in zip(branch.errors, below, above, strict=True)
    )


def convex_rises(lost: Sequence[float]) -> tuple[float, ...]:
    """Return the rises of the largest convex series that starts at 0 and lies nowhere above these losses.

    They never fall, so that among equal savings those that come first are chosen first.
    """
    corners = [(0, 0.0)]
    for point in enumerate(lost, start=1):
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return tuple(_slope(*pair) for pair in itertools.pairwise(corners) for _ in range(pair[1][0] - pair[0][0]))


def _slope(first: tuple[int, float], second: tuple[int, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


Changes = tuple[tuple[int, str, int], ...]
"""What stays other than in the dense model: the block, the name of a width, and the width."""
Choices = list[tuple[Changes, float]]
"""What may be done with a branch, and the loss in nats that it is expected to cost."""


def _choices(database: Database) -> list[Choices]:
    """Return what may be done with each branch, or with attention in all blocks."""
    rises = dict(zip(database.attention, convex_rises(database.lost), strict=True))
    most = max(rises.values(), default=0.0)
    found: list[Choices] = []
    for one, reaction in zip(database.branches, database.reactions, strict=True):
        name = NAMES[one.part]
        removed = rises.get(one.block, most) if reaction.removed is None else reaction.removed
        losses = expected_losses(one, reaction.probe, removed)
        levels: Choices = [(((one.block, name, keep),), loss) for keep, loss in zip(one.keep, losses, strict=True)]
        stays = one.part == "heads" and one.block not in rises
        found.append(levels[:-1] if stays else levels)
    single = database.levels("heads")
    if single:
        others = [block for block in database.attention if block not in single]
        return found + [[((), 0.0), (((block, "groups", 0),), rises[block])] for block in others]
    gone = itertools.accumulate(((block, "groups", 0),) for block in database.attention)
    return [*found, [((), 0.0), *zip(gone, database.lost, strict=True)]]


def allocations(database: Database, savings: Savings) -> list[AllWidths]:
    """Return the widths at the least expected loss for every amount, from the largest model to the smallest.

    Args:
        database: what widths cost.
        savings: what they save.
    """
    choices = _choices(database)
    options = [
        [Option(sum(savings.of(block, **{name: keep}) for block, name, keep in changes), loss) for changes, loss in one]
        for one in choices
    ]

    def chosen(levels: Sequence[int]) -> AllWidths:
        found = list(savings.dense)
        for one, level in zip(choices, levels, strict=True):
            for block, name, keep in one[level][0]:
                found[block] = found[block].model_copy(update={name: keep})
        return tuple(found)

    return without_empty(savings, (chosen(one.levels) for one in best_choices(options)))


def without_empty(savings: Savings, path: Iterable[AllWidths]) -> list[AllWidths]:
    """Leave out the dense model, and models without any attention or MLP."""

    def has_both(widths: AllWidths) -> bool:
        return all(
            any(getattr(own, name) for own in widths) or not any(getattr(own, name) for own in savings.dense)
            for name in ("groups", "channels")
        )

    return [one for one in dict.fromkeys(path) if one != savings.dense and has_both(one)]
