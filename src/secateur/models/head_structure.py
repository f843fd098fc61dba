"""The attention of an architecture without a row, found by names or by what changes its shape, and proved by a trial.

Attention with separate projections of queries, keys and values is called the same nearly everywhere. Any other is made
with fewer heads, and what then has fewer rows belongs to them. Whether rows and columns are heads, and whether the
configuration can name fewer of them, a trial on a small copy shows: without a key/value group it computes what the
original computes whose output projections do not read that group.
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
from secateur.models.depth import settings_of_blocks
from secateur.models.shrinking import FAILURES
from secateur.models.structure import changed_axes, same_logits, take_buffers
from secateur.models.wrappers import auto_class

_IN, _OUT = ("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense")
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))


@dataclass(frozen=True)
class _Heads:
    """The heads of all blocks that have attention: groups, query heads of each, and the size of one.

    The size is None where it does not follow from the number of heads.
    """

    groups: int
    queries: int
    size: int | None


@torch.no_grad()
def with_heads(family: Family, decoder: Decoder, tokens: torch.Tensor, *, trust_remote_code: bool = False) -> Family:
    """Return a family row with the projections of attention, if a trial on a small copy proves them."""
    for found, heads in _guesses(family, decoder, trust_remote_code=trust_remote_code):
        if _proves(found, decoder, heads, tokens, trust_remote_code=trust_remote_code):
            return found
    return family


def _guesses(family: Family, decoder: Decoder, *, trust_remote_code: bool) -> Iterator[tuple[Family, _Heads]]:
    """Yield rows with attention by its usual names, then by shapes."""
    found = _named(family, decoder)
    heads = None if found is None else _heads(found, decoder)
    if found is not None and heads is not None:
        yield found, heads
    heads = _configured(decoder)
    found = None if heads is None else _by_unit(family, decoder, heads, trust_remote_code=trust_remote_code)
    if found is not None and heads is not None:
        yield found, heads


def _proves(family: Family, decoder: Decoder, heads: _Heads, tokens: torch.Tensor, *, trust_remote_code: bool) -> bool:
    """Return whether a model with fewer heads computes what the masked original computes."""
    for fewer in _smaller(heads):
        try:
            small = _with_fewer(decoder, fewer, trust_remote_code=trust_remote_code)
            masked = _filled(small, family, decoder)
            if masked is not None and same_logits(small, masked, tokens):
                return True
        except FAILURES:
            continue
    return False


def _by_unit(family: Family, decoder: Decoder, heads: _Heads, *, trust_remote_code: bool) -> Family | None:
    """Return the row with what changes its shape with the number of heads, whatever it is called.

    None if that is no rows of projections and other parameters, and columns of one projection in a block.
    """
    before = {name: one.shape for name, one in decoder.module.named_parameters()}

    def changed(fewer: _Heads) -> dict[str, int] | None:
        try:
            small = _with_fewer(decoder, fewer, trust_remote_code=trust_remote_code)
        except FAILURES:
            return None
        return changed_axes(before, {name: one.shape for name, one in small.named_parameters()})

    all_heads = next((found for one in _smaller(heads) if (found := changed(one))), None)
    of_queries = changed(replace(heads, queries=heads.queries // 2)) if heads.queries > 1 else all_heads
    if not all_heads or of_queries is None:
        return None
    rows: dict[str, bool] = {}
    writers: dict[str, set[str]] = {}
    for name, axis in all_heads.items():
        if not name.startswith(f"{family.blocks}."):
            return None
        number, _, path = name.removeprefix(f"{family.blocks}.").partition(".")
        owner = path.rpartition(".")[0]
        is_linear = isinstance(decoder.block_list[int(number)].get_submodule(owner), nn.Linear)
        if axis == 1 and is_linear:
            writers.setdefault(number, set()).add(owner)
        elif axis == 0:
            rows[owner if is_linear else path] = name in of_queries
        else:
            return None
    if any(len(found) != 1 for found in writers.values()) or not writers:
        return None
    names = tuple(dict.fromkeys(name for found in writers.values() for name in found))
    others = [block for number, block in enumerate(decoder.block_list) if str(number) not in writers]
    if any(next(present(block, (*rows, *names)), None) for block in others):
        return None  # what is called the same there does not follow the number of heads
    return replace(
        family,
        qkv="by-unit",
        attention_in=tuple(rows),
        key_value_in=tuple(name for name, of_query in rows.items() if not of_query),
        attention_out=names,
    )


def _configured(decoder: Decoder) -> _Heads | None:
    """Return the heads that the configuration names for all blocks alike."""
    own = settings_of_blocks(decoder.config).values()
    if any(name in one for one in own for name in ("num_attention_heads", "num_key_value_heads")):
        return None
    count = entry(decoder.config, "num_attention_heads")
    groups = entry(decoder.config, "num_key_value_heads") or count
    if type(count) is not int or type(groups) is not int or count % groups:
        return None
    return _Heads(groups, count // groups, None)


def _smaller(heads: _Heads) -> Iterator[_Heads]:
    """Yield what to try: one group less, or half of them, as some configurations want heads to divide the width.

    One less may leave a size that is the width divided by their number as it is; where the size is not set, it is half.
    """
    for count in dict.fromkeys((heads.groups - 1 if heads.size else 0, heads.groups // 2)):
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
    found = _configured(decoder)
    if found is None:
        return None
    shapes = {
        (*(len(found.weight) for _, found in present(block, family.attention_in)), writer.weight.shape[1])
        for block in decoder.block_list
        for _, writer in present(block, family.attention_out)
    }
    size = next(iter(shapes))[0] // (found.groups * found.queries)
    keys, queries = found.groups * size, found.groups * found.queries * size
    return replace(found, size=size) if shapes == {(queries, keys, keys, queries)} else None


def _with_fewer(decoder: Decoder, heads: _Heads, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return a model without weights that has fewer heads of the same size."""
    whole = copy.deepcopy(decoder.module.config)
    config = text_config(whole)
    if heads.size is not None:
        config.head_dim = heads.size
    config.num_attention_heads, config.num_key_value_heads = heads.groups * heads.queries, heads.groups
    config.validate()
    whole = type(whole).from_dict(whole.to_dict())  # what is derived when it is read may differ
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
        elif not {path, path.rpartition(".")[0]} & {*names}:
            return None
        elif path.rpartition(".")[0] in family.attention_out:
            set_parameter(small, name, parameter[:, -wanted[1] :])
            find(masked, name)[:, : -wanted[1]] = 0.0
        else:
            set_parameter(small, name, parameter[-wanted[0] :])
    take_buffers(small, decoder.module)
    return masked
