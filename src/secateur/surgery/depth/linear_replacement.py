"""A matrix on the output of a block's MLP, folded into the projection that writes that output.

ReplaceMe: Shopkhoev et al. 2025, "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
Linearization" (arXiv:2505.02819).

The output of a block is R + m·(h W_out + b), where P = m·(h W_out + b) is the MLP's contribution and R the rest; the
factor m is 1 for all but a few families. Since P T = m·(h (W_out T) + b T), T can be folded into the weights, and the
result is a stock model without extra computation. In a mixture of experts P is a sum over experts, so T is folded into
each. This requires P to enter the residual stream unchanged: families with a norm between the MLP and the stream are
refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from secateur.errors import ModelError
from secateur.models.anatomy import mlp_writers
from secateur.models.decoder import Decoder
from secateur.models.forward import Call, run_block
from secateur.plan.steps import Span
from secateur.surgery.depth.blocks import keep_blocks, require_one_basis, with_block_tensors


def require_plain_mlp_output(decoder: Decoder) -> None:
    """Refuse models whose MLP output does not enter the residual stream unchanged.

    Raises:
        ModelError: with the reason.
    """
    require_one_basis(decoder)
    family = decoder.anatomy.family
    if family.detected and not family.mlp_out:
        raise ModelError(
            f"{decoder.source}: '{family.model_type}' is not in the table of families, and it was not found where its "
            "MLPs write, so no matrix can be folded in there. Methods that remove or merge blocks work; see "
            "docs/add-a-family.md."
        )
    if family.streams > 1:
        raise ModelError(
            f"{decoder.source}: what the MLPs of this {family.model_type} write is weighted anew for each of its "
            f"{family.streams} residual streams, so no matrix on that output can be folded into the weights. Methods "
            "that remove or merge blocks work."
        )
    if family.order != "pre" or getattr(decoder.config, "do_layer_norm_before", True) is False:
        raise ModelError(
            f"{decoder.source}: this {family.model_type} has a norm between the MLP's output and the residual stream, "
            "so no matrix on that output can be folded into the weights. Methods that remove or merge blocks work."
        )


def without_mlp(decoder: Decoder, index: int, call: Call, hidden: torch.Tensor) -> torch.Tensor:
    """Return R for states (batch, positions, d): block `index` (weights present) run with an MLP that writes 0."""
    block = decoder.block_list[index]
    silent = {name: torch.zeros_like(tensor) for name, tensor, _ in mlp_writers(block, decoder.anatomy.family)}
    return run_block(block, call, hidden, silent)


@torch.no_grad()
def replace_linearly(decoder: Decoder, matrices: Mapping[Span, torch.Tensor]) -> Decoder:
    """Return a decoder without some windows of blocks; the given one is unchanged.

    Args:
        decoder: the model.
        matrices: first and last block of each window to remove, with T (d, d), which acts on rows: the MLP output P of
            the preceding block becomes P T.

    Raises:
        ModelError: there is a norm after the MLP, or the model is a skeleton of an architecture that scales weights by
            block number.
    """
    require_plain_mlp_output(decoder)
    gone = {block for low, high in matrices for block in range(low, high + 1)}
    kept = [block for block in range(decoder.block_count) if block not in gone]
    shorter = keep_blocks(decoder, kept)
    ordered = sorted(matrices)
    places = {window: kept.index(window[0] - 1) for window in ordered}
    folded = ((place, _folded(shorter, place, matrices[window])) for window, place in places.items())
    named = [[*window, float(matrices[window].sum()), float(matrices[window].norm())] for window in ordered]
    return with_block_tensors(shorter, folded, {"linearize": named})


def _folded(decoder: Decoder, index: int, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return all parameters of a block, with the matrix folded into the output projections of its MLP."""
    with decoder.block(index) as block:
        tensors = {name: parameter.detach() for name, parameter in block.named_parameters()}
        for name, tensor, last_is_output in mlp_writers(block, decoder.anatomy.family):
            turn = matrix.to(tensor.device, torch.promote_types(tensor.dtype, torch.float32))
            wide = tensor.detach().to(turn.dtype)
            product = wide @ turn if last_is_output else turn.T @ wide
            tensors[name] = product.to(decoder.saved_dtype).to(tensor.dtype)
    return tensors
