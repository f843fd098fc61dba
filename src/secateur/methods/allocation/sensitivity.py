"""How much the predictions react to a narrower branch: each is pruned or removed alone, all else stays dense.

What is lost is measured in nats, as the Kullback–Leibler divergence of the predictions from those of the dense model.
All these models are walked together, block after block: one that differs from the dense model at block b shares its
states below b, and each block's weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.calibration.folds import folds_of
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, open_store, step, stored_start
from secateur.data.windows import Windows
from secateur.methods.allocation.levels import Levels, Writers
from secateur.models.anatomy import find
from secateur.models.decoder import Decoder
from secateur.run_options import DEFAULTS, RunOptions
from secateur.scores.divergence import kl_divergence, mean_distances
from secateur.surgery.width.inputs import holding, silenced, writer_of

TOKENS = 1024
"""Tokens on which it is measured, about."""

Edits = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Reaction:
    """How many nats are lost if one branch alone is changed.

    Attributes:
        probe: at its level between.
        removed: without it; None for attention, whose absence costs more the more of it is gone elsewhere.
    """

    probe: float
    removed: float | None


def judging_windows(windows: Windows, tokens: int = TOKENS) -> Windows:
    """Return the windows that no repair is fitted on, shortened to about this many tokens in all."""
    held_out = folds_of(windows).held_out
    some = windows.some(held_out.nonzero().flatten().tolist()) if bool(held_out.any()) else windows
    return shortened(some, tokens)


def shortened(windows: Windows, tokens: int) -> Windows:
    """Return the beginnings of windows, about this many tokens in all."""
    return windows.shortened(max(2, tokens // len(windows)))


@torch.no_grad()
def reactions(
    decoder: Decoder,
    windows: Windows,
    branches: Sequence[Levels],
    writers: Callable[[Levels], Writers],
    *,
    options: RunOptions = DEFAULTS,
) -> list[Reaction]:
    """Measure on held-out windows what is lost with each branch alone at its level between, and each MLP alone removed.

    Args:
        decoder: the dense model.
        windows: calibration windows.
        branches: their levels.
        writers: returns the output projection of one at the level between; read when its block is walked.
        options: windows per batch, progress.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    trials = [(place, False) for place in range(len(branches))]
    trials += [(place, True) for place, one in enumerate(branches) if one.part == "channels"]
    with open_store(decoder) as store:
        batches = stored_start(
            decoder, judging_windows(windows), store, options.batch_size, key=lambda batch: (batch.index, None)
        )
        count = decoder.block_count
        for index in options.progress(range(count), "measuring what each branch is worth", count):
            with decoder.block(index):
                for trial in trials:
                    one, removed = branches[trial[0]], trial[1]
                    if one.block < index:
                        _advance(decoder, index, batches, store, (trial, trial), {})
                    elif one.block == index:
                        edits = (
                            silenced(decoder, index, one.part) if removed else _with_writers(decoder, one, writers(one))
                        )
                        _advance(decoder, index, batches, store, (None, trial), edits)
                _advance(decoder, index, batches, store, (None, None), {})

        def state(batch: Batch, which: Trial) -> torch.Tensor:
            return store.get((batch.index, which))

        with decoder.outer():
            losses = mean_distances(decoder, batches, state, None, trials, kl_divergence)
    lost = dict(zip(trials, losses, strict=True))
    return [Reaction(lost[place, False], lost.get((place, True))) for place in range(len(branches))]


Trial = tuple[int, bool] | None


def _advance(
    decoder: Decoder,
    index: int,
    batches: Sequence[Batch],
    store: StateStore,
    names: tuple[Trial, Trial],
    edits: Edits,
) -> None:
    """Run block `index` with other parameters on the states stored under the first name; store them under the other."""
    before, after = names
    with holding(decoder.block_list[index], edits):
        for batch in batches:
            store.put((batch.index, after), step(decoder, index, batch, store.get((batch.index, before))))


def _with_writers(decoder: Decoder, branch: Levels, writers: Writers) -> Edits:
    """Return the output projections of a branch under the block's names."""
    name = writer_of(decoder, branch.block, branch.part)
    found = find(decoder.block_list[branch.block], name)
    if isinstance(found, nn.Parameter):
        return {name: torch.stack(writers).to(found)}
    writer = writers[0].T if isinstance(found, Conv1D) else writers[0]
    return {f"{name}.weight": writer.to(found.weight).contiguous()}
