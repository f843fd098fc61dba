"""A model with fewer blocks: its configuration, and a module built from it.

The new module is constructed from the new configuration, as `from_pretrained` will construct it later, and then given
the old module's tensors. What is measured in memory is therefore what will be loaded, and nothing is copied.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate import dispatch_model
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import ModelError
from secateur.models.anatomy import Family, parts_of, text_config


def config_with_blocks(config: Any, family: Family, kept: Sequence[int]) -> Any:
    """Return the configuration of the model that keeps only these blocks, in this order."""
    whole = copy.deepcopy(config)
    config, edited = text_config(config), text_config(whole)
    before = config.num_hidden_layers
    own = settings_of_blocks(config)
    for name in family.per_layer_lists:
        values = getattr(config, name, None)
        if isinstance(values, list | tuple) and len(values) == before:
            setattr(edited, name, [values[i] for i in kept])
    for name in family.per_point_lists:
        values = getattr(config, name)
        setattr(edited, name, values[: len(values) - len(values) // before * (before - len(kept))])
    for name in family.block_counts:
        setattr(edited, name, len(kept))
    for name in family.leading_counts:
        count = getattr(config, name, None)
        if isinstance(count, int):
            setattr(edited, name, sum(i < count for i in kept))
    if family.kv_shared:
        setattr(edited, family.kv_shared, sum(i >= first_sharing(config, family) for i in kept))
    for name in family.block_numbers:
        listed_numbers = set(getattr(config, name))
        setattr(edited, name, [new for new, old in enumerate(kept) if old in listed_numbers])
    if family.dense_blocks and getattr(config, family.dense_blocks, None) is not None:
        listed = set(getattr(config, family.dense_blocks))
        rhythm = getattr(config, "decoder_sparse_step", 1) or 1
        dense = [new for new, old in enumerate(kept) if old in listed or (old + 1) % rhythm]
        setattr(edited, family.dense_blocks, dense)
        edited.decoder_sparse_step = 1
    for name in family.last_numbers:
        last = getattr(config, name, None)
        if isinstance(last, int):
            setattr(edited, name, sum(i <= last for i in kept) - 1)
    for period, offset in family.periods:
        _set_period(edited, period, offset, [i % getattr(config, period) == getattr(config, offset) for i in kept])
    for name in family.cycles:
        kinds = getattr(config, name)
        setattr(edited, name, [kinds[i % len(kinds)] for i in kept])
    for name in family.depth_scales:
        setattr(edited, name, getattr(config, name) * math.sqrt(len(kept) / before))
    if own:
        edited.per_layer_config = None
    edited.num_hidden_layers = len(kept)
    if own:
        edited.per_layer_config = {new: own[old] for new, old in enumerate(kept) if old in own}
    return whole


def first_sharing(config: Any, family: Family) -> int:
    """Return the number of the first block that uses keys and values of an earlier one; if none does, of blocks."""
    text = text_config(config)
    return int(text.num_hidden_layers - (getattr(text, family.kv_shared) if family.kv_shared else 0))


def settings_of_blocks(config: Any) -> dict[int, dict[str, Any]]:
    """Return the settings that the configuration gives single blocks (`per_layer_config`), by block."""
    return {int(index): dict(own) for index, own in (config.to_dict().get("per_layer_config") or {}).items()}


def _set_period(config: Any, period: str, offset: str, wanted: Sequence[bool]) -> None:
    """Set a period and an offset by which just these blocks are of the kind.

    Raises:
        ModelError: there are none.
    """
    for length in range(1, len(wanted) + 2):
        for first in range(length):
            if all((i % length == first) == one for i, one in enumerate(wanted)):
                setattr(config, period, length)
                setattr(config, offset, first)
                return
    raise ModelError(
        f"the configuration of '{config.model_type}' gives the kinds of blocks by a period ({period}, {offset}), which "
        "the blocks that remain would not have; remove whole periods."
    )


def block_kind(config: Any, family: Family, index: int) -> tuple[Any, ...]:
    """Return the per-block entries of the configuration for this block: layer type, rotary positions, …"""
    lists = [getattr(config, name, None) for name in family.per_layer_lists]
    return tuple(
        values[index]
        for values in lists
        if isinstance(values, list | tuple) and len(values) == config.num_hidden_layers
    )


_NO_MIXING = {"mlp", "moe"}
"""Kinds of blocks that mix no tokens, where a block is attention, a state space or an MLP alone (Nemotron-H)."""


def reason_to_keep(config: Any, family: Family, gone: Collection[int]) -> str | None:
    """Return the reason why these blocks cannot all be removed, if there is one, as a clause.

    Some cannot go at all, and of each kind of sequence mixing (attention, state spaces, convolutions, …) one block
    stays: a hybrid without attention keeps no count of the tokens it has read, and cannot generate.
    """
    held = sorted(set(gone) & set(family.fixed_blocks))
    if held:
        return f"block {held[0]} must stay: {family.fixed_reason}"
    own = text_config(config)
    if family.periods:
        try:
            config_with_blocks(config, family, [i for i in range(own.num_hidden_layers) if i not in gone])
        except ModelError as error:
            return str(error).removesuffix(".")
    kinds = getattr(own, "layer_types", None) or getattr(own, "layers_block_type", None)
    if not isinstance(kinds, list | tuple) or len(kinds) != own.num_hidden_layers:
        return None
    first = first_sharing(config, family)
    for kind in dict.fromkeys(kinds[first:]):
        source = max(index for index in range(first) if kinds[index] == kind)
        readers = [index for index in range(first, len(kinds)) if kinds[index] == kind and index not in gone]
        if source in gone and readers:
            return f"block {source} must stay: block {readers[0]} uses its keys and values"
    last = max((index for index in range(len(kinds)) if index not in gone), default=0)
    if family.last_layer_type not in (None, kinds[last]):
        return f"block {last} cannot become the last one, which is always of the kind {family.last_layer_type}"
    mixing = ["attention" if "attention" in kind and kind != "linear_attention" else kind for kind in kinds]
    left = {kind for index, kind in enumerate(mixing) if index not in gone}
    lost = sorted(set(mixing) - left - _NO_MIXING)
    return f"the last block of the kind {lost[0]} must stay" if lost else None


def with_blocks(module: PreTrainedModel, family: Family, kept: Sequence[int]) -> PreTrainedModel:
    """Return a model that keeps only these blocks and shares the old model's tensors."""
    config = config_with_blocks(module.config, family, kept)
    before = text_config(module.config).num_hidden_layers
    with torch.device("meta"):
        new = type(module)._from_config(config, dtype=module.dtype)
    old_modules = dict(module.named_modules(remove_duplicate=False))  # activations may be one module for all
    packed = dict(family.packed)
    for name, holder in new.named_modules():
        source = old_modules.get(_name_before(name, family.blocks, kept))
        parameters = {} if source is None else dict(source._parameters)
        for leaf, tensor in parameters.items():
            axis = packed.get(f"{name}.{leaf}")
            if axis is not None and tensor is not None and len(kept) < before:
                parameters[leaf] = nn.Parameter(parts_of(tensor, axis, before, kept), requires_grad=False)
        if source is None or type(source) is not type(holder) or _shapes(parameters) != _shapes(holder._parameters):
            raise ModelError(
                f"no configuration of '{module.config.model_type}' describes the model that keeps just these blocks "
                f"({name} would be of another kind)."
            )
        holder._parameters.update(parameters)
        holder._buffers.update({leaf: source._buffers[leaf] for leaf in holder._buffers})
    new.tie_weights()
    new.generation_config = copy.deepcopy(module.generation_config)
    conversions = getattr(module, "_weight_conversions", None)
    if conversions is not None:
        new._weight_conversions = conversions
    _dispatch_like(module, new, family, kept)
    return new.eval()


