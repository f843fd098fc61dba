"""Widths inside a block (heads, key/value groups, MLP channels), read off its weights, and the size of its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from secateur.models.anatomy import Family, entry, experts_per_token, find, holds_transposed, owner_of, present
from secateur.models.decoder import Decoder
from secateur.plan.units import UnitKind


@dataclass(frozen=True)
class BlockWidths:
    """Widths inside a block.

    Attributes:
        groups: key/value heads; each serves the same number of adjacent query heads. 0 if there is no attention.
        queries: query heads per group.
        head_size: dimensions of a head.
        channels: inner width of the MLP, or of each of its experts; 0 if there is no MLP.
        experts: number of experts, 0 for a dense MLP.
        shared: how many times as wide as one of these the expert is that every token passes; 0 if it has a width of its
            own, or there is none.
    """

    groups: int
    queries: int
    head_size: int
    channels: int
    experts: int
    shared: int = 0

    @property
    def heads(self) -> int:
        """Total number of query heads."""
        return self.groups * self.queries


def block_widths(decoder: Decoder, index: int) -> BlockWidths:
    """Return the widths of block `index`, from the shapes of its projections."""
    family, config, block = decoder.anatomy.family, decoder.config, decoder.block_list[index]
    channels = _channels(block, family.mlp_out)
    shared = _shared_channels(block, family) // channels if channels else 0
    inner = {"channels": channels, "experts": _experts(block, family), "shared": shared}
    writer = next(present(block, family.attention_out), None)
    if writer is None:
        heads = entry(config, "num_attention_heads") or 1
        groups = entry(config, "num_key_value_heads") or heads
        size = entry(config, "head_dim") or decoder.hidden_size // heads
        return BlockWidths(groups=0, queries=max(1, heads // groups), head_size=size, **inner)
    own = getattr(config, "heads", None)
    heads = int(own[index] if own else config.num_attention_heads)
    groups = _groups(decoder, index) or heads
    return BlockWidths(groups=groups, queries=heads // groups, head_size=_inputs(writer[1]) // heads, **inner)


def _groups(decoder: Decoder, index: int) -> int | None:
    config, block = decoder.config, decoder.block_list[index]
    own = getattr(config, "key_value_heads", None)
    if own:
        return int(own[index])
    attention = find(block, decoder.anatomy.family.attention_out[0].rpartition(".")[0])
    return getattr(attention, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None)


def _inputs(module: Any) -> int:
    return int(module.weight.shape[0] if isinstance(module, Conv1D) else module.weight.shape[-1])


def _channels(block: nn.Module, writers: tuple[str, ...]) -> int:
    named = next(present(block, writers), None)
    if named is None:
        return 0
    found = named[1]
    if isinstance(found, nn.ModuleList):
        found = found[0]
    if isinstance(found, nn.Parameter):
        return int(found.shape[1 if holds_transposed(owner_of(block, named[0])) else 2])
    return _inputs(found)


def _shared_channels(block: nn.Module, family: Family) -> int:
    """Return the width of the expert that every token passes, if it follows that of the others."""
    if next(present(block, family.shared_in), None) is None:
        return 0
    return _channels(block, family.shared_out)


def _experts(block: nn.Module, family: Family) -> int:
    for _, found in present(block, family.mlp_out):
        if isinstance(found, nn.Parameter | nn.ModuleList):
            return len(found)
    return 0


def unit_counts(decoder: Decoder) -> dict[UnitKind, tuple[int, ...]]:
    """Count the units of each block that structured pruning can remove; empty if nothing is known of its inside."""
    if decoder.anatomy.family.detected and not decoder.anatomy.family.mlp_out:
        return {}
    blocks = [_units(decoder, index) for index in range(decoder.block_count)]
    return {kind: tuple(one.get(kind, 0) for one in blocks) for kind in UnitKind if any(kind in one for one in blocks)}


def _units(decoder: Decoder, index: int) -> dict[UnitKind, int]:
    """Count the units of one block; it may lack attention or an MLP."""
    found = block_widths(decoder, index)
    units = {UnitKind.DIRECTION: decoder.hidden_size}
    if found.groups:
        units |= {UnitKind.ATTENTION: 1, UnitKind.QUERY_HEAD: found.heads, UnitKind.KEY_VALUE_GROUP: found.groups}
    if found.channels:
        units |= {UnitKind.MLP: 1, UnitKind.CHANNEL: found.channels}
    return units | ({UnitKind.EXPERT: found.experts} if found.experts else {})


def cache_numbers(decoder: Decoder) -> tuple[int, ...]:
    """Return the values that each block caches per token: its keys and its values.

    The output rows of attention's input projections that are not queries are keys and values, and there are as many
    query rows as the output projection has inputs. A block without attention caches nothing. Where the projections are
    not known, or other rows are among them, the configuration is trusted; linear attention has a state of one
    size instead, whatever the context.
    """
    family, config = decoder.anatomy.family, decoder.config
    if not family.attention_out or family.qkv == "by-unit":
        kinds = getattr(config, "layer_types", None) or [""] * decoder.block_count
        return tuple(0 if kind == "linear_attention" else _configured(config) for kind in kinds)
    spread = family.cache_spread is not None and bool(getattr(config, family.cache_spread, False))
    return tuple(_projected(block, family, spread=spread) for block in decoder.block_list)


def cache_size(decoder: Decoder, context: int) -> tuple[int, ...]:
    """Return the values that each block caches for `context` tokens; sliding attention caches its window only."""
    layers = DynamicCache(config=decoder.config).layers
    windows = [getattr(layer, "sliding_window", None) for layer in layers] or [None] * decoder.block_count
    return tuple(
        numbers * min(context, window or context)
        for numbers, window in zip(cache_numbers(decoder), windows, strict=True)
    )


def _projected(block: nn.Module, family: Family, *, spread: bool) -> int:
    projected = sum(_shape(module)[0] for _, module in present(block, family.attention_in))
    queries = sum(_shape(module)[1] for _, module in present(block, family.attention_out))
    return 2 * queries if spread else projected - queries


def _shape(module: Any) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of a linear layer."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _configured(config: Any) -> int:
    latent, rotated = entry(config, "kv_lora_rank"), entry(config, "qk_rope_head_dim")
    if latent and rotated:  # keys and values of all heads are projections of these
        return int(latent) + int(rotated)
    queries = entry(config, "num_attention_heads") or 1
    heads, size = entry(config, "num_key_value_heads") or queries, entry(config, "head_dim")
    return 2 * int(heads) * int(size or config.hidden_size // queries)


def rows_per_token(decoder: Decoder) -> float:
    """Return how many tokens it takes for the widest projection of any block to see as many as it has inputs.

    That is its number of inputs, and of experts so many times more as a token passes by them.
    """
    chosen = experts_per_token(decoder.config, decoder.anatomy.family)
    most = 0.0
    for block in decoder.block_list:
        for module in block.modules():
            if isinstance(module, nn.Linear | Conv1D):
                most = max(most, _shape(module)[1])
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 3 and chosen:  # experts, stacked: (experts, outputs, inputs)
                    most = max(most, parameter.shape[-1] * parameter.shape[0] / chosen)
    return most
