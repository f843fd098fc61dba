"""Slice hidden states with one basis for the whole model and a stock architecture (docs/methods/stock-slicing.md).

With the same P everywhere, residual connections need no matrices and a smaller `hidden_size` describes the result. A
stock RMSNorm divides by √(Σ x²/d + eps) over the d kept directions, the dense norm by √(Σ x²/D + eps). What writes to
the stream is scaled by √(d/D) and the norms by √(D/d), so that the stock norm equals the dense one.

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

from secateur.calibration.reading_points import points_per_block
from secateur.errors import ModelError
from secateur.models.anatomy import entry, find, present
from secateur.models.decoder import Decoder
from secateur.models.shards import OUTER
from secateur.plan.steps import StreamSizes
from secateur.surgery.assembly import Assembly, Tensors
from secateur.surgery.hidden.directions import Directions, RowsChange, by_rows, times
from secateur.surgery.hidden.folding import refuse_unsliceable, scaled_by_norm
from secateur.surgery.hidden.own_bases import imprint_of, sliced_fingerprint
from secateur.surgery.hidden.stream_of_row import head_size, stream_of

_HEADS = ("num_attention_heads", "mamba_n_heads", "mamba_expand")
"""Configuration entries with numbers of heads that the hidden size, or its expansion, may have to be a multiple of."""


def config_of_width(decoder: Decoder, width: int) -> Any:
    """Return the configuration of the same architecture with another hidden size; heads keep their size.

    Raises:
        StrictDataclassError: the architecture does not allow this width.
    """
    config = copy.deepcopy(decoder.config)
    size = head_size(decoder)
    if size is not None:
        config.head_dim = size
    config.hidden_size = width
    if getattr(config, "widths", None):
        config.widths = [width] * len(config.widths)
    config.tie_word_embeddings = False
    try:
        config.validate()
    except (StrictDataclassError, ValueError):
        if not _states_follow(decoder.config):
            raise
        config.mamba_d_head = config.mamba_expand * width // config.mamba_n_heads
        config.validate()
    return config


def _states_follow(config: Any) -> bool:
    """Return whether the heads of state spaces together are as wide as a multiple of the hidden size.

    Some configurations require this also of a model without state spaces, where it holds nothing (Granite 4).
    """
    expansion, count, size = (entry(config, name) for name in ("mamba_expand", "mamba_n_heads", "mamba_d_head"))
    return bool(expansion and count and size) and expansion * config.hidden_size == count * size


def width_step(decoder: Decoder, rounding: int) -> int | None:
    """Return what kept widths must be multiples of: `rounding`, and numbers of heads if the configuration requires it.

    Return None if no stock model can represent sliced states: a stock LayerNorm subtracts the mean over the kept
    directions, which is not the mean over all, and some configurations tie the hidden size to other sizes (Phi-3 with
    long rope).

    Raises:
        ModelError: the hidden states cannot be rotated at all.
    """
    family = decoder.anatomy.family
    if family.stream is None:
        refuse_unsliceable(decoder)
    if family.norm == "layernorm" or (family.stream is None and not family.free_heads):
        return None
    heads, states, expansion = (int(entry(decoder.config, name) or 1) for name in _HEADS)
    counts = (heads, states // math.gcd(states, expansion))
    for step in (rounding, *(math.lcm(rounding, count) for count in counts), math.lcm(rounding, *counts)):
        largest = (decoder.hidden_size - 1) // step * step
        if largest > 0 and _allowed(decoder, largest):
            return step
    return None


def _allowed(decoder: Decoder, width: int) -> bool:
    try:
        config_of_width(decoder, width)
    except (StrictDataclassError, ValueError):  # what a configuration raises that checks its sizes itself
        return False
    return True


def stock_stream_sizes(decoder: Decoder) -> StreamSizes:
    """Return the parameters per residual dimension of a model that keeps its architecture, norms included."""
    family, stream, width = decoder.anatomy.family, stream_of(decoder), decoder.hidden_size
    blocks = [_sizes_of(decoder, block) for block in decoder.block_list]
    own = decoder.block_parameter_counts()
    table = sum(find(decoder.module, name).numel() for name in stream.tables)
    head = 0 if decoder.anatomy.tied else find(decoder.module, family.head).weight.numel()
    return StreamSizes(
        width=width,
        parallel=points_per_block(decoder) == 1,
        attention_in=tuple(one["attention_in"] for one in blocks),
        attention_out=tuple(one["attention_out"] for one in blocks),
        mlp_in=tuple(one["mlp_in"] for one in blocks),
        mlp_out=tuple(one["mlp_out"] for one in blocks),
        fixed=tuple(count - width * sum(one.values()) for count, one in zip(own, blocks, strict=True)),
        tables=table // width,
        head=find(decoder.module, family.head).weight.shape[0] + 1,
        other_fixed=decoder.parameter_count - sum(own) - table - head - width,
    )


def _sizes_of(decoder: Decoder, block: nn.Module) -> dict[str, int]:
    """Count what lies along the stream in one block, by where it reads or writes; norms read."""
    stream, attention = stream_of(decoder), decoder.anatomy.family.attention_out
    found = dict.fromkeys(("attention_in", "attention_out", "mlp_in", "mlp_out"), 0)
    norms = (readers for norm, readers in stream.readers if find(block, norm) is not None)
    for place, readers in enumerate(norms):
        rows = sum(tensor.numel() for _, tensor in present(block, tuple(name for name, _ in readers)))
        found["mlp_in" if place else "attention_in"] += 1 + rows // decoder.hidden_size
    for name, tensor in present(block, tuple(name for name, _ in stream.writers)):
        where = "attention_out" if name.rpartition(".")[0] in attention else "mlp_out"
        found[where] += tensor.numel() // decoder.hidden_size
    return found


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
        self._writing = directions * math.sqrt(width / decoder.hidden_size)
        self._scale = math.sqrt(decoder.hidden_size / width) - (family.norm == "rms-plus-one")

    @torch.no_grad()
    def block(self, index: int, readings: Sequence[Directions]) -> None:
        """Slice block `index`, whose dense weights are present, with M of each of its reading points."""
        where = self._assembly.block_path(index)
        self._assembly.put(where, _block(self._dense, index, self._writing, readings, self._scale))
        self._assembly.finish(index)

    @torch.no_grad()
    def finish(self, reading: Directions) -> Decoder:
        """Slice embeddings and head, the latter with M, and give the model."""
        with self._dense.outer(head=False):
            found = _tables(self._assembly, self._writing, self._scale)
        self._assembly.put("", found)
        self._assembly.finish(OUTER)
        with self._dense.outer(table=False):
            found = _head(self._assembly, reading)
        self._assembly.put("", found)
        self._assembly.finish(OUTER)
        return self._assembly.result(sliced_fingerprint([imprint_of(self._directions)]))


def _block(decoder: Decoder, index: int, writing: Directions, readings: Sequence[Directions], scale: float) -> Tensors:
    family, stream, block = decoder.anatomy.family, stream_of(decoder), decoder.block_list[index]
    found: Tensors = dict(block.named_parameters())
    norms = [(norm, dict(readers)) for norm, readers in stream.readers if find(block, norm) is not None]
    for (name, axes), reading in zip(norms, readings, strict=True):
        norm = find(block, name)
        for reader, tensor in present(block, tuple(axes)):
            found[reader] = along(tensor, axes[reader], _reader(norm, family.norm, reading))
        found[f"{name}.weight"] = torch.full((writing.shape[1],), scale)
    axes = dict(stream.writers)
    for name, tensor in present(block, tuple(axes)):
        found[name] = along(tensor, axes[name], lambda rows: times(rows, writing))
    return found


def _tables(assembly: Assembly, writing: Directions, scale: float) -> Tensors:
    family = assembly.dense.anatomy.family
    embed, own = (find(one.module, family.embeddings[0]) for one in (assembly.dense, assembly.decoder))

    def turned(rows: torch.Tensor) -> torch.Tensor:
        found = times(rows, writing)
        return found * (embed.embed_scale / own.embed_scale).to(found) if hasattr(embed, "embed_scale") else found

    tables = {name: find(assembly.dense.module, name) for name in stream_of(assembly.dense).tables}
    found = {name: by_rows(table, turned, assembly.stored) for name, table in tables.items()}
    return found | {f"{family.final[0]}.weight": torch.full((writing.shape[1],), scale)}


def _head(assembly: Assembly, reading: Directions) -> Tensors:
    decoder, family = assembly.dense, assembly.dense.anatomy.family
    head, norm = find(decoder.module, family.head), find(decoder.module, family.final[0])
    found = {f"{family.head}.weight": by_rows(head.weight, _reader(norm, family.norm, reading), assembly.stored)}
    if getattr(head, "bias", None) is not None:
        found[f"{family.head}.bias"] = head.bias
    return found


def _reader(norm: Any, kind: str, reading: Directions) -> RowsChange:
    """Return the change of rows that read from a norm: its scale, then M."""
    return lambda rows: times(scaled_by_norm(rows.float(), norm, kind), reading)


def along(tensor: torch.Tensor, axis: int, change: RowsChange) -> torch.Tensor:
    """Apply a function of rows to a tensor whose rows run along the given axis."""
    if tensor.dim() == 1:
        return change(tensor)
    return by_rows(tensor.movedim(axis, -1), change).movedim(-1, axis)
