"""What a model pruned to given widths has lost, and by how much that changes if one block alone has others.

It is measured in nats, as the Kullback–Leibler divergence of the predictions from those of the dense model.

Losses measured on the dense model, one MLP at a time, no longer add up where much is removed: what a channel is worth
depends on what else is gone. Here all blocks are pruned, repaired and aligned as the plan would be applied, and the
widths of one block at a time are changed, so that the changes hold near these widths (as in sequential linear
programming).

All these models are walked together, block after block: one that differs at block b shares the states of the pruned
model below b, and above b its blocks are those of the pruned model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from secateur.calibration.folds import Folds, folds_of
from secateur.calibration.inputs import InputSums
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, open_store, step, stored_start, through_block
from secateur.data.windows import Windows
from secateur.methods.allocation.sensitivity import shortened
from secateur.models.anatomy import owner_of
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths
from secateur.plan.steps import Widths
from secateur.run_options import DEFAULTS, RunOptions
from secateur.scores.divergence import kl_divergence, mean_distances
from secateur.surgery.width.alignment import Alignment, advance_dense
from secateur.surgery.width.coupling import Kept, Part, couplings_of, without_units
from secateur.surgery.width.inputs import holding, measure_inputs, of_dense, silenced, writes_stream
from secateur.surgery.width.pruning import Choose, Refit, Refitted, is_cut, parts_to_measure, refitted

JUDGED = 2048
"""Tokens on which changes are compared, about."""
_PART = 8
"""One window in this many of each source compares changes, and another one judges them."""

Trial = tuple[int, Widths]
"""A block with other widths."""
Edits = dict[str, torch.Tensor]
Others = Mapping[int, Sequence[Widths]]
"""Other widths of blocks, that differ in the channels or in the key/value groups."""


@dataclass(frozen=True)
class Parts:
    """Calibration windows in three parts, none of which shares a window with another.

    Attributes:
        fitted: on which the model is pruned and repaired.
        searched: on which changes of widths are compared; of many comparisons the best is luck in part.
        judged: on which it is decided whether widths found like that are better.
    """

    fitted: Windows
    searched: Windows
    judged: Windows

    @classmethod
    def of(cls, windows: Windows) -> Parts:
        """Take an eighth of the windows of each source to compare, and an eighth to judge; at least one of each.

        Sources with fewer than three windows take no part in one or both.

        Raises:
            InputError: there are too few windows of every source.
        """
        rest, judged = windows.split_off(1 / _PART)
        fitted, searched = rest.split_off(1 / (_PART - 1))
        return cls(fitted, shortened(searched, JUDGED), judged)


@dataclass(frozen=True)
class Point:
    """Widths with what is lost there, in nats.

    Attributes:
        widths: of all blocks.
        loss: of the pruned model, on the windows that compare.
        judged: of the pruned model, on the windows that judge.
        others: with other widths in one block, on the windows that compare.
    """

    widths: tuple[Widths, ...]
    loss: float
    judged: float
    others: Mapping[Trial, float]


@torch.no_grad()
def losses_around(
    decoder: Decoder,
    parts: Parts,
    widths: Sequence[Widths],
    others: Others,
    choose: Choose,
    *,
    refit: Refit,
    options: RunOptions = DEFAULTS,
) -> Point:
    """Measure what a pruned model has lost, and with other widths in one block.

    Args:
        decoder: the dense model.
        parts: of the calibration windows.
        widths: what each block keeps.
        others: other widths of each block, one at a time.
        choose: decides which units remain.
        refit: how output projections are refitted.
        options: windows per batch, progress.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    trials = [(block, one) for block, found in others.items() for one in found]
    with open_store(decoder) as store:
        walk = _Walk(decoder, parts, store, choose, refit, options)
        for index in options.progress(range(decoder.block_count), "pruning with other widths", decoder.block_count):
            with decoder.block(index):
                walk.through(index, widths[index], others.get(index, ()))
        with decoder.outer():
            loss, *changed = walk.losses(walk.compared, [None, *trials])
            (judged,) = walk.losses(walk.judged, [None])
            return Point(tuple(widths), loss, judged, dict(zip(trials, changed, strict=True)))


