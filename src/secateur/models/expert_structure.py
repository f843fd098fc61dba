"""The experts of an architecture without a row, found by what changes its shape with their number.

A small copy with one more expert in each group of the router has the same tensors, some of them longer along one axis:
those are the experts, and what the router holds for each. Two trials prove the guess: the copy runs with that number,
and with its experts in another order, together with all that belongs to them, it computes the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.models.anatomy import Family, find, saved_tensors
from secateur.models.decoder import Decoder
from secateur.models.experts import experts_path
from secateur.models.shrinking import CHOSEN, FAILURES
from secateur.models.structure import ALLOWED, changed_axes, with_setting

_GROUPS = ("n_group", "topk_group")
"""Configuration entries with the number of groups of experts, and of those that a token may choose from."""


@dataclass(frozen=True)
class _Count:
    """A configuration entry that counts experts.

    Attributes:
        setting: its name.
        value: how many there are.
        more: another number that the router allows.
        axes: for every tensor that follows it, by its path in the model, the axis that runs over experts.
    """

    setting: str
    value: int
    more: int
    axes: dict[str, int]


@dataclass
class _Seen:
    """What was called while a model ran.

    Attributes:
        routers: how many routers gave a number for each expert.
        chosen: the experts of a token, as many as each call of the experts named.
    """

    routers: int = 0
    chosen: list[int] = field(default_factory=list)


@torch.no_grad()
def with_experts(family: Family, decoder: Decoder, tokens: torch.Tensor, *, trust_remote_code: bool = False) -> Family:
    """Return a family row with what removing experts needs, as far as the trials on a small copy prove it."""
    paths = [experts_path(block, family) for block in decoder.block_list]
    experts = [f"{family.blocks}.{number}.{path}" for number, path in enumerate(paths) if path]
    groups = _GROUPS if all(type(getattr(decoder.config, name, None)) is int for name in _GROUPS) else None
    each = getattr(decoder.config, groups[0]) if groups else 1
    count = next(_counts(decoder, experts, each, trust_remote_code=trust_remote_code), None)
    if count is None:
        return family
    router = _router(decoder.module, family, count, experts)
    original = _with_random_routers(decoder.module, count, experts)
    try:
        with _watching(original, count, experts, router) as seen:
            expected = original(input_ids=tokens, use_cache=False).logits
        found = _in_another_order(original, count, in_groups=each > 1)(input_ids=tokens, use_cache=False).logits
        more = with_setting(decoder, count.setting, count.more, device="cpu", trust_remote_code=trust_remote_code)
        more.eval()(input_ids=tokens, use_cache=False)
    except FAILURES:
        return family
    chosen = _setting_of(decoder.config, seen.chosen)
    same = torch.allclose(found, expected, rtol=0, atol=ALLOWED * float(expected.abs().max()))
    if chosen is None or not same or seen.routers < len(experts):
        return family
    counts = (count.setting,)
    return replace(family, router=router, expert_counts=counts, experts_per_token=chosen, expert_groups=groups)


def _counts(decoder: Decoder, experts: Sequence[str], each: int, *, trust_remote_code: bool) -> Iterator[_Count]:
    """Yield the entries that all experts follow, and nothing outside blocks; `each` more experts are allowed."""
    before = {name: one.shape for name, one in saved_tensors(decoder.module)}
    counts = {find(decoder.module, path).down_proj.shape[0] for path in experts}
    for setting, value in decoder.config.to_dict().items():
        if "expert" not in setting or type(value) is not int or counts != {value}:
            continue
        try:
            larger = with_setting(decoder, setting, value + each, trust_remote_code=trust_remote_code)
        except FAILURES:
            continue
        axes = changed_axes(before, {name: one.shape for name, one in saved_tensors(larger)})
        inside = axes is not None and all(name.startswith(f"{decoder.anatomy.family.blocks}.") for name in axes)
        if axes and inside and all(f"{path}.down_proj" in axes for path in experts):
            yield _Count(setting, value, value + each, axes)


def _router(module: nn.Module, family: Family, count: _Count, experts: Sequence[str]) -> tuple[str, ...]:
    """Return what follows the number besides experts, by paths in a block: modules with a matrix, then the rest."""
    rest = [name for name in count.axes if not name.startswith(tuple(f"{path}." for path in experts))]
    where = {name: name.removeprefix(f"{family.blocks}.").partition(".")[2] for name in rest}
    modules = {
        where[name].rpartition(".")[0] for name in rest if find(module, name).dim() == 2 and name.endswith("weight")
    }
    beside = {path for path in where.values() if not path.startswith(tuple(f"{one}." for one in modules))}
    return (*sorted(modules), *sorted(beside))


def _with_random_routers(module: PreTrainedModel, count: _Count, experts: Sequence[str]) -> PreTrainedModel:
    """Return a copy whose routers choose at random, so that no two experts are alike to them."""
    found, generator = copy.deepcopy(module), torch.Generator().manual_seed(0)
    for name, tensor in saved_tensors(found):
        if name in count.axes and not name.startswith(tuple(f"{path}." for path in experts)):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
    return found


def _in_another_order(module: PreTrainedModel, count: _Count, *, in_groups: bool) -> PreTrainedModel:
    """Return a copy with its experts reordered; backwards, which keeps neighbours together, where there are groups."""
    order = torch.randperm(count.value, generator=torch.Generator().manual_seed(0))
    order = torch.arange(count.value).flip(0) if in_groups else order
    found = copy.deepcopy(module)
    for name, tensor in saved_tensors(found):
        if name in count.axes:
            tensor.copy_(tensor.index_select(count.axes[name], order))
    return found


@contextmanager
def _watching(module: nn.Module, count: _Count, experts: Sequence[str], router: Sequence[str]) -> Iterator[_Seen]:
    """Note how the routers and the experts of a model are called while it runs."""
    seen = _Seen()

    def of_router(_module: nn.Module, _args: Any, output: Any) -> None:
        scores = output[0] if isinstance(output, tuple) else output
        seen.routers += scores.shape[-1] == count.value
        if isinstance(output, tuple) and len(output) == 2:  # Llama 4: a score for each expert, 0 if not chosen
            seen.chosen.append(int((scores != 0).sum(dim=-1).max()))

    def of_experts(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) > 1:
            seen.chosen.append(0 if args[1].is_floating_point() else args[1].shape[-1])

    hooks = [find(module, path).register_forward_pre_hook(of_experts) for path in experts]
    for name, one in module.named_modules():
        if any(name.endswith(f".{path}") for path in router):
            hooks.append(one.register_forward_hook(of_router))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _setting_of(config: Any, chosen: Sequence[int]) -> str | None:
    """Return the entry with the number of experts that a token is sent to, which all calls confirm."""
    for name, value in config.to_dict().items():
        if CHOSEN.search(name) and chosen and {max(value) if isinstance(value, list) else value} == set(chosen):
            return name
    return None
