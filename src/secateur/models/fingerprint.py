"""Fingerprints that identify a model without reading all of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from secateur.models.shard_files import open_shard, shard_files

_SAMPLE = 1 << 20


def of_folder(folder: Path) -> str:
    """Hash the configuration, tensor names and shapes, and the first and last MiB of each shard."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in shard_files(folder):
        with open_shard(file) as handle:
            for key in sorted(handle.keys()):
                digest.update(f"{key}{handle.get_slice(key).get_shape()}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE))
            stream.seek(max(0, file.stat().st_size - _SAMPLE))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def of_module(module: PreTrainedModel) -> str:
    """Hash the configuration and each tensor's name, shape and first values."""
    digest = hashlib.sha256(module.config.to_json_string().encode())
    for name, parameter in module.named_parameters():
        sample = parameter.detach().flatten()[:256].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample)
    return digest.hexdigest()


def of_edit(fingerprint: str, edit: Any) -> str:
    """Return the fingerprint of the model that an edit, given as data, makes from the model with this fingerprint."""
    return hashlib.sha256(f"{fingerprint}{json.dumps(edit, sort_keys=True)}".encode()).hexdigest()
