"""Locate a model's files: on this machine, or downloaded from the hub, the configuration before the weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, list_repo_files, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)
from transformers import AutoConfig
from yaml import YAMLError

from secateur.errors import InputError, ModelError, first_line
from secateur.models import gguf
from secateur.models.config_limits import refuse_impossible
from secateur.models.quantised import READABLE, quantised_by
from secateur.models.shard_files import INDEX, files_in_index
from secateur.models.wrappers import is_causal, is_wrapper

HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
"""Form of a name on the hub: owner/name."""

_HUB_FILE = re.compile(rf"({HUB_NAME.pattern})/(.+\.gguf)", re.IGNORECASE)
"""Form of a GGUF file on the hub: owner/name/file.gguf."""

BUNDLED = "bundled"
"""The name under which the small model that ships with the package is opened."""

_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md"]
_COPIES = ["*/*.safetensors", "*/*.bin", "*/*.pt", "*/*.pth", "consolidated*"]
"""Second copies of the weights of a repository in another form."""
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
    """Return the folder of a checkpoint, downloaded from the hub if it is not local; arguments as `open_model`.

    The configuration comes first, so that nothing large is downloaded for a model that is refused. For a GGUF file it
    is the cached folder with its dequantised weights.

    Args:
        weights: whether the weights are wanted, too.

    Raises:
        InputError: the source does not exist, or holds several GGUF files.
        ModelError: it is refused for its configuration, or is a GGUF file that cannot be read.
    """
    folder = local_folder(source)
    if not (folder and allow_pickle and pickled_weights(folder)) and (file := gguf.find_gguf(folder or source)):
        return _from_gguf(file, source, weights=weights)
    if folder is not None:
        return folder
    if named := _HUB_FILE.fullmatch(source):
        return _from_gguf(_gguf_on_hub(named[1], named[2], revision), source, weights=weights)
    folder = _from_hub(source, revision, [*_FILES, *_CODE * trust_remote_code])
    if (folder / "config.json").is_file():
        read_config(folder, source, trust_remote_code=trust_remote_code)
        if weights:
            _from_hub(source, revision, [*_weight_files(folder), *_PICKLES * allow_pickle])
    if not (folder / "config.json").is_file() or (weights and not has_safetensors(folder) and not allow_pickle):
        name = _only_gguf(source, revision, folder)
        if name is not None:
            return _from_gguf(_gguf_on_hub(source, name, revision), source, weights=weights)
        read_config(folder, source, trust_remote_code=trust_remote_code)
    return folder


def _from_gguf(file: Path, source: str, *, weights: bool) -> Path:
    """Return the cached folder of a GGUF file; its configuration is checked before weights are dequantised."""
    done = gguf.finished(file)
    if done is not None:
        return done
    shapes = gguf.described(file)
    read_config(shapes, source, trust_remote_code=False)
    return gguf.dequantised(file) if weights else shapes


def _gguf_on_hub(repository: str, name: str, revision: str | None) -> Path:
    file = _from_hub(repository, revision, [name]) / name
    if not file.is_file():
        raise InputError(f"{repository}/{name}: no such file on the hub.")
    return file


def _only_gguf(source: str, revision: str | None, folder: Path) -> str | None:
    """Return the name of the GGUF file of a repository without safetensors; None if there is none.

    Raises:
        InputError: there are several.
    """
    try:
        names = list_repo_files(source, revision=revision)
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError):  # no network: what was downloaded before is used
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    found = sorted(name for name in names if name.lower().endswith(gguf.SUFFIX))
    if not found or any(name.endswith(".safetensors") for name in names):
        return None
    return gguf.choose(found, source)


def has_all_weights(folder: Path) -> bool:
    """Return whether the safetensors weights of a folder are there, all that its index names."""
    names = _weight_files(folder)
    return bool(names) and all(any(folder.glob(name)) for name in names)


def local_folder(source: str) -> Path | None:
    """Return the folder of a model on this machine; None for one on the hub."""
    if source == BUNDLED:
        return Path(__file__).resolve().parents[1] / "bundled"
    return Path(source) if Path(source).is_dir() else None


def _weight_files(folder: Path) -> list[str]:
    """List the weights to download: the shards that the index names, or else all."""
    return files_in_index(folder) if (folder / INDEX).is_file() else ["*.safetensors"]


def _from_hub(source: str, revision: str | None, patterns: list[str]) -> Path:
    if not HUB_NAME.fullmatch(source):
        raise InputError(
            f"{source}: no such folder, and not a hub name of the form owner/name (or owner/name/file.gguf)."
        )
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
        ModelError: it cannot be read, or is not that of a decoder that can be pruned.
    """
    _refuse_odd_files(folder)
    refuse_impossible(folder, source)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration class of any family may raise anything at numbers it does not expect
        raise ModelError(f"{source}: cannot read its configuration: {error}") from error
    refuse_config(config, source, original=original_in_card(folder), dequantises=True)
    return config


