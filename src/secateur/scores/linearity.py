"""How well a matrix on the MLP output before a window of blocks stands in for the window: least squares, one walk.

The part that the MLP adds to the state leaving a block is what is missing when the block runs with an MLP that writes
0, so each block before a window is run twice. That holds for every way in which blocks are built, with attention beside
the MLP or before it, whatever factor the output is multiplied by, and for mixtures of experts.

Source: Shopkhoev et al. 2025, "ReplaceMe", §3.
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
    """Gather, for each window of blocks, the normal equations of the matrix that is to stand in for it.

    They come one by one, in the order in which the windows end: two (D, D) matrices in float64 for each of a large
    model's windows would not find room together.

    Args:
        decoder: the model.
        windows: calibration windows.
        spans: first and last block of each window; the first is 1 or higher.
        batch_size: windows of text per batch; chosen by the device if None.
        progress: shows how far it is.

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
    """Take a batch through block `index`; on request keep what the MLP adds there beside the state that leaves it."""
    hidden = store.get((batch.index, index))
    result = step(decoder, index, batch, hidden)
    store.put((batch.index, index + 1), result)
    if keep_part:
        rest = without_mlp(decoder, index, batch.calls[index], hidden)
        store.put((batch.index, index + 1, "part"), result - rest)
