"""Every block its own widths, at the least expected loss for a budget.

Kurtic et al. 2023, "ZipLM" (NeurIPS); Tang et al. 2025, "DarwinLM: Evolutionary Structured Pruning of Large Language
Models": one database of levels, then one level per branch under the budget. The expected loss of a level is
interpolated over its error between the losses with that branch alone at a level between, and without it. Losses of
several branches are taken to add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from secateur.methods.allocation.database import Database
from secateur.methods.allocation.frontier import Option, best_choices
from secateur.methods.allocation.levels import Branch
from secateur.methods.allocation.sensitivity import Reaction
from secateur.methods.budget import Budget, choose_size
from secateur.models.decoder import Decoder
from secateur.models.widths import cache_size
from secateur.plan.steps import Widths, WidthSizes

AllWidths = tuple[Widths, ...]
_NOISE = 1e-4
"""Nats below which a loss says nothing."""
_POWERS = (1.0, 2.0)


def expected_losses(branch: Branch, reaction: Reaction) -> tuple[float, ...]:
    """Return the loss in nats that each level of a branch is expected to cost; it never falls from level to level.

    It follows a power of the error, a · Eᵖ with p from 1 to 2, through the loss at the level between and that without
    the branch.
    """
    between = max(reaction.probe, _NOISE)
    whole, middle = branch.errors[-1], branch.errors[branch.probe]
    if not 0 < middle < whole:
        return (0.0,) * (len(branch.errors) - 1) + (max(reaction.removed, 0.0),)
    power = math.log(max(reaction.removed, between) / between) / math.log(whole / middle)
    power = min(_POWERS[1], max(_POWERS[0], power))
    below = [between * (error / middle) ** power for error in branch.errors]
    above = [max(reaction.removed, between) * (error / whole) ** power for error in branch.errors]
    return tuple(
        low if error <= middle else max(high, between)
        for error, low, high in zip(branch.errors, below, above, strict=True)
    )


def cached_share(widths: Sequence[Widths], dense: Sequence[Widths]) -> dict[int, float]:
    """Return the share of its cache that each block keeps."""
    pairs = zip(widths, dense, strict=True)
    return {block: own.groups / max(1, before.groups) for block, (own, before) in enumerate(pairs)}


class Allocation:
    """The widths at the least expected loss, for every amount."""

    def __init__(self, decoder: Decoder, database: Database, sizes: WidthSizes, budget: Budget) -> None:
        """Search all amounts; `path` lists the widths found, from the largest model to the smallest.

        Args:
            decoder: the dense model.
            database: levels of its branches and their worth.
            sizes: parameters of the result by unit.
            budget: says in which unit amounts are counted.
        """
        self._decoder, self._branches, self._sizes = decoder, database.branches, sizes
        self._dense = tuple(one.dense for one in sizes.blocks)
        options = [
            self._options(one, reaction, budget)
            for one, reaction in zip(database.branches, database.reactions, strict=True)
        ]
        self.path = list(dict.fromkeys(self._widths(levels) for levels in best_choices(options)))

    def meet(self, budget: Budget) -> AllWidths:
        """Return the widths that meet a budget.

        Raises:
            InputError: it is out of reach.
        """
        path = [one for one in self.path if one != self._dense and not all(own.is_empty for own in one)]
        left = [self._sizes.sizes_at(one).total for one in path]
        cached = [cached_share(one, self._dense) for one in path]
        return path[choose_size(budget, left, self._decoder.parameter_count, cached=cached)]

    def _options(self, branch: Branch, reaction: Reaction, budget: Budget) -> list[Option]:
        losses = expected_losses(branch, reaction)
        full = self._sizes.blocks[branch.block].parameters_at(self._dense[branch.block])
        cached = 0.0
        if budget.cost is not None and budget.cost.unit == "bytes" and branch.part == "heads":
            numbers = cache_size(self._decoder, int(budget.cost.facts["context"]))[branch.block]
            cached = numbers / max(1, self._dense[branch.block].groups)
        return [
            Option(full - self._with(branch, keep) + cached * (branch.keep[0] - keep), loss)
            for keep, loss in zip(branch.keep, losses, strict=True)
        ]

    def _with(self, branch: Branch, keep: int) -> int:
        """Count the parameters of the block of a branch with that branch at this level."""
        name = "groups" if branch.part == "heads" else "channels"
        widths = self._dense[branch.block].model_copy(update={name: keep})
        return self._sizes.blocks[branch.block].parameters_at(widths)

    def _widths(self, levels: Sequence[int]) -> AllWidths:
        found = list(self._dense)
        for branch, level in zip(self._branches, levels, strict=True):
            name = "groups" if branch.part == "heads" else "channels"
            found[branch.block] = found[branch.block].model_copy(update={name: branch.keep[level]})
        return tuple(found)
