"""Multimodal wrappers: the text decoder in them is pruned; vision towers, projectors and the like are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from secateur.errors import ModelError
from secateur.models.anatomy import Family, text_config


def is_wrapper(config: Any) -> bool:
    """Return whether a configuration is that of a model which reads images and text, with a text decoder inside."""
    return text_config(config) is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def is_causal(config: Any) -> bool:
    """Return whether a configuration is that of a causal decoder as a whole, whatever else its model can read."""
    return text_config(config) is config and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def opens_alone(config: Any) -> bool:
    """Return whether transformers has a causal decoder with this configuration, apart from any wrapper around it."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def after_images(family: Family, config: Any) -> Family:
    """Return the row of a decoder in which blocks stay after which a wrapper adds features of images.

    These are added after the first, the second, … block (DeepStack: Meng et al. 2024, arXiv:2406.04334).
    """
    vision = getattr(config, "vision_config", None)
    added = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    if not added:
        return family
    fixed = tuple(sorted({*range(added), *family.fixed_blocks}))
    return replace(family, fixed_blocks=fixed, fixed_reason="features of images are added after it")


def auto_class(config: Any) -> Any:
    """Return the class of transformers that opens a model with this configuration."""
    return AutoModelForImageTextToText if is_wrapper(config) else AutoModelForCausalLM


def inside_wrapper(family: Family, module: PreTrainedModel) -> Family:
    """Return the row of a text decoder with its paths as they are in a wrapper.

    Raises:
        ModelError: the wrapper has no text decoder of this structure.
    """
    names = {id(part): name for name, part in module.named_modules()}
    table, head = module.get_input_embeddings(), module.get_output_embeddings()
    own = family.embeddings[0]
    found = names.get(id(table), "")
    leaf = own.rpartition(".")[2]
    if head is None or not found.endswith(leaf):
        raise ModelError(
            f"'{module.config.model_type}': its text decoder, '{family.model_type}', was not found in "
            f"{type(module).__name__}; it cannot be pruned inside the wrapper."
        )
    before, after = own.removesuffix(leaf), found.removesuffix(leaf)

    def moved(path: str) -> str:
        return after + path.removeprefix(before)

    return replace(
        family,
        blocks=moved(family.blocks),
        embeddings=tuple(map(moved, family.embeddings)),
        final=tuple(map(moved, family.final)),
        packed=tuple((moved(name), axis) for name, axis in family.packed),
        head=names[id(head)],
    )
