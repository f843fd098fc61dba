"""A pre-norm decoder whose residual stream may change its width and basis from one reading point to the next.

Saved by secateur next to the weights of pruned models; needs only transformers. Scales and biases of norms are folded
into the linear layers that follow them, and for LayerNorm models the mean subtraction into the layers that write to the
residual stream, so that every norm here is the same function without parameters. Sequential blocks read the stream
twice (attention, MLP), parallel blocks once; where the basis or the width changes between two reading points, a
shortcut matrix maps the residual from one to the other.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


@strict
class SecateurConfig(PreTrainedConfig):
    """Shapes of a pruned decoder.

    Attributes:
        hidden_size: width D of the dense model's residual stream; every norm divides by it.
        widths: width at each reading point and, last, at the head; 2L+1 numbers for sequential blocks, L+1 for
            parallel ones. None means hidden_size everywhere.
        shortcuts: for each residual connection between adjacent reading points, whether it has a shortcut matrix.
            None means none.
        parallel: attention and MLP read the same normed state and are added to the same residual.
        intermediate_sizes: width of each block's MLP (of each of its experts); 0 for a block without an MLP.
        heads, key_value_heads: numbers of query and of key/value heads of each block, 0 for a block without attention.
            None means the same everywhere.
        experts: number of experts of each block, 0 for a dense MLP. None means dense everywhere.
        networks: for each block "", or the module without attention that replaces several blocks: `ffn`,
            `down(gelu(up(x)))`, or `swiglu`, `down(silu(gate(x)) * up(x))`. None means no such module.
        final_scale: the last norm has scales of its own, as a head tied to the embeddings needs.
        gated: the MLP is `down(act(gate(x)) * up(x))`, otherwise `down(act(up(x)))`.
        positions: `rope`, `learned` (a table added to the embeddings), `learned-unpadded` (the same, counted without
            padding) or `alibi` (slopes below).
        alibi_scale: factor of slope times position.
        alibi_in_bfloat16: slope times position is rounded to bfloat16, as Falcon does.
        rope_blocks: for each block, whether it applies rotary positions. None means all.
        qk_norm: `rms` or `layernorm` over each head of queries and keys, or None.
        qk_norm_per_head: whether each head has its own scales, instead of one set for all heads.
        clip_qkv: limit of queries, keys and values, or None.
        qkv_bias, attention_out_bias, mlp_bias, mlp_out_bias, head_bias: which linear layers have a bias.
    """

    model_type = "secateur"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    widths: list[int] | None = None
    shortcuts: list[bool] | None = None
    parallel: bool = False
    intermediate_sizes: list[int] | None = None
    heads: list[int] | None = None
    key_value_heads: list[int] | None = None
    experts: list[int] | None = None
    networks: list[str] | None = None
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    final_scale: bool = False
    gated: bool = True
    hidden_act: str = "silu"
    norm_eps: float = 1e-6
    positions: str = "rope"
    rope_parameters: dict | None = None
    rope_blocks: list[bool] | None = None
    alibi_slopes: list[float] | None = None
    alibi_scale: float = 1.0
    alibi_in_bfloat16: bool = False
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    qk_norm: str | None = None
    qk_norm_per_head: bool = False
    clip_qkv: float | None = None
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    mlp_out_bias: bool = False
    head_bias: bool = False
    attention_dropout: float = 0.0
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in defaults that follow from other fields."""
        blocks = self.num_hidden_layers
        points = (1 if self.parallel else 2) * blocks + 1
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.widths = self.widths or [self.hidden_size] * points
        self.shortcuts = self.shortcuts or [False] * (points - 1)
        self.intermediate_sizes = self.intermediate_sizes or [4 * self.hidden_size] * blocks
        self.heads = self.heads or [self.num_attention_heads] * blocks
        self.key_value_heads = self.key_value_heads or [self.num_key_value_heads] * blocks
        self.experts = self.experts or [0] * blocks
        self.networks = self.networks or [""] * blocks
        self.rope_blocks = self.rope_blocks or [True] * blocks
        self.layer_types = self.layer_types or ["full_attention"] * blocks
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse lists whose lengths contradict the number of blocks."""
        connections = (1 if self.parallel else 2) * self.num_hidden_layers
        for name, length in (
            ("widths", connections + 1),
            ("shortcuts", connections),
            ("intermediate_sizes", self.num_hidden_layers),
            ("heads", self.num_hidden_layers),
            ("key_value_heads", self.num_hidden_layers),
            ("experts", self.num_hidden_layers),
            ("networks", self.num_hidden_layers),
            ("rope_blocks", self.num_hidden_layers),
        ):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; {length} are needed.")
        for before, after, matrix in zip(self.widths, self.widths[1:], self.shortcuts, strict=False):
            if before != after and not matrix:
                raise ValueError(f"the width changes from {before} to {after} without a shortcut matrix.")


class ScaleFreeNorm(nn.Module):
    """RMS norm over the dense width: `x / sqrt(sum(x²) / D + eps)`."""

    def __init__(self, width: int, eps: float, scales: int = 0) -> None:
        """Norm for a dense width D, optionally with this many scales."""
        super().__init__()
        self.width, self.eps, self.scaled = width, eps, bool(scales)
        if scales:
            self.weight = nn.Parameter(torch.ones(scales))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension, at least in float32."""
        exact = hidden_states if hidden_states.dtype == torch.float64 else hidden_states.float()
        square = exact.pow(2).sum(-1, keepdim=True) / self.width
        normed = (exact * torch.rsqrt(square + self.eps)).to(hidden_states.dtype)
        return normed * self.weight if self.scaled else normed


