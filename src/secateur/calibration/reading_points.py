"""Where the residual stream is read, and what stands there.

Points are numbered in order: attention and MLP of each block (one point where they run side by side), last the head.
The state at a point is the stream before the norm that reads it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from secateur.calibration.gradients import back_through, loss_gradients
from secateur.calibration.statistics import real_tokens
from secateur.calibration.walk import Batch, open_store, step, stored_start, walk_blocks
from secateur.data.windows import Windows
from secateur.models.anatomy import present
from secateur.models.decoder import Decoder
from secateur.models.forward import inputs_of
from secateur.run_options import DEFAULTS, RunOptions

Visit = Callable[[int, torch.Tensor], None]
"""Called with the number of a point and states (tokens, D) that stand there."""


def points_per_block(decoder: Decoder) -> int:
    """Two for blocks that read the stream for attention and again for the MLP, one for parallel ones."""
    return 1 if decoder.anatomy.parallel else 2


@torch.no_grad()
def visit_reading_points(
    decoder: Decoder,
    windows: Windows,
    visit: Visit,
    *,
    after_block: Callable[[int], None] = lambda _: None,
    options: RunOptions = DEFAULTS,
) -> None:
    """Walk the windows through the model and show the states at every reading point.

    Args:
        decoder: a model with norms before its branches.
        windows: calibration windows.
        visit: called for each batch at each point, real tokens only; for LayerNorm models their mean over directions
            is removed, which no part of such a model sees.
        after_block: called with a block's number when all batches have passed it, its weights still present.
        batch_size: windows per batch.
        progress: shows how far it is.
    """
    points = points_per_block(decoder)

    def shown(point: int, hidden: torch.Tensor, batch: Batch) -> None:
        visit(point, centred(decoder, _of_real_tokens(hidden, batch)))

    with open_store(decoder) as store:
        batches = stored_start(decoder, windows, store, options.batch_size)
        for index in options.progress(range(decoder.block_count), "walking the blocks", decoder.block_count):
            with decoder.block(index) as block:
                for batch in batches:
                    hidden = store.get(batch.index)
                    shown(points * index, hidden, batch)
                    with inputs_of(norms_within(decoder, block)) as entering:
                        store.put(batch.index, step(decoder, index, batch, hidden))
                    for middle in entering:
                        shown(points * index + 1, middle, batch)
                after_block(index)
        for batch in batches:
            shown(points * decoder.block_count, store.get(batch.index), batch)


@torch.no_grad()
def visit_gradients(decoder: Decoder, windows: Windows, visit: Visit, *, options: RunOptions = DEFAULTS) -> None:
    """Show the gradient of the loss by the state at every reading point, (tokens, D), from the last point down.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    points = points_per_block(decoder)

    def shown(point: int, gradient: torch.Tensor | None, batch: Batch) -> None:
        assert gradient is not None, "every point of a decoder reaches its loss"
        visit(point, centred(decoder, _of_real_tokens(gradient, batch).float() / predictions))

    with open_store(decoder) as kept:
        batches = walk_blocks(decoder, windows, kept, options=options)
        predictions = loss_gradients(decoder, batches, kept)
        for batch in batches:
            shown(points * decoder.block_count, kept.get(("gradient", batch.index)), batch)
        order = list(reversed(range(decoder.block_count)))
        for index in options.progress(order, "walking back through the blocks", len(order)):
            with decoder.block(index) as block, torch.enable_grad():
                for batch in batches:
                    within = back_through(decoder, index, batch, kept, entering=norms_within(decoder, block))
                    for gradient in within:
                        shown(points * index + 1, gradient, batch)
                    shown(points * index, kept.get(("gradient", batch.index)), batch)


def _of_real_tokens(states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """States of real tokens, (tokens, D); some models flatten windows and positions before a norm."""
    (found,) = real_tokens([states.reshape(*batch.tokens.shape, -1)], batch.mask)
    return found


def centred(decoder: Decoder, states: torch.Tensor) -> torch.Tensor:
    """Take the mean over directions out of states of LayerNorm models; of others nothing."""
    if decoder.anatomy.family.norm != "layernorm":
        return states
    return states - states.mean(dim=-1, keepdim=True)


def norms_within(decoder: Decoder, block: nn.Module) -> list[nn.Module]:
    """The norm between attention and MLP of a sequential block; none in a parallel one."""
    found = [norm for _, norm in present(block, decoder.anatomy.family.norms)]
    return found[1:2] if points_per_block(decoder) == 2 else []
