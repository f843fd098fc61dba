"""What a GGUF file of a model holds: its layout, metadata and tensors, in the order in which they are written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from secateur.errors import ModelError
from secateur.export.gguf_layout import LAYOUTS, LLAMA, UNEVEN, Layout, Named
from secateur.modeling import DeciLMConfig, SecateurConfig
from secateur.models.anatomy import find
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths
from secateur.surgery.hidden.folding import norm_eps
from secateur.surgery.uneven import against_llama, query_heads

_HEADS = {"q_proj.weight": "queries", "q_proj.bias": "queries", "k_proj.weight": "groups", "k_proj.bias": "groups"}


def layout_of(decoder: Decoder) -> Layout:
    """Return how llama.cpp stores a model.

    Raises:
        ModelError: it cannot run a model of this family or of these shapes; the message says why.
    """
    config = decoder.config
    if isinstance(config, SecateurConfig):
        if (reason := against_llama(config)) is not None:
            raise _refused(decoder, reason)
        return UNEVEN
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise _refused(decoder, f"only {', '.join(LAYOUTS)} are written, not '{config.model_type}'")
    if layout.square and (wide := _query_width(decoder)) != decoder.hidden_size:
        if config.model_type != "qwen2":
            needed = f"as many query dimensions as hidden ones; here {wide} and {decoder.hidden_size}"
            raise _refused(
                decoder, f"its '{layout.name}' needs {needed}. Prune with heads=never, or keep the hidden size"
            )
        layout = LLAMA  # the same computation, with the head size in the file
    if (reason := layout.refusal(config) or _against_head(decoder, layout)) is not None:
        raise _refused(decoder, reason)
    named = decoder.anatomy.family.activation
    activation = str(getattr(config, named, None) or getattr(config, "hidden_activation", named))
    if not activation.startswith(layout.activation):
        raise _refused(decoder, f"its '{layout.name}' computes {layout.activation}, this model {activation}")
    return layout


def _refused(decoder: Decoder, reason: str) -> ModelError:
    return ModelError(f"{decoder.source}: llama.cpp cannot run this model: {reason}.")


def _query_width(decoder: Decoder) -> int:
    widths = block_widths(decoder, 0)
    return widths.heads * widths.head_size


def _against_head(decoder: Decoder, layout: Layout) -> str | None:
    head = decoder.module.get_output_embeddings()
    if layout.own_head is False and not decoder.anatomy.tied:
        return f"its '{layout.name}' always uses the embeddings as head, and this head is its own"
    if getattr(head, "bias", None) is not None and not layout.head_bias:
        return f"its '{layout.name}' has no bias in the head"
    return None


# Metadata


_SILENT = 32
"""Channels of an MLP written where there is none; quantised rows need a multiple of this."""


def metadata(decoder: Decoder, layout: Layout) -> dict[str, Any]:
    """Return the entries of the file that describe the model's computation.

    Raises:
        ModelError: its positions are scaled in a way that llama.cpp does not know.
    """
    config, family = decoder.config, decoder.anatomy.family
    widths = [_widths(decoder, index) for index in range(decoder.block_count)]
    sizes = block_widths(decoder, _with_attention(decoder))
    norm = "layer_norm_epsilon" if family.norm == "layernorm" else "layer_norm_rms_epsilon"
    facts: dict[str, Any] = {
        "block_count": decoder.block_count,
        "context_length": decoder.max_positions or 2048,
        "embedding_length": decoder.hidden_size,
        "vocab_size": int(decoder.module.get_input_embeddings().num_embeddings),
        "feed_forward_length": _one_or_all([channels or _SILENT for _, _, channels in widths]),
        "attention.head_count": _one_or_all([heads for heads, _, _ in widths]),
        "attention.head_count_kv": _one_or_all([groups for _, groups, _ in widths]),
        "attention.key_length": sizes.head_size,
        "attention.value_length": sizes.head_size,
        f"attention.{norm}": norm_eps(find(decoder.module, family.final[0])),
    }
    facts |= _positions(decoder, sizes.head_size) | layout.facts(config)
    if layout.period is not None:
        facts["attention.sliding_window"] = int(config.sliding_window)
        facts["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    return {f"{layout.name}.{name}": value for name, value in facts.items()}


def _widths(decoder: Decoder, index: int) -> tuple[int, int, int]:
    """Return query heads, key/value heads and channels of a block; what is absent has none."""
    config = decoder.config
    if isinstance(config, SecateurConfig):
        assert config.key_value_heads is not None
        assert config.intermediate_sizes is not None
        heads = query_heads(config)[index]
        return heads, config.key_value_heads[index] if heads else 0, config.intermediate_sizes[index]
    found = block_widths(decoder, index)
    return found.heads, found.groups, found.channels


def _with_attention(decoder: Decoder) -> int:
    return next(index for index in range(decoder.block_count) if _widths(decoder, index)[0])


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _rope(config: Any) -> dict[str, Any]:
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)


def _positions(decoder: Decoder, head_size: int) -> dict[str, Any]:
    config = decoder.config
    rope = _rope(config)
    if "rope_theta" not in rope:
        return {}
    facts: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": head_size}
    local = (config.rope_parameters.get("sliding_attention") or {}).get("rope_theta")
    if local is not None:
        facts["rope.freq_base_swa"] = float(local)
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return facts
    if kind == "linear":
        return facts | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "longrope":
        return facts | {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": _long_attention(config, rope)}
    if kind == "yarn":
        facts |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(
                rope.get("original_max_position_embeddings") or config.max_position_embeddings
            ),
        }
        named = {
            "attention_factor": "attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        return facts | {f"rope.scaling.{theirs}": float(rope[ours]) for ours, theirs in named.items() if rope.get(ours)}
    raise _refused(decoder, f"its rotary positions are scaled by '{kind}'")


def _long_attention(config: Any, rope: dict[str, Any]) -> float:
    original = int(rope["original_max_position_embeddings"])
    scale = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


# Tensors


def tensors(decoder: Decoder, layout: Layout, *, shapes: bool = False) -> Named:
    """Yield the tensors of the file by name, in float32; with `shapes` on the meta device, reading no weights.

    Raises:
        ModelError: a weight has no place in llama.cpp's architecture.
    """
    names = _Names(decoder, layout)
    blocks = f"{decoder.anatomy.family.blocks}."
    folded = isinstance(decoder.config, SecateurConfig) and not isinstance(decoder.config, DeciLMConfig)
    yield from _rope_factors(decoder)
    with nullcontext() if shapes else decoder.outer():
        outside = [(name, one) for name, one in decoder.module.named_parameters() if not name.startswith(blocks)]
        yield from names.of(_floats(outside, shapes))
        if layout.own_head is None and decoder.anatomy.tied:
            table = decoder.module.get_input_embeddings().weight
            yield from (("output.weight", one) for _, one in names.of(_floats([(names.table, table)], shapes)))
        if folded and not decoder.config.final_scale:
            yield "output_norm.weight", _ones(decoder, shapes)
    for index in range(decoder.block_count):
        with nullcontext(decoder.block_list[index]) if shapes else decoder.block(index) as block:
            named = [(f"{blocks}{index}.{name}", one) for name, one in block.named_parameters()]
            if folded:
                heads, _, _ = _widths(decoder, index)
                for part in (*["attn_norm"] * bool(heads), "ffn_norm"):
                    yield f"blk.{index}.{part}.weight", _ones(decoder, shapes)
            yield from names.of(_floats(named, shapes), index)
        if not _widths(decoder, index)[2]:
            yield from _silent_mlp(decoder, index, norm=not folded, shapes=shapes)


def _silent_mlp(decoder: Decoder, index: int, *, norm: bool, shapes: bool) -> Named:
    """Yield an MLP that writes nothing: llama.cpp leaves out the attention, too, of a block without an MLP."""
    place, width = torch.device("meta" if shapes else "cpu"), decoder.hidden_size
    if norm:
        yield f"blk.{index}.ffn_norm.weight", _ones(decoder, shapes)
    for part in ("ffn_gate", "ffn_up"):
        yield f"blk.{index}.{part}.weight", torch.zeros(_SILENT, width, device=place)
    yield f"blk.{index}.ffn_down.weight", torch.zeros(width, _SILENT, device=place)


def _floats(named: list[tuple[str, Any]], shapes: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in named:
        yield name, torch.empty(parameter.shape, device="meta") if shapes else parameter.detach().to("cpu").float()


def _ones(decoder: Decoder, shapes: bool) -> torch.Tensor:
    return torch.ones(decoder.hidden_size, device="meta" if shapes else "cpu")


class _Names:
    """The names and the order of rows that tensors have in the file."""

    def __init__(self, decoder: Decoder, layout: Layout) -> None:
        import gguf

        number = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.name)
        self._map = gguf.get_tensor_name_map(number, decoder.block_count)
        self._decoder, self._layout = decoder, layout
        self.table = f"{decoder.anatomy.family.embeddings[0]}.weight"

    def of(self, named: Iterator[tuple[str, torch.Tensor]], index: int | None = None) -> Named:
        """Yield named tensors as they are in the file; `index` is their block."""
        layout = self._layout
        for name, tensor in named:
            for part, piece in layout.rows(name, tensor, self._decoder.config) if layout.rows else ((name, tensor),):
                found = self._map.get_name(part, (".weight", ".bias"))
                if found is None:
                    raise _refused(self._decoder, f"its '{layout.name}' has no place for {name}")
                if layout.norm_offset and found.endswith("_norm.weight"):
                    piece = piece + layout.norm_offset
                if layout.interleaved and index is not None:
                    piece = self._interleaved(part, piece, index)
                yield found, piece

    def _interleaved(self, name: str, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """Reorder the rows of each head from two halves to adjacent pairs."""
        part = next((kind for suffix, kind in _HEADS.items() if name.endswith(suffix)), None)
        if part is None:
            return tensor
        heads, groups, _ = _widths(self._decoder, index)
        count = heads if part == "queries" else groups
        return tensor.reshape(count, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _rope_factors(decoder: Decoder) -> Named:
    """Yield the factors by which rotary frequencies are divided, where positions are scaled by frequency."""
    rope = _rope(decoder.config)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"], dtype=torch.float32)
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"], dtype=torch.float32)
    if kind == "llama3":
        size = block_widths(decoder, _with_attention(decoder)).head_size
        yield "rope_freqs.weight", _llama3_factors(rope, size)


def _llama3_factors(rope: dict[str, Any], head_size: int) -> torch.Tensor:
    """Return Llama 3's divisors: 1 for short waves, `factor` for long ones, and a blend of frequencies between."""
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = ((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - blend) / rope["factor"] + blend)).float()
