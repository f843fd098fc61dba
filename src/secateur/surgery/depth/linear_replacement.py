"""A matrix on the output of a block's MLP, folded into the projection that writes that output.

ReplaceMe: Shopkhoev et al. 2025, "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
Linearization" (arXiv:2505.02819).

The state that leaves a block is R + m·(h W_out + b): all of it but the MLP's part, and the MLP's part P, whose factor m
is 1 but for a few families. P T = m·(h (W_out T) + b T), so T goes into the weights and nothing is left to be computed:
the result is a stock model of the same size. In a mixture of experts P is a sum over experts, so T goes into each.
This needs P to enter the state as it is. A norm between the MLP and the state would have to be undone first, so
families that have one are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import ModelError
from secateur.models.anatomy import present
from secateur.models.decoder import Decoder
from secateur.models.forward import Call, run_block
from secateur.plan.steps import Span
from secateur.surgery.depth.blocks import keep_blocks, require_one_basis, with_block_tensors


def require_plain_mlp_output(decoder: Decoder) -> None:
    """Refuse models whose MLP output does not enter the residual stream as it is.

    Raises:
        ModelError: with the reason.
    """
    require_one_basis(decoder)
    family = decoder.anatomy.family
    if family.detected:
        raise ModelError(
            f"{decoder.source}: '{family.model_type}' is not in the table of families, so it is not known where its "
            "MLP writes and no matrix can be folded in there. See docs/add-a-family.md."
        )
    if family.order != "pre" or getattr(decoder.config, "do_layer_norm_before", True) is False:
        raise ModelError(
            f"{decoder.source}: this {family.model_type} has a norm between the MLP's output and the residual stream, "
            "so no matrix on that output can be folded into the weights. Methods that take out or merge blocks work."
        )


def without_mlp(decoder: Decoder, index: int, call: Call, hidden: torch.Tensor) -> torch.Tensor:
    """Run block `index`, its weights present, with an MLP that writes 0: R for the states (batch, positions, d)."""
    block = decoder.block_list[index]
    silent = {name: torch.zeros_like(tensor) for name, tensor, _ in _mlp_writers(decoder, block)}
    return run_block(block, call, hidden, silent)


@torch.no_grad()
def replace_linearly(decoder: Decoder, matrices: Mapping[Span, torch.Tensor]) -> Decoder:
    """Return the decoder without some windows of blocks; the given one stays as it is.

    Args:
        decoder: the model.
        matrices: first and last block of each window that goes, with T (d, d) for rows: the MLP's part P of the state
            that leaves the block before becomes P T.

    Raises:
        ModelError: there is a norm after the MLP, or the architecture derives weights' scales from block numbers and
            the model is a skeleton.
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
    """Return all parameters of a block, those by which its MLP writes with the matrix folded in."""
    with decoder.block(index) as block:
        tensors = {name: parameter.detach() for name, parameter in block.named_parameters()}
        for name, tensor, last_is_output in _mlp_writers(decoder, block):
            turn = matrix.to(tensor.device, torch.promote_types(tensor.dtype, torch.float32))
            wide = tensor.to(turn.dtype)
            product = wide @ turn if last_is_output else turn.T @ wide
            tensors[name] = product.to(decoder.saved_dtype).to(tensor.dtype)
    return tensors


def _mlp_writers(decoder: Decoder, block: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield name and tensor of the MLP's last projection, and whether the last axis is the output's."""
    for name, found in present(block, decoder.anatomy.family.mlp_out):
        if isinstance(found, nn.Parameter):
            yield name, found.detach(), False
            continue
        for leaf, parameter in found.named_parameters():
            yield f"{name}.{leaf}", parameter.detach(), parameter.dim() == 1 or isinstance(found, Conv1D)
