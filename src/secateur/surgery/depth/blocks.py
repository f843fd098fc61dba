"""Remove blocks from a decoder, or replace their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.models.anatomy import find, resolve, set_parameter
from secateur.models.decoder import Decoder
from secateur.models.depth import reason_to_keep, with_blocks
from secateur.models.fingerprint import of_edit


def keep_blocks(decoder: Decoder, kept: Sequence[int]) -> Decoder:
    """Return a decoder that keeps only these blocks; the given one is unchanged and shares its weights.

    Raises:
        ModelError: the model is a skeleton of an architecture that scales weights by block number, it is sliced, or
            some of the other blocks must stay.
    """
    if list(kept) == list(range(decoder.block_count)):
        return decoder
    family = decoder.anatomy.family
    require_one_basis(decoder)
    require_removable(decoder, set(range(decoder.block_count)) - set(kept))
    if family.fixed_blocks:
        moved = tuple(new for new, old in enumerate(kept) if old in family.fixed_blocks)
        family = dataclasses.replace(family, fixed_blocks=moved)
    module = with_blocks(decoder.module, family, kept).requires_grad_(False)
    scaled = query_scaled_by_number(decoder)
    if scaled is not None:
        if decoder.is_skeleton:
            raise ModelError(
                f"{decoder.source}: attention is scaled by the block's number, so queries must be rescaled; "
                "open it without skeleton."
            )
        _rescale_queries(module, family.blocks, scaled, kept, decoder.saved_dtype)
    return dataclasses.replace(
        decoder,
        module=module,
        anatomy=resolve(module, family),
        fingerprint=of_edit(decoder.fingerprint, {"keep": list(kept)}),
        shards=decoder.shards.select(kept) if decoder.shards else None,
    )


def can_go(decoder: Decoder, gone: Collection[int]) -> bool:
    """Return whether these blocks can all be removed."""
    return reason_to_keep(decoder.config, decoder.anatomy.family, gone) is None


def require_removable(decoder: Decoder, gone: Collection[int]) -> None:
    """Refuse to remove blocks that must stay.

    Raises:
        ModelError: with the reason.
    """
    reason = reason_to_keep(decoder.config, decoder.anatomy.family, gone)
    if reason is not None:
        others = " Width methods work." if decoder.anatomy.family.mlp_out else ""
        raise ModelError(f"{decoder.source}: {reason}.{others}")


def require_one_basis(decoder: Decoder) -> None:
    """Refuse sliced models whose blocks fit only their neighbours.

    Raises:
        ModelError: with what to do instead.
    """
    if decoder.changes_basis:
        raise ModelError(
            f"{decoder.source}: neighbouring blocks of this sliced model fit only each other; take blocks out of the "
            "dense model first, then slice."
        )


def with_block_tensors(decoder: Decoder, edits: Iterable[tuple[int, Mapping[str, torch.Tensor]]], edit: Any) -> Decoder:
    """Return a decoder with some blocks' weights replaced; the given one is unchanged and shares all others.

    Args:
        decoder: the decoder.
        edits: block numbers, each with all parameters of the block by name; read one by one.
        edit: description of the edit as data, from which the result's fingerprint is made.
    """
    family = decoder.anatomy.family
    module = with_blocks(decoder.module, family, range(decoder.block_count)).requires_grad_(False)
    blocks, shards = find(module, family.blocks), decoder.shards
    for index, tensors in edits:
        if shards is not None:
            shards = shards.with_part(index, {name: t.to(decoder.saved_dtype) for name, t in tensors.items()})
            continue
        for name, tensor in tensors.items():
            set_parameter(blocks[index], name, tensor)
    return dataclasses.replace(
        decoder,
        module=module,
        anatomy=resolve(module, family),
        fingerprint=of_edit(decoder.fingerprint, edit),
        shards=shards,
    )


def query_scaled_by_number(decoder: Decoder) -> str | None:
    """Return the fused projection whose queries the stock code divides by the block's number + 1, if there is one."""
    scaled = getattr(decoder.config, "scale_attn_by_inverse_layer_idx", False)
    return decoder.anatomy.family.depth_scaled_query if scaled else None


def _rescale_queries(module: nn.Module, blocks: str, path: str, kept: Sequence[int], stored: torch.dtype) -> None:
    """Fold the change of 1/(number+1) into the query columns of a fused Conv1D projection (GPT-2).

    The result is rounded to the dtype it will be saved in, so that what is measured is what is saved.
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
