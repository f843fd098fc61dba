"""Slice hidden states with one basis for the whole model and a stock architecture (docs/methods/stock-slicing.md).

With the same P everywhere, residual connections need no matrices and a smaller `hidden_size` describes the result. A
stock RMSNorm divides by √(Σ x²/d + eps) over the d kept directions, the dense norm by √(Σ x²/D + eps). With weight
√(D/d) and eps·D/d, the stock norm equals the dense one.

Legend: D = dense width, d = kept width, P (D, d) = kept orthonormal directions, M (D, d) = replacement of P in the
input weights of a layer: W ← W M. M = P is a plain slice; see `Reconstruction` for a better M.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from secateur.errors import ModelError
from secateur.models.anatomy import find, present
from secateur.models.decoder import Decoder
from secateur.models.shards import OUTER
from secateur.plan.steps import StreamSizes
from secateur.surgery.assembly import Assembly, Tensors
from secateur.surgery.hidden.directions import Directions, by_rows, times
from secateur.surgery.hidden.folding import folded_config, refuse_unsliceable, scaled_by_norm, stream_sizes
from secateur.surgery.hidden.own_bases import imprint_of, sliced_fingerprint


def config_of_width(decoder: Decoder, width: int) -> Any:
    """Return the configuration of the same architecture with another hidden size; heads keep their size.

    Raises:
        StrictDataclassError: the architecture does not allow this width.
    """
    config = copy.deepcopy(decoder.config)
    block = decoder.block_list[0]
    writer = next(present(block, decoder.anatomy.family.attention_out))[1]
    config.head_dim = writer.weight.shape[-1] // config.num_attention_heads
    config.hidden_size = width
    if getattr(config, "widths", None):
        config.widths = [width] * len(config.widths)
    config.tie_word_embeddings = False
    if not list(present(block, decoder.anatomy.family.attention_norms)):
        config.rms_norm_eps = config.rms_norm_eps * decoder.hidden_size / width
    config.validate()
    return config


def width_step(decoder: Decoder, rounding: int) -> int | None:
    """Return what kept widths must be multiples of: `rounding`, and the heads if the configuration requires it.

    Return None if no stock model can represent sliced states: a stock LayerNorm subtracts the mean over the kept
    directions, which is not the mean over all, and some configurations tie the hidden size to other sizes (Phi-3 with
    long rope).

    Raises:
        ModelError: the hidden states cannot be rotated at all.
    """
    refuse_unsliceable(decoder)
    if decoder.anatomy.family.norm == "layernorm":
        return None
    for step in (rounding, math.lcm(rounding, int(decoder.config.num_attention_heads))):
        largest = (decoder.hidden_size - 1) // step * step
        if largest > 0 and _allowed(decoder, largest):
            return step
    return None


def _allowed(decoder: Decoder, width: int) -> bool:
    try:
        config_of_width(decoder, width)
    except StrictDataclassError:
        return False
    return True


def stock_stream_sizes(decoder: Decoder) -> StreamSizes:
    """Return the parameters per residual dimension of a model that keeps its architecture, norms included."""
    sizes = stream_sizes(folded_config(decoder))
    return sizes.model_copy(
        update={
            "attention_in": tuple(rows + 1 for rows in sizes.attention_in),
            "mlp_in": tuple(rows + 1 for rows in sizes.mlp_in),
            "head": sizes.head + 1,
        }
    )


class StockSlicing:
    """Slices into the same architecture with a smaller hidden size and an untied head."""

    def __init__(self, decoder: Decoder, directions: Directions) -> None:
        """Start empty; P is (D, d).

        Raises:
            ModelError: a stock architecture cannot hold the result.
        """
        if width_step(decoder, 1) is None:
            raise ModelError(f"{decoder.source}: no stock model can hold its sliced states; the modelling file can.")
        family, width = decoder.anatomy.family, directions.shape[1]
        self._dense, self._directions = decoder, directions
        self._assembly = Assembly(decoder, config_of_width(decoder, width), family)
        self._scale = math.sqrt(decoder.hidden_size / width) - (family.norm == "rms-plus-one")

    @torch.no_grad()
    def block(self, index: int, readings: Sequence[Directions]) -> None:
        """Slice block `index`, whose dense weights are present, with M of each of its reading points."""
        where = self._assembly.block_path(index)
        self._assembly.put(where, _block(self._dense, index, self._directions, readings, self._scale))
        self._assembly.finish(index)

    @torch.no_grad()
    def finish(self, reading: Directions) -> Decoder:
        """Slice embeddings and head, the latter with M, and give the model."""
        with self._dense.outer(head=False):
            found = _tables(self._assembly, self._directions, self._scale)
        self._assembly.put("", found)
        self._assembly.finish(OUTER)
        with self._dense.outer(table=False):
            found = _head(self._assembly, reading)
        self._assembly.put("", found)
        self._assembly.finish(OUTER)
        return self._assembly.result(sliced_fingerprint([imprint_of(self._directions)]))


def _block(
    decoder: Decoder, index: int, directions: Directions, readings: Sequence[Directions], scale: float
) -> Tensors:
    family, block = decoder.anatomy.family, decoder.block_list[index]
    norms = dict(present(block, family.norms))
    found: Tensors = dict(block.named_parameters())
    for names, norm, reading in (
        (family.attention_in, family.norms[0], readings[0]),
        (family.mlp_in + family.router, family.norms[1], readings[1]),
    ):
        for name, part in present(block, names):
            weight = part if isinstance(part, nn.Parameter) else part.weight
            found[_weight_name(name, part)] = _read(weight, norms[norm], family.norm, reading)
        found[f"{norm}.weight"] = torch.full((directions.shape[1],), scale)
    for name, part in present(block, family.attention_out + family.mlp_out):
        weight = part if isinstance(part, nn.Parameter) else part.weight
        found[_weight_name(name, part)] = times(weight.transpose(-1, -2), directions).transpose(-1, -2)
        if getattr(part, "bias", None) is not None:
            found[f"{name}.bias"] = times(part.bias, directions)
    return found


def _tables(assembly: Assembly, directions: Directions, scale: float) -> Tensors:
    family = assembly.dense.anatomy.family
    embed, own = (find(one.module, family.embeddings[0]) for one in (assembly.dense, assembly.decoder))

    def turned(rows: torch.Tensor) -> torch.Tensor:
        found = times(rows, directions)
        return found * (embed.embed_scale / own.embed_scale).to(found) if hasattr(embed, "embed_scale") else found

    return {
        f"{family.embeddings[0]}.weight": by_rows(embed.weight, turned, assembly.stored),
        f"{family.final[0]}.weight": torch.full((directions.shape[1],), scale),
    }


def _head(assembly: Assembly, reading: Directions) -> Tensors:
    decoder, family = assembly.dense, assembly.dense.anatomy.family
    head, norm = find(decoder.module, family.head), find(decoder.module, family.final[0])
    found = {f"{family.head}.weight": _read(head.weight, norm, family.norm, reading, assembly.stored)}
    if getattr(head, "bias", None) is not None:
        found[f"{family.head}.bias"] = head.bias
    return found


def _read(
    weight: torch.Tensor, norm: Any, kind: str, reading: Directions, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return by_rows(weight, lambda rows: times(scaled_by_norm(rows.float(), norm, kind), reading), dtype)


def _weight_name(name: str, part: Any) -> str:
    return name if isinstance(part, nn.Parameter) else f"{name}.weight"
