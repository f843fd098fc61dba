"""Bring a stock decoder into a canonical form in which its hidden states can be rotated.

Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", section 3. Norm scales
and biases are folded into the linear layers that read from the norm, multipliers into the weights they multiply, and
for LayerNorm models the mean subtraction into the layers that write to the residual stream. The result is a
`SecateurForCausalLM` at full width whose norms have no parameters. Families differ only in their row.

Legend: D = width of the residual stream, h = size of a head; weights are (out, in), in float32.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import ModelError
from secateur.modeling import SecateurConfig, mlp_traits
from secateur.models.anatomy import find, present, residual_factor
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths
from secateur.plan.steps import StreamSizes
from secateur.surgery.assembly import Tensors

ATTENTION_READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_WRITER = "self_attn.o_proj"
_FUNCTIONAL_EPS = 1e-5
"""The eps of OLMo's LayerNorm, which is hard-coded in its forward."""


CANNOT_SLICE = "the hidden size of this model cannot be sliced"


class UnfoldableError(ModelError):
    """A model that cannot be brought into the canonical form; `reason` says why, without a full stop."""

    def __init__(self, source: str, refusal: str, reason: str) -> None:
        """Build the message from what is refused and why."""
        super().__init__(f"{source}: {refusal}: {reason}.")
        self.reason = reason


def refuse_unsliceable(decoder: Decoder, refusal: str = CANNOT_SLICE) -> None:
    """Refuse models that cannot be folded or rotated.

    Raises:
        UnfoldableError: `refusal`, with the reason.
    """
    reason = reason_against(decoder)
    if reason:
        if refusal == CANNOT_SLICE and reason_against_one_basis(decoder) is None:
            reason += "; one basis may do (stock-slicing)"
        raise UnfoldableError(decoder.source, refusal, reason)


def reason_against(decoder: Decoder) -> str | None:
    """Return why a model cannot be brought into the canonical form, as a clause, or None."""
    return _against_rotation(decoder) or _against_form(decoder)


def reason_against_one_basis(decoder: Decoder) -> str | None:
    """Return why a model cannot be rotated in its own architecture, as far as its row says it, or None."""
    family = decoder.anatomy.family
    known = family.norm == "layernorm" and not family.detected
    return _against_rotation(decoder) or (_against_form(decoder) if known else None)


def _against_rotation(decoder: Decoder) -> str | None:
    family = decoder.anatomy.family
    if decoder.is_wrapped:
        return "it is inside a multimodal wrapper, whose other parts need its architecture and its hidden size"
    if family.model_type == SecateurConfig.model_type:
        return "it is already in secateur's own form; cut the dense model by more instead"
    if family.order != "pre" and not family.detected:
        return "a norm stands between its branches and the residual stream, and does not commute with a rotation"
    return None


def _against_form(decoder: Decoder) -> str | None:
    family, config, module = decoder.anatomy.family, decoder.config, decoder.module
    if family.detected:
        return f"{family.model_type} is not among the families known exactly (secateur families)"
    if not family.attention_out or family.qkv == "by-unit":
        return "it is not known which rows and columns of its attention belong to a head"
    if any(next(present(block, family.shared_out), None) for block in find(module, family.blocks)):
        return "each token passes an expert of its own beside the routed ones"
    for name, value, reason in family.unsliceable:
        if getattr(config, name, None) == value:
            return reason
    if any(isinstance(find(module, path), nn.Linear) for path in (*family.embeddings[1:], *family.final[1:])):
        return "projections stand between its embeddings and its blocks"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return f"it has blocks of the kind {sorted(kinds)[0]}" if kinds else None


