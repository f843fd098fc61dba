"""The mixtures of experts in a decoder: where their experts are, and how many a configuration may name."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.modeling import SecateurConfig
from secateur.models.anatomy import Family, experts_per_token, find, present, text_config
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths
from secateur.plan.experts import ExpertSizes


@dataclass(frozen=True)
class Mixture:
    """The mixtures of a decoder.

    Attributes:
        sizes: the experts of each block; None for a block whose MLP is dense.
        chosen: number of experts that a token is sent to.
        groups: number of groups of neighbouring experts that the router chooses among first; 1 without groups.
        chosen_groups: number of those that a token may take experts from.
    """

    sizes: tuple[ExpertSizes | None, ...]
    chosen: int
    groups: int
    chosen_groups: int

    @property
    def count(self) -> int:
        """Number of experts in each block that has any."""
        return max(one.count for one in self.sizes if one is not None)

    def multiple(self, divisor: int = 1) -> int:
        """Return what the number of experts stays a multiple of, so that all groups have as many."""
        return lcm(self.groups, divisor)

    def fewest(self, divisor: int = 1) -> int:
        """Return the smallest number of experts that still gives each token as many as before.

        Grouped routers rank a group by its two best experts, so each group keeps two.
        """
        in_chosen = -(-self.chosen // self.chosen_groups) * self.groups
        least = max(self.chosen, in_chosen, 2 * self.groups if self.groups > 1 else 1)
        multiple = self.multiple(divisor)
        return -(-least // multiple) * multiple


def mixture_of(decoder: Decoder) -> Mixture:
    """Return the mixtures of a decoder.

    Raises:
        ModelError: it has no experts, or none that can be removed one by one.
    """
    family, config = decoder.anatomy.family, decoder.config
    if isinstance(config, SecateurConfig) and any(config.experts or ()):
        raise ModelError(
            f"{decoder.source}: experts of a model with its modelling file cannot be removed; remove them from the "
            "dense model first, then slice."
        )
    if not any(has_experts(block, family) for block in decoder.block_list):
        raise ModelError(f"{decoder.source}: a {family.model_type} has no experts.")
    if not family.expert_counts:
        raise ModelError(
            f"{decoder.source}: experts of '{family.model_type}' cannot be removed: it is not known where its "
            "configuration counts them, and what its routers hold for each. See docs/add-a-family.md."
        )
    sizes = tuple(_sizes(decoder, index) for index in range(decoder.block_count))
    groups, chosen_groups = (getattr(config, name, None) or 1 for name in family.expert_groups or ("", ""))
    return Mixture(sizes, experts_per_token(config, family) or 1, int(groups), int(chosen_groups))


def _sizes(decoder: Decoder, index: int) -> ExpertSizes | None:
    block, family = decoder.block_list[index], decoder.anatomy.family
    if experts_path(block, family) is None:
        return None
    count = block_widths(decoder, index).experts
    axes = expert_axes(block, family, count)
    each = sum(one.numel() // count for name, one in block.named_parameters() if name in axes)
    return ExpertSizes(count=count, parameters=each)


def experts_path(block: nn.Module, family: Family) -> str | None:
    """Return the path of the module with the experts of a block; None if its MLP is dense."""
    for name, found in present(block, family.mlp_out):
        if isinstance(found, nn.Parameter) and found.dim() == 3:
            return name.rpartition(".")[0]
    return None


def has_experts(block: nn.Module, family: Family) -> bool:
    """Return whether a block has a mixture of experts in place of a dense MLP."""
    return experts_path(block, family) is not None


def router_path(block: nn.Module, family: Family) -> str:
    """Return the path of the router of a block that has experts."""
    return next(name for name, found in present(block, family.router) if isinstance(found, nn.Module))


def expert_axes(block: nn.Module, family: Family, count: int) -> dict[str, int]:
    """Return the axis that runs over the experts of each tensor of a block that has one, buffers included.

    Args:
        block: a block with the names of the family and its shapes; None of its weights is read.
        family: its row.
        count: number of experts.
    """
    path = experts_path(block, family)
    if path is None:
        return {}
    inside = (path, *family.router)
    found: dict[str, int] = {}
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if not any(name == one or name.startswith(f"{one}.") for one in inside):
            continue
        axes = [axis for axis, size in enumerate(tensor.shape) if size == count]
        if axes:
            found[name] = axes[0]
    return found


def without_experts(
    tensors: dict[str, torch.Tensor], axes: dict[str, int], kept: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Return a block's tensors without the experts, and their rows of the router, that are not kept."""
    stay = torch.tensor(kept, dtype=torch.int64)
    return {
        name: tensor.index_select(axes[name], stay.to(tensor.device)) if name in axes else tensor
        for name, tensor in tensors.items()
    }


def config_with_experts(config: Any, family: Family, count: int) -> Any:
    """Return the configuration of a model with this number of experts in each block."""
    whole = copy.deepcopy(config)
    edited = text_config(whole)
    for name in family.expert_counts:
        setattr(edited, name, count)
    return whole


def experts_module(block: nn.Module, family: Family) -> Any:
    """Return the module with the experts of a block that has any."""
    path = experts_path(block, family)
    assert path is not None, "the block has experts"
    return find(block, path)
