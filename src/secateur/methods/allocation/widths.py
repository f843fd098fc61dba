"""Every block its own widths, at the least expected loss for a budget.

Kurtic et al. 2023, "ZipLM" (NeurIPS); Tang et al. 2025, "DarwinLM: Evolutionary Structured Pruning of Large Language
Models": one database of levels, then one level per branch under the budget. The expected loss of a level is
interpolated over its error between the losses with that branch alone at a level between, and without it. Losses of
several MLPs are taken to add up, and so is what attention costs. Without it in more and more blocks the loss rises
faster and faster: attention that goes as a whole goes in the order measured, and where single key/value groups may go,
none of them in a block costs what that attention did in this order.

All that is measured with the blocks above as they are. Where their MLPs are refitted to bring the states back to those
of the dense model, they take back a part of what is lost below, so that the same loss counts less in a low block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from secateur.methods.allocation.database import Database
from secateur.methods.allocation.frontier import Option, best_choices
from secateur.methods.allocation.levels import Levels
from secateur.methods.allocation.savings import NAMES, AllWidths, Savings
from secateur.models.decoder import Decoder
from secateur.surgery.width.inputs import writes_stream
from secateur.surgery.width.pruning import Refit

_NOISE = 1e-4
"""Nats below which a loss says nothing."""
_POWERS = (1.0, 2.0)
FADING = 0.025
"""Share by which a loss counts less for each block above it. Chosen by what results lose (`benchmarks/allocation.py`):
what refitted MLPs take back (`benchmarks/recovery.py`) is a part of it."""


def expected_losses(branch: Levels, probe: float, removed: float) -> tuple[float, ...]:
    """Return the loss in nats that each level of a branch is expected to cost; it never falls from level to level.

    It follows the power of the error, a · Eᵖ, that goes through both losses; below the lower one with p from 1 to 2.

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
    inner = min(_POWERS[1], max(_POWERS[0], power))
    return tuple(between * (error / middle) ** (inner if error <= middle else power) for error in branch.errors)


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


def fading_of(decoder: Decoder, refit: Refit) -> float:
    """Return by which share a loss counts less for each block above it, the way MLPs are refitted."""
    return FADING if refit.repair and refit.target == "dense" and writes_stream(decoder) else 0.0


def lasting(block: int, blocks: int, fading: float) -> float:
    """Return how much a loss in a block counts, if it counts less by the share `fading` for each block above it."""
    return (1 - fading) ** (blocks - 1 - block)


def _choices(database: Database, blocks: int, fading: float) -> list[Choices]:
    """Return what may be done with each branch, or with attention in all blocks."""
    share = [lasting(block, blocks, fading) for block in range(blocks)]
    each = (after - before for before, after in itertools.pairwise((0.0, *database.lost)))
    lost = tuple(itertools.accumulate(share[block] * one for block, one in zip(database.attention, each, strict=True)))
    rises = dict(zip(database.attention, convex_rises(lost), strict=True))
    most = max(rises.values(), default=0.0)
    found: list[Choices] = []
    for one, reaction in zip(database.branches, database.reactions, strict=True):
        name, worth = NAMES[one.part], share[one.block]
        removed = rises.get(one.block, most) if reaction.removed is None else worth * reaction.removed
        losses = expected_losses(one, worth * reaction.probe, removed)
        levels: Choices = [(((one.block, name, keep),), loss) for keep, loss in zip(one.keep, losses, strict=True)]
        stays = one.part == "heads" and one.block not in rises
        found.append(levels[:-1] if stays else levels)
    single = database.levels("heads")
    if single:
        others = [block for block in database.attention if block not in single]
        return found + [[((), 0.0), (((block, "groups", 0),), rises[block])] for block in others]
    gone = itertools.accumulate(((block, "groups", 0),) for block in database.attention)
    return [*found, [((), 0.0), *zip(gone, lost, strict=True)]]


def allocations(database: Database, savings: Savings, fading: float = 0.0) -> list[AllWidths]:
    """Return the widths at the least expected loss for every amount, from the largest model to the smallest.

    Args:
        database: what widths cost.
        savings: what they save.
        fading: share by which a loss counts less for each block above it.
    """
    choices = _choices(database, len(savings.dense), fading)
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