def folded_config(decoder: Decoder, refusal: str = CANNOT_SLICE, *, tied: bool = False) -> SecateurConfig:
    """Return the configuration of the folded model at full width; `tied` keeps a tied head tied (`can_stay_tied`).

    Raises:
        UnfoldableError: the family cannot be brought into this form; with `refusal` and the reason.
    """
    refuse_unsliceable(decoder, refusal)
    family, config = decoder.anatomy.family, decoder.config
    blocks = list(decoder.block_list)
    widths = [block_widths(decoder, index) for index in range(len(blocks))]
    centred = family.norm == "layernorm"
    norm_bias = centred and _has_bias(next(present(blocks[0], family.norms))[1])
    return SecateurConfig(
        vocab_size=find(decoder.module, family.head).weight.shape[0],
        hidden_size=decoder.hidden_size,
        num_hidden_layers=len(blocks),
        num_attention_heads=widths[0].heads,
        num_key_value_heads=widths[0].groups,
        head_dim=widths[0].head_size,
        max_position_embeddings=decoder.max_positions or 2048,
        parallel=decoder.anatomy.parallel,
        intermediate_sizes=[one.channels for one in widths],
        experts=[one.experts for one in widths],
        num_experts_per_tok=getattr(config, "num_experts_per_tok", None) or 2,
        norm_topk_prob=getattr(config, "norm_topk_prob", True),
        tie_word_embeddings=tied,
        final_scale=tied,
        gated=family.mlp_layout != "plain",
        hidden_act=getattr(config, family.activation, family.activation),
        norm_eps=norm_eps(find(decoder.module, family.final[0])),
        **_position_settings(decoder, widths[0].heads),
        **_head_norm_settings(decoder),
        clip_qkv=getattr(config, "clip_qkv", None),
        qkv_bias=norm_bias or _any_bias(blocks[0], family.attention_in),
        attention_out_bias=centred or _any_bias(blocks[0], family.attention_out),
        mlp_bias=norm_bias or _any_bias(blocks[0], family.mlp_in),
        mlp_out_bias=centred or _any_bias(blocks[0], family.mlp_out),
        head_bias=norm_bias or _has_bias(find(decoder.module, family.head)),
        pad_token_id=getattr(config, "pad_token_id", None),
        bos_token_id=getattr(config, "bos_token_id", None),
        eos_token_id=getattr(config, "eos_token_id", None),
    )


def can_stay_tied(decoder: Decoder) -> bool:
    """Return whether head and embeddings are tied and can stay tied if the stream is not rotated.

    The last norm must have no bias, and nothing may be folded into only one of the two.
    """
    family, config = decoder.anatomy.family, decoder.config
    factors = (family.embedding_multiplier, family.logits_multiplier, family.logits_divisor)
    scaled = getattr(find(decoder.module, family.embeddings[0]), "embed_scale", None) is not None
    plain = not scaled and all(getattr(config, name or "", 1.0) == 1.0 for name in factors)
    return decoder.anatomy.tied and plain and family.norm != "layernorm"


def _position_settings(decoder: Decoder, heads: int) -> dict[str, Any]:
    family, config, blocks = decoder.anatomy.family, decoder.config, decoder.block_count
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * blocks
    alibi = family.uses_alibi(config)
    found = {
        "layer_types": list(kinds),
        "sliding_window": window if "sliding_attention" in kinds else None,
        "positions": "alibi" if alibi else family.positions.removesuffix("-interleaved"),
    }
    if alibi:
        found["alibi_slopes"] = alibi_slopes(heads)
        found["alibi_in_bfloat16"] = family.alibi_scaled
        if family.alibi_scaled:
            found["alibi_scale"] = find(decoder.block_list[0], family.attention_scale)
    if found["positions"] == "rope":
        found["rope_parameters"] = copy.deepcopy(config.rope_parameters)
        rotating = getattr(config, "no_rope_layers", None)
        found["rope_blocks"] = [bool(one) for one in rotating] if rotating else None
    return found


def alibi_slopes(heads: int) -> list[float]:
    """Return each head's ALiBi slope: powers of 2^(-8/n), n the largest power of two up to the number of heads.

    Heads beyond n take every other slope of the finer series (Press et al. 2022, section 3)."""
    closest = 2 ** math.floor(math.log2(heads))
    finer = 2 ** (-4 / closest)
    slopes = [finer ** (2 * number) for number in range(1, closest + 1)]
    return slopes + [finer**number for number in range(1, 2 * (heads - closest), 2)]


def _head_norm_settings(decoder: Decoder) -> dict[str, Any]:
    family = decoder.anatomy.family
    norms = list(present(decoder.block_list[0], family.attention_norms))
    if not norms:
        return {}
    kind = "layernorm" if family.norm == "layernorm" else "rms"
    return {"qk_norm": kind, "qk_norm_per_head": _head_scales(norms[0][1]).dim() == 2}


def _head_scales(norm: Any) -> torch.Tensor:
    """Return the scales of a norm over heads: (h,) shared by all, or (heads, h)."""
    parts = getattr(norm, "norms", None)
    weight: torch.Tensor = torch.stack([part.weight for part in parts]) if parts is not None else norm.weight
    return weight.float()


def _any_bias(block: nn.Module, names: tuple[str, ...]) -> bool:
    return any(_has_bias(found) for _, found in present(block, names))


