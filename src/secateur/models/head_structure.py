"""The attention of an architecture without a row, found by names and proved by a trial.

Attention with separate projections of queries, keys and values is called the same nearly everywhere. Whether its rows
and columns are heads, and whether the configuration can name fewer of them, a trial on a small copy shows: without a
key/value group it computes what the original computes whose output projections do not read that group.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.models.anatomy import Family, entry, find, present, set_parameter, text_config
from secateur.models.decoder import Decoder
from secateur.models.shrinking import FAILURES
from secateur.models.structure import same_logits, take_buffers
from secateur.models.wrappers import auto_class

_IN, _OUT = ("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense")
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))


@dataclass(frozen=True)
class _Heads:
    """The heads of all blocks that have attention: groups, query heads of each, and the size of one."""

    groups: int
    queries: int
    size: int


@torch.no_grad()
def with_heads(family: Family, decoder: Decoder, tokens: torch.Tensor, *, trust_remote_code: bool = False) -> Family:
    """Return a family row with the projections of attention, if a trial on a small copy proves them."""
    found = _named(family, decoder)
    heads = None if found is None else _heads(found, decoder)
    if found is None or heads is None:
        return family
    for fewer in _smaller(heads):
        try:
            small = _with_fewer(decoder, fewer, trust_remote_code=trust_remote_code)
            masked = _filled(small, found, decoder)
            if masked is not None and same_logits(small, masked, tokens):
                return found
        except FAILURES:
            continue
    return family


def _smaller(heads: _Heads) -> Iterator[_Heads]:
    """Yield what to try: one group less, or half of them, as some configurations want heads to divide the width."""
    for count in dict.fromkeys((heads.groups - 1, heads.groups // 2)):
        if count:
            yield replace(heads, groups=count)
    if heads.groups == 1 < heads.queries:
        yield replace(heads, queries=heads.queries // 2)


def _named(family: Family, decoder: Decoder) -> Family | None:
    """Return the row with attention by its usual names, where one module of each block holds all of it."""
    for block in decoder.block_list:
        for path, module in block.named_modules():
            readers = [isinstance(getattr(module, name, None), nn.Linear) for name in _IN]
            writer = next((name for name in _OUT if isinstance(getattr(module, name, None), nn.Linear)), None)
            if not all(readers) or writer is None:
                continue
            norms = next((pair for pair in _NORMS if getattr(module, pair[0], None) is not None), ())
            return replace(
                family,
                attention_in=tuple(f"{path}.{name}" for name in _IN),
                attention_out=(f"{path}.{writer}",),
                attention_norms=tuple(f"{path}.{name}" for name in norms),
            )
    return None


def _heads(family: Family, decoder: Decoder) -> _Heads | None:
    """Return the heads, if all projections have the rows and columns of as many as the configuration names."""
    count = entry(decoder.config, "num_attention_heads")
    groups = entry(decoder.config, "num_key_value_heads") or count
    if type(count) is not int or type(groups) is not int or count % groups:
        return None
    shapes = {
        (*(len(found.weight) for _, found in present(block, family.attention_in)), writer.weight.shape[1])
        for block in decoder.block_list
        for _, writer in present(block, family.attention_out)
    }
    size = next(iter(shapes))[0] // count
    return _Heads(groups, count // groups, size) if shapes == {_rows(_Heads(groups, count // groups, size))} else None


def _rows(heads: _Heads) -> tuple[int, ...]:
    """Return the rows of query, key and value projections and the columns of the output projection."""
    keys, queries = heads.groups * heads.size, heads.groups * heads.queries * heads.size
    return (queries, keys, keys, queries)


def _with_fewer(decoder: Decoder, heads: _Heads, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return a model without weights that has fewer heads of the same size."""
    whole = copy.deepcopy(decoder.module.config)
    config = text_config(whole)
    config.head_dim = heads.size
    config.num_attention_heads, config.num_key_value_heads = heads.groups * heads.queries, heads.groups
    config.validate()
    with torch.device("meta"):
        return auto_class(whole).from_config(whole, trust_remote_code=trust_remote_code)


def _filled(small: PreTrainedModel, family: Family, decoder: Decoder) -> PreTrainedModel | None:
    """Give the smaller model the weights of its heads, the last of all; return the original without the first.

    None if anything but attention's projections has other shapes.
    """
    masked = copy.deepcopy(decoder.module)
    names = (*family.attention_in, *family.attention_out)
    for name, parameter in decoder.module.named_parameters():
        wanted = find(small, name).shape
        _, _, path = name.removeprefix(f"{family.blocks}.").partition(".")
        if wanted == parameter.shape:
            set_parameter(small, name, parameter)
        elif path.rpartition(".")[0] not in names:
            return None
        elif path.rpartition(".")[0] in family.attention_out:
            set_parameter(small, name, parameter[:, -wanted[1] :])
            find(masked, name)[:, : -wanted[1]] = 0.0
        else:
            set_parameter(small, name, parameter[-wanted[0] :])
    take_buffers(small, decoder.module)
    return masked
