"""The backward pass block by block: gradients of the loss with respect to block inputs and weights.

Needs the states X⁰ … X^L in a store under (batch, depth), as `walk_blocks` leaves them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, loss_sum, parts_of, require_predictions
from secateur.models.decoder import Decoder
from secateur.models.forward import inputs_of, run_block


def loss_gradients(decoder: Decoder, batches: list[Batch], kept: StateStore) -> int:
    """Store ∂L/∂X^L of every batch under ("gradient", batch), and return the number of predictions.

    L is the sum of the losses of all predictions. Gradients of the mean would be too small for float16, so the caller
    divides by the number of predictions in float32.
    """
    predictions = 0
    with decoder.outer(), torch.enable_grad():
        for batch in batches:
            last = kept.get((batch.index, decoder.block_count)).detach()
            gradient = torch.empty_like(last)
            for rows, part in parts_of(decoder, batch):
                hidden = last[rows].requires_grad_()
                loss, counted = loss_sum(decoder, part, hidden)
                (gradient[rows],) = torch.autograd.grad(loss, hidden)
                predictions += counted
            kept.put(("gradient", batch.index), gradient)
    require_predictions(predictions)
    for batch in batches:
        kept.drop((batch.index, decoder.block_count))
    return predictions


def back_through(
    decoder: Decoder,
    index: int,
    batch: Batch,
    kept: StateStore,
    weights: Sequence[nn.Parameter] = (),
    entering: Sequence[nn.Module] = (),
) -> tuple[torch.Tensor | None, ...]:
    """Differentiate one block (its weights present) on one batch.

    In the store, the gradient of its input replaces that of its output, and its input is dropped.

    Args:
        decoder: the model.
        index: number of the block.
        batch: the batch.
        kept: the store.
        weights: parameters to differentiate with respect to; they must require gradients.
        entering: modules inside the block, called in this order, whose first inputs to differentiate with respect to.

    Returns:
        The gradients of the weights, then of those inputs; None where the loss does not depend on one.
    """
    hidden = kept.get((batch.index, index)).detach().requires_grad_()
    with inputs_of(entering) as within:
        output = run_block(decoder.block_list[index], batch.calls[index], hidden)
    arriving = kept.get(("gradient", batch.index)).to(output.device, output.dtype)
    wanted = [hidden, *weights, *within]
    leaving, *gradients = torch.autograd.grad(output, wanted, arriving, allow_unused=True)
    kept.put(("gradient", batch.index), leaving)
    kept.drop((batch.index, index))
    return tuple(gradients)