def _has_bias(module: Any) -> bool:
    return getattr(module, "bias", None) is not None


def norm_eps(norm: nn.Module) -> float:
    """Return the eps that a norm adds to the mean square."""
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", _FUNCTIONAL_EPS)))


def stream_sizes(config: SecateurConfig) -> StreamSizes:
    """Return the number of parameters per residual dimension of a folded model."""
    size = int(config.head_dim or 0)
    queries = config.num_attention_heads * size
    keys = int(config.num_key_value_heads or 0) * size
    head_scales = (queries + keys if config.qk_norm_per_head else 2 * size) if config.qk_norm else 0
    learned = config.positions.startswith("learned")
    attends = [not network for network in config.networks or ()]
    mlps = [
        (inner, count, *mlp_traits(config, network))
        for inner, count, network in zip(
            config.intermediate_sizes or (), config.experts or (), config.networks or (), strict=True
        )
    ]
    return StreamSizes(
        width=config.hidden_size,
        parallel=config.parallel,
        attention_in=tuple((queries + 2 * keys) * one for one in attends),
        attention_out=tuple((queries + config.attention_out_bias) * one for one in attends),
        mlp_in=tuple(count + (1 + gated) * inner * (count or 1) for inner, count, gated, _, _, _ in mlps),
        mlp_out=tuple((inner + out_bias) * (count or 1) for inner, count, _, _, out_bias, _ in mlps),
        fixed=tuple(
            ((queries + 2 * keys) * config.qkv_bias + head_scales) * attended
            + (1 + gated) * inner * (count or 1) * bias
            for attended, (inner, count, gated, bias, _, _) in zip(attends, mlps, strict=True)
        ),
        tables=config.vocab_size + learned * config.max_position_embeddings,
        head=1 if config.final_scale else config.vocab_size,
        other_fixed=config.vocab_size * config.head_bias,
    )


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply a tensor, without a copy if the factor is 1."""
    return tensor if factor == 1 else tensor * factor


def folded_block(decoder: Decoder, index: int) -> Tensors:
    """Return one block's folded weights under the names of `SecateurDecoderLayer`; they must be present."""
    family, config, block = decoder.anatomy.family, decoder.config, decoder.block_list[index]
    norms = [norm for _, norm in present(block, family.norms)]
    found: Tensors = {}
    _put(found, _attention_readers(decoder, block), norms[0], family.norm)
    _fold_attention_scale(decoder, block, found)
    _put(found, _mlp_readers(block, decoder), norms[-1], family.norm)
    multiplier = residual_factor(config, family)
    for name, (weight, bias) in _writers(block, decoder).items():
        weight, bias = scaled(weight, multiplier), None if bias is None else scaled(bias, multiplier)
        if family.norm == "layernorm":
            bias = torch.zeros(weight.shape[0], device=weight.device) if bias is None else bias
            weight, bias = weight - weight.mean(dim=0, keepdim=True), bias - bias.mean()
        found[f"{name}.weight"] = weight
        if bias is not None:
            found[f"{name}.bias"] = bias
    return found


Linear = tuple[torch.Tensor, torch.Tensor | None]


def _linear(module: Any) -> Linear:
    """Return weight (out, in) and bias of a linear layer."""
    weight: torch.Tensor = module.weight.float()
    return weight.T if isinstance(module, Conv1D) else weight, bias_of(module)


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """Return the bias of a layer in float32, or None."""
    bias: torch.Tensor | None = getattr(module, "bias", None)
    return None if bias is None else bias.float()


def _reading(weight: torch.Tensor, bias: torch.Tensor | None, norm: nn.Module, kind: str) -> Linear:
    """Fold a norm's scale and bias into a linear layer that reads from it."""
    return scaled_by_norm(weight, norm, kind), shifted_by_norm(weight, bias, norm)


def scaled_by_norm(weight: torch.Tensor, norm: nn.Module, kind: str) -> torch.Tensor:
    """Fold a norm's scale into a float32 weight (out, D) that reads from it."""
    scale: torch.Tensor | None = getattr(norm, "weight", None)
    return weight if scale is None else weight * (scale.to(weight.device, torch.float32) + (kind == "rms-plus-one"))


def shifted_by_norm(weight: torch.Tensor, bias: torch.Tensor | None, norm: nn.Module) -> torch.Tensor | None:
    """Return the bias of a linear layer with the bias of the norm it reads from folded in."""
    shift: torch.Tensor | None = getattr(norm, "bias", None)
    if shift is None:
        return bias
    moved = weight.float() @ shift.to(weight.device, torch.float32)
    return moved if bias is None else bias + moved


