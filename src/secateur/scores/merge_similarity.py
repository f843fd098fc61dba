"""Similarity of the final hidden states of the original model and of one with merged windows of blocks.

Windows are merged from the top of the model down, so everything below the lowest merged window is still the original
model. The inputs of the blocks there are computed once and cached. A candidate only runs its lowest merged block and
the blocks above it, and combines weights block by block: no model is ever copied.

Source: Ding et al. 2025, "A Sliding Layer Merging Method for Efficient Depth-Wise Pruning in LLMs", algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, step, stored_start
from secateur.data.windows import Windows
from secateur.errors import NumericsError
from secateur.models.decoder import Decoder
from secateur.models.forward import final_states, require_finite, run_block
from secateur.plan.steps import Span
from secateur.surgery.depth.merging import Shares, merged_tensors

Merged = tuple[Span, ...]
"""Windows that become one block each, from the top of the model down."""


class MergeProbe:
    """The similarity of the final hidden states to the original model's, with any windows merged.

    Attributes:
        evaluated: block evaluations so far (one block on all windows).
        known: all similarities that this probe was asked for so far, whether it measured them or knew them before. What
            is chosen among them does not depend on what else was measured earlier, so that an interrupted search, which
            has lost that, goes on with the same result.
    """

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        windows: Windows,
        store: StateStore,
        shares: Callable[[Span], Shares],
        lows: range,
        batch_size: int | None = None,
        measured: dict[Merged, float] | None = None,
    ) -> None:
        """Run the original model once.

        Args:
            decoder: the original model.
            windows: calibration windows.
            store: holds the cached states; closed by its owner.
            shares: coefficients of the blocks of a window in the merged block.
            lows: blocks at which a merged window may begin.
            batch_size: windows per batch; None depends on the device.
            measured: similarities measured earlier, on the same model and windows and with the same shares; new ones
                are added.

        Raises:
            NumericsError: NaN or infinity on the way.
        """
        self.evaluated = 0
        self.known: dict[Merged, float] = {}
        self._measured = {} if measured is None else measured
        self._decoder, self._store, self._shares = decoder, store, shares
        self._batches = stored_start(decoder, windows, store, batch_size, key=lambda batch: (batch.index, 0))
        for index in range(decoder.block_count):
            with decoder.block(index):
                for batch in self._batches:
                    before = (batch.index, index)
                    store.put((batch.index, index + 1), step(decoder, index, batch, store.get(before)))
                    if index not in lows:
                        store.drop(before)
            self.evaluated += 1
        for batch, final in self._final(decoder.block_count):
            store.put((batch.index, "final"), final)
            store.drop((batch.index, decoder.block_count))

    def similarity(self, merged: Merged) -> float:
        """Return the mean over windows of the cosine of final states, a window's real tokens flattened to a vector.

        Args:
            merged: windows of blocks that become one block each, from the top down; at least one.

        Raises:
            NumericsError: NaN or infinity on the way; it never becomes a similarity.
        """
        if merged not in self._measured:
            self._measured[merged] = self._measure(merged)
        self.known[merged] = self._measured[merged]
        return self.known[merged]

    @torch.no_grad()
    def _measure(self, merged: Merged) -> float:
        highs, (low, _) = dict(merged), merged[-1]
        entry: int | str = low
        while low < self._decoder.block_count:
            high = highs.get(low, low)
            self._advance(low, high, entry)
            entry, low = "now", high + 1
        cosines: list[float] = []
        for batch, final in self._final("now"):
            original = self._store.get((batch.index, "final"))
            cosines += window_cosines(original, final, batch.mask).tolist()
        found = sum(cosines) / len(cosines)
        if not math.isfinite(found):
            raise NumericsError(
                f"the similarity with blocks {merged[-1][0]} to {merged[-1][1]} merged is not a number."
            )
        return found

    def _advance(self, low: int, high: int, entry: int | str) -> None:
        """Run the states through block `low`, or through the block that `low` to `high` are merged into."""
        if low == high:
            with self._decoder.block(low):
                for batch in self._batches:
                    hidden = self._store.get((batch.index, entry))
                    self._store.put((batch.index, "now"), step(self._decoder, low, batch, hidden))
        else:
            tensors = merged_tensors(self._decoder, (low, high), self._shares((low, high)))
            for batch in self._batches:
                hidden = self._store.get((batch.index, entry))
                self._store.put((batch.index, "now"), self._step_merged((low, high), tensors, batch, hidden))
        self.evaluated += 1

    def _step_merged(
        self, window: Span, tensors: dict[str, torch.Tensor], batch: Batch, hidden: torch.Tensor
    ) -> torch.Tensor:
        low = window[0]
        result = run_block(self._decoder.block_list[low], batch.calls[low], hidden, tensors)
        require_finite(result, f"what leaves the block that blocks {window[0]} to {window[1]} become", batch.mask)
        return result

    def _final(self, entry: int | str) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Return the states after the final norm, of each batch."""
        with self._decoder.outer(head=False):
            for batch in self._batches:
                yield (
                    batch,
                    final_states(self._decoder, self._store.get((batch.index, entry)), batch.tokens, batch.mask),
                )


def window_cosines(left: torch.Tensor, right: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the cosine (windows,) of states (windows, positions, d), a window's real tokens flattened to a vector."""
    left, right = left.float(), right.float().to(left.device)
    products = [(a * b).sum(-1).cpu().double() for a, b in ((left, right), (left, left), (right, right))]
    if mask is not None:
        products = [product.masked_fill(~mask.cpu(), 0) for product in products]
    across, of_left, of_right = (product.sum(-1) for product in products)
    return (across / (of_left * of_right).sqrt()).clamp(-1, 1)
