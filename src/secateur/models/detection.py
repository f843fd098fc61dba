"""The anatomy of a family that is not in the table: guessed from the module, then verified on a tiny copy.

The check builds a model of the same architecture with four small random blocks. It must be causal, running its blocks
one by one must match its own forward pass exactly, and removing a block, saving and reloading must match the run that
skips that block exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.errors import ModelError, first_line
from secateur.models.anatomy import Family, count_parameters, resolve
from secateur.models.decoder import Decoder
from secateur.models.depth import with_blocks
from secateur.models.forward import capture, logits, run_block
from secateur.ownership import scratch

_BLOCKS = 4
_VOCABULARY = 128
_LARGEST_TRIAL = 500_000_000
"""Most parameters a trial copy may have, where its sizes cannot be reduced."""
_SMALL: dict[str, int] = {
    "n_embd": 64,
    "n_head": 4,
    "n_inner": 96,
    "d_model": 64,
    "ffn_dim": 96,
    "rotary_dim": 8,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_FAILURES = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""Exceptions that the code of an unknown architecture may raise while it is tried out."""
_INDEX_SETTINGS = ("mlp_only_layers",)
_COUNT_SETTINGS = ("max_window_layers", "first_k_dense_replace")


def detect(config: Any, source: str, *, trust_remote_code: bool = False) -> Family:
    """Guess the family row of an architecture and verify it.

    Raises:
        ModelError: the guess or the check failed; the message says at which step.
    """
    kind = config.model_type
    try:
        with torch.random.fork_rng(devices=[]):
            family, tiny = _guess_on_a_tiny_copy(config, trust_remote_code=trust_remote_code)
            family = replace(family, tuple_output=_returns_tuple(_proof_decoder(tiny, family)))
            _prove(_proof_decoder(tiny, family), trust_remote_code=trust_remote_code)
    except (*_FAILURES, ModelError) as error:
        raise ModelError(
            f"{source}: '{kind}' is not a known family, and the trial on a tiny copy failed: {first_line(error)}"
        ) from error
    return family


def _guess_on_a_tiny_copy(config: Any, *, trust_remote_code: bool) -> tuple[Family, PreTrainedModel]:
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    family = _guess(module, config)
    return family, _tiny_copy(config, family, trust_remote_code=trust_remote_code)


def _guess(module: PreTrainedModel, config: Any) -> Family:
    lists = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers
    ]
    if not lists:
        raise ModelError(f"'{config.model_type}': no list of {config.num_hidden_layers} blocks found in the model.")
    shortest = min(lists, key=lambda name: name.count("."))
    names = {id(part): name for name, part in module.named_modules()}
    if module.get_output_embeddings() is None:
        raise ModelError("it has no head that predicts tokens.")
    return Family(
        model_type=config.model_type,
        blocks=shortest,
        embeddings=(names[id(module.get_input_embeddings())],),
        final=(),
        head=names[id(module.get_output_embeddings())],
        norms=(),
        attention_in=(),
        attention_out=(),
        mlp_in=(),
        mlp_out=(),
        per_layer_lists=tuple(_lists_per_layer(config)),
        leading_counts=tuple(name for name in _COUNT_SETTINGS if hasattr(config, name)),
        dense_blocks=next((name for name in _INDEX_SETTINGS if hasattr(config, name)), None),
        block_numbers=tuple(_lists_of_block_numbers(config)),
        detected=True,
    )


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