def _put(found: Tensors, readers: dict[str, Linear], norm: nn.Module, kind: str) -> None:
    for name, (weight, bias) in readers.items():
        weight, bias = _reading(weight, bias, norm, kind)
        found[f"{name}.weight"] = weight
        if bias is not None:
            found[f"{name}.bias"] = bias


def _attention_readers(decoder: Decoder, block: nn.Module) -> dict[str, Linear]:
    family = decoder.anatomy.family
    projections = [_linear(module) for _, module in present(block, family.attention_in)]
    if family.qkv == "separate":
        split = projections
    else:
        weight, bias = projections[0]
        weights = _split_heads(weight, decoder)
        biases = _split_heads(bias, decoder) if bias is not None else (None, None, None)
        split = list(zip(weights, biases, strict=True))
    return dict(zip(ATTENTION_READERS, split, strict=True))


def _split_heads(rows: torch.Tensor, decoder: Decoder) -> tuple[torch.Tensor, ...]:
    """Split the rows of a fused projection (or its bias) into those of queries, keys and values."""
    widths = block_widths(decoder, 0)
    size = widths.head_size
    if decoder.anatomy.family.qkv == "stacked":
        return rows.split([widths.heads * size, widths.groups * size, widths.groups * size])
    grouped = rows.view(widths.groups, widths.queries + 2, size, *rows.shape[1:])
    return tuple(part.flatten(0, 2) for part in (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]))


def _fold_attention_scale(decoder: Decoder, block: nn.Module, found: Tensors) -> None:
    """Rename norms of heads, fold attention scales other than 1/sqrt(h) into queries, and split interleaved pairs.

    Rotary pairs in adjacent rows are moved to the two halves of a head."""
    family, config = decoder.anatomy.family, decoder.config
    size = block_widths(decoder, 0).head_size
    names = [name for name in found if name.startswith(ATTENTION_READERS[:2])]
    for (_, norm), letter in zip(present(block, family.attention_norms), "qk", strict=False):
        found[f"self_attn.{letter}_norm.weight"] = _head_scales(norm)
        names.append(f"self_attn.{letter}_norm.weight")
    if family.positions == "rope-interleaved":
        rotated = int(size * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))
        order = torch.cat([torch.arange(rotated).view(-1, 2).T.flatten(), torch.arange(rotated, size)])
        for name in names:
            by_head = found[name].view(-1, size, *(found[name].shape[1:] if "proj" in name else ()))
            found[name] = by_head[:, order].reshape(found[name].shape)
    ratio = find(block, family.attention_scale) * math.sqrt(size)
    if abs(ratio - 1) > 1e-12:
        normed = "self_attn.q_norm.weight" in found
        for name in names:
            if name.startswith("self_attn.q_norm" if normed else "self_attn.q_proj"):
                found[name] = found[name] * ratio


def _mlp_readers(block: nn.Module, decoder: Decoder) -> dict[str, Linear]:
    family = decoder.anatomy.family
    modules = [module for _, module in present(block, family.mlp_in)]
    routers = [module for _, module in present(block, family.router)]
    if routers:
        found: dict[str, Linear] = {"mlp.gate": (routers[0].weight.float(), None)}
        for number, stacked in enumerate(modules[0].float()):
            gate, up = stacked.chunk(2)
            found |= {f"mlp.gate_projs.{number}": (gate, None), f"mlp.up_projs.{number}": (up, None)}
        return found
    linears = [_linear(module) for module in modules]
    if len(linears) == 2:
        return {"mlp.gate_proj": linears[0], "mlp.up_proj": linears[1]}
    if family.mlp_layout == "plain":
        return {"mlp.up_proj": linears[0]}
    weight, bias = linears[0]
    gate_bias, up_bias = bias.chunk(2) if bias is not None else (None, None)
    gate, up = weight.chunk(2)
    return {"mlp.gate_proj": (gate, gate_bias), "mlp.up_proj": (up, up_bias)}


def _writers(block: nn.Module, decoder: Decoder) -> dict[str, Linear]:
    family = decoder.anatomy.family
    found = {ATTENTION_WRITER: _linear(next(present(block, family.attention_out))[1])}
    writer = next(present(block, family.mlp_out))[1]
    if isinstance(writer, nn.Parameter):
        return found | {f"mlp.down_projs.{n}": (one, None) for n, one in enumerate(writer.float())}
    return found | {"mlp.down_proj": _linear(writer)}
