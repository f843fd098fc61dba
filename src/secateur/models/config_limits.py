"""Refuse configurations whose numbers no model can have, before anything is built from them.

What is built takes memory and time in proportion to these numbers, so the file is read first and on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

from secateur.errors import ModelError
from secateur.reading import MIB, FileKind, from_json

CONFIG = "config.json"
CONFIG_FILE = FileKind("configuration", 16 * MIB, error=ModelError, advice="Copy it again.")


@dataclass(frozen=True)
class _Limit:
    """Which numbers a key may have."""

    least: float
    most: float
    whole: bool = True

    def problem(self, value: Any) -> str | None:
        kind = "a whole number" if self.whole else "a number"
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return f"must be {kind}, not {_shown(value)}"
        if not self.least <= value <= self.most:
            return f"is {_shown(value)}; {kind} from {self.least:,} to {self.most:,} is possible"
        return None


_BLOCKS, _WIDTH, _HEADS = _Limit(1, 1024), _Limit(1, 1 << 20), _Limit(1, 1 << 14)
_EXPERTS, _POSITIVE, _SHARE = _Limit(0, 1 << 14), _Limit(1e-30, 1e30, whole=False), _Limit(0, 1, whole=False)
_LIMITS = (
    dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _BLOCKS)
    | dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "n_inner"), _WIDTH)
    | dict.fromkeys(("ffn_hidden_size", "word_embed_proj_dim", "moe_intermediate_size", "head_dim"), _WIDTH)
    | dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads"), _HEADS)
    | dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "n_routed_experts"), _EXPERTS)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), _Limit(1, 1 << 27))
    | dict.fromkeys(("sliding_window", "max_window_layers"), _Limit(0, 1 << 31))
    | dict.fromkeys(("rope_theta", "rotary_emb_base"), _POSITIVE)
    | dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"), _SHARE)
    | dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), _SHARE)
    | dict.fromkeys(("partial_rotary_factor", "rotary_pct", "dropout"), _SHARE)
    | {"vocab_size": _Limit(1, 1 << 24)}
)
_PER_BLOCK = ("intermediate_size",)
"""Keys that may also hold one number per block, as in Gemma 3n."""
_ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "is_encoder_decoder")
_KINDS: dict[str, type] = {
    "rope_scaling": dict,
    "rope_parameters": dict,
    "layer_types": list,
    "architectures": list,
    "auto_map": dict,
    "id2label": dict,
    "text_config": dict,
    "quantization_config": dict,
    "model_type": str,
    "dtype": str,
    "torch_dtype": str,
}


def refuse_impossible(folder: Path, source: str) -> None:
    """Refuse a folder's configuration for numbers, names or types that no model has; null stands for a default.

    Raises:
        ModelError: naming the key and what is possible.
    """
    path = folder / CONFIG
    if not path.exists():
        return  # whether there has to be one is decided elsewhere
    found = CONFIG_FILE.parsed(path, lambda text: from_json(text, any_integer=True))
    if not isinstance(found, dict):
        raise ModelError(f"{path}: not a valid configuration: a {type(found).__name__}, not an object.")
    for key, problem in _problems(found):
        raise ModelError(f"{source}: {key} in its {CONFIG} {problem}.")


def _problems(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        problem = None if value is None else _problem(key, value)
        if problem:
            yield prefix + key, problem
    yield from ((prefix + key, problem) for key, problem in _contradictions(config))
    for key in ("text_config", "rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict):
            yield from _problems(config[key], f"{prefix}{key}.")


def _problem(key: str, value: Any) -> str | None:
    if key in _PER_BLOCK and isinstance(value, list):
        return next((problem for one in value if (problem := _LIMITS[key].problem(one))), None)
    if key in _LIMITS:
        return _LIMITS[key].problem(value)
    if key in _ACTIVATIONS and not (isinstance(value, str) and value in ACT2FN):
        return f"is {_shown(value)}, which is no activation that transformers knows"
    if key in _SWITCHES and not isinstance(value, bool):
        return f"must be true or false, not {_shown(value)}"
    if key in _KINDS and not isinstance(value, _KINDS[key]):
        return f"must be {_NAMES[_KINDS[key]]}, not {_shown(value)}"
    if key in ("layer_types", "architectures") and not all(isinstance(one, str) for one in value):
        return "must be a list of names"
    return None


_NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a name"}


def _contradictions(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Find numbers that exclude each other; they are possible one by one."""
    blocks, width = _first(config, "num_hidden_layers", "n_layer"), _first(config, "hidden_size", "n_embd")
    heads, groups = _first(config, "num_attention_heads", "n_head"), _first(config, "num_key_value_heads")
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and blocks and len(kinds) != blocks:
        yield "layer_types", f"names {len(kinds)} blocks, and there are {blocks}"
    own = any(config.get(key) is not None for key in ("head_dim", "v_head_dim", "qk_head_dim"))
    if width and heads and not own and width % heads:
        yield "num_attention_heads", f"is {heads}, which does not divide the hidden size of {width}"
    if heads and groups and heads % groups:
        yield "num_key_value_heads", f"is {groups}, which does not divide num_attention_heads, {heads}"


def _first(config: dict[str, Any], *keys: str) -> int | None:
    found = next((config[key] for key in keys if key in config), None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
