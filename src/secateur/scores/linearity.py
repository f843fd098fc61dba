"""Normal equations for replacing windows of blocks by a matrix on the preceding MLP's output, gathered in one walk.

The MLP's contribution to a block's output is the difference to the output of the same block with an MLP that writes 0,
so each block before a window is run twice. This holds for any block structure: attention in parallel with the MLP or
before it, scaled outputs, and mixtures of experts.

Source: Shopkhoev et al. 2025, "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
Linearization", section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from secateur.calibration.shares import share_of
from secateur.calibration.statistics import LinearSums, real_tokens
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, open_store, step, stored_start
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.plan.steps import Span
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.depth.linear_replacement import without_mlp


@torch.no_grad()
def linear_sums(
    decoder: Decoder, windows: Windows, spans: Collection[Span], *, options: RunOptions = DEFAULTS
) -> Iterator[tuple[Span, LinearSums]]:
    """Yield, for each window of blocks, the normal equations of the matrix that is to replace it.

    They are yielded one by one, in the order in which the windows end: two float64 (D, D) matrices for each window of a
    large model would not fit in memory together.

    Args:
        decoder: the model.
        windows: calibration windows.
        spans: first and last block of each window; the first is 1 or higher.
        options: batch size and progress.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    before = {low - 1 for low, _ in spans}
    with open_store(decoder) as store:
        batches = stored_start(
            decoder, share_of(windows), store, options.batch_size, key=lambda batch: (batch.index, 0)
        )
        depths = range(max(high for _, high in spans) + 1)
        for index in options.progress(depths, "walking the blocks", len(depths)):
            with decoder.block(index):
                for batch in batches:
                    _advance(decoder, index, batch, store, keep_part=index in before)
            for low, high in [span for span in spans if span[1] == index]:
                sums = LinearSums(decoder.hidden_size)
                for batch in batches:
                    keys = ((batch.index, low, "part"), (batch.index, low), (batch.index, high + 1))
                    sums.update(*real_tokens([store.get(key) for key in keys], batch.mask))
                sums.combine()
                yield (low, high), sums
            for batch in batches:
                for depth in set(range(index + 1)) - {low for low, high in spans if high > index}:
                    store.drop((batch.index, depth))
                    store.drop((batch.index, depth, "part"))


def _advance(decoder: Decoder, index: int, batch: Batch, store: StateStore, *, keep_part: bool) -> None:
    """Run block `index` on a batch; on request also keep the MLP's contribution to its output."""
    hidden = store.get((batch.index, index))
    result = step(decoder, index, batch, hidden)
    store.put((batch.index, index + 1), result)
    if keep_part:
        rest = without_mlp(decoder, index, batch.calls[index], hidden)
        store.put((batch.index, index + 1, "part"), result - rest)
