"""The structure of a decoder as data: where its parts are, and their traits.

A `Family` is one row of `families.py`; an `Anatomy` is that row matched against a module, in which every name has been
found. Paths of projections and norms are relative to a block, all others to the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import ModelError

NormKind = Literal["rms", "rms-plus-one", "layernorm"]
NormOrder = Literal["pre", "post", "sandwich"]
QkvLayout = Literal["separate", "stacked", "per-group", "by-unit"]
MlpLayout = Literal["gate-up", "stacked", "plain"]
Positions = Literal["rope", "rope-interleaved", "learned", "learned-unpadded", "alibi"]


@dataclass(frozen=True)
class Stream:
    """What lies along the residual stream: tensors by their names, in a block or, tables, in the model.

    Attributes:
        readers: the norms before branches in the order of their calls, each with the tensors that read from it, and
            with the axis of these that runs along the stream.
        writers: the tensors that write to it, biases included, and their axis along it.
        tables: matrices of embeddings (rows, directions).
    """

    readers: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]
    writers: tuple[tuple[str, int], ...]
    tables: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture as data. Parts that only some configurations have may be missing from a block."""

    model_type: str
    blocks: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    final: tuple[str, ...] = ("model.norm",)
    """Modules between the last block and the head: the final norm, then a projection if there is one."""
    head: str = "lm_head"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm: NormKind = "rms"
    order: NormOrder = "pre"
    parallel: bool | str = False
    """Whether attention and MLP run in parallel on one residual; a string names the configuration flag that decides."""
    qkv: QkvLayout = "separate"
    """Layout of query, key and value rows in attention's input projection: three projections, stacked in one, for each
    key/value head its queries, its key and its value, or any number of projections and other parameters, each with as
    many rows for every head (gates, sinks, latent attention)."""
    attention_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Projections of attention; none, here and below, where the rows and columns of a head cannot be told."""
    key_value_in: tuple[str, ...] = ()
    """Those of them that have rows for key/value heads, not query heads, where they are of the layout by-unit."""
    attention_out: tuple[str, ...] = ("self_attn.o_proj",)
    attention_norms: tuple[str, ...] = ()
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    attention_scale: str = "self_attn.scaling"
    """Attribute of a block with the factor that query-key products are multiplied by."""
    mlp_out: tuple[str, ...] = ("mlp.down_proj",)
    mlp_layout: MlpLayout = "gate-up"
    """A gate and an up projection, both stacked in one projection, or an up projection alone."""
    inner_size: str | None = "intermediate_size"
    """Configuration entry with the width of a dense MLP, or a list of them; None where other sizes imply it."""
    inner_scale: int = 1
    """How much of that entry makes one channel: 2 where it counts gate and up projection together."""
    expert_size: str | None = None
    """Configuration entry with the width of one expert of a mixture."""
    free_heads: bool = True
    """Whether the heads together may be narrower than the hidden size, with `head_dim` in the configuration."""
    activation: str = "hidden_act"
    """Configuration entry with the name of the MLP's activation, or the name itself."""
    positions: Positions = "rope"
    """Rotary (pairs split over a head's halves, or interleaved), a table (counted with or without padding), ALiBi."""
    alibi_flag: str | None = None
    """Configuration flag that switches positions to ALiBi."""
    alibi_scaled: bool = False
    """Whether ALiBi is multiplied by the attention scale, as query-key products are, and computed in bfloat16."""
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    logits_multiplier: str | None = None
    logits_divisor: str | None = None
    """Configuration entries with factors of embeddings, branch outputs or logits, or a divisor of logits."""
    unsliceable: tuple[tuple[str, Any, str], ...] = ()
    """Configuration entry, value and reason: variants whose hidden states cannot be rotated."""
    cache_spread: str | None = None
    """Configuration flag under which keys and values are cached once per query head instead of once per group."""
    shared_in: tuple[str, ...] = ()
    """Projections into an expert that every token passes, where its width is a multiple of that of the others."""
    shared_out: tuple[str, ...] = ()
    """Projections out of an expert that every token passes."""
    router: tuple[str, ...] = ()
    """Modules, or single tensors, of the router of a mixture, which hold a row for each expert."""
    expert_counts: tuple[str, ...] = ()
    """Configuration entries with the number of experts of a block."""
    experts_per_token: str = "num_experts_per_tok"
    """Configuration entry with the number of experts that a token is sent to."""
    expert_groups: tuple[str, str] | None = None
    """Configuration entries with the number of groups of neighbouring experts and of those that a token may choose
    from."""
    per_layer_lists: tuple[str, ...] = ()
    """Configuration entries with one value per block."""
    per_point_lists: tuple[str, ...] = ()
    """Configuration entries with one value per reading point of the residual stream, and perhaps one for the head."""
    block_counts: tuple[str, ...] = ()
    """Configuration entries that repeat the number of blocks."""
    leading_counts: tuple[str, ...] = ()
    """Configuration entries that count how many of the first blocks are of one kind."""
    dense_blocks: str | None = None
    """Configuration entry with the indices of blocks whose MLP is dense in a mixture of experts
    (`decoder_sparse_step` then gives the period of the others)."""
    block_numbers: tuple[str, ...] = ()
    """Configuration entries that list block indices."""
    last_numbers: tuple[str, ...] = ()
    """Configuration entries with the index of the last block of a kind."""
    periods: tuple[tuple[str, str], ...] = ()
    """Pairs of configuration entries (p, o): block i is of a kind where i mod p = o."""
    cycles: tuple[str, ...] = ()
    """Configuration entries with the kinds of the first blocks, which repeat for all others."""
    kv_shared: str | None = None
    """Configuration entry with the number of last blocks that use the keys and values of an earlier block: of the last
    one before them of the same layer type."""
    last_layer_type: str | None = None
    """The layer type of the last block, whatever the configuration says."""
    packed: tuple[tuple[str, int], ...] = ()
    """Parameters outside the blocks that hold a part for each block, and the axis along which the parts follow each
    other."""
    depth_scales: tuple[str, ...] = ()
    """Configuration entries that the stock code divides by the square root of the number of blocks."""
    fixed_blocks: tuple[int, ...] = ()
    """Blocks without which the model cannot be saved as one of its architecture."""
    fixed_reason: str = ""
    """Why, as a clause."""
    resized: tuple[tuple[str, Any], ...] = ()
    """Configuration entries, with values, that go with a width of the MLP given by number."""
    tuple_output: bool = False
    """Whether a block returns a tuple that starts with the hidden states, not the hidden states themselves."""
    depth_scaled_query: str | None = None
    """Projection whose queries the stock code scales by the block's index."""
    streams: int = 1
    """How many residual streams a block passes on (hyper-connections: Zhu et al. 2024, arXiv:2409.19606)."""
    streams_first: bool = False
    """Whether the streams are the first axis of what it passes on."""
    stream: Stream | None = None
    """What reads the residual stream and what writes to it, where a trial has found it; the fields above say it of
    families that have attention and an MLP of the usual form."""
    light_blocks: bool = False
    """Whether some blocks may lack attention or an MLP."""
    detected: bool = False
    """Whether the row was guessed for an unknown architecture and verified on a tiny copy."""

    def uses_alibi(self, config: Any) -> bool:
        """Return whether the positions of a model with this configuration are ALiBi."""
        flagged = self.alibi_flag is not None and bool(getattr(config, self.alibi_flag, False))
        return self.positions == "alibi" or flagged or getattr(config, "positions", None) == "alibi"


