"""The tokenizer of a GGUF file: copied from the dense model's file, from llama.cpp's converter, or written from ours.

llama.cpp splits text by rules that it knows by name, so a tokenizer can be written only where its rule is one of those.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from secateur.errors import InputError
from secateur.export.gguf_header import Entry, read_header
from secateur.models.decoder import Decoder

CONVERTER = "convert_hf_to_gguf.py"

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_LIST = "tokenizer.ggml.tokens"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
"""Names that llama.cpp gives to regular expressions that split text."""


def vocabulary_like(entries: dict[str, Entry], decoder: Decoder, file: Path) -> dict[str, Entry]:
    """Return the tokenizer and the description that a file of the dense model holds.

    Raises:
        InputError: the file is of a model with another vocabulary.
    """
    rows = int(decoder.module.get_input_embeddings().num_embeddings)
    found = len(entries[_LIST].value) if _LIST in entries else 0
    if found != rows:
        raise InputError(
            f"{file}: has {found:,} tokens, the model {rows:,} embeddings; name the GGUF of the model that was pruned."
        )
    described = ("general.license", "general.languages", "general.tags", "general.author", "general.organization")
    return {
        name: entry
        for name, entry in entries.items()
        if name.startswith(("tokenizer.", "general.base_model", *described))
    }


def vocabulary_by_converter(decoder: Decoder, folder: Path, llama_cpp: Path) -> dict[str, Entry]:
    """Return the tokenizer that llama.cpp's own converter writes for a checkpoint folder.

    Raises:
        InputError: no converter in that folder of llama.cpp, or it refuses the tokenizer.
    """
    script = llama_cpp / CONVERTER
    if not script.is_file():
        raise InputError(f"{llama_cpp}: has no {CONVERTER}; name a checkout of llama.cpp.")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "vocabulary.gguf")
        done = subprocess.run(
            [sys.executable, str(script), str(folder), "--outfile", str(file), "--vocab-only"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not file.is_file():
            tail = "\n".join(done.stderr.strip().splitlines()[-3:])
            advice = "\npip install it: the converter has requirements of its own." if "ModuleNotFound" in tail else ""
            raise InputError(f"{script} could not convert the tokenizer of {folder}:\n{tail}{advice}")
        return vocabulary_like(read_header(file).entries, decoder, file)


def vocabulary_of(decoder: Decoder) -> dict[str, Entry]:
    """Return the tokenizer of a model, written from its own `tokenizer.json`.

    Raises:
        InputError: it has none, or splits text by a rule that llama.cpp does not know.
    """
    hint = "Name a GGUF of the dense model (--like FILE) or a checkout of llama.cpp (--llama-cpp DIR)."
    tokenizer = decoder.tokenizer
    if tokenizer is None:
        raise InputError(f"{decoder.source}: has no tokenizer. {hint}")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = json.loads(backend.to_str()) if backend is not None else {}
    rule = _rule(data)
    if rule is None:
        raise InputError(f"{decoder.source}: llama.cpp has no name for the way its tokenizer splits text. {hint}")
    rows = int(decoder.module.get_input_embeddings().num_embeddings)
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [_UNUSED] * rows
    for token, number in data["model"]["vocab"].items():
        tokens[number], kinds[number] = token, _NORMAL
    for added in data.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in data["model"]["merges"]]
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        _LIST: tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }
    for name, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (number := getattr(tokenizer, f"{ours}_token_id")) is not None:
            entries[f"tokenizer.ggml.{name}_token_id"] = int(number)
    begun = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    entries["tokenizer.ggml.add_bos_token"] = bool(begun)
    if isinstance(tokenizer.chat_template, str):
        entries["tokenizer.chat_template"] = tokenizer.chat_template
    return {name: Entry(value) for name, value in entries.items() if value != []}


def _rule(data: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the rule by which a byte-level tokenizer splits text; None if it has none."""
    model, split = data.get("model", {}), data.get("pre_tokenizer") or {}
    plain = model.get("type") == "BPE" and model.get("merges") and not model.get("byte_fallback")
    if not plain or (data.get("normalizer") or {}).get("type", "NFC") != "NFC":
        return None
    parts = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    kinds = [part.get("type") for part in parts]
    if kinds[-1:] != ["ByteLevel"] or parts[-1].get("add_prefix_space"):
        return None
    whole = parts[-1].get("use_regex", True)
    if kinds == ["ByteLevel"]:
        return "gpt-2" if whole else None
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm" if whole and parts[0].get("individual_digits") else None
    if kinds == ["Split", "ByteLevel"] and not whole and parts[0].get("behavior") == "Isolated":
        return _RULES.get(parts[0].get("pattern", {}).get("Regex", ""))
    return None
