"""What a method is asked for, as far as its cost depends on it: known before anything is decided."""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.methods.budget import Budget
from secateur.models.decoder import Decoder


@dataclass(frozen=True)
class Asked:
    """An amount to remove from a model, for estimates of cost.

    Attributes:
        budget: the amount as it was given; of a part of a sequence, that of the whole.
        blocks: number of blocks of the model.
        worth: about how many blocks' worth of parameters is to go.
        share: about what fraction of all parameters that is.
    """

    budget: Budget
    blocks: int
    worth: float
    share: float

    @classmethod
    def of(cls, budget: Budget, model: Decoder) -> Asked:
        """Estimate what a budget removes from a model."""
        inside = model.block_parameter_counts()
        total, blocks = model.parameter_count, len(inside)
        each, value = sum(inside) / blocks, budget.value
        gone = {
            "blocks": lambda: value,
            "ratio": lambda: value * blocks,
            "slice": lambda: value * total / each,
            "remove": lambda: value * total / each,
            "target_params": lambda: (total - value) / each,
            "target_memory": lambda: (total - value / model.saved_dtype.itemsize) / each,
            "target_speedup": lambda: (1 - 1 / value) * blocks,
        }
        wanted = gone[budget.aim]() if budget.aim in gone else blocks / 4
        worth = max(0.0, min(blocks - 1.0, wanted))
        return cls(budget, blocks, worth, worth * each / total)

    @property
    def gone(self) -> int:
        """The number of whole blocks that is."""
        return round(self.worth)

    @property
    def in_directions(self) -> bool:
        """Whether the amount is a fraction of the hidden directions, the unit of the slicing papers."""
        return self.budget.aim == "slice"

    def part(self, share: float) -> Asked:
        """Return what one method of a sequence is asked for that takes this share of the amount."""
        return replace(self, worth=share * self.worth, share=share * self.share)
