"""What is not opened, and why: said before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import ModelError
from secateur.models.shards import INDEX

_WRAPPED = ("text_config", "vision_config", "audio_config", "thinker_config")


def refuse_config(config: Any, source: str) -> None:
    """Refuse configurations that are no plain causal decoder.

    Raises:
        ModelError: encoders, encoder-decoders, multimodal wrappers, quantised weights, blocks that share their
            keys and values.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source}: '{kind}' is an encoder-decoder; only decoder-only language models can be pruned.")
    wrapped = [name for name in _WRAPPED if getattr(config, name, None) is not None]
    if wrapped:
        raise ModelError(
            f"{source}: '{kind}' is a multimodal wrapper ({', '.join(wrapped)}). Save its text model on its own "
            "(for example with AutoModelForCausalLM on the text config) and prune that."
        )
    quantisation = getattr(config, "quantization_config", None)
    if quantisation:
        name = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        raise ModelError(
            f"{source}: the weights are quantised ({getattr(name, 'value', name)}). Prune the unquantised checkpoint "
            "(or dequantise this one) and quantise the result."
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise ModelError(f"{source}: blocks of '{kind}' share keys and values; removing one would break the others.")
    names = getattr(config, "architectures", None) or []
    if names and not any("CausalLM" in name or "LMHead" in name for name in names):
        raise ModelError(
            f"{source}: {names[0]} is not a causal language model (an encoder, or a head for another task)."
        )


def has_safetensors(folder: Path) -> bool:
    """Whether a folder holds safetensors weights, or an index that promises them."""
    return any(folder.glob("*.safetensors")) or (folder / INDEX).is_file()


def refuse_files(folder: Path, *, allow_pickle: bool) -> None:
    """Refuse folders without a configuration or with pickled weights only.

    Raises:
        ModelError: saying which.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a transformers checkpoint.")
    if has_safetensors(folder):
        return
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled and not allow_pickle:
        raise ModelError(
            f"{folder}: only pickled weights ({pickled[0].name}), which can run code when loaded. Convert them to "
            "safetensors, or pass allow_pickle=True (--allow-pickle) if you trust the source."
        )
    if not pickled:
        raise ModelError(
            f"{folder}: no weights here. Pickled ones of a model on the hub are fetched only if they are allowed "
            "(allow_pickle=True, --allow-pickle)."
        )
