"""What widths save, in the unit of a budget, and the choice among widths that meets it."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.methods.budget import Budget, choose_size
from secateur.models.decoder import Decoder
from secateur.plan.steps import Widths, WidthSizes
from secateur.plan.width import units_of
from secateur.surgery.width.coupling import Part

AllWidths = tuple[Widths, ...]
NAMES: dict[Part, str] = {"heads": "groups", "channels": "channels"}
"""The width of a block that is 0 without this branch."""


class Savings:
    """What is saved with other widths than the dense model's.

    Attributes:
        dense: the dense model's widths.
        sizes: parameters of the result by unit.
    """

    def __init__(self, decoder: Decoder, sizes: WidthSizes, budget: Budget) -> None:
        """Count in the unit of a budget: parameters, bytes of weights and cache, or seconds."""
        self.sizes, self.dense = sizes, tuple(one.dense for one in sizes.blocks)
        self._budget, self._total = budget, decoder.parameter_count

    def of(self, block: int, **less: int) -> float:
        """Return what is saved if one block alone has fewer groups or channels."""
        sizes, dense = self.sizes.blocks[block], self.dense[block]
        own = dense.model_copy(update=less)
        saved = sizes.parameters_at(dense) - sizes.parameters_at(own)
        cost = self._budget.cost
        if cost is None:
            return saved
        changed = tuple(own if index == block else one for index, one in enumerate(self.dense))
        every = range(len(self.dense))
        return cost.weigh(every, self._total) - cost.weigh(every, self._total - saved, units_of(changed))

    def weight(self, widths: AllWidths) -> float:
        """Return the cost of the model with these widths."""
        sizes = self.sizes.sizes_at(widths)
        cost = self._budget.cost
        return sizes.total if cost is None else cost.weigh(self.sizes.kept_blocks(widths), sizes.total, sizes.units)

    def meet(self, path: Sequence[AllWidths]) -> AllWidths:
        """Return the widths among several that meet the budget.

        Raises:
            InputError: it is out of reach.
        """
        after = [self.sizes.sizes_at(one) for one in path]
        kept, units = [self.sizes.kept_blocks(one) for one in path], [one.units for one in after]
        return path[choose_size(self._budget, [one.total for one in after], self._total, kept, units)]
