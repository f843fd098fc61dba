"""Put a model of a new shape together piece by piece, from the weights of another."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from secateur.models.anatomy import Family, resolve
from secateur.models.decoder import Decoder
from secateur.models.fingerprint import of_edit
from secateur.models.open import empty_model
from secateur.models.overlay import EditedPart
from secateur.models.shards import OUTER, Shards

Tensors = dict[str, torch.Tensor]


class Assembly:
    """A model of a new shape as it grows, block by block; that of a skeleton grows in temporary files.

    Attributes:
        dense: the model it is made from.
        decoder: the model as far as it is there; in memory until `result`.
    """

    def __init__(self, dense: Decoder, config: Any, family: Family, stored: torch.dtype | None = None) -> None:
        """Start empty.

        Args:
            dense: the model it is made from.
            config: configuration of the new model.
            family: row of the new model's architecture.
            stored: dtype to which weights are rounded; None is the one they will be saved in.
        """
        module = empty_model(config, dense.module.dtype, dense.device, trust_remote_code=False)
        module.generation_config = copy.deepcopy(dense.module.generation_config)
        self.dense = dense
        self.decoder = dataclasses.replace(
            dense, module=module.eval().requires_grad_(False), anatomy=resolve(module, family), shards=None
        )
        self._blocks = f"{family.blocks}."
        self._stored = stored or dense.saved_dtype
        self._parts: dict[int, EditedPart] = {}

    def block_path(self, index: int) -> str:
        """Prefix of the names of block `index`, the dot included."""
        return f"{self._blocks}{index}."

    def layer(self, index: int) -> Any:
        """Block `index` of the sliced model."""
        return self.decoder.block_list[index]

    def put(self, where: str, tensors: Tensors) -> None:
        """Give parameters below the path `where` their values, in the dtype they will be saved in."""
        dtype = self.decoder.module.dtype
        for name, tensor in tensors.items():
            owner, _, leaf = f"{where}{name}".rpartition(".")
            holder = self.decoder.module.get_submodule(owner)
            value = tensor.to(self._stored).to(self.dense.device, dtype).contiguous()
            holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def finish(self, part: int) -> None:
        """Block `part` (or `OUTER`) is in place; that of a skeleton goes to disk and is let go."""
        if part == OUTER:
            self.decoder.module.tie_weights()
        if not self.dense.is_skeleton:
            return
        where = "" if part == OUTER else self.block_path(part)
        named = {name.removeprefix(where): tensor for name, tensor in self._below(where).items()}
        self._parts[part] = EditedPart({name: tensor.to(self._stored) for name, tensor in named.items()})
        self.release(where)

    def release(self, where: str) -> None:
        """Let the weights below the path `where` go; only their shapes stay."""
        for name, parameter in self._below(where).items():
            owner, _, leaf = name.rpartition(".")
            holder = self.decoder.module.get_submodule(owner)
            holder._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        if not where:
            self.decoder.module.tie_weights()

    def keep_outer(self) -> None:
        """Leave what is outside the blocks as it is: shared, or read from where a skeleton reads it."""
        module = self.decoder.module
        if not self.dense.is_skeleton:
            for name, parameter in self.dense.module.named_parameters():
                if not name.startswith(self._blocks):
                    owner, _, leaf = name.rpartition(".")
                    module.get_submodule(owner)._parameters[leaf] = parameter
            module.tie_weights()

    def _below(self, where: str) -> dict[str, nn.Parameter]:
        """Parameters below a path; below the empty path those of no block."""
        named = self.decoder.module.named_parameters()
        return {n: one for n, one in named if n.startswith(where) and (where or not n.startswith(self._blocks))}

    def result(self, edit: dict[str, Any]) -> Decoder:
        """Give the finished model; `edit` says what was done, for its fingerprint."""
        shards, before = None, self.dense.shards
        if before is not None:
            parts = {part: before.edited[part] for part in (OUTER,) if part in before.edited} | self._parts
            shards = Shards(before.folder, self._blocks.removesuffix("."), files=before.files, device=before.device)
            shards = dataclasses.replace(shards, edited=parts)
        return dataclasses.replace(self.decoder, shards=shards, fingerprint=of_edit(self.dense.fingerprint, edit))
