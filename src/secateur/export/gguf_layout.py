"""How llama.cpp stores each family: its architecture, its metadata, and the order of its rows.

Names of tensors come from the package `gguf`. This module adds what depends on the architecture: rows of queries and
keys reordered for interleaved rotary positions, fused projections regrouped, `1 + w` of Gemma's norms, factors that
llama.cpp derives from the number of blocks, and which shapes each architecture can have. Read in the source of
llama.cpp (build 11434: `conversion/`, `src/models/`); tests/export/test_export_gguf.py runs every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Named = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One architecture of llama.cpp.

    Attributes:
        name: its name there.
        interleaved: its rotary positions turn adjacent pairs, so that rows of queries and keys are reordered.
        square: queries must be as wide as the residual stream.
        own_head: whether the head may differ from the embeddings; None means that it is always written.
        head_bias: whether the head may have a bias.
        activation: what the names of its activations begin with.
        norm_offset: added to the weights of norms.
        period: of its blocks with full attention, if the file does not list them; None without sliding windows.
        rows: regroups a tensor of a block before it is named.
        facts: further metadata, below the architecture's name.
        refusal: returns the reason why a model of the family cannot be stored, if there is one.
    """

    name: str
    interleaved: bool = False
    square: bool = False
    own_head: bool | None = True
    head_bias: bool = False
    activation: str = "silu"
    norm_offset: float = 0.0
    period: int | None = None
    rows: Callable[[str, torch.Tensor, Any], Named] | None = None
    facts: Callable[[Any], dict[str, Any]] = lambda _: {}
    refusal: Callable[[Any], str | None] = lambda _: None


# Rows


def _experts(name: str, tensor: torch.Tensor, config: Any) -> Named:
    """Split stacked experts into gate and up."""
    if not name.endswith("experts.gate_up_proj"):
        yield (f"{name}.weight" if name.endswith("experts.down_proj") else name), tensor
        return
    gate, up = tensor.chunk(2, dim=-2)
    base = name.removesuffix("gate_up_proj")
    yield f"{base}gate_proj.weight", gate
    yield f"{base}up_proj.weight", up


def _transposed(name: str, tensor: torch.Tensor, config: Any) -> Named:
    """Turn Conv1D weights (in, out) into linear ones."""
    yield name, tensor.T if tensor.dim() == 2 and ".h." in name else tensor


def _per_group(groups: Callable[[Any], int]) -> Callable[[str, torch.Tensor, Any], Named]:
    """Regroup a fused projection stored as [queries, key, value] per group into all queries, keys, values."""

    def regrouped(name: str, tensor: torch.Tensor, config: Any) -> Named:
        if "query_key_value" in name:
            count, head = groups(config), config.hidden_size // config.num_attention_heads
            parts = tensor.reshape(count, -1, head, *tensor.shape[1:])
            tensor = torch.cat([parts[:, :-2].flatten(0, 2), parts[:, -2].flatten(0, 1), parts[:, -1].flatten(0, 1)])
        yield name.removeprefix("transformer.") if config.model_type == "bloom" else name, tensor

    return regrouped


def _scaled_queries(part: str, offset: float) -> Callable[[str, torch.Tensor, Any], Named]:
    """Fold the attention scale into what precedes it: llama.cpp always divides by the root of the head size.

    For the largest Gemmas it uses another scale, and knows them by their number of blocks, which pruning changes.
    """

    def scaled(name: str, tensor: torch.Tensor, config: Any) -> Named:
        ratio = math.sqrt(_gemma_scale(config) / config.query_pre_attn_scalar)
        if name.endswith(part) and not math.isclose(ratio, 1.0):
            tensor = (tensor + offset) * ratio - offset
        yield name, tensor

    return scaled


