"""Save a decoder as a folder that plain transformers opens, and check that it does."""

from __future__ import annotations

import copy
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from secateur.checkpoints.card import model_card
from secateur.checkpoints.check import record_expected, reopen, require_passed, with_original
from secateur.checkpoints.folders import MARKER, replacing
from secateur.checkpoints.writer import SHARD_BYTES, write_weights
from secateur.modeling import MODELLING_FILE, DeciLMConfig, SecateurConfig, auto_map
from secateur.models.decoder import Decoder
from secateur.models.dtypes import dtype_named
from secateur.models.opening import open_model
from secateur.ownership import scratch
from secateur.plan.plan import plans_in
from secateur.surgery.uneven import against_decilm, as_decilm
from secateur.versions import versions

Layout = Literal["stock", "decilm", "secateur"]

_CARRIED = ("generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
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
    config.save_pretrained(folder)
    if decoder.has_own_code and decoder.folder:
        for file in decoder.folder.glob("*.py"):
            shutil.copy(file, folder)


def _carry_over(decoder: Decoder, folder: Path) -> None:
    """Copy tokenizer, chat template, generation configuration and licence unchanged."""
    if decoder.folder is not None:
        for pattern in (*_CARRIED, *(_TOKENIZER if not decoder.other_tokenizer else ())):
            for file in filter(Path.is_file, decoder.folder.glob(pattern)):
                shutil.copyfile(file, folder / file.name)
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
