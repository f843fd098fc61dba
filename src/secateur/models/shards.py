"""Weights of single blocks on disk: a checkpoint's safetensors shards, read on demand, and files of edited blocks.

This is the only file that uses the semi-internal loading code of transformers (`core_model_loading`,
`conversion_mapping`). Checkpoints of mixtures of experts hold one tensor per expert and the modules one fused tensor;
that code converts between the two, in both directions.
"""

from __future__ import annotations

import ctypes
import errno
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from secateur.errors import ModelError
from secateur.files import require_room
from secateur.models.anatomy import Anatomy, Family, saved_tensors, set_parameter
from secateur.models.packed import Packed
from secateur.models.quantised import Quantisation
from secateur.ownership import scratch_folder
from secateur.reading import MIB, FileKind, from_json

INDEX = "model.safetensors.index.json"
"""Name of the file that says which shard of a checkpoint folder holds which tensor."""

INDEX_FILE = FileKind("shard index", 64 * MIB, error=ModelError, advice="Copy it again.")
_SHARD = re.compile(r"\w[^/\\\0]*\.safetensors")
_ROWS = 4096
"""Rows of the token table and the head that are compared at a time."""

OUTER = -1
"""Key of the tensors outside the blocks: embeddings, final norm, head."""


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


@dataclass(frozen=True)
class Shards:
    """A checkpoint's safetensors files, with the block numbers that a pruned model reads from them.

    Attributes:
        folder: the checkpoint.
        blocks: path of the list of blocks in the model, such as `model.layers`.
        device: where weights are put when they are read.
        kept: for each block of the model, its number in the checkpoint; None means all, in order.
        edited: by number in the checkpoint (or `OUTER`), weights that replace the checkpoint's, in any number of
            pieces.
        quantised: how the checkpoint's weights are quantised; None if they are not.
        packed: which parts of the parameters outside the blocks that are packed block by block are read.
    """

    folder: Path
    blocks: str
    kept: tuple[int, ...] | None = None
    files: tuple[Path, ...] = field(default=())
    device: torch.device = field(default=torch.device("cpu"))
    edited: Mapping[int, tuple[EditedPart, ...]] = field(default_factory=dict)
    quantised: Quantisation | None = None
    packed: Packed = field(default_factory=Packed)

    @classmethod
    def of(cls, folder: Path, anatomy: Anatomy, device: torch.device, quantised: Quantisation | None = None) -> Shards:
        """Open a checkpoint folder whose weights will be loaded to a device; reads headers only."""
        packed = Packed(dict(anatomy.family.packed), anatomy.block_count)
        files = tuple(shard_files(folder))
        return cls(folder, anatomy.family.blocks, None, files, device, quantised=quantised, packed=packed)

    @cached_property
    def keys(self) -> dict[int, dict[str, Path]]:
        """Return the checkpoint keys of each block (and of `OUTER`), with the file that holds them."""
        *above, leaf = self.blocks.split(".")
        tower = "language_model." if "language_model" in above else ""  # other towers of a wrapper have blocks, too
        number = re.compile(rf"(?:^|\.){re.escape(tower)}(?:.*\.)?{re.escape(leaf)}\.(\d+)\.")
        groups: dict[int, dict[str, Path]] = {}
        for file in self.files:
            with open_shard(file) as handle:
                for key in handle.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                    match = number.search(key)
                    groups.setdefault(int(match.group(1)) if match else OUTER, {})[key] = file
        return groups

    def select(self, kept: Iterable[int]) -> Shards:
        """Return the shards of a model that keeps only these blocks (numbers in this model)."""
        current, kept = self.kept, tuple(kept)
        return replace(self, kept=tuple(current[i] if current else i for i in kept), packed=self.packed.select(kept))

    def with_part(self, index: int, tensors: Mapping[str, torch.Tensor]) -> Shards:
        """Return shards in which block `index` (number in this model, or `OUTER`) is read from these tensors instead.

        Args:
            index: the part.
            tensors: all its parameters, named as in the block (`OUTER`: as in the model), in the dtype to be saved.

        Raises:
            OSError: there is no room for the tensors.
        """
        return replace(self, edited={**self.edited, self._stored(index): (EditedPart(tensors),)})

    def _stored(self, index: int) -> int:
        return index if index == OUTER or self.kept is None else self.kept[index]

    def load(self, module: PreTrainedModel, index: int, without: Sequence[str] = ()) -> None:
        """Load the weights of block `index` of a skeleton (or `OUTER`); `without` names modules to leave empty.

        Raises:
            ModelError: the checkpoint has no such block, a shape differs from the model's, or a file is damaged.
        """
        stored = self._stored(index)
        left_out = tuple(f"{path}." for path in without)
        slices = {n: piece for n, piece in self._slices(module, stored, index) if not n.startswith(left_out)}
        try:
            if set(slices) <= _names(module, self.blocks, index):
                found = _fill(module, slices, self.device)
            else:
                found = _convert(module, slices, self.device)
        except SafetensorError as error:
            raise ModelError(f"{self.folder}: damaged weights of block {stored} ({error}).") from error
        if found:
            name, shape, expected = found
            raise ModelError(f"{self.folder}: {name} is {tuple(shape)} but the config asks for {tuple(expected)}.")
        if index == OUTER:
            module.tie_weights()
        empty = [n for n, p in _part(module, self.blocks, index) if p.is_meta and not n.startswith(left_out)]
        if empty:
            raise ModelError(f"{self.folder}: the checkpoint has no weights for {', '.join(empty[:4])}.")

    def _slices(self, module: PreTrainedModel, stored: int, index: int) -> Iterator[tuple[str, Any]]:
        """Open the tensors of a part by their names in this model, without reading them yet."""
        if stored in self.edited:
            prefix = "" if index == OUTER else f"{self.blocks}.{index}."
            found: dict[str, Any] = {}
            for piece in self.edited[stored]:
                handle = open_shard(piece.file)
                found |= {prefix + key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
            yield from ((self._buffers(module, stored, index) if index != OUTER else {}) | found).items()
            return
        if stored not in self.keys:
            raise ModelError(f"{self.folder}: no weights of block {stored} in the checkpoint.")
        files = self.keys[stored]
        handles = {file: open_shard(file) for file in sorted(set(files.values()))}
        slices = ((self._renumber(key, stored, index), handles[file].get_slice(key)) for key, file in files.items())
        read = self.quantised.dequantised(slices) if self.quantised else slices
        yield from self.packed.cut(read) if index == OUTER else read

    def _buffers(self, module: PreTrainedModel, stored: int, index: int) -> dict[str, Any]:
        """Open the buffers of an edited block that the checkpoint holds, for edits that change parameters only."""
        prefix = f"{self.blocks}.{index}."
        wanted = {f"{prefix}{name}" for name, _ in module.get_submodule(prefix[:-1]).named_buffers()}
        found = {self._renumber(key, stored, index): (key, file) for key, file in self.keys.get(stored, {}).items()}
        return {name: open_shard(found[name][1]).get_slice(found[name][0]) for name in wanted & found.keys()}

    def release(self, module: PreTrainedModel, index: int) -> None:
        """Free the weights of block `index` (or `OUTER`), keeping their shapes."""
        for name, parameter in _part(module, self.blocks, index):
            set_parameter(module, name, parameter.to("meta"))
        if index == OUTER:
            module.tie_weights()
        return_freed_memory()

    def _renumber(self, key: str, stored: int, index: int) -> str:
        if stored == index:
            return key
        leaf = self.blocks.rsplit(".", 1)[-1]
        return re.sub(rf"((?:^|\.){re.escape(leaf)}\.){stored}\.", rf"\g<1>{index}.", key, count=1)


Mismatch = tuple[str, Sequence[int], Sequence[int]]


def _fill(module: PreTrainedModel, slices: dict[str, Any], device: torch.device) -> Mismatch | None:
    """Assign tensors to the parameters of the same names; return the first whose shape differs."""
    tensors = dict(saved_tensors(module))
    for name, piece in slices.items():
        empty = tensors[name]
        if list(empty.shape) != list(piece.get_shape()):
            return name, piece.get_shape(), empty.shape
        set_parameter(module, name, piece[...].to(device, empty.dtype))
    return None


def _convert(module: PreTrainedModel, slices: dict[str, Any], device: torch.device) -> Mismatch | None:
    """Rename, fuse and split tensors as transformers does on loading; return the first whose shape differs."""
    settings = LoadStateDictConfig(
        dtype=module.dtype,
        dtype_plan=module._get_dtype_plan(module.dtype),
        weight_mapping=deepcopy(get_model_conversion_mapping(module)),
        device_map={"": str(device)},
    )
    with _quiet():
        report, _ = convert_and_load_state_dict_in_model(module, slices, settings, None)
    return min(report.mismatched_keys) if report.mismatched_keys else None


def to_checkpoint(module: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert tensors from their names in the module to the names and splits of a checkpoint folder."""
    return dict(revert_weight_conversion(module, state))


def float32_names(module: PreTrainedModel, dtype: torch.dtype, folder: Path | None) -> Callable[[str], bool]:
    """Return a predicate for the names of tensors that stay in float32 in a model of this dtype.

    Args:
        module: the model; there are some that transformers keeps in float32.
        dtype: of the others.
        folder: the checkpoint it was read from; what that holds in float32 beside the others stays so, such as routers.
    """
    names = list(module._get_dtype_plan(dtype))
    pattern = build_glob_alternation(names)[0] if names else None
    stored = frozenset() if folder is None or not any(folder.glob("*.safetensors")) else _in_float32(folder)
    return lambda name: _numberless(name) in stored or (pattern is not None and pattern.search(name) is not None)


def _in_float32(folder: Path) -> frozenset[str]:
    """Return the names, without numbers, of the tensors in float32 of a checkpoint that is mostly of another dtype."""
    sizes: dict[bool, int] = {True: 0, False: 0}
    found = set()
    for name, piece in stored_tensors(folder):
        single = piece.get_dtype() == "F32"
        sizes[single] += prod(piece.get_shape())
        if single:
            found.add(_numberless(name))
    return frozenset(found) if sizes[True] < sizes[False] else frozenset()


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _part(module: PreTrainedModel, blocks: str, index: int) -> list[tuple[str, nn.Parameter]]:
    if index == OUTER:
        return [(name, one) for name, one in module.named_parameters() if not name.startswith(f"{blocks}.")]
    return list(module.get_submodule(f"{blocks}.{index}").named_parameters(f"{blocks}.{index}"))


def _names(module: PreTrainedModel, blocks: str, index: int) -> set[str]:
    """Return the names of the parameters and buffers of a part."""
    where = f"{blocks}." if index == OUTER else f"{blocks}.{index}."
    return {name for name, _ in saved_tensors(module) if name.startswith(where) == (index != OUTER)}


def return_freed_memory() -> None:
    """Return freed heap pages to the system if the C library can; large tensors otherwise fragment the heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' progress bar, which would appear for each block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def open_shard(file: Path) -> safe_open:
    """Open one safetensors file.

    Raises:
        ModelError: it is damaged or incomplete.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: damaged or incomplete weights ({error}); copy the file again.") from error


class EditedPart:
    """Tensors of one part of a model (a block, or everything outside the blocks), in a file.

    The file is deleted with the object. Names are relative to the part: `mlp.down_proj.weight` in a block.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the tensors.

        Raises:
            OSError: there is no room for them.
        """
        folder = scratch_folder("edited", self)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        require_room(folder, needed, "edited weights")
        self.file = folder / "part.safetensors"
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, self.file)
        except SafetensorError as error:
            raise OSError(errno.ENOSPC, f"edited weights cannot be written ({error})", str(folder)) from error
