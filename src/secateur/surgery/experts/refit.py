"""Build a model with fewer experts, and refit what they write so that blocks write what those of the dense model do.

Once experts are gone, a block lacks m(x), the difference of the dense model's state after the block and its own. With
h_j the channels of expert j and g_j its weight, the output projections D_j change by Δ_j. If the weights of a token sum
to s, then with g_j = s ĝ_j

    ‖m − Σ_j g_j Δ_j h_j‖²  ≤  Σ_j ĝ_j ‖m − s Δ_j h_j‖²,

because the square is convex. The bound falls apart into one ridge regression for each expert, on the tokens that it is
chosen for, so none needs to know what the others add. Ridge and whether to refit at all are chosen on held-out windows
for each expert (`surgery/width/repair.py`).

The bound and its use are secateur's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.calibration.folds import Folds, folds_of
from secateur.calibration.inputs import InputSums, capturing_inputs
from secateur.calibration.ridge import Ridge
from secateur.calibration.routing import Routed, capturing_routing
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, open_store, step, stored_start
from secateur.data.windows import Windows
from secateur.errors import ModelError
from secateur.models.decoder import Decoder
from secateur.models.experts import experts_module, mixture_of
from secateur.models.widths import block_widths
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.experts.removal import ExpertAssembly, require_even_groups
from secateur.surgery.width.inputs import expert_weight, of_dense, stacked_weights, writer_of, writes_stream
from secateur.surgery.width.repair import choose_fit, described

_TINY = 1e-30


SetBlock = Callable[[ExpertAssembly, int, Sequence[Batch], StateStore], None]
"""Sets a block of the new model that has experts, given the states before it, in the store under the batch's index."""


@dataclass(frozen=True)
class Rebuilt:
    """A model with fewer experts.

    Attributes:
        decoder: the model.
        fits: for each block with experts, the ridge of every expert and its errors on held-out windows; empty if
            nothing was refitted.
    """

    decoder: Decoder
    fits: list[dict[str, Any]]


def require_repairable(decoder: Decoder) -> None:
    """Refuse a model whose experts cannot be refitted.

    Raises:
        ModelError: saying why.
    """
    if not writes_stream(decoder):
        raise ModelError(f"{decoder.source}: its experts write into a norm, not the residual stream; leave out repair.")


@torch.no_grad()
def rebuild_experts(
    decoder: Decoder,
    windows: Windows,
    keep: int,
    set_block: SetBlock,
    *,
    ridge: Ridge | None,
    options: RunOptions = DEFAULTS,
) -> Rebuilt:
    """Build a model with fewer experts block by block, each block on the states that the new blocks before it give.

    Args:
        decoder: the model; it stays as it is.
        windows: calibration windows.
        keep: number of experts each block with experts keeps.
        set_block: sets such a block of the new model; the weights of the dense one are present.
        ridge: refit output projections with this λ, in mean diagonals of the Gram matrix of each expert's channels, or
            "auto"; None leaves them as they were set.
        options: batch size and progress.

    Raises:
        InputError: a model with that many experts in each block is impossible.
        ModelError: the model has no experts that can be removed, or a norm behind them that a refit does not know.
        NumericsError: NaN or infinity on the way.
    """
    if ridge is not None:
        require_repairable(decoder)
    new, folds, fits = ExpertAssembly(decoder, keep), folds_of(windows), list[dict[str, Any]]()
    with open_store(decoder) as store:
        batches = stored_start(decoder, windows, store, options.batch_size)
        for batch in batches if ridge is not None else ():
            store.put(of_dense(batch), store.get(batch.index))
        blocks = range(decoder.block_count)
        for index in options.progress(blocks, "fewer experts, block by block", len(blocks)):
            with decoder.block(index):
                if new.mixture.sizes[index] is None:
                    new.keep(index, ())
                else:
                    set_block(new, index, batches, store)
                for batch in batches if ridge is not None else ():
                    store.put(of_dense(batch), step(decoder, index, batch, store.get(of_dense(batch))))
            if ridge is not None and new.mixture.sizes[index] is not None:  # the dense block is gone: sums need room
                fits.append(_refit(new, index, (folds, ridge), batches, store))
            for batch in batches:
                store.put(batch.index, step(new.decoder, index, batch, store.get(batch.index)))
            new.finish(index)
    return Rebuilt(new.result(), fits)


