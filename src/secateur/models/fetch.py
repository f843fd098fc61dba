"""Where a model's files are: on this machine, or fetched from the hub, the configuration before the weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from transformers import AutoConfig

from secateur.errors import InputError, ModelError, first_line
from secateur.models.refuse import refuse_config
from secateur.models.shards import INDEX, files_in_index

HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
"""What a name on the hub looks like: owner/name."""

BUNDLED = "bundled"
"""The name under which the small model that ships with the package is opened."""

_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md"]
_COPIES = ["*/*.safetensors", "*/*.bin", "*/*.pt", "*/*.pth", "consolidated*"]
"""Weights that a repository holds once more in another form."""
_CODE = ["*.py"]
_PICKLES = ["*.bin", "*.pt", "*.pth"]


def fetch(
    source: str,
    *,
    revision: str | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """Give the folder of a checkpoint, fetched from the hub where it is not on this machine; arguments as `open_model`.

    The configuration comes first, so that nothing large is fetched of a model that is refused.

    Args:
        weights: whether the weights are wanted, too.

    Raises:
        InputError: the source does not exist.
        ModelError: it is refused for its configuration.
    """
    folder = local_folder(source)
    if folder is None:
        folder = _from_hub(source, revision, [*_FILES, *_CODE * trust_remote_code])
        read_config(folder, source, trust_remote_code=trust_remote_code)
        if weights:
            _from_hub(source, revision, [*_weight_files(folder), *_PICKLES * allow_pickle])
    return folder


def has_all_weights(folder: Path) -> bool:
    """Whether the safetensors weights of a folder are there, all that its index names."""
    names = _weight_files(folder)
    return bool(names) and all(any(folder.glob(name)) for name in names)


def local_folder(source: str) -> Path | None:
    """Give the folder of a model on this machine; None for one on the hub."""
    if source == BUNDLED:
        return Path(__file__).resolve().parents[1] / "bundled"
    return Path(source) if Path(source).is_dir() else None


def _weight_files(folder: Path) -> list[str]:
    """List which weights to fetch: the shards that the index names, or else all."""
    return files_in_index(folder) if (folder / INDEX).is_file() else ["*.safetensors"]


def _from_hub(source: str, revision: str | None, patterns: list[str]) -> Path:
    if not HUB_NAME.fullmatch(source):
        raise InputError(f"{source}: no such folder, and not a hub name of the form owner/name.")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=_COPIES))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{source}: no such folder, and the hub cannot be reached (or HF_HUB_OFFLINE is set). Give a local folder."
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"{source}: not available on the hub ({first_line(error)}).") from error


def read_config(folder: Path, source: str, *, trust_remote_code: bool) -> Any:
    """Read a folder's configuration; `source` is what the user named.

    Raises:
        ModelError: it cannot be read, or is of no decoder that can be pruned.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"{source}: cannot read its configuration: {error}") from error
    refuse_config(config, source)
    return config