class HeadNorm(nn.Module):
    """Norm over the dimensions of each head, with scales; states are (batch, positions, heads, head_dim)."""

    def __init__(self, config: SecateurConfig, heads: int) -> None:
        """Norm for this many heads."""
        super().__init__()
        shape = (heads, config.head_dim) if config.qk_norm_per_head else (config.head_dim,)
        self.weight = nn.Parameter(torch.ones(shape))
        self.centred, self.eps = config.qk_norm == "layernorm", config.norm_eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension, in float32."""
        exact = states.float()
        if self.centred:
            exact = exact - exact.mean(-1, keepdim=True)
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(states.dtype)


class SecateurAttention(nn.Module):
    """Attention with grouped key/value heads, whose size does not depend on the width of the stream."""

    def __init__(self, config: SecateurConfig, layer_idx: int, width_in: int, width_out: int) -> None:
        """Attention of one block, reading `width_in` and writing `width_out` directions."""
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        heads, groups = config.heads[layer_idx], config.key_value_heads[layer_idx]
        self.num_key_value_groups = heads // groups
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.rotates = config.positions == "rope" and config.rope_blocks[layer_idx]
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        queries, keys = heads * config.head_dim, groups * config.head_dim
        self.q_proj = nn.Linear(width_in, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width_in, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width_in, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, width_out, bias=config.attention_out_bias)
        self.q_norm = HeadNorm(config, heads) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(config, groups) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; return what is added to the residual stream, and the attention weights if available."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projected = [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        if self.config.clip_qkv is not None:
            projected = [state.clamp(-self.config.clip_qkv, self.config.clip_qkv) for state in projected]
        query = self.q_norm(projected[0].view(shape)).transpose(1, 2)
        key = self.k_norm(projected[1].view(shape)).transpose(1, 2)
        value = projected[2].view(shape).transpose(1, 2)
        if self.rotates:
            query, key = _rotated(query, *position_embeddings), _rotated(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to as many leading dimensions of each head as the tables have."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)


_NETWORKS = {"ffn": (False, True, True, "gelu"), "swiglu": (True, False, False, "silu")}


def mlp_traits(config: SecateurConfig, network: str = "") -> tuple[bool, bool, bool, str]:
    """Return the MLP's traits, of a block or replacement module: gated, input bias, output bias, activation."""
    ordinary = (config.gated, config.mlp_bias, config.mlp_out_bias, config.hidden_act)
    return _NETWORKS[network] if network else ordinary


