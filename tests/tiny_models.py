"""Tiny random models of many families, built from configs: offline, float32, seeded, in eval mode.

In a freshly constructed Hugging Face model every block adds next to nothing, every bias is zero and every
norm weight is one, so a test could forget a block, a bias or a norm and still pass. Here every parameter is
drawn again, such that each shows in the logits (except key biases where there is no rotary embedding: softmax
cancels them). Buffers (rotary tables, embedding scales) stay as the constructor computed them, and tied
weights stay tied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

VOCABULARY = 256
HIDDEN = 32
INTERMEDIATE = 48
POSITIONS = 64
WINDOW = 8
PAD, BOS, EOS = 0, 1, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class TinyModel:
    """One row: a name, the model_type of its config, and the config for a number of blocks."""

    name: str
    model_type: str
    config: Callable[[int], PreTrainedConfig]


def _row(name: str, model_type: str | None = None, **settings: Any) -> TinyModel:
    """A row from config settings; a setting that depends on the number of blocks is a function of it."""
    model_type = model_type or name

    def config(blocks: int) -> PreTrainedConfig:
        given = {key: value(blocks) if callable(value) else value for key, value in settings.items()}
        return AutoConfig.for_model(
            model_type,
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": HIDDEN,
                "num_hidden_layers": blocks,
                "num_attention_heads": 4,
                "pad_token_id": PAD,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                **given,
            },
        )

    return TinyModel(name, model_type, config)


def _full_every(period: int) -> Callable[[int], list[str]]:
    """layer_types in which every `period`-th block sees everything and the others a window."""
    return lambda blocks: ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(blocks)]


# What most families share, by the names their configs use for it.
_PLAIN = {"intermediate_size": INTERMEDIATE, "max_position_embeddings": POSITIONS}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
# Heads wider than hidden / heads, so that a mix-up of the two widths cannot go unnoticed.
_WIDE_HEADS = {**_GROUPED, "head_dim": 16}
_GEMMA2 = {**_WIDE_HEADS, "query_pre_attn_scalar": 12, "sliding_window": WINDOW}
_GPT2 = {"n_inner": INTERMEDIATE, "n_positions": POSITIONS}
_NEOX = {**_PLAIN, "rotary_pct": 0.5}
_OPT = {"ffn_dim": INTERMEDIATE, "max_position_embeddings": POSITIONS}
_FALCON = {"ffn_hidden_size": INTERMEDIATE, "max_position_embeddings": POSITIONS}
_STABLELM = {**_GROUPED, "partial_rotary_factor": 0.5}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
_QWEN3_MOE = {**_WIDE_HEADS, **_EXPERTS}

_CANONICAL = (
    _row("llama", **_GROUPED),
    _row("mistral", **_GROUPED, sliding_window=None),
    _row("qwen2", **_GROUPED),
    _row("qwen3", **_WIDE_HEADS),
    _row("smollm3", **_GROUPED, no_rope_layers=lambda blocks: [int(i % 3 != 1) for i in range(blocks)]),
    _row("gemma", **_WIDE_HEADS),
    _row("gemma2", **_GEMMA2, layer_types=_full_every(2)),
    _row("gemma3_text", **_GEMMA2, layer_types=_full_every(3)),
    _row("phi", **_PLAIN, partial_rotary_factor=0.5),
    _row("phi3", **_GROUPED),
    _row("opt", **_OPT),
    _row("gpt2", **_GPT2),
    _row("gpt_neox", **_NEOX),
    _row("olmo", **_GROUPED),
    _row("olmo2", **_GROUPED),
    _row("stablelm", **_STABLELM),
    _row(
        "granite",
        **_GROUPED,
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        attention_multiplier=0.25,
        logits_scaling=2.0,
    ),
    _row("cohere", **_GROUPED, logit_scale=0.25),
    _row("falcon", **_FALCON),  # as 7b: one key/value head, parallel branches on one norm, no biases
    _row("bloom"),
    _row("mixtral", **_GROUPED, num_local_experts=4),
    _row("qwen3_moe", **_QWEN3_MOE),
    _row(
        "secateur",
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        intermediate_sizes=lambda blocks: [INTERMEDIATE] * blocks,
        experts=lambda blocks: [4 * (i % 3 == 1) for i in range(blocks)],
        positions="learned",
        qk_norm="rms",
    ),
    _row(
        "nemotron-nas",
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        intermediate_sizes=lambda blocks: [INTERMEDIATE - 8 * (i % 3 == 1) for i in range(blocks)],
        tie_word_embeddings=True,
    ),
)

_VARIATIONS = (
    _row("llama-tied", "llama", **_GROUPED, tie_word_embeddings=True),
    _row("llama-bias", "llama", **_GROUPED, attention_bias=True, mlp_bias=True),
    _row("mistral-sliding", "mistral", **_GROUPED, sliding_window=WINDOW),
    _row(
        "qwen2-sliding",
        "qwen2",
        **_GROUPED,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=_full_every(3),
    ),
    _row(  # without layer_types: the config derives them from max_window_layers
        "qwen3-sliding",
        "qwen3",
        **_WIDE_HEADS,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=lambda blocks: blocks // 2,
    ),
    _row("gpt_neox-sequential", "gpt_neox", **_NEOX, use_parallel_residual=False),
    _row("stablelm-parallel", "stablelm", **_STABLELM, use_parallel_residual=True),
    _row("stablelm-bias", "stablelm", **_STABLELM, use_qkv_bias=True),
    _row("falcon-new", "falcon", **_FALCON, new_decoder_architecture=True, num_kv_heads=2),  # as 40b
    _row("falcon-rw", "falcon", **_FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    _row("opt-post-norm", "opt", **_OPT, do_layer_norm_before=False, word_embed_proj_dim=24),  # as 350m
    _row("gpt2-scaled", "gpt2", **_GPT2, scale_attn_by_inverse_layer_idx=True),
    _row(
        "qwen3_moe-mixed",
        "qwen3_moe",
        **_QWEN3_MOE,
        mlp_only_layers=lambda blocks: [i for i in (1, 5) if i < blocks],
    ),
    _row("qwen3_moe-step", "qwen3_moe", **_QWEN3_MOE, decoder_sparse_step=2),
)

_SLIDING = {"sliding_window": WINDOW, "layer_types": _full_every(4)}
_LLAMA_SHAPED = (
    _row("ministral", **_WIDE_HEADS, **_SLIDING),
    _row("ministral3", **_WIDE_HEADS),
    _row("seed_oss", **_WIDE_HEADS),
    _row("cwm", **_WIDE_HEADS, **_SLIDING),
    _row("internlm3", **_GROUPED),
    _row("iquestcoder", **_GROUPED),
    _row("arcee", **_GROUPED),
    _row("jais2", **_GROUPED),
    _row("nemotron", **_GROUPED, head_dim=8),
    _row("starcoder2", **_GROUPED),
    _row("helium", **_GROUPED, head_dim=8),
    _row("ernie4_5", **_WIDE_HEADS),
    _row("glm", **_GROUPED, head_dim=8),
    _row("hunyuan_v1_dense", **_WIDE_HEADS),
    _row("hyperclovax", **_GROUPED, residual_multiplier=0.7),
    _row("olmo3", **_GROUPED, **_SLIDING),
    _row("exaone4", **_GROUPED, **_SLIDING),
    _row("glm4", **_GROUPED, head_dim=8),
    _row("cohere2", **_GROUPED, **_SLIDING, logit_scale=0.25),
)
"""Families that share all traits with others: a few cases of the contract stand for all."""

_ROUTED = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_GROUPS = {**_ROUTED, "n_routed_experts": 4, "n_shared_experts": 2, "n_group": 1, "topk_group": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_LINEAR = {
    **_WIDE_HEADS,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": lambda blocks: ["linear_attention" if i % 2 else "full_attention" for i in range(blocks)],
}
_GATED_DELTA = {**_LINEAR, **_ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 40}


def _kinds(*names: str) -> Callable[[int], list[str]]:
    """Kinds of blocks that repeat."""
    return lambda blocks: [names[i % len(names)] for i in range(blocks)]


_STATES = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}
_SHORT = {**_GROUPED, "layer_types": _kinds("conv", "full_attention", "conv")}
_MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "lm_head_multiplier": 0.5,
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 0.7,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.6,
    "mlp_multipliers": [0.9, 0.7],
}
_HYBRIDS = (
    _row("qwen3_5_text", **_LINEAR),
    _row("falcon_h1", **_WIDE_HEADS, **_STATES, **_MULTIPLIERS, mamba_d_ssm=48),
    _row("bamba", **_GROUPED, **_STATES, attn_layer_indices=lambda blocks: [i for i in range(blocks) if i % 3 == 1]),
    _row("lfm2", **_SHORT),
)
"""Dense families with blocks of several kinds."""
_MIXTURES = (
    _row("olmoe", **_GROUPED, num_experts=4, num_experts_per_tok=2),
    _row("granitemoe", **_GROUPED, num_local_experts=4, num_experts_per_tok=2, residual_multiplier=0.7),
    _row("glm4_moe", **_WIDE_HEADS, **_GROUPS, first_k_dense_replace=2, use_qk_norm=True),
    _row("dots1", **_WIDE_HEADS, **_GROUPS, first_k_dense_replace=2),
    _row("deepseek_v2", **_PLAIN, **_GROUPS, **_LATENT, num_key_value_heads=4, first_k_dense_replace=2),
    _row("deepseek_v3", **_PLAIN, **_GROUPS, **_LATENT, num_key_value_heads=4, first_k_dense_replace=2),
    _row("gpt_oss", **_WIDE_HEADS, **_SLIDING, num_local_experts=4, num_experts_per_tok=2),
    _row("ernie4_5_moe", **_GROUPED, moe_intermediate_size=24, moe_num_experts=4, moe_k=2, moe_layer_start_index=2),
    _row("hunyuan_v1_moe", **_WIDE_HEADS, num_experts=4, moe_topk=2),
    _row("minimax", **_WIDE_HEADS, num_local_experts=4, layer_types=_kinds("linear_attention", "full_attention")),
    _row("llama4_text", **_WIDE_HEADS, num_local_experts=4, intermediate_size_mlp=40, interleave_moe_layer_step=2),
    _row(
        "nemotron_h",
        **_WIDE_HEADS,
        moe_intermediate_size=48,
        num_experts_per_tok=2,
        n_routed_experts=4,
        moe_shared_expert_intermediate_size=40,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=8,
        layer_types=_kinds("linear_attention", "moe", "full_attention", "mlp"),
    ),
    _row(
        "jamba",
        **_GROUPED,
        num_experts=8,
        num_experts_per_tok=2,
        expert_layer_period=16,
        expert_layer_offset=2,
        attn_layer_period=16,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    _row("lfm2_moe", **_SHORT, **_ROUTED, num_experts=4, num_dense_layers=2),
    _row("qwen3_next", **_GATED_DELTA),
    _row("qwen3_5_moe_text", **_GATED_DELTA),
)
"""Mixtures of experts that are like others: a few cases of the contract stand for all."""

_OTHERS = (
    _row("apertus", **_GROUPED),
    _row("persimmon", **_PLAIN),
    _row(  # as E2B: inputs of its own for each block, shared keys and values, and MLPs of two widths
        "gemma4_text",
        **_WIDE_HEADS,
        global_head_dim=24,
        sliding_window=WINDOW,
        layer_types=_full_every(2),
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=lambda blocks: blocks // 2 - 1,
        use_double_wide_mlp=True,
    ),
)

VARIANTS: dict[str, TinyModel] = {
    row.name: row for row in (*_CANONICAL, *_VARIATIONS, *_LLAMA_SHAPED, *_HYBRIDS, *_MIXTURES, *_OTHERS)
}
FAMILIES: tuple[str, ...] = tuple(
    row.name for row in (*_CANONICAL, *_LLAMA_SHAPED, *_HYBRIDS, *_MIXTURES)
)  # one per row
MIXED: tuple[str, ...] = tuple(row.name for row in _MIXTURES)
LLAMA_SHAPED: tuple[str, ...] = tuple(row.name for row in (*_LLAMA_SHAPED, *_HYBRIDS))
AFTER_NORM = ("gemma2", "gemma3_text", "olmo2", "hyperclovax", "olmo3", "exaone4", "glm4")
"""Families with a norm between their branches and the residual stream."""
OTHER_FAMILIES: tuple[str, ...] = tuple(row.name for row in _OTHERS)  # real, but not among the supported ones

UNSLICEABLE: tuple[str, ...] = (
    *AFTER_NORM,
    "opt-post-norm",
    "secateur",
    "ministral3",
    "nemotron",
    "hunyuan_v1_dense",
    "cohere2",
    *(row.name for row in _HYBRIDS),
    *(name for name in MIXED if name != "granitemoe"),
    *OTHER_FAMILIES,
)
"""Models that the modelling file for sliced ones cannot hold, or whose hidden states cannot be rotated."""


def build(name: str, *, blocks: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model in eval mode; the same arguments give the same weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(VARIANTS[name].config(blocks), dtype=dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    draw_parameters(model, seed)
    return model.eval()


@torch.no_grad()
def draw_parameters(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in drawn:  # tied
                continue
            drawn.add(parameter)
            noise = torch.randn(parameter.shape, generator=generator)  # float32 for every dtype
            if name == "bias":
                parameter.copy_(0.1 * noise)
            elif "Norm" in type(module).__name__:
                parameter.add_(0.2 * noise)  # around 1, or around 0 where the norm computes 1 + w
            else:
                parameter.copy_(_std(module, parameter) * noise)


def _std(module: nn.Module, parameter: nn.Parameter) -> float:
    if isinstance(module, nn.Embedding):
        return 0.3  # small beside what the blocks add, also when the model multiplies it by sqrt(hidden)
    fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[-1]
    return 1.0 / math.sqrt(fan_in)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes by the names that most configurations have for them, for families that are not in the table above."""


