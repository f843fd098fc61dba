"""Take whole blocks out of a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.models.anatomy import find, resolve
from secateur.models.decoder import Decoder
from secateur.models.depth import with_blocks
from secateur.models.fingerprint import of_edit


def keep_blocks(decoder: Decoder, kept: Sequence[int]) -> Decoder:
    """Give the decoder that keeps only these blocks; the given one stays as it is and shares its weights.

    Raises:
        ModelError: the architecture derives weights' scales from block numbers and the model is a skeleton, or the
            model is sliced.
    """
    if list(kept) == list(range(decoder.block_count)):
        return decoder
    family = decoder.anatomy.family
    if decoder.changes_basis:
        raise ModelError(
            f"{decoder.source}: neighbouring blocks of this sliced model fit only each other; take blocks out of the "
            "dense model first, then slice."
        )
    module = with_blocks(decoder.module, family, kept).requires_grad_(False)
    if family.depth_scaled_query and getattr(decoder.config, "scale_attn_by_inverse_layer_idx", False):
        if decoder.is_skeleton:
            raise ModelError(
                f"{decoder.source}: attention is scaled by the block's number, so queries must be rescaled; "
                "open it without skeleton."
            )
        _rescale_queries(module, family.blocks, family.depth_scaled_query, kept, decoder.saved_dtype)
    return dataclasses.replace(
        decoder,
        module=module,
        anatomy=resolve(module, family),
        fingerprint=of_edit(decoder.fingerprint, {"keep": list(kept)}),
        shards=decoder.shards.select(kept) if decoder.shards else None,
    )


def _rescale_queries(module: nn.Module, blocks: str, path: str, kept: Sequence[int], stored: torch.dtype) -> None:
    """Fold the change of 1/(number+1) into the query columns of a fused Conv1D projection (GPT-2).

    The result is rounded to the dtype it will be stored in, so that what is measured is what is saved.
    """
    for new, old in enumerate(kept):
        projection = find(module, f"{blocks}.{new}.{path}")
        width = projection.weight.shape[0]
        ratio = (new + 1) / (old + 1)
        weight, bias = projection.weight.detach().clone(), projection.bias.detach().clone()
        weight[:, :width] *= ratio
        bias[:width] *= ratio
        projection.weight = nn.Parameter(weight.to(stored).to(weight.dtype), requires_grad=False)
        projection.bias = nn.Parameter(bias.to(stored).to(bias.dtype), requires_grad=False)
