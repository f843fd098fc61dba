"""The safetensors files of a checkpoint folder: which there are, what they hold, and where in them it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from secateur.errors import ModelError
from secateur.models.anatomy import Family
from secateur.reading import MIB, FileKind, from_json

INDEX = "model.safetensors.index.json"
"""Name of the file that says which shard of a checkpoint folder holds which tensor."""

INDEX_FILE = FileKind("shard index", 64 * MIB, error=ModelError, advice="Copy it again.")
_SHARD = re.compile(r"\w[^/\\\0]*\.safetensors")
_ROWS = 4096
"""Rows of the token table and the head that are compared at a time."""


def shard_files(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint folder, in order.

    Raises:
        ModelError: there are none, or a file listed in the index is missing or elsewhere.
    """
    if not (folder / INDEX).is_file():
        whole = folder / "model.safetensors"
        files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder}: no safetensors weights here.")
        return files
    names = files_in_index(folder)
    leaving = [name for name in names if not _stays(folder / name)]
    if leaving:
        raise ModelError(f"{folder}: {leaving[0]} is a link that leaves the folder; copy the file instead.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: missing shard {', '.join(missing)} (named in {INDEX}); copy it again.")
    return [folder / name for name in names]


def files_in_index(folder: Path) -> list[str]:
    """List the files that a checkpoint's index names.

    Raises:
        ModelError: it cannot be read, or names anything but plain safetensors files beside it.
    """
    return INDEX_FILE.parsed(folder / INDEX, _names_in)


def stored_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and opened tensor of all that a checkpoint's shards hold, without reading them."""
    for file in shard_files(folder):
        handle = open_shard(file)
        yield from ((key, handle.get_slice(key)) for key in handle.keys())  # noqa: SIM118 - not a dict


def _names_in(text: str) -> list[str]:
    found = from_json(text)["weight_map"]
    if not isinstance(found, dict) or not found:
        raise ValueError("its weight_map names no weights")
    for name in found.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ValueError(f"'{name}' is no plain name of a safetensors file")
    return sorted(set(found.values()))


def _stays(file: Path) -> bool:
    """Return whether a file named by an index is in its folder; in the Hub's cache it is a link to the blobs."""
    folder, found = file.parent.resolve(), file.resolve()
    if found.is_relative_to(folder):
        return True
    return folder.parent.name == "snapshots" and found.is_relative_to(folder.parent.parent / "blobs")


def holds_own_head(folder: Path, family: Family) -> bool:
    """Return whether a checkpoint stores a head beside the token table that differs from it.

    transformers then does not tie the two, whatever the configuration says.
    """
    found: dict[str, Any] = {}
    for key, piece in stored_tensors(folder):
        for path in (family.embeddings[0], family.head):
            # the prefix of the base model is missing in some checkpoints, or there is one more
            if f".{path}.weight".endswith(f".{key}") or f".{key}".endswith(f".{path}.weight"):
                found[path] = piece
    if len(found) < 2:
        return False
    table, head = found.values()
    if list(table.get_shape()) != list(head.get_shape()):
        return True
    rows = range(0, table.get_shape()[0], _ROWS)
    return not all(torch.equal(table[row : row + _ROWS], head[row : row + _ROWS]) for row in rows)


def holds_mtp(folder: Path) -> bool:
    """Return whether a checkpoint stores blocks for multi-token prediction, which transformers leaves alone.

    They are numbered after the blocks that the configuration counts, or named so.
    """
    config = from_json((folder / "config.json").read_text(encoding="utf-8"))
    count = config.get("text_config", config).get("num_hidden_layers")
    for file in shard_files(folder) if any(folder.glob("*.safetensors")) else ():
        for key in open_shard(file).keys():  # noqa: SIM118 - a safetensors handle is not a dict
            number = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", key)
            if re.search(r"(?:^|\.)mtp\b", key) or (number and count and int(number[1]) >= count):
                return True
    return False


def open_shard(file: Path) -> safe_open:
    """Open one safetensors file.

    Raises:
        ModelError: it is damaged or incomplete.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: damaged or incomplete weights ({error}); copy the file again.") from error


def places_in(file: Path) -> dict[str, tuple[int, int]]:
    """Return where the bytes of each tensor of a safetensors file begin and end."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    first = 8 + size
    return {
        name: (first + one["data_offsets"][0], first + one["data_offsets"][1])
        for name, one in header.items()
        if name != "__metadata__"
    }


def joined(places: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that touch; in order."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(places):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found
