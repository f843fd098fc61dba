"""Build the module of a checkpoint: without weights, or with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import ModelError, first_line
from secateur.models.anatomy import find
from secateur.models.shard_files import shard_files
from secateur.models.shards import OUTER, Shards
from secateur.models.wrappers import auto_class


def empty_model(config: Any, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool) -> PreTrainedModel:
    """Build a model without weights but with its buffers (rotary tables and the like)."""
    try:
        with torch.device("meta"):
            module = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # the classes of a family may raise anything at settings they do not expect
        raise ModelError(
            f"{config.name_or_path or config.model_type}: the model that its config.json describes cannot be built "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    for holder in module.modules():
        for name, buffer in holder._buffers.items():
            if buffer is not None:
                holder._buffers[name] = torch.empty_like(buffer, device=device)
    _fill_buffers(module, module)
    module.tie_weights()
    return module


def _fill_buffers(holder: nn.Module, owner: PreTrainedModel) -> None:
    """Let the innermost model around each module fill its buffers; a module may fill those of the ones inside it."""
    owner = holder if isinstance(holder, PreTrainedModel) else owner
    for part in holder.children():
        _fill_buffers(part, owner)
    owner._init_weights(holder)


def whole_model(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    trust_remote_code: bool,
    pickled: bool,
) -> PreTrainedModel:
    """Load a checkpoint as transformers does.

    Args:
        folder: the checkpoint.
        config: its configuration.
        dtype: of the weights in memory.
        device: where they go; `auto` spreads them over all GPUs.
        trust_remote_code: allow code that comes with the checkpoint to run.
        pickled: whether it holds pickled weights only.

    Raises:
        ModelError: it is damaged, incomplete, of another architecture, or too large for the device.
    """
    if not pickled:
        shard_files(folder)
    placed = {} if device == torch.device("cpu") else {"device_map": device if device == "auto" else {"": device}}
    try:
        module, report = auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=not pickled,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **placed,
        )
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{folder}: does not fit on {device}; open it as a skeleton (--skeleton).") from error
    except Exception as error:  # transformers and the classes of a family may raise anything at a damaged checkpoint
        raise ModelError(f"{folder}: cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise ModelError(f"{folder}: {name} is {tuple(found)} but the config asks for {tuple(expected)}.")
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:4])
        raise ModelError(
            f"{folder}: the checkpoint has no weights for {names}; it is incomplete or of another architecture."
        )
    return module


def filled(module: PreTrainedModel, shards: Shards) -> PreTrainedModel:
    """Load all weights of an empty model, part by part, which dequantises them.

    Raises:
        ModelError: as `Shards.load`.
    """
    for part in (OUTER, *range(len(find(module, shards.blocks)))):
        shards.load(module, part)
    return module
