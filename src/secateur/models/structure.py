"""The MLPs of an architecture without a row, found by what changes its shape with the sizes a configuration names.

Each size is made a little smaller in a small copy. The tensors whose shapes follow it are what reads into the MLP and
what writes out of it, whatever their names. Two trials on the copy prove the guess: without some channels it computes
what the masked original computes, and a matrix folded into the output projections acts on what the MLP adds to the
residual stream.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.models.anatomy import (
    EXPERT_TENSORS,
    Family,
    find,
    holds_transposed,
    mlp_writers,
    present,
    residual_factor,
    set_parameter,
    text_config,
)
from secateur.models.decoder import Decoder
from secateur.models.forward import capture, run_block
from secateur.models.shrinking import FAILURES
from secateur.models.wrappers import auto_class

_SIZES = re.compile(r"intermediate|inner|ffn|feed_forward|dff|dim_ff|mlp")
_STEP, _NARROWEST = 8, 16
_ADJUSTMENTS = (("block_auto_adjust_ff_dim", False),)
"""Configuration entries, with the value that lets a size be the width itself and not what a width is computed from."""
ALLOWED = 1e-5
"""Difference of logits that is rounding, relative to the largest."""
_SAME = 1e-4
"""Relative difference at which a measured factor is that of the configuration."""


@dataclass(frozen=True)
class Axis:
    """The axis of a tensor along which its shape follows a size.

    Attributes:
        axis: its number.
        times: how many entries there are for each channel.
    """

    axis: int
    times: int


@dataclass
class Size:
    """A size in the configuration, and what follows it in each block.

    Attributes:
        setting: the configuration entry.
        width: how many channels there are.
        scale: what the entry grows by with each of them; 2 where it counts gate and up together.
        followers: by block, the tensors that follow it.
    """

    setting: str
    width: int
    scale: int
    followers: dict[int, dict[str, Axis]] = field(default_factory=dict)


@torch.no_grad()
def with_mlp(family: Family, decoder: Decoder, tokens: torch.Tensor, *, trust_remote_code: bool = False) -> Family:
    """Return a family row with the MLPs of a small copy, as far as the trials prove them.

    Where blocks share weights there are none, because no block can be edited by itself.
    """
    parameters = [id(one) for block in decoder.block_list for one in block.parameters()]
    if len(parameters) > len(set(parameters)):
        return replace(family, order="post")
    resized = tuple((name, off) for name, off in _ADJUSTMENTS if getattr(decoder.config, name, off) != off)
    for name, off in resized:
        setattr(decoder.config, name, off)
    found = replace(family, resized=resized)
    for size in _sizes(decoder, anew=bool(resized), trust_remote_code=trust_remote_code):
        if _proves_width(decoder, size, tokens, trust_remote_code=trust_remote_code):
            found = _with_size(found, decoder, size)
    plain = bool(found.mlp_out) and _writes_stream(decoder, found, tokens)
    if not plain:
        return replace(found, order="post")
    return replace(found, order="pre", residual_multiplier=_residual_multiplier(decoder, found, tokens))


def _sizes(decoder: Decoder, *, anew: bool, trust_remote_code: bool) -> Iterator[Size]:
    """Yield the sizes that only projections follow, inside blocks; `anew` reads all values off the shapes."""
    config = decoder.config
    shapes = {name: tuple(one.shape) for name, one in decoder.module.named_parameters()}
    for setting, value in config.to_dict().items():
        if (value is None or anew) and _SIZES.search(setting):
            value = _implied(decoder, setting, shapes, trust_remote_code=trust_remote_code)
            if value is None:
                continue
            setattr(config, setting, value)
        if not _SIZES.search(setting) or type(value) is not int or value < _NARROWEST:
            continue
        try:
            smaller = with_setting(decoder, setting, value - _STEP, trust_remote_code=trust_remote_code)
        except FAILURES:
            continue
        size = _followers(decoder, setting, shapes, smaller)
        if size is not None:
            yield size


def _implied(
    decoder: Decoder, setting: str, shapes: Mapping[str, tuple[int, ...]], *, trust_remote_code: bool
) -> int | None:
    """Return the value that a size has where the configuration leaves it open, read off what follows it."""
    try:
        other = with_setting(decoder, setting, _NARROWEST, trust_remote_code=trust_remote_code)
    except FAILURES:
        return None
    now = {name: tuple(one.shape) for name, one in other.named_parameters()}
    changed = (old for name in shapes for old, new in zip(shapes[name], now.get(name, ()), strict=False) if old != new)
    return min(changed, default=None)


def with_setting(
    decoder: Decoder, setting: str, value: int, *, trust_remote_code: bool, device: str = "meta"
) -> PreTrainedModel:
    """Return a model that differs in one size, by default without weights."""
    config = copy.deepcopy(decoder.module.config)
    setattr(text_config(config), setting, value)
    with torch.device(device):
        return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)


def changed_axes(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> dict[str, int] | None:
    """Return the axis along which each tensor has another length; None where tensors come, go or change along two."""
    if before.keys() != after.keys():
        return None
    found = {}
    for name, old in before.items():
        changed = [axis for axis, (one, other) in enumerate(zip(old, after[name], strict=True)) if one != other]
        if len(changed) > 1:
            return None
        if changed:
            found[name] = changed[0]
    return found


def _followers(
    decoder: Decoder, setting: str, shapes: Mapping[str, tuple[int, ...]], smaller: PreTrainedModel
) -> Size | None:
    """Compare shapes; None if nothing follows the size, or something other than projections inside blocks."""
    now = {name: tuple(one.shape) for name, one in smaller.named_parameters()}
    if now.keys() != shapes.keys():
        return None
    blocks = f"{decoder.anatomy.family.blocks}."
    changed: dict[str, int] = {}
    for name, before in shapes.items():
        axes = [axis for axis, (old, new) in enumerate(zip(before, now[name], strict=True)) if old != new]
        if axes and (not name.startswith(blocks) or len(axes) != 1):
            return None
        if axes:
            (changed[name],) = axes
    lost = {name: shapes[name][axis] - now[name][axis] for name, axis in changed.items()}
    channels = min((_STEP, *lost.values()))
    if channels < 1 or not changed or _STEP % channels:
        return None
    widths = {shapes[name][axis] * channels / lost[name] for name, axis in changed.items()}
    if len(widths) > 1 or any(one % channels for one in lost.values()) or not min(widths).is_integer():
        return None
    size = Size(setting, int(min(widths)), _STEP // channels)
    for name, axis in changed.items():
        number, _, path = name.removeprefix(blocks).partition(".")
        size.followers.setdefault(int(number), {})[path] = Axis(axis, lost[name] // channels)
    known = all(
        _role(decoder.block_list[index], path, one.axis) is not None
        for index, followers in size.followers.items()
        for path, one in followers.items()
    )
    return size if known else None


def _role(block: nn.Module, path: str, axis: int) -> str | None:
    """Return whether a tensor reads into or writes out of an MLP: `in`, `out`, `bias`; None if it does neither."""
    owner_path, _, leaf = path.rpartition(".")
    owner, tensor = block.get_submodule(owner_path), find(block, path)
    if tensor.dim() == 3:
        if leaf not in EXPERT_TENSORS:
            return None
        return "in" if (axis == 2) == holds_transposed(owner) else "out"
    if tensor.dim() == 2 and isinstance(owner, nn.Linear | Conv1D):
        return "in" if (axis == 1) == isinstance(owner, Conv1D) else "out"
    if leaf == "bias" and isinstance(owner, nn.Linear | Conv1D):
        return "bias"
    return "bias" if leaf.endswith("_bias") and tensor.dim() == 2 else None


def _is_stacked(block: nn.Module, path: str) -> bool:
    return find(block, path).dim() == 3


def _module(block: nn.Module, path: str) -> str:
    """Return the name a row gives a tensor: that of its layer, or of a tensor of all experts its own."""
    return path if _is_stacked(block, path) else path.rpartition(".")[0]


def _with_size(family: Family, decoder: Decoder, size: Size) -> Family:
    """Add what follows a size to a row; what stands beside experts and follows another size is shared, and stays."""
    for index, followers in size.followers.items():
        block = decoder.block_list[index]
        roles = {path: _role(block, path, one.axis) for path, one in followers.items()}
        experts = [path for path in followers if _is_stacked(block, path)]
        mixed = any(name.endswith(EXPERT_TENSORS) and one.dim() == 3 for name, one in block.named_parameters())
        own = [path for path in followers if not experts or path in experts]
        beside = [path for path in followers if path not in own]
        if mixed and not experts:
            own, beside = [], list(followers)
        readers = [path for path in own if roles[path] == "in"]
        stacked = any(followers[path].times == 2 for path in readers)
        if experts or (readers and not family.mlp_out):
            family = replace(family, mlp_layout="stacked" if stacked else "gate-up" if len(readers) > 1 else "plain")
        family = replace(
            family,
            mlp_in=_joined(family.mlp_in, block, readers, first=bool(experts)),
            mlp_out=_joined(family.mlp_out, block, [p for p in own if roles[p] == "out"], first=bool(experts)),
            shared_in=_joined(family.shared_in, block, [p for p in beside if experts and roles[p] == "in"]),
            shared_out=_joined(family.shared_out, block, [p for p in beside if roles[p] == "out"]),
            expert_size=size.setting if experts else family.expert_size,
            inner_size=size.setting if own and not experts else family.inner_size,
            inner_scale=size.scale if own and not experts else family.inner_scale,
        )
    return family


def _joined(names: tuple[str, ...], block: nn.Module, paths: Sequence[str], *, first: bool = False) -> tuple[str, ...]:
    found = tuple(_module(block, path) for path in paths)
    return tuple(dict.fromkeys((*found, *names) if first else (*names, *found)))


def _proves_width(decoder: Decoder, size: Size, tokens: torch.Tensor, *, trust_remote_code: bool) -> bool:
    """Return whether the model without some channels computes what the original with these masked does."""
    generator = torch.Generator().manual_seed(0)
    stays = torch.randperm(size.width, generator=generator)[: size.width - _STEP].sort().values
    blocks = f"{decoder.anatomy.family.blocks}."
    small = with_setting(decoder, size.setting, len(stays) * size.scale, trust_remote_code=trust_remote_code)
    masked = copy.deepcopy(decoder.module)
    for name, parameter in decoder.module.named_parameters():
        number, _, path = name.removeprefix(blocks).partition(".")
        follower = size.followers.get(int(number), {}).get(path) if name.startswith(blocks) else None
        if follower is None:
            set_parameter(small, name, parameter)
            continue
        block = decoder.block_list[int(number)]
        kept = _entries(block, path, follower, size.width, stays)
        set_parameter(small, name, parameter.index_select(follower.axis, kept))
        if _role(block, path, follower.axis) == "out":
            gone = torch.ones(parameter.shape[follower.axis], dtype=torch.bool)
            gone[kept] = False
            find(masked, name).index_fill_(follower.axis, gone.nonzero().flatten(), 0.0)
    take_buffers(small, decoder.module)
    try:
        return same_logits(small, masked, tokens)
    except FAILURES:
        return False


def take_buffers(small: PreTrainedModel, module: nn.Module) -> None:
    """Give a smaller model, whose parameters are set, the buffers of the original."""
    buffers = dict(module.named_buffers())
    for path, holder in small.named_modules():
        for leaf in holder._buffers:
            holder._buffers[leaf] = buffers.get(f"{path}.{leaf}" if path else leaf)
    small.tie_weights()


def same_logits(small: nn.Module, masked: nn.Module, tokens: torch.Tensor) -> bool:
    """Return whether a smaller model computes what the masked original computes."""
    found = small.eval()(input_ids=tokens, use_cache=False).logits
    expected = masked(input_ids=tokens, use_cache=False).logits
    return torch.allclose(found, expected, rtol=0, atol=ALLOWED * float(expected.abs().max()))


def _entries(block: nn.Module, path: str, follower: Axis, value: int, stays: torch.Tensor) -> torch.Tensor:
    """Return the entries along the axis that belong to the channels that stay."""
    owner = block.get_submodule(path.rpartition(".")[0])
    if getattr(owner, "is_concatenated", True) or follower.times == 1:
        return torch.cat([stays + part * value for part in range(follower.times)])
    return (stays[:, None] * follower.times + torch.arange(follower.times)).flatten()


def _writes_stream(decoder: Decoder, family: Family, tokens: torch.Tensor) -> bool:
    """Return whether a matrix folded into the MLPs' output projections acts on what they add to the stream."""
    if family.streams > 1:
        return False
    hidden, calls = capture(decoder, tokens)
    width = decoder.hidden_size
    turn = torch.eye(width) + 0.3 * torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    for index, call in enumerate(calls):
        block = decoder.block_list[index]
        writers = {name: (one, last) for name, one, last in mlp_writers(block, family)}
        after = run_block(block, call, hidden)
        if writers:
            rest = run_block(block, call, hidden, {name: torch.zeros_like(one) for name, (one, _) in writers.items()})
            folded = {name: one @ turn if last else turn.T @ one for name, (one, last) in writers.items()}
            expected = rest + (after - rest) @ turn
            found = run_block(block, call, hidden, folded)
            if not torch.allclose(found, expected, rtol=0, atol=10 * ALLOWED * float(expected.abs().max())):
                return False
        hidden = after
    return True


def _residual_multiplier(decoder: Decoder, family: Family, tokens: torch.Tensor) -> str | None:
    """Return the configuration entry with the factor by which the output of an MLP enters the residual stream.

    It is read off what a block adds for a shift of that output; None where it is 1, or all MLPs are mixtures.
    """
    hidden, calls = capture(decoder, tokens)
    for index, call in enumerate(calls):
        block = decoder.block_list[index]
        before = run_block(block, call, hidden)
        dense = [found for _, found in present(block, family.mlp_out) if isinstance(found, nn.Module)]
        if dense:
            handle = dense[0].register_forward_hook(lambda _module, _args, output: output + 1.0)
            try:
                factor = float((run_block(block, call, hidden) - before).mean())
            finally:
                handle.remove()
            return _entry_of(decoder.config, family, factor)
        hidden = before
    return None


def _entry_of(config: Any, family: Family, factor: float) -> str | None:
    if math.isclose(factor, 1.0, rel_tol=_SAME):
        return None
    for name, value in config.to_dict().items():
        if type(value) in (int, float) and value > 0:
            found = residual_factor(config, replace(family, residual_multiplier=name))
            if math.isclose(found, factor, rel_tol=_SAME):
                return name
    return None