def drawn_again(module: PreTrainedModel) -> PreTrainedModel:
    """Draw every parameter, seeded, so that each block matters; in fresh models they do next to nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    return module.eval()


def of_type(model_type: str, **settings: Any) -> PreTrainedModel:
    """A tiny model of any family, each weight drawn so that it matters."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    return drawn_again(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def save_tiny(
    name: str,
    folder: str | Path,
    *,
    tokenizer: bool = False,
    max_shard_size: int | str | None = None,
    **build_kwargs: Any,
) -> Path:
    """Save `build(name, **build_kwargs)` as a checkpoint folder, on request with a tokenizer."""
    folder = Path(folder)
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    build(name, **build_kwargs).save_pretrained(folder, **sharding)
    if tokenizer:
        build_tokenizer().save_pretrained(folder)
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without merges: one token per byte, and it adds no special tokens itself.

    Its 256 entries are pad, bos, eos and 253 bytes. The three missing bytes occur in no UTF-8 text, so every
    text still survives a round trip.
    """
    never_in_utf8 = "ýþÿ"  # the letters that stand for the bytes 0xFD, 0xFE and 0xFF
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(never_in_utf8))
    special = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
    vocabulary = special | {letter: i for i, letter in enumerate(letters, start=len(special))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<eos>",  # never needed; Qwen2Tokenizer would add a 257th entry for it
        chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS,
    )
