"""The anatomy of a family that is not in the table: guessed from the module, then verified on a tiny copy.

The check builds a model of the same architecture with four small random blocks. It must be causal, running its blocks
one by one must match its own forward pass exactly, and removing a block, saving and reloading must match the run that
skips that block exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import ModelError, first_line
from secateur.models.anatomy import Family, find, text_config
from secateur.models.decoder import Decoder
from secateur.models.depth import reason_to_keep, with_blocks
from secateur.models.expert_structure import with_experts
from secateur.models.forward import capture, logits, run_block
from secateur.models.head_structure import with_heads
from secateur.models.packed import packed_parameters
from secateur.models.shrinking import FAILURES
from secateur.models.structure import with_mlp
from secateur.models.trial_copies import Kind, built_of, tiny_copy, trial_decoder, trial_tokens
from secateur.models.wrappers import auto_class
from secateur.ownership import scratch

_WITH_WEIGHTS = 2
"""Values that a block may return: the residual stream, and attention weights."""
_INDEX_SETTINGS = ("mlp_only_layers",)
_COUNTS = re.compile(r"dense_replace|dense_layers|layer_start_index|max_window_layers|hash_layers")
_BLOCK_COUNTS = ("num_blocks",)
_LAST_NUMBERS = re.compile(r"layer_end_index")
_KV_SHARED = ("num_kv_shared_layers",)
_DEPTH_SCALES = ("scale_depth",)
_PROVED: dict[str, Family] = {}
"""Rows that were verified in this process, by configuration."""
_PERIOD = "_layer_period"
_LONGEST_QUOTE = 100
"""Characters of another library's message in a reason."""


