"""Assemble a model of a new shape piece by piece from the weights of another."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from secateur.models.anatomy import Family, resolve, set_parameter
from secateur.models.decoder import Decoder
from secateur.models.fingerprint import of_edit
from secateur.models.opening import empty_model
from secateur.models.shards import OUTER, EditedPart, Shards, return_freed_memory

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
        self._parts: dict[int, tuple[EditedPart, ...]] = {}

    def block_path(self, index: int) -> str:
        """Return the prefix of the parameter names of block `index`, including the dot."""
        return f"{self._blocks}{index}."

    def layer(self, index: int) -> Any:
        """Return block `index` of the new model."""
        return self.decoder.block_list[index]

    def put(self, where: str, tensors: Tensors) -> None:
        """Set the parameters below the path `where`, rounded to the dtype they will be saved in."""
        dtype = self.decoder.module.dtype
        for name, tensor in tensors.items():
            value = tensor.to(self.stored).to(self.dense.device, dtype).contiguous()
            set_parameter(self.decoder.module, f"{where}{name}", value)

    def finish(self, part: int) -> None:
        """Finish block `part`, or a piece of `OUTER`; for a skeleton it is written to disk and freed."""
        if part == OUTER:
            self.decoder.module.tie_weights()
        if not self.dense.is_skeleton:
            return
        where = "" if part == OUTER else self.block_path(part)
        named = {name.removeprefix(where): tensor for name, tensor in self._below(where).items()}
        piece = EditedPart({name: tensor.to(self.stored) for name, tensor in named.items() if not tensor.is_meta})
        self._parts[part] = (*self._parts.get(part, ()), piece)
        self.release(where)

    def release(self, where: str) -> None:
        """Free the weights below the path `where`, keeping their shapes."""
        for name, parameter in self._below(where).items():
            set_parameter(self.decoder.module, name, parameter.to("meta"))
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

    def _below(self, where: str) -> dict[str, torch.nn.Parameter]:
        """Return the parameters below a path; for the empty path, those outside the blocks."""
        named = self.decoder.module.named_parameters()
        return {n: one for n, one in named if n.startswith(where) and (where or not n.startswith(self._blocks))}

    def result(self, edit: dict[str, Any]) -> Decoder:
        """Return the finished model; `edit` describes what was done, for its fingerprint."""
        shards, before = None, self.dense.shards
        if before is not None:
            parts = {part: before.edited[part] for part in (OUTER,) if part in before.edited} | self._parts
            shards = Shards(before.folder, self._blocks.removesuffix("."), files=before.files, device=before.device)
            shards = dataclasses.replace(shards, edited=parts)
        return dataclasses.replace(self.decoder, shards=shards, fingerprint=of_edit(self.dense.fingerprint, edit))
