"""The widths that the MLP of each block can be given, with the error that each leaves after repair.

Kurtic et al. 2023, "ZipLM: Inference-Aware Structured Pruning of Language Models" (NeurIPS): greedy removal by optimal
brain surgery gives all widths of a layer in one pass, as prefixes of one order. Errors are those of the repaired output
projection on windows held out of the fit, each token relative to the residual stream that leaves the block, so that
errors of different blocks can be compared. Everything is measured on the dense model.

Legend: W = output projection (out, n); level = number of channels that stay, down to none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from secateur.calibration.folds import folds_of
from secateur.calibration.inputs import InputSums
from secateur.calibration.ridge import UNJUDGED
from secateur.calibration.walk import open_store, stored_start, through_block
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths
from secateur.run_options import DEFAULTS, RunOptions
from secateur.scores.unit_scores import removal_order
from secateur.surgery.width.pruning import measure_inputs, writer_weights
from secateur.surgery.width.repair import correction, error_with

_BATCHES = 128
"""How often costs are recomputed while all units of a projection are removed."""
_MOST = 12
"""Maximum number of levels between all and none, about."""


@dataclass(frozen=True)
class Levels:
    """The widths that one MLP can be given.

    Attributes:
        block: its block.
        keep: channels that stay at each level, from all to none.
        errors: error at each level, as a share of the residual stream, squared; 0 for the first.
        probe: a level between, whose loss is measured; the last if there is none between.
    """

    block: int
    keep: tuple[int, ...]
    errors: tuple[float, ...]
    probe: int


def levels_of(channels: int, multiple: int) -> tuple[int, ...]:
    """Return the levels of an MLP, from all channels to none, those between in multiples."""
    apart = max(1, round(channels / _MOST / multiple)) * multiple
    return (channels, *reversed(range(apart, channels, apart)), 0)


class Known(Protocol):
    """What was measured of blocks before."""

    def __contains__(self, block: int, /) -> bool:
        """Return whether this block was measured."""


Writers = tuple[torch.Tensor, ...]
"""W of each expert (one if there are none), zeros in the removed columns; float32."""


@torch.no_grad()
def measure_levels(
    decoder: Decoder,
    windows: Windows,
    free: Sequence[int],
    multiple: int,
    known: Known = (),
    *,
    options: RunOptions = DEFAULTS,
) -> Iterator[tuple[Levels, Writers]]:
    """Measure the levels of the MLPs of the free blocks, on the dense model.

    With each comes its output projection at the level between. Blocks in `known` are not measured again.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    widths = {index: block_widths(decoder, index) for index in free if index not in known}
    wanted = {index: levels_of(one.channels, multiple) for index, one in widths.items() if one.channels}
    last = max(wanted, default=-1) + 1
    if not last:
        return
    folds = folds_of(windows)
    judged = folds.held_out if bool(folds.held_out.any()) else torch.ones_like(folds.held_out)
    tokens = torch.full((len(windows),), windows.seq_len) if windows.mask is None else windows.mask.sum(dim=1)
    scale = float((folds.weight * tokens)[judged].sum()) * decoder.hidden_size
    with open_store(decoder) as store:
        batches = stored_start(decoder, windows, store, options.batch_size)
        for index in options.progress(range(last), "measuring widths block by block", last):
            with decoder.block(index):
                if index not in wanted:
                    through_block(decoder, index, batches, store)
                    continue
                sums = measure_inputs(decoder, index, ["channels"], batches, store, folds, advance=True)
                weights = writer_weights(decoder, index, "channels")
                yield _measured(index, wanted[index], weights, sums["channels"], scale)


def _measured(
    block: int, levels: tuple[int, ...], weights: list[torch.Tensor], sums: list[InputSums], scale: float
) -> tuple[Levels, Writers]:
    """Return the levels of an MLP, or of all experts alike, and W at the level between."""
    probe = len(levels) // 2
    errors, writers = torch.zeros(len(levels), dtype=torch.float64), []
    for weight, one in zip(weights, sums, strict=True):
        weight = weight.to(one.total.device)
        assert one.moments is not None
        assert one.fitted is not None
        units = torch.arange(weight.shape[1], device=weight.device)[None, :, None]
        order = removal_order(weight, one.moments.gram, units, batch=max(1, weight.shape[1] // _BATCHES))
        for place, keep in enumerate(levels[1:], start=1):
            stay = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
            stay[order[: len(order) - keep]] = False
            delta = correction(weight, one.fitted, stay, UNJUDGED)
            errors[place] += error_with(weight, delta, one.held_out or one.fitted, stay) / scale
            if place == probe:
                writer = torch.zeros_like(weight)
                writer[:, stay] = weight[:, stay] + delta
                writers.append(writer.float().cpu().contiguous())
    return Levels(block, levels, tuple(errors.cummax(dim=0).values.tolist()), probe), tuple(writers)
