"""First-order importance of blocks, heads, groups and channels: `Σ_w |w · Σ_batches ∂L/∂w|`.

The backward pass goes block by block as the forward pass does: each block is run again from its stored input and
differentiated alone. The gradients of only one block are in memory at a time, and skeletons work like models in memory.

Source: Kim et al. 2024, "Shortened LLaMA", §3 (Taylor+). There signed products of different samples cancel before the
absolute value is taken; `per_window=True` takes it window by window instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from secateur.calibration.gradients import back_through, loss_gradients
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, open_store, walk_blocks
from secateur.data.windows import Windows
from secateur.errors import NumericsError
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.width.coupling import couplings_of, sums_by_unit

Saliencies = dict[str, torch.Tensor]
"""Saliencies `w · Σ_batches ∂L/∂w` of a block's weights, by name."""


def taylor(
    decoder: Decoder, windows: Windows, *, per_window: bool = False, options: RunOptions = DEFAULTS
) -> list[float]:
    """Return the Taylor score of each block; the loss is the mean over all predicted tokens.

    Raises:
        NumericsError: NaN or infinity in the forward or backward pass.
    """
    scores = [0.0] * decoder.block_count

    def add(index: int, found: Saliencies) -> None:
        parts = [one.abs().sum(dtype=torch.float64).cpu() for one in found.values()]
        scores[index] += float(torch.stack(parts).sum())

    visit_saliencies(decoder, windows, add, per_window=per_window, options=options)
    return scores


def taylor_by_unit(
    decoder: Decoder, windows: Windows, *, options: RunOptions = DEFAULTS
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return `Σ |w · Σ_batches ∂L/∂w|` over the weights of each unit of each block.

    Source: Ma et al. 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models", §3.2 (first order). A
    query head has its rows of the query projection and its columns of the output projection, a key/value group its own
    rows; the released code adds those of queries to the wrong groups where several share one.

    Returns:
        For each block the scores of query heads, then groups, (H+G,), and of channels, (experts or 1, F).
    """
    scores: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(index: int, found: Saliencies) -> None:
        widths = block_widths(decoder, index)
        couplings = couplings_of(decoder.block_list[index], decoder.anatomy.family, widths)
        scores[index] = sums_by_unit({name: one.abs() for name, one in found.items()}, couplings, widths)

    visit_saliencies(decoder, windows, add, options=options)
    return [scores[index] for index in range(decoder.block_count)]


def visit_saliencies(
    decoder: Decoder,
    windows: Windows,
    visit: Callable[[int, Saliencies], None],
    *,
    per_window: bool = False,
    options: RunOptions = DEFAULTS,
) -> None:
    """Call `visit` with each block's number and saliencies, last block first; with `per_window`, for each window.

    Raises:
        NumericsError: NaN or infinity in the forward or backward pass.
    """
    size = 1 if per_window else options.batch_size
    with open_store(decoder) as kept:
        batches = walk_blocks(decoder, windows, kept, options=RunOptions(batch_size=size, progress=options.progress))
        predictions = loss_gradients(decoder, batches, kept)
        order = list(reversed(range(decoder.block_count)))
        for index in options.progress(order, "walking back through the blocks", len(order)):
            for found in _saliencies(decoder, index, batches, kept, predictions, per_window=per_window):
                if not all(bool(torch.isfinite(one).all()) for one in found.values()):
                    raise NumericsError(f"NaN or infinity in the Taylor scores of block {index}; try --dtype float32.")
                visit(index, found)


def _saliencies(
    decoder: Decoder, index: int, batches: list[Batch], kept: StateStore, predictions: int, *, per_window: bool
) -> Iterator[Saliencies]:
    with decoder.block(index) as block, torch.enable_grad():
        weights = scored_weights(block)
        for weight in weights.values():
            weight.requires_grad_(True)
        sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        try:
            for batch in batches:
                gradients = back_through(decoder, index, batch, kept, list(weights.values()))
                for running, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        running += gradient.float() / predictions
                if per_window:
                    yield {name: weights[name].detach().float() * running for name, running in sums.items()}
                    for running in sums.values():
                        running.zero_()
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
        if not per_window:
            yield {name: weights[name].detach().float() * running for name, running in sums.items()}


def scored_weights(block: nn.Module) -> dict[str, nn.Parameter]:
    """Return a block's weight matrices and norm weights; biases are left out, as in the paper."""
    return {name: parameter for name, parameter in block.named_parameters() if not name.endswith("bias")}