@dataclass(frozen=True)
class Anatomy:
    """A family row all of whose names were found in one model."""

    family: Family
    block_count: int
    parallel: bool
    tied: bool

    def block_path(self, index: int) -> str:
        """Path of block `index` from the root of the model."""
        return f"{self.family.blocks}.{index}"

    def describe(self) -> dict[str, Any]:
        """Return the traits that `secateur inspect` shows."""
        family = self.family
        return {
            "family": family.model_type + (" (detected)" if family.detected else ""),
            "blocks": f"{self.block_count} at {family.blocks}",
            "norm": f"{family.norm}, {family.order}",
            "residual": "parallel" if self.parallel else "sequential",
            "tied head": "yes" if self.tied else "no",
        }


def find(module: nn.Module, path: str) -> Any:
    """Return the object at a dotted path, or None if part of the path does not exist."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def owner_of(module: nn.Module, path: str) -> nn.Module:
    """Return the module that holds the object at a dotted path."""
    return module.get_submodule(path.rpartition(".")[0])


def set_parameter(module: nn.Module, path: str, value: torch.Tensor) -> None:
    """Replace the parameter (or buffer) at a dotted path by a tensor, without gradient."""
    owner, _, leaf = path.rpartition(".")
    holder = module.get_submodule(owner)
    if leaf in holder._buffers:
        holder._buffers[leaf] = value
    else:
        holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def parts_of(tensor: torch.Tensor, axis: int, count: int, kept: Sequence[int]) -> torch.Tensor:
    """Return the parts of some blocks of a tensor that holds one for each of `count` blocks along an axis."""
    parts = tensor.unflatten(axis, (count, -1))
    return parts.index_select(axis, torch.tensor(kept, device=tensor.device)).flatten(axis, axis + 1)


def saved_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a checkpoint holds of a module: parameters, tied ones once, and persistent buffers."""
    yield from module.named_parameters()
    for path, holder in module.named_modules():
        for leaf, buffer in holder._buffers.items():
            if buffer is not None and leaf not in holder._non_persistent_buffers_set:
                yield f"{path}.{leaf}" if path else leaf, buffer


