"""The known decoder families, one row each. To add one, see docs/add-a-family.md.

Tested against transformers 5.23: a test opens a tiny model of every row and looks up each name in it.
"""

from __future__ import annotations

from dataclasses import replace

from secateur.models.anatomy import Family

_LLAMA = Family(model_type="llama")

_OWN_LISTS = ("intermediate_sizes", "heads", "key_value_heads", "experts", "networks", "rope_blocks", "layer_types")
"""What the configurations of the modelling file name for every block."""

_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

_MIXTRAL = replace(
    _LLAMA,
    model_type="mixtral",
    mlp_in=("mlp.experts.gate_up_proj",),
    mlp_out=("mlp.experts.down_proj",),
    mlp_layout="stacked",
    expert_size="intermediate_size",
    router=("mlp.gate",),
    expert_counts=("num_local_experts",),
)

_SANDWICH = replace(
    _LLAMA,
    norm="rms-plus-one",
    order="sandwich",
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    per_layer_lists=("layer_types",),
)

_NEOX = Family(
    model_type="gpt_neox",
    blocks="gpt_neox.layers",
    embeddings=("gpt_neox.embed_in",),
    final=("gpt_neox.final_layer_norm",),
    norm="layernorm",
    parallel="use_parallel_residual",
    qkv="per-group",
    attention_in=("attention.query_key_value",),
    attention_out=("attention.dense",),
    attention_scale="attention.scaling",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out=("mlp.dense_4h_to_h",),
    mlp_layout="plain",
    free_heads=False,
)

_BLOOM = replace(
    _NEOX,
    model_type="bloom",
    blocks="transformer.h",
    embeddings=("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
    final=("transformer.ln_f",),
    parallel=False,
    attention_in=("self_attention.query_key_value",),
    attention_out=("self_attention.dense",),
    attention_scale="self_attention.inv_norm_factor",
    inner_size=None,
    activation="gelu_pytorch_tanh",
    positions="alibi",
    tuple_output=True,
    unsliceable=(("apply_residual_connection_post_layernorm", True, "its residual is taken after the norm"),),
)

_ROWS = (
    _LLAMA,
    replace(_LLAMA, model_type="mistral"),
    replace(
        _LLAMA,
        model_type="qwen2",
        per_layer_lists=("layer_types",),
        leading_counts=("max_window_layers",),
    ),
    replace(
        _LLAMA,
        model_type="qwen3",
        attention_norms=_QK_NORMS,
        per_layer_lists=("layer_types",),
        leading_counts=("max_window_layers",),
    ),
    replace(_LLAMA, model_type="smollm3", per_layer_lists=("layer_types", "no_rope_layers")),
    replace(
        _LLAMA,
        model_type="granite",
        embedding_multiplier="embedding_multiplier",
        residual_multiplier="residual_multiplier",
        logits_divisor="logits_scaling",
    ),
    replace(_LLAMA, model_type="gemma", norm="rms-plus-one"),
    replace(_SANDWICH, model_type="gemma2"),
    replace(_SANDWICH, model_type="gemma3_text", attention_norms=_QK_NORMS),
    replace(
        _LLAMA,
        model_type="phi",
        final=("model.final_layernorm",),
        norms=("input_layernorm",),
        norm="layernorm",
        parallel=True,
        attention_out=("self_attn.dense",),
        attention_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        mlp_in=("mlp.fc1",),
        mlp_out=("mlp.fc2",),
        mlp_layout="plain",
        unsliceable=(("qk_layernorm", True, "its query and key norms have biases"),),
    ),
    replace(
        _LLAMA,
        model_type="phi3",
        qkv="stacked",
        attention_in=("self_attn.qkv_proj",),
        mlp_in=("mlp.gate_up_proj",),
        mlp_layout="stacked",
    ),
    Family(
        model_type="opt",
        blocks="model.decoder.layers",
        embeddings=(
            "model.decoder.embed_tokens",
            "model.decoder.embed_positions",
            "model.decoder.project_in",
        ),
        final=("model.decoder.final_layer_norm", "model.decoder.project_out"),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        norm="layernorm",
        attention_out=("self_attn.out_proj",),
        mlp_in=("fc1",),
        mlp_out=("fc2",),
        mlp_layout="plain",
        inner_size="ffn_dim",
        free_heads=False,
        activation="activation_function",
        positions="learned-unpadded",
        unsliceable=(("do_layer_norm_before", False, "its norms stand on the residual stream"),),
    ),
    Family(
        model_type="gpt2",
        blocks="transformer.h",
        embeddings=("transformer.wte", "transformer.wpe"),
        final=("transformer.ln_f",),
        norms=("ln_1", "ln_2"),
        norm="layernorm",
        qkv="stacked",
        attention_in=("attn.c_attn",),
        attention_out=("attn.c_proj",),
        attention_scale="attn.scaling",
        mlp_in=("mlp.c_fc",),
        mlp_out=("mlp.c_proj",),
        mlp_layout="plain",
        inner_size="n_inner",
        free_heads=False,
        activation="activation_function",
        positions="learned",
        depth_scaled_query="attn.c_attn",
    ),
    _NEOX,
    _BLOOM,
    replace(
        _BLOOM,
        model_type="falcon",
        embeddings=("transformer.word_embeddings",),
        norms=("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp"),
        parallel="parallel_attn",
        inner_size="ffn_hidden_size",
        activation="activation",
        positions="rope",
        alibi_flag="alibi",
        alibi_scaled=True,
        cache_spread="new_decoder_architecture",
    ),
    replace(_LLAMA, model_type="olmo", norm="layernorm"),
    replace(
        _LLAMA,
        model_type="olmo2",
        order="post",
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        attention_norms=_QK_NORMS,
    ),
    replace(
        _LLAMA,
        model_type="stablelm",
        norm="layernorm",
        parallel="use_parallel_residual",
        attention_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        free_heads=False,
    ),
    replace(
        _LLAMA,
        model_type="cohere",
        norms=("input_layernorm",),
        norm="layernorm",
        parallel=True,
        attention_norms=_QK_NORMS,
        positions="rope-interleaved",
        logits_multiplier="logit_scale",
    ),
    _MIXTRAL,
    replace(
        _MIXTRAL,
        model_type="qwen3_moe",
        attention_norms=_QK_NORMS,
        mlp_in=("mlp.experts.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
        mlp_out=("mlp.experts.down_proj", "mlp.down_proj"),
        expert_size="moe_intermediate_size",
        expert_counts=("num_experts",),
        dense_blocks="mlp_only_layers",
    ),
    replace(
        _LLAMA,
        model_type="secateur",
        embeddings=("model.embed_tokens", "model.embed_positions"),
        norms=("norm",),
        parallel="parallel",
        attention_norms=_QK_NORMS,
        mlp_in=("mlp.gate_proj", "mlp.up_proj", "mlp.gate_projs", "mlp.up_projs"),
        mlp_out=("mlp.down_proj", "mlp.down_projs"),
        router=("mlp.gate",),
        inner_size="intermediate_sizes",
        per_layer_lists=_OWN_LISTS,
        per_point_lists=("widths", "shortcuts"),
        light_blocks=True,
    ),
    replace(
        _LLAMA,
        model_type="nemotron-nas",
        inner_size="intermediate_sizes",
        per_layer_lists=(*_OWN_LISTS, "block_configs"),
        per_point_lists=("widths", "shortcuts"),
        light_blocks=True,
    ),
)

FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}