def refit_experts(
    decoder: Decoder,
    windows: Windows,
    kept: Sequence[Sequence[int]],
    *,
    ridge: Ridge = "auto",
    options: RunOptions = DEFAULTS,
) -> Rebuilt:
    """Drop all experts but these, in order for each block, and refit the output projections of the others.

    The arguments and errors are those of `rebuild_experts`.
    """
    require_even_groups(mixture_of(decoder), kept)

    def keep(new: ExpertAssembly, index: int, _batches: Sequence[Batch], _store: StateStore) -> None:
        new.keep(index, kept[index])

    return rebuild_experts(decoder, windows, max(map(len, kept)), keep, ridge=ridge, options=options)


def _refit(
    new: ExpertAssembly, index: int, how: tuple[Folds, Ridge], batches: Sequence[Batch], store: StateStore
) -> dict[str, Any]:
    """Refit block `index` of the new model, whose states before it and of the dense model after it are in the store."""
    folds, ridge = how
    decoder = new.decoder
    block, name = decoder.block_list[index], writer_of(decoder, index, "channels")
    sums = _lacking(decoder, index, folds, batches, store)
    written, fits = [], []
    for expert in range(len(sums)):
        one = sums.pop(0)  # so that its memory is free again
        weight = expert_weight(block, name, expert).to(one.total.device)
        stay = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        fits.append(choose_fit(weight, one, stay, repair=True, bias=False, ridge=ridge))
        written.append(fits[-1].applied(weight, one, stay)[0].to(decoder.saved_dtype))
    new.put(index, {name: stacked_weights(block, name, written)})
    return {"block": index, "part": "experts", **described(fits)}


def _lacking(
    decoder: Decoder, index: int, folds: Folds, batches: Sequence[Batch], store: StateStore
) -> list[InputSums]:
    """Sum up the channels of each expert of block `index`, its weights present, and what the block's output lacks."""
    block, family = decoder.block_list[index], decoder.anatomy.family
    widths, device = block_widths(decoder, index), store.get(batches[0].index).device
    sums = [InputSums(widths.channels, device) for _ in range(widths.experts)]
    first, factor = 0, _factor(decoder, index, batches[0], store.get(batches[0].index))
    for batch in batches:
        writer = writer_of(decoder, index, "channels")
        with (
            capturing_routing(block, family, batch) as routed,
            capturing_inputs(block, writer, batch, len(sums)) as captured,
        ):
            hidden = step(decoder, index, batch, store.get(batch.index))
        missed = ((store.get(of_dense(batch)) - hidden) / factor).flatten(0, 1)
        length = hidden.flatten(0, 1).double().square().mean(dim=1).clamp_min(_TINY)
        own, total = folds.slice(first, len(batch.tokens)), _weights(routed[0], len(sums), batch)
        scale = total.sum(dim=1)
        for inputs in captured:
            window = inputs.rows // hidden.shape[1]
            share = (total[inputs.rows, inputs.expert] * scale[inputs.rows]).to(length)
            rows = inputs.rows.to(hidden.device)
            weight = own.weight[window].to(length) * share / length[rows]
            lacking = missed[rows] / scale[inputs.rows].to(missed)[:, None]
            sums[inputs.expert].update(inputs.inputs, window, weight, own.held_out[window], lacking)
        first += len(batch.tokens)
    for one in sums:
        one.require_finite(f"what experts of block {index} compute")
    return sums


def _factor(decoder: Decoder, index: int, batch: Batch, hidden: torch.Tensor) -> float:
    """Return what the block multiplies the output of its experts by when it adds it to the residual stream."""
    experts, written = experts_module(decoder.block_list[index], decoder.anatomy.family), list[torch.Tensor]()

    def silence(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        written.append(output.reshape(-1, hidden[..., 0].numel(), hidden.shape[-1]).sum(dim=0))
        return torch.zeros_like(output)

    whole = step(decoder, index, batch, hidden)
    hook = experts.register_forward_hook(silence)
    try:
        added = (whole - step(decoder, index, batch, hidden)).flatten(0, 1)
    finally:
        hook.remove()
    if batch.mask is not None:
        added, written[0] = added[batch.mask.flatten()], written[0][batch.mask.flatten()]
    length = float(written[0].float().square().sum())
    return float((written[0].float() * added.float()).sum()) / length if length else 1.0


def _weights(routed: Routed, experts: int, batch: Batch) -> torch.Tensor:
    """Return the weight of each expert for each token of a batch, (tokens, E) float64 on the CPU; 0 if not chosen."""
    found = torch.zeros(batch.tokens.numel(), experts, dtype=torch.float64)
    rows = torch.zeros(len(routed.rows), experts, dtype=torch.float64)
    found[routed.rows] = rows.scatter_add_(1, routed.chosen.cpu(), routed.weights.cpu().double())
    return found