def _shapes(parameters: Mapping[str, torch.Tensor | None]) -> dict[str, Any]:
    return {leaf: None if one is None else one.shape for leaf, one in parameters.items()}


def _name_before(name: str, blocks: str, kept: Sequence[int]) -> str:
    prefix = f"{blocks}."
    if not name.startswith(prefix):
        return name
    number, dot, rest = name[len(prefix) :].partition(".")
    return f"{prefix}{kept[int(number)]}{dot}{rest}"


def _dispatch_like(module: nn.Module, new: nn.Module, family: Family, kept: Sequence[int]) -> None:
    """Distribute the new model over the old model's devices."""
    placed = getattr(module, "hf_device_map", None)
    if not placed or len(set(placed.values())) < 2:
        return
    prefix = f"{family.blocks}."
    new_map = {name: device for name, device in placed.items() if not name.startswith(prefix)}
    for index, old in enumerate(kept):
        new_map[f"{prefix}{index}"] = _place_of(f"{prefix}{old}", placed)
    dispatch_model(new, device_map=new_map, skip_keys=getattr(module, "_skip_keys_device_placement", None))


def _place_of(path: str, placed: Mapping[str, Any]) -> Any:
    """Look up a module in a device map, which lists the largest modules that are on one device."""
    above = [path.rsplit(".", count)[0] for count in range(path.count(".") + 1)]
    return next(placed[name] for name in (*above, "") if name in placed)