_DENSE: Literal["dense"] = "dense"
Model = Trial | None | Literal["dense"]
"""The model with other widths in one block, the pruned model, or the dense one."""


@dataclass(frozen=True)
class _Read:
    """Windows that models are read on.

    Attributes:
        name: tells their states in the store from those of others.
        batches: the windows.
    """

    name: str
    batches: Sequence[Batch]

    def key(self, batch: Batch, model: Model) -> tuple[str, int, Model]:
        return self.name, batch.index, model


@dataclass
class _Walk:
    """States of the pruned model on the calibration windows, and of all models on those that compare or judge them."""

    decoder: Decoder
    parts: Parts
    store: StateStore
    choose: Choose
    refit: Refit
    options: RunOptions
    trials: list[Trial] = field(default_factory=list)
    changed: bool = False

    def __post_init__(self) -> None:
        size = self.options.batch_size
        self._folds: Folds = folds_of(self.parts.fitted)
        self._batches = stored_start(self.decoder, self.parts.fitted, self.store, size)
        if self.refit.target == "dense" and writes_stream(self.decoder):
            for batch in self._batches:
                self.store.put(of_dense(batch), self.store.get(batch.index))
        self.compared = self._read("compared", self.parts.searched)
        self.judged = self._read("judged", self.parts.judged)

    def _read(self, name: str, windows: Windows) -> _Read:
        def key(batch: Batch) -> tuple[str, int, Model]:
            return name, batch.index, None

        found = _Read(name, stored_start(self.decoder, windows, self.store, self.options.batch_size, key=key))
        for batch in found.batches:
            self.store.put(found.key(batch, _DENSE), self.store.get(found.key(batch, None)))
        return found

    def through(self, index: int, keep: Widths, others: Sequence[Widths]) -> None:
        """Run block `index`, its weights loaded."""
        dense, every = block_widths(self.decoder, index), (keep, *others)
        aligned = self._alignment(index) if any(is_cut(one, dense) for one in every) else None
        if aligned is not None and any(one.groups for one in every):
            aligned.fit_attention_inputs()
        advance_dense(self.decoder, index, self._batches, self.store, aligned)
        for read in (self.compared, self.judged):
            self._advance(read, index, _DENSE, _DENSE, {})
        attention = self._attention(index, keep, sorted({one.groups for one in every}), aligned)
        before = {} if self.decoder.anatomy.parallel and keep.groups else attention[keep.groups]
        mlps = self._mlps(index, keep, sorted({one.channels for one in every}), before, aligned)
        if aligned is not None:
            aligned.forget()

        def edits(widths: Widths) -> Edits:
            return attention[widths.groups] | mlps[widths.channels] if is_cut(widths, dense) else {}

        for widths in others:
            self._advance(self.compared, index, None, (index, widths), edits(widths))
        if not keep.is_empty:
            own = edits(keep)
            for trial in self.trials:
                self._advance(self.compared, index, trial, trial, own)
            for read in (self.compared, self.judged):
                self._advance(read, index, None, None, own)
            with holding(self.decoder.block_list[index], own):
                through_block(self.decoder, index, self._batches, self.store)
        self.trials += [(index, widths) for widths in others]
        self.changed |= is_cut(keep, dense)

    def _alignment(self, index: int) -> Alignment | None:
        """Return what aligns the block, where that is wanted and possible, and something below it is cut."""
        if not (self.refit.align and self.changed and of_dense(self._batches[0]) in self.store):
            return None
        return Alignment.where_possible(self.decoder, index, self._batches, self.store, self._folds, self.refit.ridge)

    def losses(self, read: _Read, models: Sequence[Model]) -> list[float]:
        """Return what these models have lost on some windows, in nats; final norm and head are loaded."""

        def state(batch: Batch, model: Model) -> torch.Tensor:
            return self.store.get(read.key(batch, model))

        return mean_distances(self.decoder, read.batches, state, _DENSE, models, kl_divergence)

    def _attention(
        self, index: int, keep: Widths, counts: Sequence[int], aligned: Alignment | None
    ) -> dict[int, Edits]:
        """Return the parameters of a block's attention with these numbers of key/value groups, few first."""
        dense = block_widths(self.decoder, index)
        found: dict[int, Edits] = {dense.groups: {}}
        if 0 in counts and dense.groups:
            found[0] = silenced(self.decoder, index, "heads")
        fitted = [count for count in counts if 0 < count < dense.groups + (aligned is not None)]
        if fitted:
            inputs = {} if aligned is None else aligned.attention_inputs()
            before = silenced(self.decoder, index, "channels") if dense.channels > keep.channels == 0 else {}
            goal = None if aligned is None else aligned.attention_goal(then_mlp=bool(keep.channels))
            run = None if aligned is None else aligned.after_attention
            sums = self._sums(index, ["heads"], {**inputs, **before}, run=run, goal=goal)
            for count in fitted:
                own = keep.model_copy(update={"groups": count})
                found[count] = {**inputs, **self._refitted(index, "heads", sums, own).parameters}
        return found

    def _mlps(
        self, index: int, keep: Widths, counts: Sequence[int], before: Edits, aligned: Alignment | None
    ) -> dict[int, Edits]:
        """Return the parameters of a block's MLP with these numbers of channels, few first, after its attention."""
        dense = block_widths(self.decoder, index)
        found: dict[int, Edits] = {dense.channels: {}}
        if 0 in counts and dense.channels:
            found[0] = silenced(self.decoder, index, "channels")
        fitted = [count for count in counts if 0 < count < dense.channels + (aligned is not None)]
        if fitted:
            inputs = {} if aligned is None else aligned.mlp_inputs(before)
            narrow = keep.model_copy(update={"channels": fitted[0]})
            parts: list[Part] = [part for part in parts_to_measure(narrow, dense) if part != "heads"] or ["channels"]
            sums = self._sums(index, parts, {**before, **inputs})
            for count in fitted:
                kept, edits = Kept.all_of(dense), dict(inputs)
                for part in parts:
                    own = self._refitted(index, part, sums, keep.model_copy(update={"channels": count}))
                    kept.note(part, own.chosen)
                    edits |= own.parameters
                found[count] = edits | self._narrower(index, edits, kept)
        return found

    def _sums(self, index: int, parts: list[Part], before: Edits, **more: Any) -> dict[Part, list[InputSums]]:
        """Sum up the inputs of output projections of a block with other parameters."""
        with holding(self.decoder.block_list[index], before):
            return measure_inputs(self.decoder, index, parts, self._batches, self.store, self._folds, **more)

    def _refitted(self, index: int, part: Part, sums: Mapping[Part, list[InputSums]], keep: Widths) -> Refitted:
        return refitted(self.decoder, index, part, sums[part], keep, self.choose, refit=self.refit)

    def _narrower(self, index: int, edits: Edits, kept: Kept) -> dict[str, torch.Tensor]:
        """Return an MLP without the channels that go, so that it runs faster; nothing if its modules count them."""
        block, family = self.decoder.block_list[index], self.decoder.anatomy.family
        named = couplings_of(block, family, block_widths(self.decoder, index))
        of_mlp = {name: one for name, one in named.items() if one.part != "heads"}
        if bool(kept.channels.all()) or any(type(owner_of(block, name)) is not nn.Linear for name in of_mlp):
            return {}
        there = dict(block.named_parameters())
        return without_units({name: edits.get(name, there[name]) for name in of_mlp}, of_mlp, kept)

    def _advance(self, read: _Read, index: int, before: Model, after: Model, edits: Edits) -> None:
        """Advance the states of one model; they become those of another."""
        with holding(self.decoder.block_list[index], edits):
            for batch in read.batches:
                found = step(self.decoder, index, batch, self.store.get(read.key(batch, before)))
                self.store.put(read.key(batch, after), found)
