"""Rows of families whose blocks are of several kinds, or hold something beside attention and an MLP; see `families.py`.

Where a part has another role in other configurations (the shared MLP of Granite 4, the dense one of Gemma 4), a family
has no row: it is tried out when it is opened.
"""

from __future__ import annotations

from dataclasses import replace

from secateur.models.anatomy import Family

_HYBRID = Family(
    model_type="falcon_h1",
    final=("model.final_layernorm",),
    norms=("input_layernorm", "pre_ff_layernorm"),
    mlp_in=("feed_forward.gate_proj", "feed_forward.up_proj"),
    mlp_out=("feed_forward.down_proj",),
    light_blocks=True,
    tuple_output=True,
    unsliceable=(("model_type", "falcon_h1", "a state space runs beside the attention of each block"),),
)

_CONVOLUTIONS = replace(
    _HYBRID,
    model_type="lfm2",
    final=("model.embedding_norm",),
    norms=("operator_norm", "ffn_norm"),
    attention_out=("self_attn.out_proj",),
    attention_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    mlp_in=("feed_forward.w1", "feed_forward.w3"),
    mlp_out=("feed_forward.w2",),
    per_layer_lists=("layer_types",),
    resized=(("block_auto_adjust_ff_dim", False),),
    tuple_output=False,
    unsliceable=(("model_type", "lfm2", "it has blocks with convolutions in place of attention"),),
)

HYBRIDS = (
    _HYBRID,
    replace(
        _HYBRID,
        model_type="bamba",
        block_numbers=("attn_layer_indices",),
        unsliceable=(("model_type", "bamba", "it has blocks with state spaces in place of attention"),),
    ),
    replace(
        _HYBRID,
        model_type="jamba",
        mlp_in=("feed_forward.experts.gate_up_proj", *_HYBRID.mlp_in),
        mlp_out=("feed_forward.experts.down_proj", *_HYBRID.mlp_out),
        mlp_layout="stacked",
        expert_size="intermediate_size",
        router=("feed_forward.router",),
        expert_counts=("num_experts",),
        periods=(("expert_layer_period", "expert_layer_offset"), ("attn_layer_period", "attn_layer_offset")),
        tuple_output=False,
        unsliceable=(("model_type", "jamba", "it has blocks with state spaces in place of attention"),),
    ),
    _CONVOLUTIONS,
    replace(
        _CONVOLUTIONS,
        model_type="lfm2_moe",
        mlp_in=("feed_forward.experts.gate_up_proj", *_CONVOLUTIONS.mlp_in),
        mlp_out=("feed_forward.experts.down_proj", *_CONVOLUTIONS.mlp_out),
        mlp_layout="stacked",
        expert_size="moe_intermediate_size",
        router=("feed_forward.gate", "feed_forward.expert_bias"),
        expert_counts=("num_experts",),
        leading_counts=("num_dense_layers",),
        resized=(),
        unsliceable=(("model_type", "lfm2_moe", "it has blocks with convolutions in place of attention"),),
    ),
    Family(
        model_type="nemotron_h",
        embeddings=("model.embeddings",),
        final=("model.norm_f",),
        norms=("norm",),
        attention_in=("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
        attention_out=("mixer.o_proj",),
        mlp_in=("mixer.experts.up_proj", "mixer.up_proj"),
        mlp_out=("mixer.experts.down_proj", "mixer.down_proj"),
        mlp_layout="plain",
        shared_out=("mixer.shared_experts.down_proj",),
        expert_size="moe_intermediate_size",
        router=("mixer.gate",),
        expert_counts=("n_routed_experts",),
        expert_groups=("n_group", "topk_group"),
        per_layer_lists=("layers_block_type",),
        light_blocks=True,
        unsliceable=(("model_type", "nemotron_h", "its blocks hold one branch each"),),
    ),
)
