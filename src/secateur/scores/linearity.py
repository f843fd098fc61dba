"""Normal equations for replacing windows of blocks by a matrix on the preceding MLP's output, gathered in one walk.

The MLP's contribution to a block's output is the difference to the output of the same block with an MLP that writes 0,
so each block before a window is run twice. This holds for any block structure: attention in parallel with the MLP or
before it, scaled outputs, and mixtures of experts.

Source: Shopkhoev et al. 2025, "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
Linearization", section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from secateur.calibration.folds import Folds, folds_of
from secateur.calibration.ridge import Ridge
from secateur.calibration.shares import share_numbers, share_of
from secateur.calibration.statistics import LinearSums, real_tokens
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, open_store, step, stored_start
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.plan.steps import Span
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.depth.linear_replacement import without_mlp

ROUNDS = 4
"""Times that weights and targets are computed anew for the cosine; more changed nothing on a real model."""

_TINY = 1e-30
_LEAST_SCALE = 1e-3


@torch.no_grad()
def linear_sums(
    decoder: Decoder,
    windows: Windows,
    spans: Collection[Span],
    *,
    cosine: Ridge | None = None,
    options: RunOptions = DEFAULTS,
) -> Iterator[tuple[Span, LinearSums]]:
    """Yield, for each window of blocks, the normal equations of the matrix that is to replace it.

    Every source of the windows counts the same, and a token counts as 1 / ‖Y‖², Y being the state that leaves the
    window, by whose length the next norm divides: else the few tokens with massive activations outweigh all others.

    For the cosine between Z = R + P T and Y there are no normal equations, but 1 − cos² is the least over c of
    ‖c Z − Y‖² / ‖Y‖²: with the best c of each token they are set up for Y / c and weights c² / ‖Y‖², and solved, in
    turn, so that 1 − cos² only falls.

    They are yielded one by one, in the order in which the windows end: the float64 (D, D) matrices for each window of a
    large model would not fit in memory together.

    Args:
        decoder: the model.
        windows: calibration windows.
        spans: first and last block of each window; the first is 1 or higher.
        cosine: the ridge with which the matrix of the largest cosine is approached; None takes the smallest error.
        options: batch size and progress.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    before = {low - 1 for low, _ in spans}
    folds = folds_of(windows).some(share_numbers(windows))
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
                states = _States(store, batches, folds, low, high)
                sums = states.sums(decoder.state_size)
                for _ in range(0 if cosine is None else ROUNDS):
                    sums = states.sums(decoder.state_size, sums.result(ridge_of(sums, cosine)))
                yield (low, high), sums
            for batch in batches:
                for depth in set(range(index + 1)) - {low for low, high in spans if high > index}:
                    store.drop((batch.index, depth))
                    store.drop((batch.index, depth, "part"))


def ridge_of(sums: LinearSums, ridge: Ridge | None) -> float | None:
    """Return the ridge itself, or the one chosen on held-out tokens for "auto"."""
    return sums.best_ridge() if ridge == "auto" else ridge


@dataclass(frozen=True)
class _States:
    """The stored states around a window of blocks."""

    store: StateStore
    batches: Sequence[Batch]
    folds: Folds
    low: int
    high: int

    def sums(self, width: int, matrix: torch.Tensor | None = None) -> LinearSums:
        """Sum up the normal equations for Y, or for the direction of Y as it is seen from R + P T for a matrix T."""
        sums, first = LinearSums(width), 0
        for batch in self.batches:
            keys = ((batch.index, self.low, "part"), (batch.index, self.low), (batch.index, self.high + 1))
            part, before, after = real_tokens([self.store.get(key) for key in keys], batch.mask)
            folds = self.folds.slice(first, len(batch.tokens))
            real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.mask is None else batch.mask
            window = real.cpu().nonzero()[:, 0]
            after = after.float()
            weight = 1 / after.square().mean(dim=1).clamp_min(_TINY)
            weight *= folds.weight.to(weight)[window.to(weight.device)]
            if matrix is not None:
                turn = matrix.to(part.device, torch.float32) - torch.eye(width, device=part.device)
                reached = before.float() + part.float() @ turn
                scale = (reached * after).sum(dim=1) / reached.square().sum(dim=1).clamp_min(_TINY)
                scale = scale.clamp_min(_LEAST_SCALE)
                weight, after = weight * scale.square(), after / scale[:, None]
            sums.update(part, before, after, weight, folds.held_out[window])
            first += len(batch.tokens)
        sums.combine()
        return sums


def _advance(decoder: Decoder, index: int, batch: Batch, store: StateStore, *, keep_part: bool) -> None:
    """Run block `index` on a batch; on request also keep the MLP's contribution to its output."""
    hidden = store.get((batch.index, index))
    result = step(decoder, index, batch, hidden)
    store.put((batch.index, index + 1), result)
    if keep_part:
        rest = without_mlp(decoder, index, batch.calls[index], hidden)
        store.put((batch.index, index + 1, "part"), result - rest)