class SecateurMLP(nn.Module):
    """MLP, gated or not."""

    def __init__(self, config: SecateurConfig, inner: int, width_in: int, width_out: int, network: str = "") -> None:
        """MLP of `inner` channels, reading `width_in` and writing `width_out` directions."""
        super().__init__()
        gated, bias, out_bias, activation = mlp_traits(config, network)
        self.gate_proj = nn.Linear(width_in, inner, bias=bias) if gated else None
        self.up_proj = nn.Linear(width_in, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width_out, bias=out_bias)
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what is added to the residual stream."""
        inner = self.up_proj(hidden_states)
        inner = self.act_fn(inner) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_states)) * inner
        return self.down_proj(inner)


class SecateurExperts(nn.Module):
    """Mixture of gated experts; the router sends each token to its top experts."""

    def __init__(self, config: SecateurConfig, count: int, inner: int, width_in: int, width_out: int) -> None:
        """Build `count` experts of `inner` channels each."""
        super().__init__()
        self.picked, self.normalised = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(width_in, count, bias=False)
        self.gate_projs = nn.ModuleList(nn.Linear(width_in, inner, bias=False) for _ in range(count))
        self.up_projs = nn.ModuleList(nn.Linear(width_in, inner, bias=False) for _ in range(count))
        self.down_projs = nn.ModuleList(nn.Linear(inner, width_out, bias=False) for _ in range(count))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs."""
        tokens = hidden_states.flatten(0, -2)
        share = self.gate(tokens).float().softmax(-1)
        best, chosen = share.topk(self.picked, dim=-1)
        if self.normalised:
            best = best / best.sum(-1, keepdim=True)
        best = best.to(tokens.dtype)
        said = []
        for number in chosen.unique().tolist():
            rows, places = torch.where(chosen == number)
            said.append((rows, self._expert(number, tokens[rows]) * best[rows, places, None]))
        mixed = tokens.new_zeros(tokens.shape[0], said[0][1].shape[-1])
        for rows, one in said:
            mixed = mixed.index_add(0, rows, one)
        return mixed.view(*hidden_states.shape[:-1], -1)

    def _expert(self, number: int, tokens: torch.Tensor) -> torch.Tensor:
        inner = self.act_fn(self.gate_projs[number](tokens)) * self.up_projs[number](tokens)
        return self.down_projs[number](inner)