def original_in_card(folder: Path) -> str | None:
    """Return the name of the model that a checkpoint's card says it was made from, if it says one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        card_data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, AttributeError, YAMLError):
        return None  # a card is for readers, and may hold anything
    named = card_data.get("base_model")
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) and HUB_NAME.fullmatch(first) else None


_MOST_SETTINGS = 512 << 20
"""Largest size in bytes of a file of settings or of a tokenizer."""


def _refuse_odd_files(folder: Path) -> None:
    """Refuse pipes, devices and the like, which would be read without end, and settings too large to be any.

    Raises:
        ModelError: naming the file.
    """
    for pattern in (*_FILES, *_PICKLES, "*.safetensors"):
        for file in folder.glob(pattern):
            if file.exists() and not file.is_file() and not file.is_dir():
                raise ModelError(f"{file}: not an ordinary file; copy the checkpoint again.")
            if pattern in _FILES and file.is_file() and file.stat().st_size > _MOST_SETTINGS:
                raise ModelError(f"{file}: {file.stat().st_size >> 20:,} MiB are too many for settings or a tokenizer.")


_WRAPPED = ("text_config", "vision_config", "audio_config", "thinker_config")


def refuse_config(config: Any, source: str, *, original: str | None = None, dequantises: bool = False) -> None:
    """Refuse configurations of anything but a plain causal decoder.

    Args:
        config: the configuration.
        source: what the user named.
        original: the model that the checkpoint was made from, if its card says one.
        dequantises: whether the weights are still to be read, and can be dequantised.

    Raises:
        ModelError: encoders, encoder-decoders, multimodal wrappers, quantised weights, blocks that share their
            keys and values.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source}: '{kind}' is an encoder-decoder; only decoder-only language models can be pruned.")
    wrapped = [name for name in _WRAPPED if getattr(config, name, None) is not None]
    if wrapped and not is_wrapper(config) and not is_causal(config):
        raise ModelError(
            f"{source}: '{kind}' is a multimodal model ({', '.join(wrapped)}) that AutoModelForImageTextToText does "
            "not open; of those that hold a text decoder, only the ones it opens can be pruned."
        )
    method = quantised_by(config)
    if method is not None and not (dequantises and method in READABLE):
        raise ModelError(
            f"{source}: the weights are quantised ({method}). Prune the unquantised checkpoint"
            f"{f', {original},' if original else ' (or dequantise this one)'} and quantise the result."
        )
    names = getattr(config, "architectures", None) or []
    if names and not wrapped and not any("CausalLM" in name or "LMHead" in name for name in names):
        raise ModelError(
            f"{source}: {names[0]} is not a causal language model (an encoder, or a head for another task)."
        )


def has_safetensors(folder: Path) -> bool:
    """Return whether a folder holds safetensors weights, or an index that promises them."""
    return any(folder.glob("*.safetensors")) or (folder / INDEX).is_file()


def pickled_weights(folder: Path) -> list[Path]:
    """List the pickled weights in a folder."""
    return sorted(file for pattern in _PICKLES for file in folder.glob(pattern))


def refuse_files(folder: Path, *, allow_pickle: bool) -> None:
    """Refuse folders without a configuration or with pickled weights only.

    Raises:
        ModelError: saying which.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a transformers checkpoint.")
    if (folder / "adapter_config.json").exists():  # transformers would load it into the model, pickled ones too
        raise ModelError(f"{folder}: holds an adapter (adapter_config.json); merge it into the model, or remove it.")
    if has_safetensors(folder):
        return
    pickled = pickled_weights(folder)
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
