"""Fold and rotate embeddings and head of a sliced model; some rows at a time, because they are its largest tensors.

Legend: V = vocabulary, D = width of the residual stream, P (D, d) = kept directions.
"""

from __future__ import annotations

import torch
from torch import nn

from secateur.models.anatomy import find
from secateur.models.decoder import Decoder
from secateur.models.shards import OUTER
from secateur.surgery.assembly import Assembly, Tensors
from secateur.surgery.hidden.directions import Directions, by_rows, times
from secateur.surgery.hidden.folding import bias_of, scaled, scaled_by_norm, shifted_by_norm


def put_outer(assembly: Assembly, first: Directions | None, last: Directions | None) -> None:
    """Add embeddings and head to the model, one after the other.

    Args:
        assembly: the model under construction; if its head is tied, the two share a table and must not be rotated.
        first: directions at the first reading point; None for the dense coordinates.
        last: directions at the head.
    """
    put_tables(assembly, first)
    assembly.finish(OUTER)
    put_head(assembly, last)
    assembly.finish(OUTER)


def put_tables(assembly: Assembly, directions: Directions | None) -> None:
    """Write the embeddings in the coordinates of the first point (None: the dense ones)."""
    with assembly.dense.outer(head=False):
        found = folded_tables(assembly.dense, directions, assembly.stored)
    assembly.put("", found)


def put_head(assembly: Assembly, directions: Directions | None) -> None:
    """Write the head in the coordinates of the last point (None: dense); if tied, set the last norm's scales."""
    with assembly.dense.outer(table=False):
        tied = assembly.decoder.config.final_scale
        found = final_scales(assembly.dense) if tied else folded_head(assembly.dense, directions, assembly.stored)
    assembly.put("", found)


def final_scales(decoder: Decoder) -> Tensors:
    """Return the scales of the last norm, which cannot be folded into a head that is tied to the embeddings."""
    family = decoder.anatomy.family
    norm = find(decoder.module, family.final[0])
    return {"model.norm.weight": norm.weight.float() + (family.norm == "rms-plus-one")}


def folded_tables(
    decoder: Decoder, directions: Directions | None = None, dtype: torch.dtype = torch.float32
) -> Tensors:
    """Fold the tables of tokens (V, D) and positions, multiply by P if given, and round to a dtype.

    `decoder.outer(head=False)` must be open.
    """
    family = decoder.anatomy.family
    embed = find(decoder.module, family.embeddings[0])

    def tokens(rows: torch.Tensor) -> torch.Tensor:
        return _turned(_centred(decoder, _embedded(decoder, rows)), directions)

    def positions(rows: torch.Tensor) -> torch.Tensor:
        return _turned(_centred(decoder, rows.float()), directions)

    found = {"model.embed_tokens.weight": by_rows(embed.weight, tokens, dtype)}
    if family.positions.startswith("learned"):
        table = find(decoder.module, family.embeddings[1])
        rows = table.weight[getattr(table, "offset", 0) :]
        found["model.embed_positions.weight"] = by_rows(rows, positions, dtype)
    return found


def folded_head(decoder: Decoder, directions: Directions | None = None, dtype: torch.dtype = torch.float32) -> Tensors:
    """Fold the head (V, D), multiply its weight by P if given, and round it to a dtype; a tied head becomes a copy.

    `decoder.outer(table=False)` must be open.
    """
    family, config = decoder.anatomy.family, decoder.config
    head, norm = find(decoder.module, family.head), find(decoder.module, family.final[0])
    scale = getattr(config, family.logits_multiplier or "", 1.0) / getattr(config, family.logits_divisor or "", 1.0)

    def read(rows: torch.Tensor) -> torch.Tensor:
        return _turned(scaled(scaled_by_norm(rows.float(), norm, family.norm), scale), directions)

    found = {"lm_head.weight": by_rows(head.weight, read, dtype)}
    bias = shifted_by_norm(head.weight, bias_of(head), norm)
    if bias is not None:
        found["lm_head.bias"] = scaled(bias, scale)
    return found


def _turned(rows: torch.Tensor, directions: Directions | None) -> torch.Tensor:
    return rows if directions is None else times(rows, directions)


def _centred(decoder: Decoder, rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(dim=1, keepdim=True) if decoder.anatomy.family.norm == "layernorm" else rows


def _embedded(decoder: Decoder, rows: torch.Tensor) -> torch.Tensor:
    """Return the input of block 0 (tokens, D): embedding rows, their multiplier, and a norm if there is one."""
    family = decoder.anatomy.family
    embed = find(decoder.module, family.embeddings[0])
    found = scaled(rows.float(), getattr(decoder.config, family.embedding_multiplier or "", 1.0))
    scale = getattr(embed, "embed_scale", None)
    if scale is not None:
        found = found * scale.to(rows.dtype).float()
    norm = find(decoder.module, family.embeddings[1]) if len(family.embeddings) > 1 else None
    return norm(found.to(norm.weight.dtype)).float() if isinstance(norm, nn.LayerNorm) else found
