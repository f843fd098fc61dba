"""The form of a width-pruned model: the same architecture, or the modelling file.

A configuration names one width for all blocks, so a result with uniform widths stays a stock model wherever the
family's configuration can express it (`inner_size`, `expert_size`, `free_heads` of its row). Anything else is folded
into the modelling file, which names the widths of every block; a model that already has it keeps it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from secateur.calibration.statistics import device_with_float64
from secateur.errors import ModelError
from secateur.modeling import DeciLMConfig, SecateurConfig
from secateur.modeling.modeling_secateur import SecateurDecoderLayer
from secateur.models.anatomy import Family, count_parameters, present, text_config
from secateur.models.decoder import Decoder
from secateur.models.families import FAMILIES
from secateur.models.widths import BlockWidths, block_widths
from secateur.plan.steps import BlockSizes, Widths, WidthSizes
from secateur.surgery.assembly import Assembly, Tensors
from secateur.surgery.hidden.folding import UnfoldableError, can_stay_tied, folded_block, folded_config, stream_sizes
from secateur.surgery.hidden.invariance import require_invariance
from secateur.surgery.hidden.outer import put_outer
from secateur.surgery.width.coupling import Couplings, Kept, couplings_of, joint_head_norm, without_units

_FOLDED = FAMILIES[SecateurConfig.model_type]


def all_widths(decoder: Decoder) -> tuple[BlockWidths, ...]:
    """Return the widths of every block."""
    return tuple(block_widths(decoder, index) for index in range(decoder.block_count))


def dense_widths(decoder: Decoder) -> tuple[Widths, ...]:
    """Return the widths of every block as a plan names them."""
    return tuple(Widths(groups=one.groups, queries=one.queries, channels=one.channels) for one in all_widths(decoder))


def require_width_prunable(decoder: Decoder) -> None:
    """Refuse a model for which it is not known what the tensors of a block depend on.

    Raises:
        ModelError: with the reason.
    """
    family = decoder.anatomy.family
    if family.detected and not family.mlp_out:
        raise ModelError(
            f"{decoder.source}: '{family.model_type}' is not in the table of families, and no MLP was found in its "
            "blocks whose width its configuration names. Methods that remove blocks work; see docs/add-a-family.md."
        )
    if names_every_block(decoder) and any(decoder.config.networks):
        raise ModelError(
            f"{decoder.source}: a network without attention replaces some of its blocks; prune the widths before it "
            "is put in."
        )
    if names_every_block(decoder) and any(decoder.config.experts):
        raise ModelError(
            f"{decoder.source}: experts of a model with its modelling file cannot be pruned; prune the dense model "
            "first, then slice."
        )


def reason_against_heads(decoder: Decoder) -> str | None:
    """Return the reason why no head of this model can be removed, if there is one."""
    family, config = decoder.anatomy.family, decoder.config
    if not family.attention_out:
        return "it is not known which rows and columns of its attention belong to a head"
    if family.uses_alibi(config):
        return "the slopes of its positions follow from the number of heads"
    if joint_head_norm(decoder.block_list[0], family, block_widths(decoder, 0)):
        return "a norm runs over all its heads together"
    return None


def stock_config(decoder: Decoder, widths: Sequence[Widths]) -> Any | None:
    """Return the configuration of the same architecture at these widths; None if it cannot express them."""
    family, dense, whole = decoder.anatomy.family, all_widths(decoder), copy.deepcopy(decoder.module.config)
    config = text_config(whole)
    if isinstance(config, DeciLMConfig) and len({new.groups * new.queries for new in widths} - {0}) > 1:
        return None
    if names_every_block(decoder):
        return with_widths(config, widths)
    lost = (
        (old.groups and not new.groups) or (old.channels and not new.channels)
        for old, new in zip(dense, widths, strict=True)
    )
    if any(lost):
        return None
    for name, experts in ((family.inner_size, False), (family.expert_size, True)):
        pairs = {
            (old.channels, new.channels)
            for old, new in zip(dense, widths, strict=True)
            if bool(old.experts) == experts and old.channels
        }
        if all(old == new for old, new in pairs):
            continue
        old_base, new_base = min(pairs)  # some blocks may be so many times as wide, all by one entry
        alike = all(old % old_base == 0 and new * old_base == old * new_base for old, new in pairs)
        if name is None or not alike or (len(pairs) > 1 and not isinstance(getattr(config, name), int)):
            return None
        width = new_base * (1 if experts else family.inner_scale)
        for entry, value in ((name, width), *family.resized):
            setattr(config, entry, value)
    heads = {(new.groups, new.queries) for new in widths if new.groups}
    if heads != {(old.groups, old.queries) for old in dense if old.groups}:
        if len(heads) > 1 or not family.free_heads:
            return None
        groups, queries = next(iter(heads))
        if family.qkv != "by-unit":  # else the size of a head does not follow from their number
            config.head_dim = dense[0].head_size
        config.num_attention_heads, config.num_key_value_heads = groups * queries, groups
    try:
        config.validate()
    except StrictDataclassError:
        return None
    return whole


def folded_at(decoder: Decoder, widths: Sequence[Widths], *, bias: bool) -> SecateurConfig:
    """Return the configuration of the modelling file at these widths; `bias` gives every output projection a bias.

    Raises:
        ModelError: the family cannot be put into this form.
    """
    try:
        config = folded_config(decoder, tied=can_stay_tied(decoder))
    except UnfoldableError as error:
        raise ModelError(
            f"{decoder.source}: these widths need the modelling file, which cannot hold this model: {error.reason}. "
            "Channels alone (heads=never), as many in all blocks, need none."
        ) from error
    if bias:
        config.attention_out_bias = config.mlp_out_bias = True
    return with_widths(config, widths)


def blocks_without_bias(decoder: Decoder, *, stock: bool) -> int:
    """Count the blocks of the pruned model with an output projection that has no place for a bias, as of experts."""
    if stock:
        names = (*decoder.anatomy.family.attention_out, *decoder.anatomy.family.mlp_out)
        writers = [[found for _, found in present(block, names)] for block in decoder.block_list]
        return sum(any(getattr(one, "bias", None) is None for one in found) for found in writers)
    return sum(bool(one.experts) for one in all_widths(decoder))


def with_widths(config: SecateurConfig, widths: Sequence[Widths]) -> SecateurConfig:
    """Give the blocks of the modelling file these widths, in place."""
    config.heads = [one.groups * one.queries for one in widths]
    config.key_value_heads = [one.groups for one in widths]
    config.intermediate_sizes = [one.channels for one in widths]
    if isinstance(config, DeciLMConfig):
        config.num_attention_heads, config.num_key_value_heads = max(config.heads), max(config.key_value_heads)
        config.describe_blocks()
    return config


def names_every_block(decoder: Decoder) -> bool:
    """Return whether the configuration gives every block its own widths, as that of the modelling file does."""
    return isinstance(decoder.config, SecateurConfig)


def width_sizes(decoder: Decoder, *, stock: bool, bias: bool = False) -> WidthSizes:
    """Return the parameters of a pruned model by unit.

    Raises:
        ModelError: the family cannot be converted to the requested form.
    """
    require_width_prunable(decoder)
    widths = all_widths(decoder)
    if stock:
        blocks, family = list(decoder.block_list), decoder.anatomy.family
        outside = decoder.parameter_count - sum(decoder.block_parameter_counts())
        beside = decoder.packed_parameters // decoder.block_count
        found = [_block_sizes(block, family, one, beside) for block, one in zip(blocks, widths, strict=True)]
        return WidthSizes(blocks=tuple(found), other=outside)
    config = folded_at(decoder, dense_widths(decoder), bias=bias)
    first = {one: widths.index(one) for one in widths}
    with torch.device("meta"):
        layers = {one: SecateurDecoderLayer(config, block) for one, block in first.items()}
    kinds = {one: _block_sizes(layer, _FOLDED, one) for one, layer in layers.items()}
    stream = stream_sizes(config)
    rows = stream.tables + stream.head
    return WidthSizes(blocks=tuple(kinds[one] for one in widths), other=rows * config.hidden_size + stream.other_fixed)


def _block_sizes(block: nn.Module, family: Family, widths: BlockWidths, beside: int = 0) -> BlockSizes:
    """Count the parameters of a block by unit; `beside` are outside of it and go with it."""
    couplings = couplings_of(block, family, widths)
    counted = dict.fromkeys(("query", "group", "channel"), 0)
    fixed = dict.fromkeys(("attention", "mlp"), 0)
    of_attention, of_mlp = _with_branch(family, family.attention_out, 0), _with_branch(family, family.mlp_out, -1)
    for name, parameter in block.named_parameters():
        coupling = couplings.get(name)
        if coupling is None:
            fixed["attention"] += parameter.numel() * name.startswith(of_attention)
            fixed["mlp"] += parameter.numel() * name.startswith(of_mlp)
            continue
        slices = 1 if coupling.axis is None else parameter.shape[coupling.axis]
        if coupling.part == "shared":
            counted["channel"] += parameter.numel() // slices * (len(coupling.labels) // widths.channels)
            continue
        for kind, unit in (("query", 0), ("group", widths.heads)) if coupling.part == "heads" else (("channel", 0),):
            counted[kind] += int((coupling.labels == unit).sum()) * (parameter.numel() // slices)
    return BlockSizes(
        dense=Widths(groups=widths.groups, queries=widths.queries, channels=widths.channels),
        **counted,
        **fixed,
        fixed=beside
        + count_parameters(block)
        - widths.heads * counted["query"]
        - widths.groups * counted["group"]
        - widths.channels * counted["channel"],
    )


def _with_branch(family: Family, writers: tuple[str, ...], norm: int) -> tuple[str, ...]:
    """Return how the names of parameters begin that go with a branch, given its output projections and its norm."""
    own = (f"{family.norms[norm]}.",) if family.model_type == DeciLMConfig.model_type else ()
    return (*own, *(f"{writer.partition('.')[0]}." for writer in writers))


class WidthAssembly:
    """A width-pruned model under construction, block by block."""

    def __init__(self, decoder: Decoder, widths: Sequence[Widths], *, stock: bool, bias: bool = False) -> None:
        """Start empty.

        Raises:
            ModelError: the family cannot be converted to the requested form, or a stock model cannot hold these widths.
        """
        require_width_prunable(decoder)
        self._dense, self._stock = decoder, stock
        if stock:
            config, family = stock_config(decoder, widths), decoder.anatomy.family
            if config is None:
                raise ModelError(
                    f"{decoder.source}: no {family.model_type} can have these widths; edit the plan, or make a new one."
                )
        else:
            config, family = folded_at(decoder, widths, bias=bias), _FOLDED
            require_invariance(decoder)
        self._assembly = Assembly(decoder, config, family)
        self._seen: list[Any] = [[one.groups, one.queries, one.channels] for one in widths]

    def writes_bias(self, index: int, part: str) -> bool:
        """Return whether the output of attention (or the MLP) of a block has a bias in the new model."""
        family = _FOLDED if not self._stock else self._dense.anatomy.family
        names = family.attention_out if part == "heads" else family.mlp_out
        return any(getattr(found, "bias", None) is not None for _, found in present(self._assembly.layer(index), names))

    @torch.no_grad()
    def block(self, index: int, kept: Kept) -> None:
        """Add block `index` without the removed units; its weights, output projections edited, are loaded."""
        assembly, block, widths = self._assembly, self._dense.block_list[index], block_widths(self._dense, index)
        where = assembly.block_path(index)
        if self._stock:
            tensors: Tensors = {name: parameter.detach() for name, parameter in block.named_parameters()}
            couplings: Couplings = couplings_of(block, self._dense.anatomy.family, widths)
        else:
            tensors = folded_block(self._dense, index)
            couplings = couplings_of(assembly.layer(index), _FOLDED, widths)
            for name, parameter in assembly.layer(index).named_parameters():
                if name.endswith("bias") and name not in tensors:
                    tensors[name] = torch.zeros(parameter.shape)
        there = {name for name, _ in assembly.layer(index).named_parameters()}
        tensors = {name: tensor for name, tensor in tensors.items() if name in there}
        found = without_units(tensors, couplings, kept)
        self._seen.append([[round(_size(tensor), 4), len(tensor)] for tensor in found.values()])
        assembly.put(where, found)
        assembly.finish(index)

    @torch.no_grad()
    def finish(self) -> Decoder:
        """Add what is outside the blocks, and return the model."""
        if self._stock:
            self._assembly.keep_outer()
        else:
            put_outer(self._assembly, None, None)
        return self._assembly.result({"narrowed": self._seen})


def _size(tensor: torch.Tensor) -> float:
    """Return Σ|w|: what folds the mean out of writers leaves plain sums at 0."""
    return float(tensor.to(device_with_float64(tensor.device)).abs().sum(dtype=torch.float64))
