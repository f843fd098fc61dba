"""Every block its own widths, at the least expected loss for a budget.

Kurtic et al. 2023, "ZipLM" (NeurIPS); Tang et al. 2025, "DarwinLM: Evolutionary Structured Pruning of Large Language
Models": one database of levels, then one level per MLP under the budget, and a number of attention branches. The
expected loss of a level is interpolated over its error between the losses with that MLP alone at a level between, and
without it. Losses of several MLPs, and that without attention in some blocks, are taken to add up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from secateur.methods.allocation.database import Database
from secateur.methods.allocation.frontier import Option, best_choices
from secateur.methods.allocation.levels import Levels
from secateur.methods.allocation.savings import AllWidths, Savings
from secateur.methods.allocation.sensitivity import Reaction

_NOISE = 1e-4
"""Nats below which a loss says nothing."""
_POWERS = (1.0, 2.0)


def expected_losses(mlp: Levels, reaction: Reaction) -> tuple[float, ...]:
    """Return the loss in nats that each level of an MLP is expected to cost; it never falls from level to level.

    It follows a power of the error, a · Eᵖ with p from 1 to 2, through the loss at the level between and that without
    the MLP.
    """
    between = max(reaction.probe, _NOISE)
    whole, middle = mlp.errors[-1], mlp.errors[mlp.probe]
    if not 0 < middle < whole:
        return (0.0,) * (len(mlp.errors) - 1) + (max(reaction.removed, 0.0),)
    power = math.log(max(reaction.removed, between) / between) / math.log(whole / middle)
    power = min(_POWERS[1], max(_POWERS[0], power))
    below = [between * (error / middle) ** power for error in mlp.errors]
    above = [max(reaction.removed, between) * (error / whole) ** power for error in mlp.errors]
    return tuple(
        low if error <= middle else max(high, between)
        for error, low, high in zip(mlp.errors, below, above, strict=True)
    )


def allocations(database: Database, savings: Savings) -> list[AllWidths]:
    """Return the widths at the least expected loss for every amount, from the largest model to the smallest.

    Args:
        database: what widths cost.
        savings: what they save.
    """
    options = [
        [
            Option(savings.of(one.block, channels=keep), loss)
            for keep, loss in zip(one.keep, expected_losses(one, reaction), strict=True)
        ]
        for one, reaction in zip(database.mlps, database.reactions, strict=True)
    ]
    saved = itertools.accumulate((savings.of(block, groups=0) for block in database.attention), initial=0.0)
    options.append([Option(one, loss) for one, loss in zip(saved, (0.0, *database.lost), strict=True)])
    return without_empty(savings, (_widths(database, savings.dense, one.levels) for one in best_choices(options)))


def without_empty(savings: Savings, path: Iterable[AllWidths]) -> list[AllWidths]:
    """Leave out the dense model, and models without any attention or MLP."""

    def has_both(widths: AllWidths) -> bool:
        return all(
            any(getattr(own, name) for own in widths) or not any(getattr(own, name) for own in savings.dense)
            for name in ("groups", "channels")
        )

    return [one for one in dict.fromkeys(path) if one != savings.dense and has_both(one)]


def _widths(database: Database, dense: AllWidths, levels: Sequence[int]) -> AllWidths:
    found = list(dense)
    for mlp, level in zip(database.mlps, levels[:-1], strict=True):
        found[mlp.block] = found[mlp.block].model_copy(update={"channels": mlp.keep[level]})
    for block in database.attention[: levels[-1]]:
        found[block] = found[block].model_copy(update={"groups": 0})
    return tuple(found)