class SecateurDecoderLayer(GradientCheckpointingLayer):
    """A block: attention and MLP, each with a norm and a residual connection; one of them may be absent."""

    def __init__(self, config: SecateurConfig, layer_idx: int) -> None:
        """Block with the widths that the configuration gives it."""
        super().__init__()
        self.parallel = config.parallel
        step = 1 if config.parallel else 2
        widths = config.widths[layer_idx * step : layer_idx * step + step + 1]
        matrices = config.shortcuts[layer_idx * step : layer_idx * step + step]
        inner, experts = config.intermediate_sizes[layer_idx], config.experts[layer_idx]
        network = config.networks[layer_idx]
        self.layer_idx = layer_idx
        self.norm = ScaleFreeNorm(config.hidden_size, config.norm_eps)
        self.self_attn: nn.Module | None = None
        self.mlp: nn.Module | None = None
        if config.heads[layer_idx] and not network:
            self.self_attn = SecateurAttention(config, layer_idx, widths[0], widths[1])
        if inner and experts:
            self.mlp = SecateurExperts(config, experts, inner, widths[-2], widths[-1])
        elif inner:
            self.mlp = SecateurMLP(config, inner, widths[-2], widths[-1], network)
        self.attn_shortcut = _shortcut(widths[0], widths[1], matrices[0]) if not config.parallel else None
        self.mlp_shortcut = _shortcut(widths[-2], widths[-1], matrices[-1])

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Map the residual stream (batch, positions, width in) to (batch, positions, width out)."""
        attended = self.attention_branch(hidden_states, **kwargs)
        if self.parallel:
            return self.mlp_shortcut(hidden_states) + attended + self.mlp_branch(hidden_states)
        hidden_states = self.attn_shortcut(hidden_states) + attended
        return self.mlp_shortcut(hidden_states) + self.mlp_branch(hidden_states)

    def attention_branch(
        self, hidden_states: torch.Tensor, use_cache: bool | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Return what attention adds to the residual stream: nothing if there is none."""
        if self.self_attn is None:
            _note_positions(kwargs.get("past_key_values"), self.layer_idx, hidden_states)
            return hidden_states.new_zeros(())
        return self.self_attn(self.norm(hidden_states), **kwargs)[0]

    def mlp_branch(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what the MLP adds to the residual stream: nothing if there is none."""
        return hidden_states.new_zeros(()) if self.mlp is None else self.mlp(self.norm(hidden_states))


def _note_positions(cache: Any, layer_idx: int, hidden_states: torch.Tensor) -> None:
    """Let the cache count the positions seen, with one value each, because it may ask any block for that count."""
    if cache is not None:
        mark = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
        cache.update(mark, mark, layer_idx)


def _shortcut(width_in: int, width_out: int, matrix: bool) -> nn.Module:
    return nn.Linear(width_in, width_out, bias=False) if matrix else nn.Identity()


class SecateurPreTrainedModel(PreTrainedModel):
    """Shared by the model with and without head."""

    config: SecateurConfig
    config_class = SecateurConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("SecateurDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SecateurDecoderLayer, "attentions": SecateurAttention}  # noqa: RUF012


class SecateurModel(SecateurPreTrainedModel):
    """Embeddings, blocks and final norm."""

    _layer_class: type[nn.Module] = SecateurDecoderLayer

    def __init__(self, config: SecateurConfig) -> None:
        """Build from a configuration."""
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.widths[0], config.pad_token_id)
        learned = config.positions.startswith("learned")
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.widths[0]) if learned else None
        self.layers = nn.ModuleList(self._layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = ScaleFreeNorm(config.hidden_size, config.norm_eps, config.widths[-1] * config.final_scale)
        self.rotary_emb = PhiRotaryEmbedding(config) if config.positions == "rope" else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run all blocks and the final norm."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = self._positions(hidden_states, attention_mask, seen)
        given = {
            "config": self.config,
            "inputs_embeds": hidden_states,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        masks = self._masks(given, seen)
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        tables = self.rotary_emb(hidden_states, position_ids) if self.rotary_emb is not None else None
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_embeddings=tables,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _positions(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, seen: int) -> torch.Tensor:
        if self.config.positions == "learned-unpadded" and attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, seen : seen + hidden.shape[1]]
        return torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]

    def _masks(self, given: dict[str, Any], seen: int) -> dict[str, torch.Tensor | None]:
        if self.config.positions == "alibi":
            given["allow_is_causal_skip"] = False
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        masks = {kind: makers[kind](**given) for kind in dict.fromkeys(self.config.layer_types)}
        if self.config.positions != "alibi":
            return masks
        return {kind: self._with_slopes(mask, given, seen) for kind, mask in masks.items()}

    def _with_slopes(self, mask: torch.Tensor, given: dict[str, Any], seen: int) -> torch.Tensor:
        """Add each head's slope times the position of the key."""
        hidden, real = given["inputs_embeds"], given["attention_mask"]
        place = torch.arange(mask.shape[-1], device=hidden.device)[None]
        if real is not None and real.dim() == 2:
            place = (real.long().cumsum(-1) - 1) * real.long()
            place = nn.functional.pad(place, (0, mask.shape[-1] - place.shape[-1]))
        kind = torch.bfloat16 if self.config.alibi_in_bfloat16 else torch.float32
        slopes = torch.tensor(self.config.alibi_slopes, device=hidden.device, dtype=kind)
        bias = (slopes[None, :, None, None] * place[:, None, None, :]).to(hidden.dtype) * self.config.alibi_scale
        hidden_from_view = ~mask if mask.dtype == torch.bool else mask < -1
        return bias.expand(-1, -1, mask.shape[-2], -1).masked_fill(hidden_from_view, torch.finfo(hidden.dtype).min)


class SecateurForCausalLM(SecateurPreTrainedModel, GenerationMixin):
    """The decoder with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _model_class: type[SecateurModel] = SecateurModel

    def __init__(self, config: SecateurConfig) -> None:
        """Build from a configuration."""
        super().__init__(config)
        self.model = self._model_class(config)
        self.lm_head = nn.Linear(config.widths[-1], config.vocab_size, bias=config.head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position; with labels also the mean loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class Part(dict):
    """A part of a block's configuration: a dictionary whose entries are attributes too, as vLLM reads them."""

    def __getattr__(self, name: str) -> Any:
        """Return an entry."""
        if name not in self:
            raise AttributeError(name)
        return self[name]


@strict
class DeciLMConfig(SecateurConfig):
    """Shapes of a Llama in which every block has its own MLP and its own key/value heads, or lacks one branch.

    This is the layout of Nemotron-NAS, under whose name vLLM serves it. All blocks with attention have as many
    query heads; a block without attention has no heads in `heads`, one without an MLP no channels.

    Attributes:
        block_configs: for each block `attention` (`no_op`, `n_heads_in_group`: query heads for each key/value head) and
            `ffn` (`no_op`, `intermediate_size`, `hidden_act`); lists of `SecateurConfig` given beside it count first.
    """

    model_type = "nemotron-nas"
    attribute_map = {"rms_norm_eps": "norm_eps", "attention_bias": "attention_out_bias"}  # noqa: RUF012

    block_configs: list[dict] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive the lists from `block_configs`, or the other way round."""
        if self.block_configs is not None and self.intermediate_sizes is None:
            self._read_blocks(self.block_configs)
        self.final_scale = True
        super().__post_init__(**kwargs)
        self.describe_blocks()

    def _read_blocks(self, blocks: list[dict]) -> None:
        heads = self.num_attention_heads
        if any(
            block["attention"].get("replace_with_linear") or block["ffn"].get("replace_with_linear") for block in blocks
        ):
            raise ValueError("blocks with a linear layer in place of attention or MLP are not supported.")
        groups = [
            None if block["attention"].get("no_op") else block["attention"]["n_heads_in_group"] for block in blocks
        ]
        self.heads = [heads if group else 0 for group in groups]
        self.key_value_heads = [heads // group if group else 0 for group in groups]
        self.intermediate_sizes = [_inner_size(block["ffn"], self.hidden_size) for block in blocks]

    def describe_blocks(self) -> None:
        """Set `block_configs` from the lists, after one of them was changed."""
        self.block_configs = [
            Part(
                attention=Part(
                    no_op=not heads, n_heads_in_group=heads // groups if heads else None, replace_with_linear=False
                ),
                ffn=Part(
                    no_op=not inner,
                    intermediate_size=inner or None,
                    hidden_act=self.hidden_act,
                    replace_with_linear=False,
                ),
            )
            for heads, groups, inner in zip(self.heads, self.key_value_heads, self.intermediate_sizes, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration with the names under which others read it too."""
        self.describe_blocks()
        return super().to_dict() | {"rms_norm_eps": self.norm_eps, "attention_bias": self.attention_out_bias}


def _inner_size(ffn: dict, hidden_size: int) -> int:
    """Return the channels of an MLP, given as such or as a multiple of the hidden size, rounded up to 256."""
    if ffn.get("no_op"):
        return 0
    if ffn.get("intermediate_size"):
        return int(ffn["intermediate_size"])
    return -(-int(2 * ffn["ffn_mult"] * hidden_size / 3) // 256) * 256


class DeciLMDecoderLayer(GradientCheckpointingLayer):
    """A Llama's block, in which attention or the MLP may be absent."""

    def __init__(self, config: DeciLMConfig, layer_idx: int) -> None:
        """Block with the widths that the configuration gives it."""
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_sizes[layer_idx]
        self.layer_idx = layer_idx
        self.self_attn = self.mlp = None
        if config.heads[layer_idx]:
            self.input_layernorm = ScaleFreeNorm(width, config.norm_eps, width)
            self.self_attn = SecateurAttention(config, layer_idx, width, width)
        if inner:
            self.post_attention_layernorm = ScaleFreeNorm(width, config.norm_eps, width)
            self.mlp = SecateurMLP(config, inner, width, width)

    def forward(self, hidden_states: torch.Tensor, use_cache: bool | None = None, **kwargs: Any) -> torch.Tensor:
        """Map the residual stream (batch, positions, width) to the same shape."""
        if self.self_attn is None:
            _note_positions(kwargs.get("past_key_values"), self.layer_idx, hidden_states)
        else:
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciLMModel(SecateurModel):
    """Embeddings, blocks and final norm in the layout of Nemotron-NAS."""

    config: DeciLMConfig
    config_class = DeciLMConfig
    _layer_class = DeciLMDecoderLayer
    _no_split_modules = ("DeciLMDecoderLayer",)
    _can_record_outputs = {"hidden_states": DeciLMDecoderLayer, "attentions": SecateurAttention}  # noqa: RUF012


class DeciLMForCausalLM(SecateurForCausalLM):
    """The decoder with its head in the layout of Nemotron-NAS."""

    config: DeciLMConfig
    config_class = DeciLMConfig
    _model_class = DeciLMModel
    _no_split_modules = ("DeciLMDecoderLayer",)
    _can_record_outputs = {"hidden_states": DeciLMDecoderLayer, "attentions": SecateurAttention}  # noqa: RUF012


__all__ = [
    "DeciLMConfig",
    "DeciLMForCausalLM",
    "DeciLMModel",
    "SecateurConfig",
    "SecateurForCausalLM",
    "SecateurModel",
]
