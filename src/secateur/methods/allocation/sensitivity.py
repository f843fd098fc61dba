"""How much the loss reacts to an error in a branch: each is pruned or removed alone, all others stay dense.

All these models are walked together, block after block: one that differs from the dense model at block b shares its
states below b, and each block's weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.calibration.folds import folds_of
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, mean_loss_of, open_store, step, stored_start
from secateur.data.windows import Windows
from secateur.methods.allocation.levels import Branch, Writers
from secateur.models.anatomy import find
from secateur.models.decoder import Decoder
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.width.pruning import holding, silenced, writer_of

TOKENS = 1024
"""Tokens on which the losses are measured, about."""

Edits = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Reaction:
    """By how many nats the loss rises if one branch alone is changed.

    Attributes:
        probe: at its level between.
        removed: without it.
    """

    probe: float
    removed: float


def judging_windows(windows: Windows) -> Windows:
    """Return the windows that no repair is fitted on, shortened to about 1,024 tokens in all."""
    held_out = folds_of(windows).held_out
    some = windows.some(held_out.nonzero().flatten().tolist()) if bool(held_out.any()) else windows
    length = min(some.seq_len, max(2, TOKENS // len(some)))
    mask = None if some.mask is None else some.mask[:, :length]
    return replace(some, tokens=some.tokens[:, :length], mask=mask)


@torch.no_grad()
def reactions(
    decoder: Decoder,
    windows: Windows,
    branches: Sequence[Branch],
    writers: Callable[[Branch], Writers],
    *,
    options: RunOptions = DEFAULTS,
) -> list[Reaction]:
    """Measure the loss with each branch alone at its level between, and removed, on held-out windows.

    Args:
        decoder: the dense model.
        windows: calibration windows.
        branches: the branches.
        writers: returns a branch's output projection at the level between; read when its block is walked.
        options: windows per batch, progress.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    between = [one.probe < len(one.keep) - 1 for one in branches]
    trials = [(place, removed) for place, has in enumerate(between) for removed in (False, True) if has or removed]
    with open_store(decoder) as store:
        batches = stored_start(
            decoder, judging_windows(windows), store, options.batch_size, key=lambda batch: (batch.index, None)
        )
        count = decoder.block_count
        for index in options.progress(range(count), "measuring what each branch is worth", count):
            below = [trial for trial in trials if branches[trial[0]].block < index]
            with decoder.block(index):
                for trial in below:
                    _advance(decoder, index, batches, store, (trial, trial), {})
                for place, one in enumerate(branches):
                    if one.block == index:
                        if between[place]:
                            at_probe = _with_writers(decoder, one, writers(one))
                            _advance(decoder, index, batches, store, (None, (place, False)), at_probe)
                        silent = silenced(decoder, index, one.part)
                        _advance(decoder, index, batches, store, (None, (place, True)), silent)
                _advance(decoder, index, batches, store, (None, None), {})
        losses: dict[Trial, float] = {}
        with decoder.outer():
            for which in (None, *trials):
                losses[which] = mean_loss_of(decoder, ((one, store.get((one.index, which))) for one in batches))
    without = [losses[place, True] - losses[None] for place in range(len(branches))]
    return [
        Reaction(losses[place, False] - losses[None] if between[place] else removed, removed)
        for place, removed in enumerate(without)
    ]


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


def _with_writers(decoder: Decoder, branch: Branch, writers: Writers) -> Edits:
    """Return these output projections under the block's names."""
    name = writer_of(decoder, branch.block, branch.part)
    found = find(decoder.block_list[branch.block], name)
    if isinstance(found, nn.Parameter):
        return {name: torch.stack(writers).to(found)}
    writer = writers[0].T if isinstance(found, Conv1D) else writers[0]
    return {f"{name}.weight": writer.to(found.weight).contiguous()}
