"""Small random copies of a model with a few blocks of each kind, on which an architecture is tried out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import ModelError, first_line
from secateur.models.anatomy import Family, count_parameters, find, resolve, text_config
from secateur.models.decoder import Decoder
from secateur.models.depth import config_with_blocks
from secateur.models.shrinking import FAILURES, divisors, shrunken
from secateur.models.wrappers import auto_class

_FEWEST, _EACH, _MOST = 4, 2, 12
"""Blocks of a trial copy: at least so many, two of each kind, and no more than that."""
_LARGEST_TRIAL = 50_000_000
"""Most parameters of a trial copy."""

Kind = tuple[tuple[str, str, tuple[int, ...]], ...]
"""What a block is built of: paths, classes and shapes of its parameters."""


def built_of(block: nn.Module) -> Kind:
    """Return what a block is built of; blocks of one kind are alike in it."""
    return tuple(
        (
            path,
            type(part).__name__,
            tuple(shape for one in part._parameters.values() if one is not None for shape in one.shape),
        )
        for path, part in block.named_modules()
    )


def tiny_copy(
    config: Any, family: Family, module: PreTrainedModel, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[int]]:
    """Build a small copy with a few blocks of each kind; return it and the numbers of these blocks.

    Args:
        config: configuration of the model.
        family: its row, of which the list of blocks and the configuration entries that go by blocks are read.
        module: the model; only the shapes of its blocks are read.
        trust_remote_code: allow code that comes with the checkpoint to run.

    Raises:
        ModelError: none can be built.
    """
    failures = []
    for kept in _choices([built_of(block) for block in find(module, family.blocks)]):
        try:
            short = config_with_blocks(config, family, kept)
        except (*FAILURES, ModelError) as error:
            failures.append(error)
            continue
        for divisor in divisors(text_config(config)):
            try:
                tiny = _built(shrunken(short, divisor), trust_remote_code=trust_remote_code)
                if (found := len(find(tiny, family.blocks))) != len(kept):
                    raise ModelError(f"with num_hidden_layers = {len(kept)} it has {found} blocks")
                return tiny, kept
            except (*FAILURES, ModelError) as error:
                failures.append(error)
    raise ModelError(f"no small copy of it can be built ({type(failures[0]).__name__}: {first_line(failures[0])})")


def _choices(kinds: Sequence[Kind]) -> Iterator[list[int]]:
    """Yield blocks for the copy: some of every kind, spread over the model; the last; the first."""
    each = {kind: [index for index, one in enumerate(kinds) if one == kind] for kind in kinds}
    most = max(1, _MOST // len(each))
    chosen = {index for found in each.values() for index in found[: min(most, max(_EACH, _FEWEST // len(each)))]}
    for index in range(len(kinds)):
        if len(chosen) < min(_FEWEST, len(kinds)):
            chosen.add(index)
    yield sorted(chosen)
    yield list(range(len(kinds)))[-_FEWEST:]
    yield list(range(len(kinds)))[:_FEWEST]


def _built(config: Any, *, trust_remote_code: bool) -> PreTrainedModel:
    with torch.device("meta"):
        numbers = count_parameters(auto_class(config).from_config(config, trust_remote_code=trust_remote_code))
    if numbers > _LARGEST_TRIAL:
        blocks = text_config(config).num_hidden_layers
        raise ModelError(f"with {blocks} blocks it has {numbers:,} parameters, too many for a trial")
    torch.manual_seed(0)
    own = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}  # buffers must not be rounded to another
    module = auto_class(config).from_config(config, **own).float().eval()
    with torch.no_grad():
        module(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    return module


def trial_decoder(module: PreTrainedModel, family: Family) -> Decoder:
    """Return a copy as an open decoder."""
    return Decoder(
        module=module,
        tokenizer=None,
        anatomy=resolve(module, family),
        source=f"a tiny {family.model_type}",
        folder=None,
        fingerprint="",
        saved_dtype=torch.float32,
    )


def trial_tokens(decoder: Decoder) -> torch.Tensor:
    """Return seeded random tokens, (2, 12)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, int(decoder.config.vocab_size), (2, 12), generator=generator)
