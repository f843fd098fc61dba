"""What a decoder looks like: where its parts are and which traits they have, as data.

A `Family` is one row of `families.py`; an `Anatomy` is that row held against a real module: every name in it
has been found there. Paths of projections and norms are relative to a block, all others to the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from secateur.errors import ModelError

NormKind = Literal["rms", "rms-plus-one", "layernorm"]
NormOrder = Literal["pre", "post", "sandwich"]
QkvLayout = Literal["separate", "stacked", "per-group"]
MlpLayout = Literal["gate-up", "stacked", "plain"]
Positions = Literal["rope", "rope-interleaved", "learned", "learned-unpadded", "alibi"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture as data. Names that a configuration may leave out are simply absent from the block."""

    model_type: str
    blocks: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    final: tuple[str, ...] = ("model.norm",)
    """What stands between the last block and the head: the final norm, then a projection if there is one."""
    head: str = "lm_head"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm: NormKind = "rms"
    order: NormOrder = "pre"
    parallel: bool | str = False
    """Attention and MLP side by side on one residual; a string names the configuration flag that decides."""
    qkv: QkvLayout = "separate"
    """How query, key and value rows lie in the input projection of attention: three projections, one above the
    other, or for each key/value head its queries, its key and its value."""
    attention_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: tuple[str, ...] = ("self_attn.o_proj",)
    attention_norms: tuple[str, ...] = ()
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    attention_scale: str = "self_attn.scaling"
    """Where a block keeps the number that products of queries and keys are multiplied by."""
    mlp_out: tuple[str, ...] = ("mlp.down_proj",)
    mlp_layout: MlpLayout = "gate-up"
    """A gate and an up projection, both stacked in one, or an up projection alone."""
    inner_size: str | None = "intermediate_size"
    """Configuration entry with the width of a dense MLP, or a list of them; None where other sizes imply it."""
    expert_size: str | None = None
    """Configuration entry with the width of one expert of a mixture."""
    free_heads: bool = True
    """The heads together may be narrower than the hidden size, their own size being named by `head_dim`."""
    activation: str = "hidden_act"
    """Configuration entry with the name of the MLP's activation, or the name itself."""
    positions: Positions = "rope"
    """Rotary (pairs in the halves of a head, or side by side), a table (counted with or without padding), ALiBi."""
    alibi_flag: str | None = None
    """Configuration entry that says, where it is true, that positions are ALiBi after all."""
    alibi_scaled: bool = False
    """ALiBi is multiplied by the attention scale like the products of queries and keys, and computed in bfloat16."""
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    logits_multiplier: str | None = None
    logits_divisor: str | None = None
    """Configuration entries with a number that embeddings, branch outputs or logits are multiplied or divided by."""
    unsliceable: tuple[tuple[str, Any, str], ...] = ()
    """Configuration entry, value and reason: variants whose hidden states cannot be rotated."""
    cache_spread: str | None = None
    """Configuration flag under which keys and values are cached once per query head, however few there are."""
    router: tuple[str, ...] = ()
    per_layer_lists: tuple[str, ...] = ()
    """Configuration entries with one value per block."""
    per_point_lists: tuple[str, ...] = ()
    """Configuration entries with one value per reading point of the residual stream, and perhaps one for the head."""
    leading_counts: tuple[str, ...] = ()
    """Configuration entries that count how many of the first blocks are of one kind."""
    dense_blocks: str | None = None
    """Configuration entry with the indices of blocks whose MLP is dense in a mixture of experts
    (`decoder_sparse_step` then names the rhythm of the others)."""
    block_numbers: tuple[str, ...] = ()
    """Configuration entries that list numbers of blocks."""
    tuple_output: bool = False
    """A block returns a tuple whose first entry is the hidden states, not the hidden states themselves."""
    depth_scaled_query: str | None = None
    """Projection whose query rows carry a scale that stock code derives from the block's index."""
    light_blocks: bool = False
    """Some blocks may have an MLP alone."""
    detected: bool = False
    """True for a row that was guessed from an unknown architecture and proved on a tiny copy."""

    def uses_alibi(self, config: Any) -> bool:
        """Return whether the positions of a model with this configuration are ALiBi."""
        flagged = self.alibi_flag is not None and bool(getattr(config, self.alibi_flag, False))
        return self.positions == "alibi" or flagged or getattr(config, "positions", None) == "alibi"


@dataclass(frozen=True)
class Anatomy:
    """A family row whose names were all found in one model."""

    family: Family
    block_count: int
    parallel: bool
    tied: bool

    def block_path(self, index: int) -> str:
        """Path of block `index` from the root of the model."""
        return f"{self.family.blocks}.{index}"

    def describe(self) -> dict[str, Any]:
        """Return the traits a reader wants to see, for `secateur inspect`."""
        family = self.family
        return {
            "family": family.model_type + (" (detected)" if family.detected else ""),
            "blocks": f"{self.block_count} at {family.blocks}",
            "norm": f"{family.norm}, {family.order}",
            "residual": "parallel" if self.parallel else "sequential",
            "tied head": "yes" if self.tied else "no",
        }


def find(module: nn.Module, path: str) -> Any:
    """Return what stands at a dotted path, or None where a part of the path does not exist."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def set_parameter(module: nn.Module, path: str, value: torch.Tensor) -> None:
    """Put a tensor, without gradient, in the place of the parameter at a dotted path."""
    owner, _, leaf = path.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def present(block: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield those of the names that exist in this block, with what stands there."""
    for name in names:
        found = find(block, name)
        if found is not None:
            yield name, found


def resolve(module: nn.Module, family: Family) -> Anatomy:
    """Hold a family row against a model.

    Raises:
        ModelError: a name of the row does not exist in the model.
    """
    blocks = find(module, family.blocks)
    config: Any = module.config
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise ModelError(f"{family.model_type}: no list of blocks at '{family.blocks}' in {type(module).__name__}.")
    for path in (*family.embeddings[:1], family.head):
        if find(module, path) is None:
            raise ModelError(f"{family.model_type}: nothing at '{path}' in {type(module).__name__}.")
    parts = ("mlp_in", "mlp_out") if family.light_blocks else ("attention_in", "attention_out", "mlp_in", "mlp_out")
    for index, block in enumerate(blocks):
        for part in parts:
            if not family.detected and not list(present(block, getattr(family, part))):
                raise ModelError(f"{family.model_type}: block {index} has none of {getattr(family, part)}.")
    return Anatomy(
        family=family,
        block_count=len(blocks),
        parallel=_parallel(config, family),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def _parallel(config: Any, family: Family) -> bool:
    if isinstance(family.parallel, bool):
        return family.parallel
    return bool(getattr(config, family.parallel, False) or getattr(config, "new_decoder_architecture", False))


def count_parameters(module: nn.Module) -> int:
    """Count parameters, tied tensors once (meta tensors count by their shape)."""
    return sum(parameter.numel() for parameter in module.parameters())
