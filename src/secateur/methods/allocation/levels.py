"""The widths that each branch of a decoder can be given, with the error that each leaves after repair.

Kurtic et al. 2023, "ZipLM: Inference-Aware Structured Pruning of Language Models" (NeurIPS): greedy removal by optimal
brain surgery gives all widths of a branch in one pass, as prefixes of one order. Errors are those of the repaired
output projection on windows held out of the fit, each token relative to the residual stream that leaves the block, so
that errors of different blocks can be compared. Everything is measured on the dense model.

Legend: W = output projection (out, n); level = number of key/value groups or channels that stay, down to none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from secateur.calibration.folds import folds_of
from secateur.calibration.inputs import InputSums
from secateur.calibration.ridge import UNJUDGED
from secateur.calibration.walk import open_store, stored_start, through_block
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.models.widths import BlockWidths, block_widths
from secateur.plan.steps import Widths
from secateur.run_options import DEFAULTS, RunOptions
from secateur.scores.unit_scores import removal_order
from secateur.surgery.width.coupling import Part
from secateur.surgery.width.pruning import measure_inputs, units_of, writer_weights
from secateur.surgery.width.repair import correction, error_with

_BATCHES = 128
"""How often costs are recomputed while all units of a projection are removed."""


@dataclass(frozen=True)
class Branch:
    """Attention or the MLP of a block, and the widths it can be given.

    Attributes:
        block: its block.
        part: "heads" for attention, "channels" for the MLP.
        keep: groups or channels that stay at each level, from all to none.
        errors: error at each level, as a share of the residual stream, squared; 0 for the first. Of a branch that goes
            as a whole or not at all it is 1 in the end, unmeasured.
        probe: a level between, whose loss is measured; the last if there is none between.
    """

    block: int
    part: Part
    keep: tuple[int, ...]
    errors: tuple[float, ...]
    probe: int


Groups = Literal["singly", "together", "never"]


@dataclass(frozen=True)
class Grid:
    """Which levels are measured.

    Attributes:
        multiple: channels stay in multiples of this.
        most: maximum number of levels of an MLP between all and none.
        groups: whether key/value groups may go singly, only all of a block together, or never.
    """

    multiple: int
    most: int = 12
    groups: Groups = "together"

    def of(self, part: Part, dense: BlockWidths) -> tuple[int, ...]:
        """Return the levels of a branch, from all units to none; one level if nothing may go."""
        if part == "heads":
            less = {"singly": range(dense.groups - 1, -1, -1), "together": (0,), "never": ()}
            return (dense.groups, *less[self.groups])
        steps_of = max(1, round(dense.channels / self.most / self.multiple)) * self.multiple
        return (dense.channels, *reversed(range(steps_of, dense.channels, steps_of)), 0)


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
    grid: Grid,
    known: Known = (),
    *,
    options: RunOptions = DEFAULTS,
) -> Iterator[tuple[int, list[tuple[Branch, Writers]]]]:
    """Measure the levels of all branches of the free blocks, on the dense model; yield block by block.

    With each branch comes its output projection at the level between. Blocks in `known` are not measured again.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    dense = {index: block_widths(decoder, index) for index in free if index not in known}
    levels = {(index, part): grid.of(part, one) for index, one in dense.items() for part in _PARTS}
    last = max((index for (index, _), found in levels.items() if len(found) > 2), default=-1) + 1
    for index in [index for index in dense if index >= last]:
        yield index, [_whole(index, part, levels[index, part]) for part in _PARTS if len(levels[index, part]) == 2]
    folds = folds_of(windows)
    judged = folds.held_out if bool(folds.held_out.any()) else torch.ones_like(folds.held_out)
    tokens = torch.full((len(windows),), windows.seq_len) if windows.mask is None else windows.mask.sum(dim=1)
    scale = float((folds.weight * tokens)[judged].sum()) * decoder.hidden_size
    if not last:
        return
    with open_store(decoder) as store:
        batches = stored_start(decoder, windows, store, options.batch_size)
        for index in options.progress(range(last), "measuring widths block by block", last):
            with decoder.block(index):
                if index not in dense:
                    through_block(decoder, index, batches, store)
                    continue
                own = {part: levels[index, part] for part in _PARTS}
                graded = [part for part in _PARTS if len(own[part]) > 2]
                sums = measure_inputs(decoder, index, graded, batches, store, folds, advance=True)
                found = [_whole(index, part, own[part]) for part in _PARTS if len(own[part]) == 2]
                for part in graded:
                    weights = writer_weights(decoder, index, part)
                    found.append(_branch(index, part, dense[index], own[part], weights, sums[part], scale))
                yield index, found


_PARTS: tuple[Part, Part] = ("heads", "channels")


def _whole(block: int, part: Part, levels: tuple[int, ...]) -> tuple[Branch, Writers]:
    """Return a branch that goes as a whole or not at all, of which no error need be known."""
    return Branch(block, part, levels, (0.0, 1.0), 1), ()


def _branch(
    block: int,
    part: Part,
    dense: BlockWidths,
    levels: tuple[int, ...],
    weights: list[torch.Tensor],
    sums: list[InputSums],
    scale: float,
) -> tuple[Branch, Writers]:
    units = units_of(part, dense, Widths(groups=0, queries=dense.queries, channels=0))[0]
    probe = len(levels) // 2
    errors, writers = torch.zeros(len(levels), dtype=torch.float64), []
    for weight, one in zip(weights, sums, strict=True):
        weight, inputs = weight.to(one.total.device), units.to(one.total.device)
        assert one.moments is not None
        assert one.fitted is not None
        order = removal_order(weight, one.moments.gram, inputs, batch=max(1, inputs.shape[1] // _BATCHES))
        judged = one.held_out or one.fitted
        for place, keep in enumerate(levels[1:], start=1):
            stay = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
            stay[inputs[0, order[: len(order) - keep]].flatten()] = False
            delta = correction(weight, one.fitted, stay, UNJUDGED)
            errors[place] += error_with(weight, delta, judged, stay) / scale
            if place == probe:
                writer = torch.zeros_like(weight)
                writer[:, stay] = weight[:, stay] + delta
                writers.append(writer.float().cpu().contiguous())
    return Branch(block, part, levels, tuple(errors.cummax(dim=0).values.tolist()), probe), tuple(writers)