def _tiny_copy(config: Any, family: Family, *, trust_remote_code: bool) -> PreTrainedModel:
    failures = []
    for sizes in (_SMALL, {}):
        tiny = _shrink(config, family, sizes)
        try:
            _require_small(tiny, trust_remote_code=trust_remote_code)
            torch.manual_seed(0)
            module = AutoModelForCausalLM.from_config(tiny, trust_remote_code=trust_remote_code).float().eval()
            with torch.no_grad():
                module(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
            return module
        except _FAILURES as error:
            failures.append(first_line(error))
    raise ModelError(f"none could be built ({failures[-1]})")


def _require_small(config: Any, *, trust_remote_code: bool) -> None:
    with torch.device("meta"):
        numbers = count_parameters(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    if numbers > _LARGEST_TRIAL:
        raise ValueError(f"with {config.num_hidden_layers} blocks it has {numbers:,} parameters, too many for a trial")


def _shrink(config: Any, family: Family, sizes: dict[str, int]) -> Any:
    tiny = copy.deepcopy(config)
    for name in family.per_layer_lists:
        setattr(tiny, name, list(getattr(config, name))[-_BLOCKS:])
    for name in family.block_numbers:
        setattr(tiny, name, [number for number in getattr(config, name) if number < _BLOCKS])
    tiny.num_hidden_layers = min(_BLOCKS, config.num_hidden_layers)
    tiny.vocab_size = min(_VOCABULARY, config.vocab_size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tiny, name, None) is not None:
            setattr(tiny, name, 0)
    grouped = getattr(config, "num_key_value_heads", None) != getattr(config, "num_attention_heads", None)
    for name, size in sizes.items():
        if isinstance(getattr(config, name, None), int):
            multi_head = name == "num_key_value_heads" and not grouped
            setattr(tiny, name, sizes["num_attention_heads"] if multi_head else min(size, getattr(config, name)))
    return tiny


def _proof_decoder(module: PreTrainedModel, family: Family) -> Decoder:
    return Decoder(
        module=module,
        tokenizer=None,
        anatomy=resolve(module, family),
        source=f"a tiny {family.model_type}",
        folder=None,
        fingerprint="",
        saved_dtype=torch.float32,
    )


@torch.no_grad()
def _returns_tuple(decoder: Decoder) -> bool:
    """Run block 0 to learn whether blocks return a tuple."""
    seen: list[bool] = []
    block = decoder.block_list[0]
    handle = block.register_forward_hook(lambda _m, _a, output: seen.append(isinstance(output, tuple)))
    try:
        decoder.module(input_ids=_tokens(decoder), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def _tokens(decoder: Decoder) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, int(decoder.config.vocab_size), (2, 12), generator=generator)


@torch.no_grad()
def _prove(decoder: Decoder, *, trust_remote_code: bool = False) -> None:
    tokens = _tokens(decoder)
    whole = decoder.module(input_ids=tokens, use_cache=False).logits
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % int(decoder.config.vocab_size)
    again = decoder.module(input_ids=changed, use_cache=False).logits
    if not torch.allclose(whole[:, :-1], again[:, :-1], rtol=0, atol=1e-4 * float(whole.abs().max())):
        raise ValueError("it is not causal: a later token changes what came before")
    if not torch.equal(_walk(decoder, tokens, left_out=None), whole):
        raise ValueError("walking its blocks one by one does not give its own forward pass")
    for left_out in range(decoder.block_count):
        kept = [i for i in range(decoder.block_count) if i != left_out]
        shorter = with_blocks(decoder.module, decoder.anatomy.family, kept)
        expected = _walk(decoder, tokens, left_out)
        again = _reloaded(shorter, trust_remote_code=trust_remote_code)(input_ids=tokens, use_cache=False)
        if not torch.equal(again.logits, expected):
            raise ValueError(f"without block {left_out} it loads as another model")


def _walk(decoder: Decoder, tokens: torch.Tensor, left_out: int | None) -> torch.Tensor:
    hidden, calls = capture(decoder, tokens)
    for index, call in enumerate(calls):
        if index != left_out:
            hidden = run_block(decoder.block_list[index], call, hidden)
    return logits(decoder, hidden, tokens)


def _reloaded(module: PreTrainedModel, *, trust_remote_code: bool) -> PreTrainedModel:
    with scratch("detection") as folder:
        module.save_pretrained(folder)
        again, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError("a shorter copy has missing or unexpected weights when it is loaded")
    return again.eval()
