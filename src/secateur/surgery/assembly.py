"""Assemble a model of a new shape piece by piece from the weights of another."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from secateur.models.anatomy import Family, resolve, saved_tensors, set_parameter
from secateur.models.decoder import Decoder
from secateur.models.fingerprint import of_edit
from secateur.models.loading import empty_model
from secateur.models.shards import OUTER, EditedPart, float32_names, return_freed_memory

Tensors = dict[str, torch.Tensor]


class Assembly:
    """A model of a new shape under construction, block by block; for a skeleton its weights go to temporary files.

    Attributes:
        dense: the model it is made from.
        decoder: the model so far; incomplete until `result`.
        stored: dtype to which weights are rounded.
    """

    def __init__(self, dense: Decoder, config: Any, family: Family, stored: torch.dtype | None = None) -> None:
        """Start empty.

        Args:
            dense: the model it is made from.
            config: configuration of the new model.
            family: row of the new model's architecture.
            stored: dtype to which weights are rounded; None takes the dtype they will be saved in.
        """
        module = empty_model(config, dense.module.dtype, dense.device, trust_remote_code=False)
        module.generation_config = copy.deepcopy(dense.module.generation_config)
        self.dense = dense
        self.decoder = dataclasses.replace(
            dense, module=module.eval().requires_grad_(False), anatomy=resolve(module, family), shards=None
        )
        self._blocks = f"{family.blocks}."
        self.stored = stored or dense.saved_dtype
        self._stays_float32 = float32_names(module, self.stored, dense.folder)
        self._buffers = {name for name, _ in module.named_buffers()}
        self._placed: set[str] = set()
        self._parts: dict[int, tuple[EditedPart, ...]] = {}

    def block_path(self, index: int) -> str:
        """Return the prefix of the parameter names of block `index`, including the dot."""
        return f"{self._blocks}{index}."

    def layer(self, index: int) -> Any:
        """Return block `index` of the new model."""
        return self.decoder.block_list[index]

    def put(self, where: str, tensors: Tensors) -> None:
        """Set the parameters and buffers below the path `where`, rounded to the dtype they will be saved in."""
        dtype = self.decoder.module.dtype
        for name, tensor in tensors.items():
            path = f"{where}{name}"
            value = tensor.to(self.dense.device)
            if path not in self._buffers:
                exact = self._stays_float32(path)
                value = (
                    value.to(torch.promote_types(dtype, torch.float32)) if exact else value.to(self.stored).to(dtype)
                )
            set_parameter(self.decoder.module, path, value.contiguous())
            self._placed.add(path)

    def finish(self, part: int) -> None:
        """Finish block `part`, or a piece of `OUTER`; for a skeleton it is written to disk and freed."""
        if part == OUTER:
            self.decoder.module.tie_weights()
        else:
            self._keep_buffers(part)
        if not self.dense.is_skeleton:
            return
        where = "" if part == OUTER else self.block_path(part)
        found = {name: tensor for name, tensor in self._below(where).items() if not tensor.is_meta}
        piece = EditedPart({name.removeprefix(where): self._rounded(name, tensor) for name, tensor in found.items()})
        self._parts[part] = (*self._parts.get(part, ()), piece)
        self.release(where)

    def _keep_buffers(self, index: int) -> None:
        """Copy the buffers of a block that were not set and that the dense block has in this shape."""
        before = dict(saved_tensors(self.dense.block_list[index]))
        where = self.block_path(index)
        for name, buffer in saved_tensors(self.layer(index)):
            path, own = f"{where}{name}", before.get(name)
            if path in self._buffers - self._placed and own is not None and own.shape == buffer.shape:
                set_parameter(self.decoder.module, path, own)

    def _rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if name in self._buffers or self._stays_float32(name) else tensor.to(self.stored)

    def release(self, where: str) -> None:
        """Free the weights below the path `where`, keeping their shapes."""
        for name, tensor in self._below(where).items():
            if name not in self._buffers:
                set_parameter(self.decoder.module, name, tensor.to("meta"))
        if not where:
            self.decoder.module.tie_weights()
        return_freed_memory()

    def keep_outer(self) -> None:
        """Keep everything outside the blocks unchanged: shared, or for a skeleton read from the same shards."""
        if not self.dense.is_skeleton:
            for name, parameter in self.dense.module.named_parameters():
                if not name.startswith(self._blocks):
                    set_parameter(self.decoder.module, name, parameter.to(self.dense.device))
            self.decoder.module.tie_weights()

    def _below(self, where: str) -> Tensors:
        """Return what is saved below a path; for the empty path, what is outside the blocks."""
        named = saved_tensors(self.decoder.module)
        return {n: one for n, one in named if n.startswith(where) and (where or not n.startswith(self._blocks))}

    def result(self, edit: dict[str, Any]) -> Decoder:
        """Return the finished model; `edit` describes what was done, for its fingerprint."""
        shards, before = None, self.dense.shards
        if before is not None:
            parts = {part: before.edited[part] for part in (OUTER,) if part in before.edited} | self._parts
            shards = dataclasses.replace(before, blocks=self._blocks.removesuffix("."), kept=None, edited=parts)
        return dataclasses.replace(self.decoder, shards=shards, fingerprint=of_edit(self.dense.fingerprint, edit))
