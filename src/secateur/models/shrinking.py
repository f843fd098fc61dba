"""Small copies of a configuration that keep its proportions, for trials of an architecture.

All widths are divided by one number, so that whatever the architecture derives from them still fits together: heads
times their size, sums of rotated and plain dimensions, expansions. Counts of heads stay; of experts a few are enough.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from secateur.models.anatomy import text_config
from secateur.models.depth import settings_of_blocks

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""Exceptions that the code of an unknown architecture may raise while a small copy of it is tried out."""
_WIDTH = re.compile(
    r"size|dim|rank|width|intermediate|inner|ffn|dff|n_embd|d_model|d_state|d_ssm|d_head|d_rel|kv_channels|channels"
)
_NO_WIDTH = re.compile(
    r"vocab|window|kernel|chunk|block|patch|conv|num_|n_heads|group|position|type|topk|buckets|round|cache|multiple"
    r"|seq|length|max|range|batch"
)
_INNER = re.compile(r"intermediate|ffn|inner|dff|feed_forward|shared_expert")
_EXPERTS = re.compile(r"^(?:moe_)?n(?:um)?_(?:local_|routed_)?experts$")
CHOSEN = re.compile(r"experts?_per_tok(?:en)?$|^moe_k$|^moe_topk$|^top_k_experts$")
"""Names of configuration entries with the number of experts that a token is sent to."""
_ALIGNMENT = 8
"""Grouped matrix products need rows that start at multiples of 16 bytes."""
_MOST_EXPERTS, _MOST_CHOSEN = 16, 4
_VOCABULARY, _WINDOW, _CHUNK = 128, 8, 16
_DEPTHS, _TOWER = ("num_hidden_layers", "num_blocks"), 2
"""Configuration entries with the number of blocks of another tower, and how many are enough."""
_NARROWEST, _SMALLEST_HEAD = 64, 4
"""Hidden sizes, and heads, below twice this are left alone."""


def divisors(config: Any) -> Iterator[int]:
    """Yield what widths may be divided by, the smallest copy first; heads of no size of their own divide the width."""
    entries = config.to_dict()
    width = getattr(config, "hidden_size", None) or 1
    heads = entries.get(config.attribute_map.get("num_attention_heads", "num_attention_heads")) or 1
    size = entries.get("head_dim") or max(_SMALLEST_HEAD, width // heads)
    found = 1
    while width >= 2 * found * _NARROWEST and size >= 2 * found * _SMALLEST_HEAD:
        found *= 2
    while found >= 1:
        if found == 1 or entries.get("head_dim") or width % heads or width // found % heads == 0:
            yield found
        found //= 2


def shrunken(config: Any, divisor: int) -> Any:
    """Return a copy of a configuration with its widths divided, a small vocabulary and few experts."""
    tiny = copy.deepcopy(config)
    if settings_of_blocks(config):
        tiny.per_layer_config = None
    for name, value in _integers(config):
        small = _smaller(name, value, divisor)
        if small != value:
            setattr(tiny, name, small)
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig):
            small = shrunken(part, divisor)
            setattr(tiny, name, small if part is text_config(config) else _shallow(small))
    if own := settings_of_blocks(config):
        tiny.per_layer_config = {index: _all_smaller(entries, divisor) for index, entries in own.items()}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tiny, name, None) is not None:
            setattr(tiny, name, 0)
    return tiny


def _shallow(part: Any) -> Any:
    """Give another tower (for images or sound) few blocks, in place, unless its configuration lists them."""
    lengths = {len(value) for value in part.to_dict().values() if isinstance(value, list)}
    for name in _DEPTHS:
        depth = getattr(part, name, None)
        if type(depth) is int and depth > _TOWER and depth not in lengths:
            setattr(part, name, _TOWER)
    return part


def _integers(config: Any) -> Iterator[tuple[str, Any]]:
    own = {alias for alias in config.attribute_map if alias in config.to_dict()}
    for name, value in config.to_dict().items():
        if name in own:
            continue
        if type(value) is int or (isinstance(value, list) and value and all(type(one) is int for one in value)):
            yield name, value


def _all_smaller(entries: Any, divisor: int) -> dict[str, Any]:
    return {name: _smaller(name, value, divisor) if type(value) is int else value for name, value in entries.items()}


def _smaller(name: str, value: Any, divisor: int) -> Any:
    if isinstance(value, list):
        return [_smaller(name, one, divisor) for one in value] if _is_width(name) else value
    if "vocab" in name:
        return min(value, _VOCABULARY)
    if name.startswith("sliding_window") and not name.endswith("pattern"):
        return min(value, _WINDOW)
    if name.endswith("chunk_size"):
        return min(value, _CHUNK)
    if divisor == 1 or value == 0:
        return value  # 0 says that there is no such part
    if _EXPERTS.search(name):
        return min(value, _MOST_EXPERTS)
    if CHOSEN.search(name):
        return min(value, _MOST_CHOSEN)
    return _divided(name, value, divisor) if _is_width(name) else value


def _is_width(name: str) -> bool:
    return _WIDTH.search(name) is not None and _NO_WIDTH.search(name) is None


def _divided(name: str, value: int, divisor: int) -> int:
    if _INNER.search(name) and value % (_ALIGNMENT * divisor):
        return max(_ALIGNMENT, value // divisor // _ALIGNMENT * _ALIGNMENT)
    return max(1, value // divisor)
