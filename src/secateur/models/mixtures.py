"""Rows of families whose blocks hold mixtures of experts; see `families.py`."""

from __future__ import annotations

from dataclasses import replace

from secateur.models.anatomy import Family

_ROUTED = Family(
    model_type="mixtral",
    mlp_in=("mlp.experts.gate_up_proj",),
    mlp_out=("mlp.experts.down_proj",),
    mlp_layout="stacked",
    expert_size="intermediate_size",
    router=("mlp.gate",),
    expert_counts=("num_local_experts",),
)

_WITH_DENSE = replace(
    _ROUTED,
    mlp_in=("mlp.experts.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
    mlp_out=("mlp.experts.down_proj", "mlp.down_proj"),
    expert_size="moe_intermediate_size",
)

_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_KEYS_VALUES = ("self_attn.k_proj", "self_attn.v_proj")

_DEEPSEEK = replace(
    _WITH_DENSE,
    shared_in=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    shared_out=("mlp.shared_experts.down_proj",),
    expert_counts=("n_routed_experts",),
    expert_groups=("n_group", "topk_group"),
    leading_counts=("first_k_dense_replace",),
)
"""Dense blocks first, then mixtures in groups, with an expert that every token passes."""

_GATED_DELTA = replace(
    _ROUTED,
    norm="rms-plus-one",
    qkv="by-unit",
    key_value_in=_KEYS_VALUES,
    attention_norms=_QK_NORMS,
    light_blocks=True,
    shared_out=("mlp.shared_expert.down_proj",),
    expert_size="moe_intermediate_size",
    expert_counts=("num_experts",),
    per_layer_lists=("layer_types",),
)
"""Linear attention in most blocks; the query projection of the others holds a gate beside each head."""

_LATENT = replace(
    _DEEPSEEK,
    qkv="by-unit",
    attention_in=("self_attn.q_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj"),
    key_value_in=("self_attn.kv_b_proj",),
)
"""Latent attention: keys and values of all heads are read from one projection, and queries perhaps from another."""

MIXTURES = (
    _ROUTED,
    replace(
        _WITH_DENSE,
        model_type="qwen3_moe",
        attention_norms=_QK_NORMS,
        expert_counts=("num_experts",),
        dense_blocks="mlp_only_layers",
    ),
    replace(
        _ROUTED,
        model_type="olmoe",
        attention_norms=_QK_NORMS,
        expert_counts=("num_experts",),
        unsliceable=(("model_type", "olmoe", "a norm runs over all its heads together"),),
    ),
    replace(
        _ROUTED,
        model_type="granitemoe",
        mlp_in=("block_sparse_moe.experts.gate_up_proj",),
        mlp_out=("block_sparse_moe.experts.down_proj",),
        router=("block_sparse_moe.router",),
        embedding_multiplier="embedding_multiplier",
        residual_multiplier="residual_multiplier",
        logits_divisor="logits_scaling",
    ),
    replace(_DEEPSEEK, model_type="glm4_moe", attention_norms=_QK_NORMS),
    replace(
        _DEEPSEEK,
        model_type="dots1",
        attention_norms=_QK_NORMS,
        per_layer_lists=("layer_types",),
        leading_counts=("first_k_dense_replace", "max_window_layers"),
    ),
    replace(_LATENT, model_type="deepseek_v2"),
    replace(_LATENT, model_type="deepseek_v3"),
    replace(
        _ROUTED,
        model_type="gpt_oss",
        qkv="by-unit",
        attention_in=("self_attn.q_proj", *_KEYS_VALUES, "self_attn.sinks"),
        key_value_in=_KEYS_VALUES,
        router=("mlp.router",),
        per_layer_lists=("layer_types",),
    ),
    replace(
        _DEEPSEEK,
        model_type="ernie4_5_moe",
        expert_counts=("moe_num_experts",),
        experts_per_token="moe_k",
        expert_groups=None,
        leading_counts=("moe_layer_start_index",),
        last_numbers=("moe_layer_end_index",),
        unsliceable=(("model_type", "ernie4_5_moe", "its router adds a bias where it chooses experts"),),
    ),
    replace(
        _ROUTED,
        model_type="hunyuan_v1_moe",
        attention_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"),
        shared_in=("mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj"),
        shared_out=("mlp.shared_mlp.down_proj",),
        router=("mlp.gate.wg",),
        expert_counts=("num_experts",),
        experts_per_token="moe_topk",
    ),
    replace(
        _ROUTED,
        model_type="minimax",
        attention_in=(),
        attention_out=(),
        per_layer_lists=("layer_types",),
    ),
    replace(
        _ROUTED,
        model_type="llama4_text",
        mlp_in=("feed_forward.experts.gate_up_proj", "feed_forward.gate_proj", "feed_forward.up_proj"),
        mlp_out=("feed_forward.experts.down_proj", "feed_forward.down_proj"),
        inner_size="intermediate_size_mlp",
        shared_in=("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj"),
        shared_out=("feed_forward.shared_expert.down_proj",),
        router=("feed_forward.router",),
        per_layer_lists=("layer_types", "no_rope_layers"),
        block_numbers=("moe_layers",),
        unsliceable=(("model_type", "llama4_text", "only some of its blocks have rotary positions"),),
    ),
    replace(_GATED_DELTA, model_type="qwen3_next", dense_blocks="mlp_only_layers"),
    replace(_GATED_DELTA, model_type="qwen3_5_moe_text"),
)
