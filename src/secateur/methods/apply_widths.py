"""Apply a step of width pruning: what decides which units remain, by the scores of the papers or greedily."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch

from secateur.calibration.inputs import InputSums
from secateur.calibration.ridge import Ridge
from secateur.data.windows import Windows
from secateur.errors import InputError, SecateurWarning
from secateur.methods.method import Applied, Measurements, applies
from secateur.models.decoder import Decoder
from secateur.models.widths import BlockWidths, block_widths
from secateur.plan.steps import Choice, PruneWidth
from secateur.scores.taylor import taylor_by_unit
from secateur.scores.unit_scores import (
    activation_norm,
    batch_for,
    best_units,
    cheapest_to_lose,
    fluctuation,
    magnitude,
    order_by_surgeon,
    weighted_norm,
)
from secateur.surgery.depth.blocks import keep_blocks
from secateur.surgery.width.pruning import Choose, Place, Refit, prune_width
from secateur.surgery.width.repair import aimed
from secateur.surgery.width.target import width_sizes

_TOKENS_PER_INPUT = 16
"""With fewer calibration tokens than this per input of a projection, its repair generalises badly to other texts."""


@applies(PruneWidth)
def apply(measurements: Measurements, step: PruneWidth) -> Applied:
    """Prune as the step says; which units remain is measured on the texts.

    Raises:
        InputError: the step was made for a model of another shape.
        ModelError: the widths of this family cannot be pruned.
        NumericsError: NaN or infinity on the way.
    """
    decoder = measurements.decoder
    if width_sizes(decoder, stock=step.stock, bias=step.bias) != step.sizes:
        raise InputError("this width-pruning step was made for a model of another shape; make a new plan for this one.")
    if step.repair:
        _warn_of_few_tokens(decoder, measurements.need_windows())
    refit = Refit(
        repair=step.repair,
        ridge=step.ridge,
        bias=step.bias,
        target=step.target,
        others=frozenset(step.refitted),
        align=step.align,
    )
    pruned = prune_width(
        decoder,
        measurements.need_windows(),
        step.widths,
        _chooser(measurements, step, refit),
        stock=step.stock,
        refit=refit,
        gram=step.repair or step.choose == "brain-surgeon",
        options=measurements.options,
    )
    kept = step.kept_blocks(decoder.block_count)
    return Applied(keep_blocks(pruned.decoder, kept), {"repair": pruned.fits} if pruned.fits else {})


def _warn_of_few_tokens(decoder: Decoder, windows: Windows) -> None:
    """Warn if there are few tokens, with the number of windows that a fit of the widest projection needs."""
    widths = [block_widths(decoder, block) for block in range(decoder.block_count)]
    inputs = max(max(one.channels, one.heads * one.head_size) for one in widths)
    wanted = _TOKENS_PER_INPUT * inputs
    if windows.token_count < wanted:
        count = math.ceil(wanted * len(windows) / windows.token_count)
        warnings.warn(
            f"repair: {windows.token_count:,} calibration tokens are few for projections of {inputs:,} inputs; "
            f"{count} windows of {windows.seq_len} tokens would be {_TOKENS_PER_INPUT} for each.",
            SecateurWarning,
            stacklevel=4,
        )


_SCORES: dict[Choice, Callable[[torch.Tensor, InputSums], torch.Tensor]] = {
    "fluctuation": fluctuation,
    "weighted-norm": weighted_norm,
    "magnitude": magnitude,
    "activation-norm": activation_norm,
}


def _chooser(measurements: Measurements, step: PruneWidth, refit: Refit) -> Choose:
    """Create the function that decides which units remain."""
    if step.choose == "brain-surgeon":
        return BrainSurgeon.before(refit, step.candidates)
    if step.choose in _SCORES:
        score = _SCORES[step.choose]

        def by_score(
            _: Place, weight: torch.Tensor, sums: InputSums, units: torch.Tensor, keep: int, /
        ) -> torch.Tensor:
            return best_units(score(weight, sums).view(*units.shape[:2], -1).sum(dim=-1), keep)

        return by_score
    taylor = taylor_by_unit(measurements.decoder, measurements.need_windows(), options=measurements.options)

    def by_taylor(place: Place, _: torch.Tensor, sums: InputSums, units: torch.Tensor, keep: int, /) -> torch.Tensor:
        heads, channels = taylor[place.block]
        if place.part == "channels":
            scores = channels[place.expert][None]
        elif place.part == "shared":
            scores = channels[place.expert :]
        else:
            scores = _of_head_units(heads, block_widths(measurements.decoder, place.block), groups=len(units))
        return best_units(scores.to(sums.total.device), keep)

    return by_taylor


def _of_head_units(scores: torch.Tensor, dense: BlockWidths, *, groups: int) -> torch.Tensor:
    """Return scores (H+G,) as those of query heads, group by group, or as one group of whole key/value groups."""
    queries, shared = scores[: dense.heads].view(dense.groups, dense.queries), scores[dense.heads :]
    return queries if groups == dense.groups else (queries.sum(dim=1) + shared)[None]


class BrainSurgeon:
    """Chooses greedily; the ridge stays small: that of the repair would lose channels on which few tokens rely.

    Channels that go are among those of smallest mean size: one that others replace on the calibration texts may be
    missed on texts of another kind.

    Where much is cut and projections are refitted to bring states back to those of the dense model, units are chosen
    for the projection as it would be refitted with all of them.

    The order in which the units of one group go is kept until another projection is asked for, so that several widths
    of the same one cost little more than the narrowest.
    """

    def __init__(self, candidates: float | None = None, *, aim: Ridge | None = None) -> None:
        """Start without an order.

        Args:
            candidates: channels that may go, those of smallest mean size, as a share of all; None: all.
            aim: refit the projection with this ridge before units are chosen; None: they are chosen for it as it is.
        """
        self._candidates, self._aim = candidates, aim
        self._place: Place | None = None
        self._order = torch.zeros(0, dtype=torch.int64)

    @classmethod
    def before(cls, refit: Refit, candidates: float | None = None) -> BrainSurgeon:
        """Return what chooses units before projections are refitted like this."""
        return cls(candidates, aim=refit.ridge if refit.repair and refit.align else None)

    def __call__(
        self, place: Place, weight: torch.Tensor, sums: InputSums, units: torch.Tensor, keep: int, /
    ) -> torch.Tensor:
        """Mark `keep` units of each group, (P, U) bool."""
        groups, each = units.shape[:2]
        if groups > 1:
            moments = sums.moments
            assert moments is not None, "greedy removal needs the Gram matrix"
            return cheapest_to_lose(self._aimed(weight, sums), moments.gram, units, keep, batch=batch_for(units))
        if place != self._place or len(self._order) < each - keep:
            toward = self._aimed(weight, sums)
            self._order = order_by_surgeon(toward, sums, units, keep, candidates=self._candidates)
            self._place = place
        stay = torch.ones(1, each, dtype=torch.bool, device=weight.device)
        stay[0, self._order[: each - keep]] = False
        return stay

    def _aimed(self, weight: torch.Tensor, sums: InputSums) -> torch.Tensor:
        return weight if self._aim is None else aimed(weight, sums, self._aim)
