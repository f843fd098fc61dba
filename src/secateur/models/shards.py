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
from safetensors import SafetensorError
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
from secateur.files import read_ahead, require_room
from secateur.models.anatomy import Anatomy, saved_tensors, set_parameter
from secateur.models.packed import Packed
from secateur.models.quantised import Quantisation
from secateur.models.shard_files import joined, open_shard, places_in, shard_files, stored_tensors
from secateur.ownership import scratch_folder

OUTER = -1
"""Key of the tensors outside the blocks: embeddings, final norm, head."""


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

    @cached_property
    def _places(self) -> dict[Path, dict[str, tuple[int, int]]]:
        """Return where in its file each tensor stands."""
        return {file: places_in(file) for file in self.files}

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

    def read_ahead(self, index: int) -> None:
        """Ask the system to read the weights of block `index`, if there is one, while something else is computed."""
        if self.kept is not None and index >= len(self.kept):
            return
        stored = self._stored(index)
        if stored in self.edited:
            return
        wanted: dict[Path, list[tuple[int, int]]] = {}
        for key, file in self.keys.get(stored, {}).items():
            wanted.setdefault(file, []).append(self._places[file][key])
        for file, places in wanted.items():
            read_ahead(file, joined(places))

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
    if hasattr(module, "_weight_conversions"):
        del module._weight_conversions  # those that this part took; writing another part may need others
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
