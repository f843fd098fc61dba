"""How many hidden directions each block keeps, and the parameters that are left with a basis at every reading point.

DynamicSlicing: Dumitru et al. 2024, "Change Is the Only Constant: Dynamic LLM Slicing based on Layer Redundancy".

Legend: SP = mean fraction sliced away, SB = the fraction every block loses, LR = layer redundancy in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from secateur.errors import InputError
from secateur.methods.budget import Budget, choose_size
from secateur.models.decoder import Decoder
from secateur.surgery.hidden.folding import folded_config, stream_sizes

Normalise = Literal["minmax", "interior", "rank"]
Head = Literal["auto", "sliced", "whole"]
Widths = tuple[int, ...]


def slice_fractions(redundancy: Sequence[float], mean: float, base: float, cap: float = 0.9) -> list[float]:
    """Distribute the slicing over blocks: `FS(l) = SB + LR(l) · (SP − SB) / mean(LR)`, capped, the mean kept.

    Args:
        redundancy: LR of each block, in [0, 1], 1 the most redundant.
        mean: SP, the mean of the result.
        base: SB, from 0 to SP.
        cap: no block loses more; the excess goes to the others in proportion to FS − SB, or evenly.

    Raises:
        InputError: SP above the cap, or SB above SP.
    """
    if not 0 <= mean <= cap:
        raise InputError(f"slice={mean:.1%}: must be at most the cap, {cap:.0%} (--set cap=…).")
    if not 0 <= base <= mean:
        raise InputError(f"slice_base={base:g}: must be between 0 and the slice percentage, {mean:g}.")
    average = sum(redundancy) / len(redundancy)
    above = [(mean - base) * (one / average if average > 0 else 1.0) for one in redundancy]
    capped: set[int] = set()
    while True:
        over = {block for block, extra in enumerate(above) if base + extra > cap * (1 + 1e-12)}
        if not over:
            return [base + extra for extra in above]
        capped |= over
        free = [block for block in range(len(above)) if block not in capped]
        left = (mean - base) * len(above) - len(capped) * (cap - base)
        total = sum(above[block] for block in free)
        for block in capped:
            above[block] = cap - base
        for block in free:
            above[block] = left * above[block] / total if total > 0 else left / len(free)


def normalised(redundancy: Sequence[float], how: Normalise) -> list[float]:
    """Map layer redundancy E cos(X^l, X^{l+1}) to [0, 1].

    `minmax` is the paper's; `interior` takes smallest and largest of blocks 1 … L−2 and clips the outer two, so that
    one outlier does not make all others alike; `rank` spaces the blocks evenly by their order.
    """
    if how == "rank":
        order = sorted(range(len(redundancy)), key=lambda block: (redundancy[block], block))
        return [order.index(block) / max(1, len(order) - 1) for block in range(len(order))]
    inner = redundancy[1:-1] if how == "interior" and len(redundancy) > 2 else redundancy
    low, high = min(inner), max(inner)
    if high <= low:
        return [1.0] * len(redundancy)
    return [min(1.0, max(0.0, (one - low) / (high - low))) for one in redundancy]


def rounded_width(fraction: float, width: int, rounding: int) -> int:
    """Return the directions kept when a fraction is removed: rounded down to a multiple of `rounding`, at least one."""
    if fraction <= 0:
        return width
    return min(width, max(rounding, int(((1 - fraction) * width + 1e-9) // rounding) * rounding))


class OwnBases:
    """Widths of a model with a basis of its own at every reading point, and what is left of its parameters.

    Attributes:
        sizes: parameters per residual dimension.
        total: parameters of the dense model.
    """

    def __init__(self, decoder: Decoder, *, rounding: int, slices_head: bool) -> None:
        """Start for a model.

        Args:
            decoder: the dense model.
            rounding: widths are rounded down to a multiple of this.
            slices_head: whether the head reads as many directions as the blocks keep on average, or all.
        """
        self.sizes = stream_sizes(folded_config(decoder))
        self.total = decoder.parameter_count
        self._rounding = rounding
        self._slices_head = slices_head

    def rounded(self, fraction: float) -> int:
        """Return the directions kept when a fraction is removed."""
        return rounded_width(fraction, self.sizes.width, self._rounding)

    def constant(self, budget: Budget) -> Widths:
        """Return the same width for every block that meets a budget.

        Raises:
            InputError: no width does.
        """
        if budget.aim == "slice":
            return (self.rounded(budget.value),) * len(self.sizes.fixed)
        candidates = self._constants()
        if not candidates:
            raise InputError(f"rounding={self._rounding}: the model has only {self.sizes.width} directions.")
        return candidates[choose_size(budget, [self.left(one) for one in candidates], self.total)]

    def constant_within(self, parameters: int) -> Widths | None:
        """Return the largest width, the same for every block, whose model has at most so many parameters."""
        return max((one for one in self._constants() if self.left(one) <= parameters), default=None)

    def _constants(self) -> list[Widths]:
        blocks = len(self.sizes.fixed)
        return [(width,) * blocks for width in range(self._rounding, self.sizes.width, self._rounding)]

    def head(self, widths: Widths) -> int:
        """Return how many directions the head reads."""
        return self.rounded(self.sliced_away(widths)) if self._slices_head else self.sizes.width

    def left(self, widths: Widths) -> int:
        """Return the number of parameters at these widths of the blocks."""
        points = [width for width in widths for _ in range(self.sizes.points_per_block)] + [self.head(widths)]
        return self.sizes.sizes_at(points, [True] * (len(points) - 1)).total

    def sliced_away(self, widths: Widths) -> float:
        """Return the mean share of the blocks' directions that goes."""
        return 1 - sum(widths) / len(widths) / self.sizes.width
