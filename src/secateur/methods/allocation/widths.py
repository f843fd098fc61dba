"""Every block its own widths, at the least expected loss for a budget.

Kurtic et al. 2023, "ZipLM" (NeurIPS); Tang et al. 2025, "DarwinLM: Evolutionary Structured Pruning of Large Language
Models": one database of levels, then one level per MLP under the budget, and a number of attention branches. The
expected loss of a level is interpolated over its error between the losses with that MLP alone at a level between, and
without it. Losses of several MLPs, and that without attention in some blocks, are taken to add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from secateur.methods.allocation.database import Database
from secateur.methods.allocation.frontier import Option, best_choices
from secateur.methods.allocation.levels import Levels
from secateur.methods.allocation.sensitivity import Reaction
from secateur.methods.budget import Budget, choose_size
from secateur.models.decoder import Decoder
from secateur.models.widths import cache_size
from secateur.plan.steps import Widths, WidthSizes

AllWidths = tuple[Widths, ...]
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
            database: what widths cost.
            sizes: parameters of the result by unit.
            budget: says in which unit amounts are counted.
        """
        self._decoder, self._database, self._sizes = decoder, database, sizes
        self._dense = tuple(one.dense for one in sizes.blocks)
        options = [
            [
                Option(self._saved(one.block, channels=keep), loss)
                for keep, loss in zip(one.keep, expected_losses(one, reaction), strict=True)
            ]
            for one, reaction in zip(database.mlps, database.reactions, strict=True)
        ]
        options.append(self._attention(budget))
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

    def _attention(self, budget: Budget) -> list[Option]:
        """Return the options of losing the attention of 0, 1, 2, … blocks; bytes count their cache, too."""
        cache = [0] * len(self._dense)
        if budget.cost is not None and budget.cost.unit == "bytes":
            cache = list(cache_size(self._decoder, int(budget.cost.facts["context"])))
        found, saved = [Option(0, 0.0)], 0
        for block, loss in zip(self._database.attention, self._database.lost, strict=True):
            saved += self._saved(block, groups=0) + cache[block]
            found.append(Option(saved, loss))
        return found

    def _saved(self, block: int, **less: int) -> int:
        """Count the parameters that a block loses with these widths."""
        sizes, dense = self._sizes.blocks[block], self._dense[block]
        return sizes.parameters_at(dense) - sizes.parameters_at(dense.model_copy(update=less))

    def _widths(self, levels: Sequence[int]) -> AllWidths:
        found = list(self._dense)
        for mlp, level in zip(self._database.mlps, levels[:-1], strict=True):
            found[mlp.block] = found[mlp.block].model_copy(update={"channels": mlp.keep[level]})
        for block in self._database.attention[: levels[-1]]:
            found[block] = found[block].model_copy(update={"groups": 0})
        return tuple(found)
