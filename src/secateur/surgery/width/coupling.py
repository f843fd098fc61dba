"""Which slices of a block's tensors belong together, and the removal of some of them.

A query head is its rows of the query projection and its columns of the output projection; a key/value group its key and
value rows and all its query heads; a channel of an MLP its rows of gate and up and its column of down. Every slice of
such a tensor carries the number of its unit, so pruning and scoring need no knowledge of a family's layout.

Legend: H = query heads, G = key/value groups, h = size of a head, F = channels, E = experts (1 for a dense MLP),
S = widths of one of these that the shared expert has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.calibration.statistics import device_with_float64
from secateur.models.anatomy import Family, find, holds_transposed, owner_of, present
from secateur.models.widths import BlockWidths

Part = Literal["heads", "channels", "shared"]
"""Attention, whose units are query heads (0 to H−1) and key/value groups (H to H+G−1); the MLP or its experts, with
channels; or the expert that every token passes, with S times as many."""


@dataclass(frozen=True)
class Coupling:
    """What the slices of one tensor belong to.

    Attributes:
        part: what its units are.
        axis: the axis along which it is sliced; None for a tensor that belongs to one unit as a whole, and whose name
            contains that unit's number.
        labels: for each slice along the axis the number of its unit.
        expert: the expert it belongs to; None if the first axis runs over all of them.
    """

    part: Part
    axis: int | None
    labels: torch.Tensor
    expert: int | None = 0


Couplings = dict[str, Coupling]


@dataclass(frozen=True)
class Kept:
    """The units of a block that remain: query heads then groups, (H+G,) bool, and channels, (E+S, F) bool.

    An expert that every token passes counts as S of the others' width.
    """

    heads: torch.Tensor
    channels: torch.Tensor

    @classmethod
    def all_of(cls, widths: BlockWidths) -> Kept:
        """Keep everything."""
        return cls(
            torch.ones(widths.heads + widths.groups, dtype=torch.bool),
            torch.ones(max(1, widths.experts) + widths.shared, widths.channels, dtype=torch.bool),
        )

    def note(self, part: Part, chosen: Sequence[torch.Tensor], *, whole_groups: bool = True) -> None:
        """Mark the units that remain of a part, given those of each of its output projections.

        Args:
            part: what the projections belong to.
            chosen: bool: of heads (1, G), or (G, query heads of each); of the channels of each expert (1, F); of those
                of the shared one (S, F).
            whole_groups: whether heads go by key/value groups.
        """
        for expert, one in enumerate(chosen):
            stay = one.cpu()
            if part == "shared":
                self.channels[-len(stay) :] = stay
            elif part == "channels":
                self.channels[expert] = stay[0]
            elif whole_groups:
                self.heads[:] = torch.cat([stay[0].repeat_interleave(len(self.heads) // len(stay[0]) - 1), stay[0]])
            else:
                self.heads[: stay.numel()] = stay.flatten()


def couplings_of(block: nn.Module, family: Family, widths: BlockWidths) -> Couplings:
    """Return what the slices of each tensor of a block that has units belong to; other tensors are left out.

    Args:
        block: a block with the names of the family; of the layout by-unit, rows are counted.
        family: its row.
        widths: its widths before pruning.
    """
    size, heads, groups = widths.head_size, widths.heads, widths.groups
    found: Couplings = {}
    query = torch.arange(heads).repeat_interleave(size)
    group = torch.arange(heads, heads + groups).repeat_interleave(size)
    queries_keys_values = list(present(block, family.attention_in))
    if family.qkv == "by-unit":
        readers = [_by_unit(name, module, family, widths) for name, module in queries_keys_values]
    elif family.qkv == "separate":
        readers = [query, group, group]
    elif family.qkv == "stacked":
        readers = [torch.cat([query, group, group])]
    else:
        own, shared = query.view(groups, -1), group.view(groups, -1)
        readers = [torch.cat([own, shared, shared], dim=1).flatten()]
    for (name, module), labels in zip(queries_keys_values, readers, strict=bool(queries_keys_values)):
        found |= _reader(block, name, module, "heads", labels)
    for name, module in present(block, family.attention_out):
        found |= _writer(block, name, module, "heads", query)
    units = (torch.arange(heads), torch.arange(heads, heads + groups))
    for (name, norm), labels in zip(present(block, family.attention_norms), units, strict=False):
        found |= _head_norm(name, norm, labels)
    found |= _mlp_couplings(block, family, family.mlp_in, family.mlp_out, "channels", widths.channels)
    if widths.shared:
        wide = widths.shared * widths.channels
        found |= _mlp_couplings(block, family, family.shared_in, family.shared_out, "shared", wide)
    return found


def _by_unit(name: str, module: Any, family: Family, widths: BlockWidths) -> torch.Tensor:
    """Return the unit of each row of a projection, or of a parameter, with as many rows for every head."""
    first, count = (widths.heads, widths.groups) if name in family.key_value_in else (0, widths.heads)
    rows = len(module if isinstance(module, nn.Parameter) else module.weight)
    return torch.arange(first, first + count).repeat_interleave(rows // count)


def _mlp_couplings(
    block: nn.Module, family: Family, readers: tuple[str, ...], writers: tuple[str, ...], part: Part, width: int
) -> Couplings:
    channels, inner = torch.arange(width), list(present(block, readers))
    found: Couplings = {}
    for name, module in inner:
        labels = channels
        if family.mlp_layout == "stacked" and len(inner) == 1:
            together = getattr(owner_of(block, name), "is_concatenated", True)
            labels = torch.cat([channels, channels]) if together else channels.repeat_interleave(2)
        found |= _reader(block, name, module, part, labels)
    for name, module in present(block, writers):
        found |= _writer(block, name, module, part, channels)
    return found


def _reader(block: nn.Module, name: str, module: Any, part: Part, labels: torch.Tensor) -> Couplings:
    """Return the couplings of a projection whose outputs are units: linear, a tensor of all experts, or a list."""
    if isinstance(module, nn.Parameter) and part == "heads":
        return {name: Coupling(part, 0, labels)}
    if isinstance(module, nn.Parameter):
        own = {name: Coupling(part, 2 if holds_transposed(owner_of(block, name)) else 1, labels, None)}
        bias = f"{name}_bias"
        return own if find(block, bias) is None else own | {bias: Coupling(part, 1, labels, None)}
    found: Couplings = {}
    for path, linear, expert in _linears(name, module):
        found[f"{path}.weight"] = Coupling(part, 1 if isinstance(linear, Conv1D) else 0, labels, expert)
        if getattr(linear, "bias", None) is not None:
            found[f"{path}.bias"] = Coupling(part, 0, labels, expert)
    return found


def _writer(block: nn.Module, name: str, module: Any, part: Part, labels: torch.Tensor) -> Couplings:
    """Return the couplings of a projection whose inputs are units."""
    if isinstance(module, nn.Parameter):
        return {name: Coupling(part, 1 if holds_transposed(owner_of(block, name)) else 2, labels, None)}
    return {
        f"{path}.weight": Coupling(part, 0 if isinstance(linear, Conv1D) else 1, labels, expert)
        for path, linear, expert in _linears(name, module)
    }


def _linears(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    if isinstance(module, nn.ModuleList):
        yield from ((f"{name}.{number}", one, number) for number, one in enumerate(module))
    else:
        yield name, module, 0


def _head_norm(name: str, norm: Any, units: torch.Tensor) -> Couplings:
    """Return the couplings of a norm over heads: scales for each (one tensor, or a module each); shared ones stay."""
    members = getattr(norm, "norms", None)
    if members is not None:
        return {f"{name}.norms.{n}.weight": Coupling("heads", None, units[n : n + 1]) for n in range(len(units))}
    weight = getattr(norm, "weight", None)
    return {f"{name}.weight": Coupling("heads", 0, units)} if weight is not None and weight.dim() == 2 else {}


def joint_head_norm(block: nn.Module, family: Family, widths: BlockWidths) -> bool:
    """Return whether a norm runs over all heads together, so that removing a head changes what the others are."""
    norms = (getattr(norm, "weight", None) for _, norm in present(block, family.attention_norms))
    return any(weight is not None and weight.dim() == 1 and weight.numel() > widths.head_size for weight in norms)


def without_units(tensors: Mapping[str, torch.Tensor], couplings: Couplings, kept: Kept) -> dict[str, torch.Tensor]:
    """Return a block's tensors without the removed units; those that are not coupled stay as they are."""
    found = {}
    for name, tensor in tensors.items():
        coupling = couplings.get(name)
        if coupling is None:
            found[name] = tensor
        elif coupling.axis is None:
            unit = int(coupling.labels)
            if kept.heads[unit]:
                found[_renumbered(name, coupling, couplings, kept)] = tensor
        elif coupling.expert is None:
            pairs = zip(tensor, kept.channels[: len(tensor)], strict=True)
            found[name] = torch.stack([_taken(one, coupling.axis - 1, stay[coupling.labels]) for one, stay in pairs])
        else:
            found[name] = _taken(tensor, coupling.axis, _staying(coupling, kept)[coupling.labels])
    return found