def _gemma_scale(config: Any) -> float:
    """Return what llama.cpp takes the root of: it takes a Gemma of this many blocks for the one of 27 B."""
    largest = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    if config.num_hidden_layers == largest:
        return float(config.hidden_size // config.num_attention_heads)
    return float(config.head_dim)


# Metadata


def _rotated(config: Any) -> dict[str, Any]:
    """Return the number of rotated dimensions of a head."""
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return {"rope.dimension_count": int(share * (config.hidden_size // config.num_attention_heads))}


def _granite(config: Any) -> dict[str, Any]:
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _soft_caps(config: Any) -> dict[str, Any]:
    caps = {
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    return {name: float(cap) for name, cap in caps.items() if cap}


def _clipped(config: Any) -> dict[str, Any]:
    return {"attention.clamp_kqv": float(config.clip_qkv)} if config.clip_qkv is not None else {}


def _phi3(config: Any) -> dict[str, Any]:
    original = config.rope_parameters.get("original_max_position_embeddings", config.max_position_embeddings)
    return _rotated(config) | {
        "rope.scaling.original_context_length": int(original),
        "attention.sliding_window": int(config.sliding_window or 0),
    }


def _routed(config: Any) -> dict[str, Any]:
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    facts: dict[str, Any] = {"expert_count": int(count or 0), "expert_used_count": int(config.num_experts_per_tok)}
    if (width := getattr(config, "moe_intermediate_size", None)) is not None:
        facts["expert_feed_forward_length"] = int(width)
    return facts


# What cannot be stored


def _no_rope(config: Any) -> str | None:
    wanted = [int((index + 1) % 4 != 0) for index in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) == wanted:
        return None
    return (
        "llama.cpp leaves out rotary positions in every fourth block, and pruning moved those blocks "
        f"({', '.join(str(i) for i, rotates in enumerate(config.no_rope_layers) if not rotates)})"
    )


def _dense_blocks(config: Any) -> str | None:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "some of its blocks have no experts, which llama.cpp's Qwen3-MoE does not know"
    return None if config.norm_topk_prob else "its router's weights are not normalised (norm_topk_prob)"


def _falcon(config: Any) -> str | None:
    if config.alibi or not config.parallel_attn:
        return "llama.cpp knows only Falcons with parallel branches and rotary positions"
    return "llama.cpp's Falcon has no biases" if config.bias else None


def _cohere(config: Any) -> str | None:
    return "llama.cpp reads its norms of queries and keys only from 64 blocks on" if config.use_qk_norm else None


def _phi(config: Any) -> str | None:
    return "llama.cpp's Phi-2 has no norms of queries and keys" if config.qk_layernorm else None


def _stablelm(config: Any) -> str | None:
    return "its norms of single queries and keys are not written" if config.qk_layernorm else None


def _gpt2(config: Any) -> str | None:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        return "llama.cpp scales the attention of every block alike"
    return None


LLAMA = Layout(name="llama", interleaved=True)

UNEVEN = Layout(name="deci", interleaved=True)
"""A Llama in which every block has its own heads and channels, or no attention at all."""

LAYOUTS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": Layout(name="llama", interleaved=True, rows=_experts, facts=_routed),
    "granite": Layout(name="granite", interleaved=True, facts=_granite),
    "smollm3": Layout(name="smollm3", interleaved=True, refusal=_no_rope),
    "qwen2": Layout(name="qwen2", square=True),
    "qwen3": Layout(name="qwen3"),
    "qwen3_moe": Layout(name="qwen3moe", rows=_experts, facts=_routed, refusal=_dense_blocks),
    "gemma": Layout(name="gemma", activation="gelu", own_head=False, norm_offset=1.0),
    "gemma2": Layout(
        name="gemma2",
        activation="gelu",
        own_head=False,
        norm_offset=1.0,
        period=2,
        rows=_scaled_queries("q_proj.weight", 0.0),
        facts=_soft_caps,
    ),
    "gemma3_text": Layout(
        name="gemma3",
        activation="gelu",
        norm_offset=1.0,
        period=6,
        rows=_scaled_queries("q_norm.weight", 1.0),
        facts=_soft_caps,
    ),
    "phi": Layout(
        name="phi2", activation="gelu", square=True, own_head=None, head_bias=True, facts=_rotated, refusal=_phi
    ),
    "phi3": Layout(name="phi3", square=True, facts=_phi3),
    "olmo": Layout(name="olmo", interleaved=True, square=True, facts=_clipped),
    "olmo2": Layout(name="olmo2", square=True, own_head=None),
    "stablelm": Layout(
        name="stablelm",
        square=True,
        own_head=None,
        facts=lambda config: _rotated(config) | {"use_parallel_residual": bool(config.use_parallel_residual)},
        refusal=_stablelm,
    ),
    "cohere": Layout(
        name="command-r",
        square=True,
        own_head=False,
        facts=lambda config: {"logit_scale": float(config.logit_scale), "rope.scaling.type": "none"},
        refusal=_cohere,
    ),
    "gpt2": Layout(name="gpt2", activation="gelu", square=True, rows=_transposed, refusal=_gpt2),
    "gpt_neox": Layout(
        name="gptneox",
        activation="gelu",
        square=True,
        own_head=None,
        rows=_per_group(lambda config: config.num_attention_heads),
        facts=lambda config: _rotated(config) | {"use_parallel_residual": bool(config.use_parallel_residual)},
    ),
    "bloom": Layout(
        name="bloom", square=True, activation="gelu", rows=_per_group(lambda config: config.num_attention_heads)
    ),
    "falcon": Layout(
        name="falcon",
        activation="gelu",
        square=True,
        rows=_per_group(lambda config: config.num_kv_heads if config.new_decoder_architecture else 1),
        refusal=_falcon,
    ),
}
