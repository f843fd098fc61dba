"""The points where the residual stream is read, with the states and loss gradients there.

Points are numbered in order: attention and MLP of each block (one point if they run in parallel), and last the head.
Where blocks have other branches, there are as many points for each as a block has norms before branches at most. The
state at a point is the stream before the norm that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

Visit = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with the number of a point, the states (tokens, D) there, and the window of each token (tokens,)."""


def points_per_block(decoder: Decoder) -> int:
    """Return the reading points per block: one if attention and MLP run in parallel, otherwise two."""
    if decoder.anatomy.family.stream is not None:
        return max(len(reading_norms(decoder, block)) for block in decoder.block_list)
    return 1 if decoder.anatomy.parallel else 2


def reading_norms(decoder: Decoder, block: nn.Module) -> list[nn.Module]:
    """Return the norms at the reading points of a block, in the order of the points."""
    family = decoder.anatomy.family
    if family.stream is not None:
        return [norm for _, norm in present(block, tuple(name for name, _ in family.stream.readers))]
    return [norm for _, norm in present(block, family.norms)][: points_per_block(decoder)]


@torch.no_grad()
def visit_reading_points(
    decoder: Decoder,
    windows: Windows,
    visit: Visit,
    *,
    after_block: Callable[[int], None] = lambda _: None,
    options: RunOptions = DEFAULTS,
) -> None:
    """Walk the windows through the model and pass on the states at every reading point.

    Args:
        decoder: a model with norms before its branches.
        windows: calibration windows.
        visit: called for each batch at each point with the states of real tokens; for LayerNorm models without their
            mean over directions, which the norms remove anyway.
        after_block: called with a block's number once all batches have passed it, its weights still present.
        options: batch size and progress.
    """
    points = points_per_block(decoder)

    def shown(point: int, hidden: torch.Tensor, batch: Batch) -> None:
        visit(point, centred(decoder, _real_tokens(hidden, batch)), window_of[batch.index])

    with open_store(decoder) as store:
        batches = stored_start(decoder, windows, store, options.batch_size)
        window_of = windows_of_tokens(batches)
        for index in options.progress(range(decoder.block_count), "walking the blocks", decoder.block_count):
            with decoder.block(index) as block:
                for batch in batches:
                    hidden = store.get(batch.index)
                    shown(points * index, hidden, batch)
                    with inputs_of(norms_within(decoder, block)) as entering:
                        store.put(batch.index, step(decoder, index, batch, hidden))
                    for place, middle in enumerate(entering, start=1):
                        shown(points * index + place, middle, batch)
                after_block(index)
        for batch in batches:
            shown(points * decoder.block_count, store.get(batch.index), batch)


@torch.no_grad()
def visit_gradients(decoder: Decoder, windows: Windows, visit: Visit, *, options: RunOptions = DEFAULTS) -> None:
    """Pass on the gradient of the loss with respect to the state at every reading point, (tokens, D), last point first.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    points = points_per_block(decoder)

    def shown(point: int, gradient: torch.Tensor | None, batch: Batch) -> None:
        assert gradient is not None, "every point of a decoder reaches its loss"
        visit(point, centred(decoder, _real_tokens(gradient, batch).float() / predictions), window_of[batch.index])

    with open_store(decoder) as kept:
        batches = walk_blocks(decoder, windows, kept, options=options)
        window_of = windows_of_tokens(batches)
        predictions = loss_gradients(decoder, batches, kept)
        for batch in batches:
            shown(points * decoder.block_count, kept.get(("gradient", batch.index)), batch)
        order = list(reversed(range(decoder.block_count)))
        for index in options.progress(order, "walking back through the blocks", len(order)):
            with decoder.block(index) as block, torch.enable_grad():
                for batch in batches:
                    within = back_through(decoder, index, batch, kept, entering=norms_within(decoder, block))
                    for place, gradient in enumerate(within, start=1):
                        shown(points * index + place, gradient, batch)
                    shown(points * index, kept.get(("gradient", batch.index)), batch)


def windows_of_tokens(batches: Sequence[Batch]) -> dict[int, torch.Tensor]:
    """Return for each batch, by its number, the number of the window that each real token is from, int64 (tokens,)."""
    found, first = {}, 0
    for batch in batches:
        windows, positions = batch.tokens.shape
        owners = torch.arange(first, first + windows)[:, None].expand(windows, positions)
        found[batch.index] = owners.flatten() if batch.mask is None else owners[batch.mask.cpu()]
        first += windows
    return found


def _real_tokens(states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the states of real tokens, (tokens, D); some models flatten windows and positions before a norm."""
    (found,) = real_tokens([states.reshape(*batch.tokens.shape, -1)], batch.mask)
    return found


def centred(decoder: Decoder, states: torch.Tensor) -> torch.Tensor:
    """Subtract the mean over directions from the states of LayerNorm models; leave others unchanged."""
    if decoder.anatomy.family.norm != "layernorm":
        return states
    return states - states.mean(dim=-1, keepdim=True)


def norms_within(decoder: Decoder, block: nn.Module) -> list[nn.Module]:
    """Return the norms at the reading points of a block other than its input."""
    return reading_norms(decoder, block)[1:]