def _staying(coupling: Coupling, kept: Kept) -> torch.Tensor:
    """Return which units of a part remain."""
    if coupling.part == "heads":
        return kept.heads
    if coupling.part == "channels":
        return kept.channels[coupling.expert]
    width = kept.channels.shape[1]
    return kept.channels[-((int(coupling.labels.max()) + 1) // width) :].flatten()


def _taken(tensor: torch.Tensor, axis: int, stay: torch.Tensor) -> torch.Tensor:
    return tensor.index_select(axis, stay.nonzero().flatten().to(tensor.device))


def _renumbered(name: str, coupling: Coupling, couplings: Couplings, kept: Kept) -> str:
    """Return the name of a norm of one head with the number that the head has among those that remain."""
    path, _, leaf = name.rpartition(".")
    siblings, _, _ = path.rpartition(".")
    before = [
        int(one.labels) for other, one in couplings.items() if other.startswith(f"{siblings}.") and one.axis is None
    ]
    place = sum(bool(kept.heads[unit]) for unit in before if unit < int(coupling.labels))
    return f"{siblings}.{place}.{leaf}"


def sums_by_unit(
    tensors: Mapping[str, torch.Tensor], couplings: Couplings, widths: BlockWidths
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum tensors by unit: query heads then groups, (H+G,), and channels, (E+S, F); float64, on the CPU."""
    heads = torch.zeros(widths.heads + widths.groups, dtype=torch.float64)
    channels = torch.zeros(max(1, widths.experts) + widths.shared, widths.channels, dtype=torch.float64)
    shared = channels[len(channels) - widths.shared :].view(-1)
    for name, tensor in tensors.items():
        coupling = couplings.get(name)
        if coupling is None or coupling.axis is None:
            continue
        if coupling.expert is None:
            for row, one in zip(channels[: len(tensor)], tensor, strict=True):
                row.index_add_(0, coupling.labels, _along(one, coupling.axis - 1))
        else:
            target = heads if coupling.part == "heads" else channels[coupling.expert]
            target = shared if coupling.part == "shared" else target
            target.index_add_(0, coupling.labels, _along(tensor, coupling.axis))
    return heads, channels


def _along(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    exact = tensor.to(device_with_float64(tensor.device))
    if tensor.dim() == 1:
        return exact.double().cpu()
    return exact.movedim(axis, 0).flatten(1).sum(dim=1, dtype=torch.float64).cpu()
