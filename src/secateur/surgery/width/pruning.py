"""Walk through a model and prune the widths of each block in turn, measured on the model as pruned so far.

Attention first, then the MLP of the same block (both at once if they run in parallel): the inputs of the output
projection are summed up, the units to remove are chosen, and the projection is refitted to do without them. For the
walk itself the dense block is run with zeros in the removed columns, which is what the pruned block computes.

Legend: P groups of U units of C inputs each (`scores/unit_scores.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.calibration.folds import Folds, folds_of
from secateur.calibration.inputs import InputSums
from secateur.calibration.ridge import Ridge
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, open_store, stored_start
from secateur.data.windows import Windows
from secateur.models.anatomy import find
from secateur.models.decoder import Decoder
from secateur.models.widths import BlockWidths, block_widths
from secateur.plan.steps import Target, Widths
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.width.alignment import Alignment, advance_dense
from secateur.surgery.width.coupling import Kept, Part
from secateur.surgery.width.exchange import Exchange
from secateur.surgery.width.inputs import (
    Goal,
    as_saved,
    holding,
    measure_inputs,
    of_dense,
    silenced,
    stacked_weights,
    writer_of,
    writer_weights,
    writes_stream,
)
from secateur.surgery.width.repair import Fit, choose_fit, described
from secateur.surgery.width.target import WidthAssembly

_PARTS: tuple[Part, ...] = ("heads", "channels", "shared")


@dataclass(frozen=True)
class Place:
    """An output projection: that of attention, or of the MLP or one expert, of a block.

    `expert` of the expert that every token passes is the number of the others.
    """

    block: int
    part: Part
    expert: int = 0


class Choose(Protocol):
    """Decides which units remain."""

    def __call__(
        self, place: Place, weight: torch.Tensor, sums: InputSums, units: torch.Tensor, keep: int, /
    ) -> torch.Tensor:
        """Mark `keep` units of each group, (P, U) bool, given W (out, n) and the inputs of each unit (P, U, C)."""


def parts_to_measure(keep: Widths, dense: BlockWidths) -> list[Part]:
    """Return the parts of a block of which some units go and others stay."""
    left = {"heads": keep.groups * keep.queries, "channels": keep.channels}
    there = {"heads": dense.heads, "channels": dense.channels}
    left["shared"], there["shared"] = (dense.shared * one["channels"] for one in (left, there))
    return [part for part in _PARTS if 0 < left[part] < there[part]]


def _lost(keep: Widths, dense: BlockWidths) -> list[Part]:
    """Return the branches of a block that go."""
    gone: dict[Part, bool] = {"heads": dense.heads > keep.groups == 0, "channels": dense.channels > keep.channels == 0}
    return [part for part in gone if gone[part]]


def is_cut(keep: Widths, dense: BlockWidths) -> bool:
    """Return whether a block loses anything."""
    return bool(parts_to_measure(keep, dense) or _lost(keep, dense))


@dataclass(frozen=True)
class Refit:
    """How output projections are refitted to the remaining inputs.

    Attributes:
        repair: by least squares, where that is better on held-out windows; else the removed columns are left out.
        ridge: of that fit; "auto" is chosen on held-out windows.
        bias: put what a constant can compensate for into biases, where the result has them.
        target: what an MLP is to write: what brings the states back to those of the dense model, where it writes them
            directly; or what it wrote before, which is what all others do, and all with a bias.
        others: blocks whose MLP is refitted to the dense states even if nothing is removed from it, once something was
            removed before it.
        align: bring what branches read and what attention writes back to that of the dense model too, where MLPs are
            refitted to its states.
    """

    repair: bool = True
    ridge: Ridge = "auto"
    bias: bool = False
    target: Target = "block"
    others: frozenset[int] = frozenset()
    align: bool = False


REFIT = Refit()


@dataclass(frozen=True)
class Pruned:
    """A model with fewer units in its blocks.

    Attributes:
        decoder: the model.
        fits: for each part of a block that was fitted, the ridge and the errors on held-out windows.
    """

    decoder: Decoder
    fits: list[dict[str, Any]]


@torch.no_grad()
def prune_width(
    decoder: Decoder,
    windows: Windows,
    widths: Sequence[Widths],
    choose: Choose,
    *,
    stock: bool,
    refit: Refit = REFIT,
    gram: bool = True,
    options: RunOptions = DEFAULTS,
) -> Pruned:
    """Prune the widths of every block.

    Args:
        decoder: the model; it stays as it is.
        windows: calibration windows.
        widths: what each block keeps.
        choose: decides which units remain.
        stock: keep the architecture, or write the modelling file.
        refit: how output projections are refitted to the remaining inputs.
        gram: accumulate the products of inputs, which repair and some choices read.
        options: batch size and progress.

    Raises:
        ModelError: the widths of this family cannot be pruned, or not like this.
        NumericsError: NaN or infinity on the way.
    """
    target = WidthAssembly(decoder, widths, stock=stock, bias=refit.bias)
    folds = folds_of(windows) if gram else None
    fits: list[dict[str, Any]] = []
    dense = [block_widths(decoder, index) for index in range(decoder.block_count)]
    reads = refit.repair or any(parts_to_measure(*pair) for pair in zip(widths, dense, strict=True))
    changed = False
    with open_store(decoder) as store:
        batches = stored_start(decoder, windows, store, options.batch_size) if reads else []
        if refit.repair and refit.target == "dense" and not refit.bias and writes_stream(decoder):
            for batch in batches:
                store.put(of_dense(batch), store.get(batch.index))
        for index in options.progress(range(decoder.block_count), "pruning widths block by block", decoder.block_count):
            with decoder.block(index):
                walk = _Block(decoder, index, widths[index], batches, store, target, refit, folds, changed)
                walk.prune(choose)
                changed |= walk.is_cut
                fits += walk.fits
    return Pruned(target.finish(), fits)


@dataclass
class _Block:
    """One block to be pruned, its weights loaded; `changed` says whether anything below it was."""

    decoder: Decoder
    index: int
    keep: Widths
    batches: list[Batch]
    store: StateStore
    target: WidthAssembly
    refit: Refit
    folds: Folds | None
    changed: bool
    fits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_cut(self) -> bool:
        """Whether anything is removed from it."""
        return is_cut(self.keep, self._dense)

    def prune(self, choose: Choose) -> None:
        """Choose, refit, run the batches through, and add the block to the result."""
        kept = Kept.all_of(self._dense)
        edits: dict[str, torch.Tensor] = {}
        for part in _lost(self.keep, self._dense):
            edits |= silenced(self.decoder, self.index, part)
            (kept.heads if part == "heads" else kept.channels)[:] = False
        aligned = self._alignment()
        if aligned is not None and self.keep.groups:
            aligned.fit_attention_inputs()
        advance_dense(self.decoder, self.index, self.batches, self.store, aligned)
        if aligned is not None:
            edits |= aligned.attention_inputs()
        exchange = Exchange(self.decoder, self.index, self.store)
        for parts in self._stages(aligned):
            if aligned is not None and parts != ["heads"]:
                edits |= aligned.mlp_inputs(edits)
            run, goal = self._way_of(parts, aligned, exchange)
            with holding(self.block, edits):
                measured = measure_inputs(
                    self.decoder, self.index, parts, self.batches, self.store, self.folds, run=run, goal=goal
                )
            for part, sums in measured.items():
                edits |= self._edit(part, sums, choose, kept)
        if aligned is not None:
            aligned.forget()
            self.fits += aligned.fits
        exchange.advance(edits, self.batches)
        with holding(self.block, edits):
            self.target.block(self.index, kept)

    @property
    def block(self) -> nn.Module:
        return self.decoder.block_list[self.index]

    @property
    def _dense(self) -> BlockWidths:
        return block_widths(self.decoder, self.index)

    @property
    def _follows_dense(self) -> bool:
        """Whether the states of the dense model are known."""
        return any(of_dense(batch) in self.store for batch in self.batches)

    def _alignment(self) -> Alignment | None:
        """Return what aligns the block, where that is wanted and possible and something below it was changed."""
        may_change = self.is_cut or self.index in self.refit.others
        if not (self.refit.align and self.changed and may_change and self._follows_dense) or self.folds is None:
            return None
        return Alignment.where_possible(
            self.decoder, self.index, self.batches, self.store, self.folds, self.refit.ridge
        )

    def _stages(self, aligned: Alignment | None) -> list[list[Part]]:
        """Return the parts that are refitted, those at the same time together."""
        parts = parts_to_measure(self.keep, self._dense)
        stands_in = self._follows_dense and self.index in self.refit.others and (self.changed or self.is_cut)
        if (stands_in or aligned is not None) and self.keep.channels == self._dense.channels > 0:
            parts.append("channels")
        if aligned is not None and self.keep.groups == self._dense.groups > 0:
            parts.insert(0, "heads")
        if self.decoder.anatomy.parallel and parts:
            return [parts]
        return _in_turn(parts)

    def _way_of(
        self, parts: list[Part], aligned: Alignment | None, exchange: Exchange
    ) -> tuple[Callable[[Batch], torch.Tensor] | None, Goal | None]:
        """Return how the block runs while parts are measured, and what they are to reach; None as for any block."""
        if aligned is not None and parts == ["heads"]:
            return aligned.after_attention, aligned.attention_goal(then_mlp=bool(self.keep.channels))
        once = parts == ["channels"] and self._follows_dense and Exchange.possible(self.decoder, self.index)
        return (exchange.run if once else None), None

    def _edit(self, part: Part, sums: list[InputSums], choose: Choose, kept: Kept) -> dict[str, torch.Tensor]:
        """Choose what remains of one part, note it in `kept`, and return the output projection as it is then."""
        bias = self.refit.bias and self.target.writes_bias(self.index, part)
        found = refitted(self.decoder, self.index, part, sums, self.keep, choose, refit=self.refit, bias=bias)
        whole = self.keep.queries == self._dense.queries
        kept.note(part, found.chosen, whole_groups=whole)
        if self.refit.repair:
            self.fits.append({"block": self.index, "part": part, **described(found.fits)})
        return found.parameters


@dataclass(frozen=True)
class Refitted:
    """An output projection that reads fewer inputs.

    Attributes:
        parameters: its tensors under the block's names, with zeros for the removed inputs.
        chosen: the units that remain, of each expert, (P, U) bool.
        fits: how each was fitted.
    """

    parameters: dict[str, torch.Tensor]
    chosen: list[torch.Tensor]
    fits: list[Fit]


def refitted(
    decoder: Decoder,
    index: int,
    part: Part,
    sums: Sequence[InputSums],
    keep: Widths,
    choose: Choose,
    *,
    refit: Refit = REFIT,
    bias: bool = False,
) -> Refitted:
    """Choose which units of a part of block `index` remain, and refit its output projection to them.

    Args:
        decoder: the model; the weights of the block are loaded.
        index: the block.
        part: attention or MLP.
        sums: over the inputs of its output projection, of each expert.
        keep: what remains of the block.
        choose: decides which units remain.
        refit: how the projection is refitted.
        bias: put what a constant can compensate for into its bias.
    """
    dense = block_widths(decoder, index)
    units, count = units_of(part, dense, keep)
    written, shifts, chosen, fits = [], [], [], []
    for expert, (weight, one) in enumerate(zip(writer_weights(decoder, index, part), sums, strict=True)):
        weight, units = weight.to(one.total.device), units.to(one.total.device)
        place = Place(index, part, max(1, dense.experts) if part == "shared" else expert)
        chosen.append(
            torch.ones(units.shape[:2], dtype=torch.bool, device=weight.device)
            if count == units.shape[1]
            else choose(place, weight, one, units, count)
        )
        stay = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        stay[units[chosen[-1]].flatten()] = True
        fits.append(choose_fit(weight, one, stay, repair=refit.repair, bias=bias, ridge=refit.ridge))
        weight, shift = fits[-1].applied(weight, one, stay)
        written.append(weight)
        shifts.append(shift)
    return Refitted(_parameters(decoder, index, part, written, shifts[0]), chosen, fits)


def _parameters(
    decoder: Decoder, index: int, part: Part, weights: list[torch.Tensor], shift: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return weights (out, n) under the block's names, rounded to the dtype they will be saved in."""
    block, name = decoder.block_list[index], writer_of(decoder, index, part)
    found = find(block, name)
    if isinstance(found, nn.Parameter):
        return {name: as_saved(decoder, stacked_weights(block, name, weights), found)}
    weight = weights[0].T if isinstance(found, Conv1D) else weights[0]
    edits = {f"{name}.weight": as_saved(decoder, weight, found.weight)}
    if shift is not None:
        shifted = shift if found.bias is None else found.bias.to(shift) + shift
        edits[f"{name}.bias"] = as_saved(decoder, shifted, found.weight)
    return edits


def _in_turn(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts in the order in which they are pruned: attention, then all that the MLP consists of."""
    first: list[Part] = [part for part in parts if part == "heads"]
    then: list[Part] = [part for part in parts if part != "heads"]
    return [one for one in (first, then) if one]


def units_of(part: Part, dense: BlockWidths, keep: Widths) -> tuple[torch.Tensor, int]:
    """Return the inputs of each unit that may be removed, (P, U, C), and how many units of each group remain.

    Channels are one group (those of a shared expert as many as it is times wider than the others), and so are key/value
    heads; of query heads as many go in each key/value head's group.
    """
    if part == "channels":
        return torch.arange(dense.channels)[None, :, None], keep.channels
    if part == "shared":
        return torch.arange(dense.shared * dense.channels).view(dense.shared, -1, 1), keep.channels
    inputs = torch.arange(dense.heads * dense.head_size)
    if keep.queries == dense.queries:
        return inputs.view(1, dense.groups, -1), keep.groups
    return inputs.view(dense.groups, dense.queries, dense.head_size), keep.queries
