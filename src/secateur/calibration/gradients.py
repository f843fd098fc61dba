"""Walk back through the blocks: the gradient of the loss by each block's input, one block at a time.

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
    """Put ∂L/∂X^L of every batch in the store under ("gradient", batch), and give the number of predictions.

    L is the sum of the losses of all predictions: gradients of the mean are too small for float16, so that whoever uses
    them divides by the number in float32.
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

    The gradient of its input replaces that of its output in the store, and its input is forgotten.

    Args:
        decoder: the model.
        index: number of the block.
        batch: the batch.
        kept: the store.
        weights: parameters to differentiate by; they must require gradients.
        entering: modules inside the block, called in this order, by whose first input to differentiate.

    Returns:
        The gradients by the weights, then by those inputs; None where the loss does not depend on one.
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
