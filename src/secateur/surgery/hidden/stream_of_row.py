"""What reads and what writes the residual stream of a model whose row names its attention and its MLP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.models.anatomy import Stream, entry, holds_transposed, owner_of, present
from secateur.models.decoder import Decoder


def stream_of(decoder: Decoder) -> Stream:
    """Return what a trial has found, else what the row says."""
    family = decoder.anatomy.family
    if family.stream is not None:
        return family.stream
    blocks = decoder.block_list
    reading = (family.attention_in, (*family.mlp_in, *family.router))
    readers: dict[str, dict[str, int]] = {}
    for norm, names in zip((family.norms[0], family.norms[-1]), reading, strict=True):
        readers.setdefault(norm, {}).update(_all(blocks, names, writes=False))
    return Stream(
        readers=tuple((norm, tuple(found.items())) for norm, found in readers.items()),
        writers=tuple(_all(blocks, (*family.attention_out, *family.mlp_out), writes=True).items()),
        tables=(f"{family.embeddings[0]}.weight",),
    )


def _all(blocks: Iterable[nn.Module], names: tuple[str, ...], *, writes: bool) -> dict[str, int]:
    return {name: axis for block in blocks for name, axis in _tensors(block, names, writes=writes)}


def _tensors(block: nn.Module, names: tuple[str, ...], *, writes: bool) -> Iterator[tuple[str, int]]:
    """Yield the tensors of projections and experts, with the axis that runs along the stream."""
    for name, part in present(block, names):
        if isinstance(part, nn.Parameter):
            turned = holds_transposed(owner_of(block, name))
            yield name, 1 if writes != turned else 2
            continue
        turned = isinstance(part, Conv1D)
        yield f"{name}.weight", int(writes == turned)
        if writes and getattr(part, "bias", None) is not None:
            yield f"{name}.bias", 0


def head_size(decoder: Decoder) -> int | None:
    """Return the size of a head, which does not change with the hidden size; None for a model without attention."""
    heads = entry(decoder.config, "num_attention_heads")
    if decoder.anatomy.family.stream is not None:
        named = entry(decoder.config, "head_dim")
        return named or (decoder.hidden_size // heads if heads else None)
    writer = next(present(decoder.block_list[0], decoder.anatomy.family.attention_out))[1]
    return int(writer.weight.shape[-1] // heads)