def present(block: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the names that exist in this block, with the modules there."""
    for name in names:
        found = find(block, name)
        if found is not None:
            yield name, found


_PARTS = ("attention_in", "attention_out", "mlp_in", "mlp_out")


EXPERT_TENSORS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the tensors that hold a matrix for each expert."""


def holds_transposed(experts: nn.Module) -> bool:
    """Return whether a module of stacked experts holds their matrices as (experts, in, out), not (experts, out, in)."""
    known = getattr(experts, "is_transposed", None)
    if known is not None:
        return bool(known)
    readers: Any = getattr(experts, "gate_up_proj", None)
    writers: Any = experts.down_proj
    return readers is not None and readers.shape[1] == writers.shape[2]


def mlp_writers(block: nn.Module, family: Family) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield name and tensor of the MLP's output projections and biases, and whether the last axis is the output."""
    for name, found in present(block, (*family.mlp_out, *family.shared_out)):
        if isinstance(found, nn.Parameter):
            yield name, found, holds_transposed(owner_of(block, name))
            bias = find(block, f"{name}_bias")
            if bias is not None:
                yield f"{name}_bias", bias, True
            continue
        for leaf, parameter in found.named_parameters():
            yield f"{name}.{leaf}", parameter, parameter.dim() == 1 or isinstance(found, Conv1D)


def resolve(module: nn.Module, family: Family) -> Anatomy:
    """Match a family row against a model.

    Raises:
        ModelError: a name of the row does not exist in the model.
    """
    blocks = find(module, family.blocks)
    config: Any = text_config(module.config)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise ModelError(f"{family.model_type}: no list of blocks at '{family.blocks}' in {type(module).__name__}.")
    for path in (*family.embeddings[:1], family.head):
        if find(module, path) is None:
            raise ModelError(f"{family.model_type}: nothing at '{path}' in {type(module).__name__}.")
    for index, block in enumerate(blocks):
        for part in () if family.detected or family.light_blocks else _PARTS:
            if getattr(family, part) and not list(present(block, getattr(family, part))):
                raise ModelError(f"{family.model_type}: block {index} has none of {getattr(family, part)}.")
    return Anatomy(
        family=family,
        block_count=len(blocks),
        parallel=_parallel(config, family),
        tied=is_tied(module, family),
    )


def text_config(config: Any) -> Any:
    """Return the configuration of the text decoder: a part of that of a multimodal wrapper, else all of it."""
    return config.get_text_config(decoder=True)


def entry(config: Any, name: str) -> Any:
    """Return a configuration entry, None if there is none; where blocks differ in it, what most of them have."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers refuses to name one value where blocks have their own
        return config.to_dict().get(name)


def residual_factor(config: Any, family: Family) -> float:
    """Return the factor of what a branch writes to the residual stream."""
    value = float(getattr(config, family.residual_multiplier or "", 1.0))
    by_depth = family.residual_multiplier in family.depth_scales
    return value / math.sqrt(config.num_hidden_layers) if by_depth else value


def experts_per_token(config: Any, family: Family) -> int | None:
    """Return the number of experts that a token is sent to, the largest of all blocks; None for a dense model."""
    value = entry(config, family.experts_per_token)
    return max(value) if isinstance(value, list) else value


def is_tied(module: nn.Module, family: Family) -> bool:
    """Return whether the head is the token table."""
    return find(module, f"{family.embeddings[0]}.weight") is find(module, f"{family.head}.weight")


def _parallel(config: Any, family: Family) -> bool:
    if isinstance(family.parallel, bool):
        return family.parallel
    return bool(getattr(config, family.parallel, False) or getattr(config, "new_decoder_architecture", False))


def count_parameters(module: nn.Module) -> int:
    """Count parameters, tied tensors once (meta tensors count by their shape)."""
    return sum(parameter.numel() for parameter in module.parameters())
