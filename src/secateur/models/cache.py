"""How much of the key/value cache each block fills, from shapes alone: no weight is read."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from secateur.models.anatomy import Family, present
from secateur.models.decoder import Decoder


def cache_numbers(decoder: Decoder) -> tuple[int, ...]:
    """Numbers that each block adds to the cache per token: its keys and its values.

    What attention projects to and is not queries is keys and values; there are as many query rows as its output
    projection reads. A block without attention adds nothing. A family that is only detected is taken at its
    configuration's word.
    """
    family, config = decoder.anatomy.family, decoder.config
    if family.detected:
        return (_configured(config),) * decoder.block_count
    spread = family.cache_spread is not None and bool(getattr(config, family.cache_spread, False))
    return tuple(_projected(block, family, spread=spread) for block in decoder.block_list)


def cache_size(decoder: Decoder, context: int) -> tuple[int, ...]:
    """Numbers that each block keeps for one sequence of `context` tokens; sliding attention keeps its window only."""
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
    """Outputs and inputs of a linear layer."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _configured(config: Any) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(heads) * int(size)
