"""One threshold for all blocks, so that each gets its own width (FLAP, An et al. 2024).

Scores are standardised to mean 0 and standard deviation 1 over the channels of one layer; then all units of the model
are ranked together and those below a threshold are removed; the budget counts their parameters. The scores that decide
how many units a block keeps are those of the dense model; which ones is decided again when the plan is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.calibration.inputs import InputSums
from secateur.calibration.walk import open_store, stored_start, through_block
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.methods.budget import Budget, choose_size
from secateur.methods.uniform_widths import TOLD, AllWidths
from secateur.models.decoder import Decoder
from secateur.models.widths import BlockWidths, block_widths
from secateur.plan.steps import Widths, WidthSizes
from secateur.run_options import DEFAULTS, RunOptions
from secateur.scores.unit_scores import fluctuation, z_scores
from secateur.surgery.width.coupling import Part
from secateur.surgery.width.inputs import measure_inputs, writer_weights
from secateur.surgery.width.pruning import units_of

_LEVELS = 1000


@dataclass(frozen=True)
class Profile:
    """Scores of a block's units, highest first.

    Attributes:
        heads: of key/value groups, or of query heads if there is one group; empty if none may be removed.
        channels: of channels; for a mixture of experts the mean over them, rank by rank.
    """

    heads: torch.Tensor
    channels: torch.Tensor


@torch.no_grad()
def fluctuation_profiles(
    decoder: Decoder, windows: Windows, free: range, *, heads: bool, options: RunOptions = DEFAULTS
) -> dict[int, Profile]:
    """Measure the z-scored fluctuation of the units of the free blocks, on the dense model.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    found = {}
    parts: list[Part] = ["heads", "channels"] if heads else ["channels"]
    with open_store(decoder) as store:
        batches = stored_start(decoder, windows, store, options.batch_size)
        for index in options.progress(range(free.stop), "walking the blocks", free.stop):
            with decoder.block(index):
                if index not in free:
                    through_block(decoder, index, batches, store)
                    continue
                sums = measure_inputs(decoder, index, parts, batches, store, advance=True)
                found[index] = Profile(*(_profile(decoder, index, part, sums.get(part, [])) for part in _BOTH))
    return found


_BOTH: tuple[Part, Part] = ("heads", "channels")


def _profile(decoder: Decoder, index: int, part: Part, sums: list[InputSums]) -> torch.Tensor:
    if not sums:
        return torch.zeros(0, dtype=torch.float64)
    dense = block_widths(decoder, index)
    units = units_of(part, dense, fewest(dense))[0]
    scores = []
    for weight, one in zip(writer_weights(decoder, index, part), sums, strict=True):
        values = z_scores(fluctuation(weight.to(one.total.device), one)).cpu()
        scores.append(values.view(units.shape[0] * units.shape[1], -1).mean(dim=1).sort(descending=True).values)
    return torch.stack(scores).mean(dim=0)


def fewest(dense: BlockWidths) -> Widths:
    """Return the smallest widths a block can have: one group, or one query head if there is one group."""
    return Widths(groups=1, queries=dense.queries if dense.groups > 1 else 1, channels=1)


class Thresholds:
    """Widths for every threshold over the units of all free blocks."""

    def __init__(
        self, profiles: dict[int, Profile], dense: Sequence[Widths], sizes: WidthSizes, multiple: int, total: int
    ) -> None:
        """Rank the units of all blocks; `total` is the number of parameters of the dense model."""
        self._profiles, self._dense, self._sizes = profiles, tuple(dense), sizes
        self._multiple, self._total = multiple, total
        row = torch.cat([part for one in profiles.values() for part in (one.heads, one.channels)]).unique()
        self._levels = row[torch.linspace(0, len(row) - 1, min(len(row), _LEVELS)).round().long()]

    def meet(self, budget: Budget) -> tuple[AllWidths, float | None]:
        """Return the widths that meet a budget, and the fraction removed with single channels if that differs.

        Raises:
            InputError: the budget is out of reach.
        """
        if budget.aim == "ratio":
            inside = sum(
                self._sizes.blocks[b].parameters_at(self._dense[b]) - self._sizes.blocks[b].fixed
                for b in self._profiles
            )
            budget = Budget("remove", budget.value * inside / self._total)
        widths, got = self._closest(budget, self._multiple)
        if self._multiple == 1:
            return widths, None
        best = self._closest(budget, 1)[1]
        return widths, best if abs(best - got) > TOLD else None

    def _closest(self, budget: Budget, multiple: int) -> tuple[AllWidths, float]:
        kept = torch.stack([self._kept(block, multiple) for block in self._profiles], dim=1)
        full = torch.tensor([self._units(block) for block in self._profiles])
        weights = torch.tensor([self._weights(block) for block in self._profiles])
        kept = kept[(kept < full).flatten(1).any(dim=1)]
        if not len(kept):
            raise InputError(f"rounding={multiple}: MLPs have no more channels than that.")
        left = (self._sizes.sizes_at(self._dense).total - ((full - kept) * weights).sum(dim=(1, 2))).tolist()
        place = choose_size(budget, left, self._total)
        widths = list(self._dense)
        for block, (heads, channels) in zip(self._profiles, kept[place].tolist(), strict=True):
            unit = "groups" if self._dense[block].groups > 1 else "queries"
            widths[block] = self._dense[block].model_copy(update={unit: heads, "channels": channels})
        return tuple(widths), 1 - left[place] / self._total

    def _units(self, block: int) -> tuple[int, int]:
        """Return the number of groups (query heads if there is one group), and of channels, of the dense block."""
        dense = self._dense[block]
        return dense.groups if dense.groups > 1 else dense.queries, dense.channels

    def _weights(self, block: int) -> tuple[int, int]:
        """Return the number of parameters of such a unit, and of a channel."""
        sizes, dense = self._sizes.blocks[block], self._dense[block]
        return sizes.query if dense.groups == 1 else sizes.group + dense.queries * sizes.query, sizes.channel

    def _kept(self, block: int, multiple: int) -> torch.Tensor:
        """Return the units kept at every threshold, (levels, 2): those of a higher score, at least one of each kind."""
        profile, (units, channels) = self._profiles[block], self._units(block)
        heads = torch.full_like(self._levels, units, dtype=torch.long)
        if len(profile.heads):
            heads = (len(profile.heads) - self._up_to(profile.heads)).clamp_min(1)
        rounded = (channels - self._up_to(profile.channels) + multiple // 2) // multiple * multiple
        return torch.stack([heads, rounded.clamp(min(multiple, channels), channels)], dim=1)

    def _up_to(self, scores: torch.Tensor) -> torch.Tensor:
        """Count the scores that do not exceed each threshold."""
        return torch.searchsorted(scores.flip(0).contiguous(), self._levels, right=True)
