"""The layout of Nemotron-NAS, in which engines read Llamas whose blocks differ from each other.

The folded model that width pruning makes for such shapes becomes, with the same computation, a Llama with norms
whose scales are 1: vLLM serves it with its own implementation of DeciLM, and llama.cpp has an architecture for it.
"""

from __future__ import annotations

from typing import Any

import torch

from secateur.errors import ModelError
from secateur.modeling import DeciLMConfig, SecateurConfig
from secateur.models.decoder import Decoder
from secateur.models.families import FAMILIES
from secateur.models.shards import OUTER
from secateur.surgery.assembly import Assembly
from secateur.surgery.width.target import dense_widths, folded_at


def against_llama(config: SecateurConfig) -> str | None:
    """Return the reason why a folded model is no Llama, whatever the widths of its blocks; None if it is one."""
    networks, experts, rope = config.networks or (), config.experts or (), config.rope_parameters or {}
    reasons = {
        "its residual stream changes its width or basis": any(config.shortcuts or ())
        or set(config.widths or ()) != {config.hidden_size},
        "its attention and MLP run in parallel": config.parallel,
        f"its positions are {config.positions}": config.positions != "rope",
        "some of its blocks have no rotary positions": not all(config.rope_blocks or ()),
        "its queries and keys have norms": config.qk_norm is not None,
        "its queries are clipped": config.clip_qkv is not None,
        "it has experts": any(experts),
        "its head has a bias": config.head_bias,
        "its MLP is not a gated SiLU": not config.gated or config.hidden_act != "silu",
        "it has a replacement module other than SwiGLU": not set(networks) <= {"", "swiglu"},
        "its first block has no attention": bool(networks and networks[0]) or not (config.heads or (1,))[0],
        "some of its blocks attend to a window": "sliding_attention" in (config.layer_types or ()),
        "only a part of each head is rotated": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    return next((reason for reason, found in reasons.items() if found), None)


def query_heads(config: SecateurConfig) -> list[int]:
    """Return the query heads of every block, 0 where there is no attention."""
    assert config.heads is not None
    return [0 if network else heads for heads, network in zip(config.heads, config.networks or (), strict=True)]


def against_decilm(config: SecateurConfig) -> str | None:
    """Return the reason why a folded model does not fit the layout of Nemotron-NAS; None if it does."""
    if len(set(query_heads(config)) - {0}) > 1:
        return "its blocks have different numbers of query heads"
    return against_llama(config)


def becomes_decilm(decoder: Decoder) -> bool:
    """Return whether a model with other widths in some blocks fits the layout, as long as its heads stay as they are.

    Whole attentions may be absent, but not the first.
    """
    if isinstance(decoder.config, DeciLMConfig):
        return True
    try:
        return against_decilm(folded_at(decoder, dense_widths(decoder), bias=False)) is None
    except ModelError:
        return False


@torch.no_grad()
def as_decilm(decoder: Decoder) -> Decoder:
    """Return a folded model that fits in the layout of Nemotron-NAS; it computes the same."""
    config = _config(decoder.config)
    assembly = Assembly(decoder, config, FAMILIES[DeciLMConfig.model_type])
    with decoder.outer():
        named = decoder.module.named_parameters()
        outside = {name: one for name, one in named if not name.startswith(f"{decoder.anatomy.family.blocks}.")}
        assembly.put("", {"model.norm.weight": torch.ones(config.hidden_size)} | outside)
        assembly.finish(OUTER)
    for index in range(decoder.block_count):
        with decoder.block(index) as block:
            tensors = {name: parameter.detach() for name, parameter in block.named_parameters()}
        for name, parameter in assembly.layer(index).named_parameters():
            if name.endswith("layernorm.weight"):
                tensors[name] = torch.ones(parameter.shape)
            elif name.endswith("bias") and name not in tensors:
                tensors[name] = torch.zeros(parameter.shape)
        assembly.put(assembly.block_path(index), tensors)
        assembly.finish(index)
    return assembly.result({"layout": "decilm"})


def _config(folded: SecateurConfig) -> DeciLMConfig:
    """Return the configuration in the layout, in which all layers of an MLP have a bias or none."""
    given: dict[str, Any] = {
        name: value for name, value in folded.to_dict().items() if name in DeciLMConfig.__dataclass_fields__
    }
    heads = query_heads(folded)
    groups = [count if own else 0 for count, own in zip(folded.key_value_heads or (), heads, strict=True)]
    given |= {"heads": heads, "key_value_heads": groups, "networks": None, "num_attention_heads": max(heads)}
    given["num_key_value_heads"] = groups[0]
    given["mlp_bias"] = given["mlp_out_bias"] = folded.mlp_bias or folded.mlp_out_bias
    return DeciLMConfig(**given)
