"""Choose the weights a run trains, copy them to float32, and merge them back into a decoder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.errors import InputError, ModelError
from secateur.models.anatomy import find, present, resolve
from secateur.models.decoder import Decoder
from secateur.models.depth import with_blocks
from secateur.models.experts import has_experts
from secateur.models.fingerprint import of_edit

Trained = Literal["lora", "last-layers", "full", "router"]

LAST_BLOCKS = 3
"""Number of blocks that `last-layers` trains besides the head."""


@dataclass(frozen=True)
class Prepared:
    """A model ready for training.

    Attributes:
        module: the model; trained parameters require gradients and are in float32.
        blocks: its blocks, the units of sharding.
        trained: number of trained weights.
        finish: returns the decoder for trained weights, given by their names in `module`, rounded to the dtype to be
            saved.
    """

    module: nn.Module
    blocks: nn.ModuleList
    trained: int
    finish: Callable[[Mapping[str, torch.Tensor]], Decoder]


def prepare(
    decoder: Decoder,
    which: Trained,
    *,
    mixed: bool = True,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    seed: int = 0,
) -> Prepared:
    """Return a model of which only some weights are trained; the given one is unchanged and shares the others.

    Args:
        decoder: the model, in memory.
        which: `full`: all weights; `last-layers`: the head, the final norm and the last three blocks; `router`: what
            sends tokens to experts; `lora`: low-rank updates of the linear layers of all blocks (Hu et al. 2021),
            merged back by `finish`.
        mixed: keep weights that are not trained in their dtype; otherwise they too are copied to float32.
        rank, alpha, dropout: of `lora`.
        seed: random seed of the initial updates.

    Raises:
        InputError: the decoder is a skeleton.
        ModelError: `lora` finds no linear layers, or `router` no router.
    """
    if decoder.is_skeleton:
        raise InputError(
            f"{decoder.source}: training these weights needs the whole model in memory; open it with --in-memory, or "
            "heal with blocks."
        )
    if which == "lora":
        return _with_lora(decoder, rank, alpha, dropout, seed)
    module = _copy(decoder)
    chosen = [name for name, _ in module.named_parameters() if _is_chosen(decoder, which, name)]
    if which == "router":
        require_router(decoder)
    replace_parameters(module, chosen, lambda _, tensor: nn.Parameter(tensor.detach().clone().float()))
    if not mixed:
        in_float32(module)

    def finish(trained: Mapping[str, torch.Tensor]) -> Decoder:
        return _finished(decoder, _copy(decoder), trained)

    return Prepared(module, find(module, decoder.anatomy.family.blocks), _trained_count(module), finish)


def require_router(decoder: Decoder) -> None:
    """Refuse a model without routers to train.

    Raises:
        ModelError: saying so.
    """
    if not any(has_experts(block, decoder.anatomy.family) for block in decoder.block_list):
        raise ModelError(f"{decoder.source}: it has no experts, and so no router to train; heal with another recipe.")


def _copy(decoder: Decoder) -> PreTrainedModel:
    """Return new modules that share the model's tensors."""
    return with_blocks(decoder.module, decoder.anatomy.family, range(decoder.block_count)).requires_grad_(False)


def _trained_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def replace_parameters(
    module: PreTrainedModel, names: Iterable[str], make: Callable[[str, torch.Tensor], nn.Parameter]
) -> None:
    """Replace parameters by new tensors, by name; tied ones stay tied."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        found = holder._parameters[leaf]
        assert found is not None
        holder._parameters[leaf] = make(name, found)
    module.tie_weights()


def in_float32(module: PreTrainedModel) -> None:
    """Replace weights of lower precision in a module by float32 copies."""
    less = [name for name, one in module.named_parameters() if one.dtype in (torch.bfloat16, torch.float16)]
    replace_parameters(module, less, lambda _, one: nn.Parameter(one.detach().float(), requires_grad=one.requires_grad))


def _is_chosen(decoder: Decoder, which: Trained, name: str) -> bool:
    if which == "router":
        return _is_of_router(decoder, name)
    return which == "full" or _is_last(decoder, name)


def _is_of_router(decoder: Decoder, name: str) -> bool:
    family = decoder.anatomy.family
    block = re.match(rf"{re.escape(family.blocks)}\.(\d+)\.(.*)", name)
    if block is None or not has_experts(decoder.block_list[int(block.group(1))], family):
        return False
    return any(f"{block.group(2)}.".startswith(f"{path}.") for path in family.router)


def _is_last(decoder: Decoder, name: str) -> bool:
    family = decoder.anatomy.family
    block = re.match(rf"{re.escape(family.blocks)}\.(\d+)\.", name)
    if block:
        return int(block.group(1)) >= decoder.block_count - LAST_BLOCKS
    parts = [family.head, *family.final]
    if decoder.anatomy.tied:
        parts.append(family.embeddings[0])
    return any(name.startswith(f"{part}.") for part in parts)


def _with_lora(decoder: Decoder, rank: int, alpha: int, dropout: float, seed: int) -> Prepared:
    from peft import LoraConfig, get_peft_model  # here, because importing it takes seconds

    targets = sorted(_linear_layers(decoder))
    if not targets:
        raise ModelError(f"{decoder.source}: no linear layers in its blocks for LoRA; heal with full or last-layers.")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", bias="none"
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(_copy(decoder), config)

    def finish(trained: Mapping[str, torch.Tensor]) -> Decoder:
        weights = [f"{name}.weight" for name in targets]
        module = _copy(decoder)
        replace_parameters(module, weights, lambda _, one: nn.Parameter(one.detach().clone(), requires_grad=False))
        merging: Any = get_peft_model(module, config)
        merging.load_state_dict(dict(trained), strict=False)
        merged = merging.merge_and_unload()
        return _finished(decoder, merged, {name: merged.get_parameter(name) for name in weights})

    blocks = find(adapted.base_model.model, decoder.anatomy.family.blocks)
    return Prepared(adapted, blocks, _trained_count(adapted), finish)


def _linear_layers(decoder: Decoder) -> Iterator[str]:
    """Return the paths of the linear projections of all blocks, without routers and shortcut matrices."""
    family = decoder.anatomy.family
    named = (*family.attention_in, *family.attention_out, *family.mlp_in, *family.mlp_out)
    for index, block in enumerate(decoder.block_list):
        known = family.attention_out and family.qkv != "by-unit"
        found = present(block, named) if known else block.named_modules()
        for name, module in found:
            if isinstance(module, nn.Linear | Conv1D):
                yield f"{decoder.anatomy.block_path(index)}.{name}"


def _finished(decoder: Decoder, module: PreTrainedModel, trained: Mapping[str, torch.Tensor]) -> Decoder:
    stored, dtype = decoder.saved_dtype, decoder.module.dtype

    def rounded(name: str, before: torch.Tensor) -> nn.Parameter:
        value = trained[name].detach().to(stored).to(before.device, dtype)
        return nn.Parameter(value, requires_grad=False)

    replace_parameters(module, trained, rounded)
    module = module.requires_grad_(False).eval()
    sums = [[name, float(module.get_parameter(name).double().sum())] for name in trained]
    return dataclasses.replace(
        decoder,
        module=module,
        anatomy=resolve(module, decoder.anatomy.family),
        fingerprint=of_edit(decoder.fingerprint, {"healed": sums}),
    )
