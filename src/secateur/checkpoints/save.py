"""Save a decoder as a folder that plain transformers opens, and check that it does."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch

from secateur.checkpoints.card import model_card
from secateur.checkpoints.check import record_expected, reopen, require_passed, with_original
from secateur.checkpoints.folders import MARKER, replacing
from secateur.checkpoints.writer import SHARD_BYTES, write_weights
from secateur.errors import SecateurWarning
from secateur.modeling import MODELLING_FILE, DeciLMConfig, SecateurConfig, auto_map
from secateur.models.anatomy import text_config
from secateur.models.decoder import Decoder
from secateur.models.dtypes import dtype_named
from secateur.models.gguf import RECORD
from secateur.models.opening import open_model
from secateur.models.shard_files import holds_mtp
from secateur.ownership import scratch
from secateur.plan.plan import plans_in
from secateur.surgery.uneven import against_decilm, as_decilm
from secateur.versions import versions

_MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Configuration entries with the number of blocks for multi-token prediction."""

Layout = Literal["stock", "decilm", "secateur"]

_STAYS = (
    "config.json",
    "README.md",
    MARKER,
    RECORD,
    "*.index.json",
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "*quant*config.json",
    ".*",
)
"""Files of a checkpoint folder that do not travel: weights in any form, and what is written anew."""
_FOLDERS = ("additional_chat_templates",)
_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.tiktoken",
    "*.model",
)


def save(
    decoder: Decoder,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    check: bool = True,
) -> dict[str, Any]:
    """Save a decoder as a checkpoint folder that plain transformers opens.

    The folder holds safetensors weights, configuration, tokenizer, chat template, generation configuration, model
    card and `secateur.json`; for shapes that no stock architecture supports also the modelling file
    (`trust_remote_code=True` opens it where secateur is not imported). It is written next to the target, reopened in
    a fresh process without secateur, and only renamed to the target if logits and cached generation are the same.

    Args:
        decoder: the model to save.
        out: the folder; one that secateur wrote before is replaced, any other is refused.
        dtype: dtype of the saved weights; None keeps the original checkpoint's.
        shard_bytes: size above which the weights are split over several files.
        check: reopen the folder in a fresh process before it replaces the target.

    Returns:
        The record written to `secateur.json`.

    Raises:
        InputError: the folder must not be replaced, or cannot be written.
        NumericsError: a weight is NaN or infinite.
        CheckError: the reopened folder behaves differently; nothing is left at the target.
    """
    stored = decoder.saved_dtype if dtype is None else dtype_named(dtype)
    if layout_of(decoder) == "decilm" and not isinstance(decoder.config, DeciLMConfig):
        decoder = as_decilm(decoder)
    with replacing(out, reads=decoder.folder) as folder:
        size = write_weights(decoder, folder, stored, shard_bytes)
        _write_config(decoder, folder, stored)
        _carry_over(decoder, folder)
        record = _record(decoder, stored, size)
        if check:
            record["check"] = _prove(decoder, folder, stored)
        model_card(decoder, record).save(folder / "README.md")
        (folder / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def layout_of(decoder: Decoder) -> Layout:
    """Return the layout in which a model is saved: its architecture's own, Nemotron-NAS's, or the modelling file's."""
    if not isinstance(decoder.config, SecateurConfig):
        return "stock"
    if isinstance(decoder.config, DeciLMConfig) or against_decilm(decoder.config) is None:
        return "decilm"
    return "secateur"


def _prove(decoder: Decoder, folder: Path, stored: torch.dtype) -> dict[str, Any]:
    with scratch("check") as place:
        expected = with_original(record_expected(decoder, place / "expected.npz", stored), decoder)
        (result,) = reopen([expected.job(folder)])
    require_passed(result)
    del result["folder"]
    return result


def _write_config(decoder: Decoder, folder: Path, stored: torch.dtype) -> None:
    config = copy.deepcopy(decoder.module.config)
    config.architectures = [type(decoder.module).__name__]
    config.dtype = stored
    if isinstance(config, SecateurConfig):
        config.auto_map = auto_map(config)
        assert config.widths is not None
        config.embedding_size = config.widths[0]  # the name from which vLLM's transformers backend builds the embedding
        config.save_pretrained(folder)
        shutil.copyfile(MODELLING_FILE, folder / MODELLING_FILE.name)
        return
    if not decoder.has_own_code and hasattr(config, "auto_map"):
        del config.auto_map  # it names code that was not used and is missing here
    _without_mtp(config, decoder)
    config.save_pretrained(folder)


def _without_mtp(config: Any, decoder: Decoder) -> None:
    """Let the configuration promise no blocks for multi-token prediction, which plain transformers does not load."""
    text = text_config(config)
    for name in _MTP_COUNTS:
        count = getattr(text, name, None)
        if not count:
            continue
        setattr(text, name, 0)
        if decoder.folder is not None and holds_mtp(decoder.folder):
            warnings.warn(
                f"the {count} blocks for multi-token prediction in {decoder.source} are left behind: they were trained "
                f"with the dense model, and plain transformers does not load them; {name} is 0 now.",
                SecateurWarning,
                stacklevel=5,
            )


def _carry_over(decoder: Decoder, folder: Path) -> None:
    """Copy what else is in the checkpoint folder unchanged: tokenizer, templates, processors, code, licences."""
    if decoder.folder is not None:
        stays = (*_STAYS, *(_TOKENIZER if decoder.other_tokenizer else ()))
        for file in decoder.folder.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in stays) or (folder / file.name).exists():
                continue
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
            elif file.name in _FOLDERS:
                shutil.copytree(file, folder / file.name)
    has_tokenizer = any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))
    if decoder.tokenizer is not None and not has_tokenizer:
        decoder.tokenizer.save_pretrained(folder)
    if decoder.folder is None and decoder.module.generation_config is not None:
        decoder.module.generation_config.save_pretrained(folder)


def _record(decoder: Decoder, stored: torch.dtype, size: int) -> dict[str, Any]:
    history = list(decoder.history)
    first = next(iter(plans_in(history)), None)
    return {
        "secateur": versions()["secateur"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": first.model.source if first else decoder.source,
        "base_fingerprint": first.model.fingerprint if first else decoder.fingerprint,
        "parameters_before": first.parameters_before if first else decoder.parameter_count,
        "parameters_after": decoder.parameter_count,
        "blocks": decoder.block_count,
        "dtype": str(stored).removeprefix("torch."),
        "bytes": size,
        "history": history,
        "versions": versions(),
    }


def convert(
    model: Decoder | str | Path, out: str | Path, *, dtype: str | None = None, check: bool = True
) -> dict[str, Any]:
    """Save a model as a safetensors folder that plain transformers opens, verified in a fresh process.

    Args:
        model: an open model, or what `open_model` takes: a GGUF file, a folder, a name on the hub.
        out: the folder; one that secateur wrote before is replaced, any other is refused.
        dtype: dtype of the saved weights; None keeps the checkpoint's (of a GGUF what it was dequantised to).
        check: reopen the folder in a fresh process and compare logits and cached generation.

    Returns:
        The record that was written to `secateur.json`.

    Raises:
        InputError: the model or dtype does not exist, or the folder must not be replaced.
        ModelError: the model cannot be opened.
        NumericsError: a weight is NaN or infinite, or does not fit the dtype.
        CheckError: the reopened folder behaves differently; nothing is left at the target.
    """
    decoder = model if isinstance(model, Decoder) else open_model(model)
    return save(decoder, out, dtype=dtype, check=check)
