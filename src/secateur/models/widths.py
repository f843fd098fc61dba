"""How wide a block is inside: heads, key/value groups, channels of its MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.models.anatomy import find, present
from secateur.models.decoder import Decoder


@dataclass(frozen=True)
class BlockWidths:
    """What a block has between what it reads and what it writes.

    Attributes:
        groups: key/value heads; each serves the same number of query heads, which stand together.
        queries: query heads of each group.
        head_size: numbers in a head.
        channels: inner width of the MLP, or of each of its experts.
        experts: number of experts, 0 for a dense MLP.
    """

    groups: int
    queries: int
    head_size: int
    channels: int
    experts: int

    @property
    def heads(self) -> int:
        """Query heads altogether."""
        return self.groups * self.queries


def block_widths(decoder: Decoder, index: int) -> BlockWidths:
    """Read the widths of block `index` off the shapes of its projections."""
    family, config, block = decoder.anatomy.family, decoder.config, decoder.block_list[index]
    writer = next(present(block, family.attention_out))[1]
    own = getattr(config, "heads", None)
    heads = int(own[index] if own else config.num_attention_heads)
    groups = _groups(decoder, index) or heads
    return BlockWidths(
        groups=groups,
        queries=heads // groups,
        head_size=_inputs(writer) // heads,
        channels=_channels(block, family.mlp_out),
        experts=_experts(block, family.router),
    )


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
    found = next(present(block, writers))[1]
    if isinstance(found, nn.ModuleList):
        found = found[0]
    return int(found.shape[-1]) if isinstance(found, nn.Parameter) else _inputs(found)


def _experts(block: nn.Module, router: tuple[str, ...]) -> int:
    found = next(present(block, router), None)
    return int(found[1].weight.shape[0]) if found else 0