def detect(config: Any, source: str, *, trust_remote_code: bool = False) -> Family:
    """Guess the family row of an architecture and verify it.

    Raises:
        ModelError: the guess or the check failed; the message says at which step.
    """
    kind, described = text_config(config).model_type, config.to_json_string(use_diff=False)
    if described in _PROVED and not trust_remote_code:
        return _PROVED[described]
    try:
        with torch.random.fork_rng(devices=[]), _trial("it cannot be tried out"):
            family = _detected(config, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(
            f"{source}: '{kind}' is not a known family, and the trial on a tiny copy failed: {error}"
        ) from error
    _PROVED[described] = family
    return family


@contextmanager
def _trial(impossible: str) -> Iterator[None]:
    """Turn what the code of an unknown architecture raises into a sentence that says what cannot be done."""
    try:
        yield
    except FAILURES as error:
        raise ModelError(f"{impossible} ({type(error).__name__}: {first_line(error)}).") from error


def _detected(config: Any, *, trust_remote_code: bool) -> Family:
    with torch.device("meta"):
        module = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    family = _guess(module, text_config(config))
    tiny, kept = tiny_copy(config, family, module, trust_remote_code=trust_remote_code)
    with _trial("its blocks cannot be run at all"):
        values = _returned_values(trial_decoder(tiny, family))
    family = replace(
        family,
        tuple_output=values > 0,
        packed=packed_parameters(tiny, family, trust_remote_code=trust_remote_code),
    )
    passed_on = f": they pass on {values} values, not the residual stream alone" if values > _WITH_WEIGHTS else ""
    with _trial(f"its blocks cannot be run one by one{passed_on}"):
        streams, first = _streams(trial_decoder(tiny, family))
        family = replace(family, streams=streams, streams_first=first)
        trial = trial_decoder(tiny, family)
        failed = _prove(trial, trust_remote_code=trust_remote_code)
    family = with_mlp(family, trial, trial_tokens(trial), trust_remote_code=trust_remote_code)
    family = with_heads(family, trial, trial_tokens(trial), trust_remote_code=trust_remote_code)
    family = with_experts(family, trial, trial_tokens(trial), trust_remote_code=trust_remote_code)
    kinds = [built_of(block) for block in find(module, family.blocks)]
    return replace(family, **_fixed(failed, kept, kinds, only_depth=not family.mlp_out))


def _fixed(
    failed: Mapping[int, str], kept: Sequence[int], kinds: Sequence[Kind], *, only_depth: bool
) -> dict[str, Any]:
    """Return which blocks cannot go and why: the first, the last, and all of a kind of which another could not.

    Raises:
        ModelError: none can go, and nothing but blocks could be removed.
    """
    if not failed:
        return {}
    reason = next(iter(failed.values()))
    movable = {kinds[kept[index]] for index in range(len(kept)) if index not in failed}
    ends = {0, len(kinds) - 1}
    movable -= {kinds[kept[index]] for index in failed if kept[index] not in ends}
    gone = {kept[index] for index in failed}
    fixed = tuple(index for index, kind in enumerate(kinds) if kind not in movable or index in gone)
    if only_depth and len(fixed) == len(kinds):
        raise ModelError(reason)
    return {"fixed_blocks": fixed, "fixed_reason": reason.removesuffix(".")}


def _guess(module: PreTrainedModel, config: Any) -> Family:
    found = {name: len(part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    count = getattr(config, "num_hidden_layers", None)
    if count is None:
        raise ModelError("its configuration does not say how many blocks it has (num_hidden_layers).")
    lists = [name for name, length in found.items() if length == count]
    if not lists:
        raise ModelError(
            f"its configuration counts {count} blocks, and no list in the model holds as many (the longest holds "
            f"{max(found.values(), default=0)}), so they are not one stack of which some can be left out."
        )
    names = {id(part): name for name, part in module.named_modules()}
    tower = names[id(module.get_input_embeddings())].rpartition(".")[0]  # other towers of a wrapper have blocks, too
    nearest = min(lists, key=lambda name: (not name.startswith(f"{tower}."), name.count(".")))
    settings, listed = config.to_dict(), tuple(_lists_per_layer(config))
    if module.get_output_embeddings() is None:
        raise ModelError("it has no head that predicts tokens.")
    return Family(
        model_type=config.model_type,
        blocks=nearest,
        embeddings=(names[id(module.get_input_embeddings())],),
        final=(),
        head=names[id(module.get_output_embeddings())],
        norms=(),
        attention_in=(),
        attention_out=(),
        mlp_in=(),
        mlp_out=(),
        per_layer_lists=listed,
        block_counts=tuple(name for name in _BLOCK_COUNTS if settings.get(name) == count),
        leading_counts=tuple(name for name in settings if _COUNTS.search(name)),
        dense_blocks=next((name for name in _INDEX_SETTINGS if hasattr(config, name)), None),
        block_numbers=tuple(_lists_of_block_numbers(config)),
        last_numbers=tuple(name for name in settings if _LAST_NUMBERS.search(name)),
        periods=() if any("type" in name for name in listed) else tuple(_periods(settings)),
        cycles=tuple(_cycles(config)),
        last_layer_type=_last_layer_type(config),
        kv_shared=next((name for name in _KV_SHARED if settings.get(name)), None),
        depth_scales=tuple(name for name in _DEPTH_SCALES if name in settings),
        detected=True,
    )


def _last_layer_type(config: Any) -> str | None:
    """Return the layer type of the last block, if the configuration sets it to this whatever it is given."""
    kinds: list[str] = list(getattr(config, "layer_types", None) or [])
    given = next((kind for kind in kinds if kind != kinds[-1]), None)
    if given is None:
        return None
    try:
        read = type(config).from_dict(config.to_dict() | {"layer_types": [*kinds[:-1], given]})
    except FAILURES:
        return None
    return kinds[-1] if read.layer_types[-1] == kinds[-1] else None


def _periods(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in settings:
        offset = f"{name.removesuffix('_period')}_offset"
        if name.endswith(_PERIOD) and offset in settings:
            yield name, offset


def _cycles(config: Any) -> Iterator[str]:
    """Yield the names of shorter lists of kinds of blocks."""
    for name, value in _lists(config):
        if name in ("block_types",) and len(value) < config.num_hidden_layers:
            yield name


def _lists_per_layer(config: Any) -> Iterator[str]:
    numbers = set(_lists_of_block_numbers(config))
    for name, value in _lists(config):
        if len(value) == config.num_hidden_layers and name not in numbers:
            yield name


def _lists_of_block_numbers(config: Any) -> Iterator[str]:
    """Yield the names of lists of increasing integers below the number of blocks, such as `moe_layers`."""
    for name, value in _lists(config):
        if (
            len(value) > 1
            and all(type(one) is int for one in value)
            and name not in _INDEX_SETTINGS
            and value == sorted(set(value))
            and value[-1] < config.num_hidden_layers
        ):
            yield name


def _lists(config: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield lists in a configuration that may refer to blocks, which lists of token ids do not."""
    for name, value in config.to_dict().items():
        if isinstance(value, list) and not name.endswith(("token_id", "token_ids")):
            yield name, value


@torch.no_grad()
def _returned_values(decoder: Decoder) -> int:
    """Run block 0 to learn how many values its blocks return in a tuple or list; 0 for a tensor alone."""
    seen: list[int] = []
    block = decoder.block_list[0]
    handle = block.register_forward_hook(
        lambda _m, _a, output: seen.append(len(output) if isinstance(output, tuple | list) else 0)
    )
    try:
        decoder.module(input_ids=trial_tokens(decoder), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def _streams(decoder: Decoder) -> tuple[int, bool]:
    """Return how many residual streams the blocks pass on, and whether these are the first axis.

    Raises:
        ModelError: what they pass on has another shape.
    """
    tokens = trial_tokens(decoder)
    entering = capture(decoder, tokens)[0]
    if entering.shape[1:] == (*tokens.shape, decoder.hidden_size):
        return len(entering), True
    streams, rest = divmod(entering.shape[-1], decoder.hidden_size)
    if entering.shape[:-1] != tokens.shape or streams < 1 or rest:
        raise ModelError(
            f"its blocks pass on states of the shape {tuple(entering.shape)}, not residual streams of "
            f"{decoder.hidden_size} directions for each of {tokens.shape[1]} tokens"
        )
    return streams, False


@torch.no_grad()
def _prove(decoder: Decoder, *, trust_remote_code: bool = False) -> dict[int, str]:
    """Return why single blocks cannot be left out, by block.

    Raises:
        ModelError: the model cannot be run block by block.
    """
    tokens = trial_tokens(decoder)
    whole = decoder.module(input_ids=tokens, use_cache=False).logits
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % int(decoder.config.vocab_size)
    again = decoder.module(input_ids=changed, use_cache=False).logits
    if not _close(again[:, :-1], whole[:, :-1], tolerance=1e-4):
        raise ModelError("it is not causal: a later token changes what came before")
    if not torch.equal(_walk(decoder, tokens, left_out=None), whole):
        raise ModelError(
            "running its blocks one by one does not give its own forward pass, so they pass on more than the residual "
            "stream."
        )
    failed = {}
    for left_out in range(decoder.block_count):
        try:
            if reason_to_keep(decoder.config, decoder.anatomy.family, [left_out]) is None:
                _prove_without(decoder, left_out, tokens, trust_remote_code=trust_remote_code)
        except (*FAILURES, ModelError) as error:
            known, said = isinstance(error, ModelError), shorten(first_line(error), _LONGEST_QUOTE, placeholder=" …")
            failed[left_out] = str(error) if known else f"a model without it cannot be built ({said})"
    return failed


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Return whether logits agree but for rounding: experts are computed together, and memory decides in what order."""
    return found.shape == expected.shape and torch.allclose(
        found, expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


def _prove_without(decoder: Decoder, left_out: int, tokens: torch.Tensor, *, trust_remote_code: bool) -> None:
    kept = [i for i in range(decoder.block_count) if i != left_out]
    shorter = with_blocks(decoder.module, decoder.anatomy.family, kept)
    expected = _walk(decoder, tokens, left_out)
    again = _reloaded(shorter, trust_remote_code=trust_remote_code)(input_ids=tokens, use_cache=False)
    if not _close(again.logits, expected):
        raise ModelError(
            "a model without it computes something else than one that skips it, so its blocks depend on their place"
        )


def _walk(decoder: Decoder, tokens: torch.Tensor, left_out: int | None) -> torch.Tensor:
    hidden, calls = capture(decoder, tokens)
    for index, call in enumerate(calls):
        if index != left_out:
            hidden = run_block(decoder.block_list[index], call, hidden)
    return logits(decoder, hidden, tokens)


def _reloaded(module: PreTrainedModel, *, trust_remote_code: bool) -> PreTrainedModel:
    with scratch("detection") as folder:
        module.save_pretrained(folder)
        again, report = auto_class(module.config).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ModelError("a shorter copy has missing or unexpected weights when it is loaded")
    return again.eval()
