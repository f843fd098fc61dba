"""Put a model of a new shape together piece by piece, from the weights of another."""

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
    """A model of a new shape as it grows, block by block; that of a skeleton grows in temporary files.

    Attributes:
        dense: the model it is made from.
        decoder: the model as far as it is there; in memory until `result`.
        stored: dtype to which weights are rounded.
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
        self.stored = stored or dense.saved_dtype
        self._parts: dict[int, tuple[EditedPart, ...]] = {}

    def block_path(self, index: int) -> str:
        """Prefix of the names of block `index`, the dot included."""
        return f"{self._blocks}{index}."

    def layer(self, index: int) -> Any:
        """Block `index` of the sliced model."""
        return self.decoder.block_list[index]

    def put(self, where: str, tensors: Tensors) -> None:
        """Return parameters below the path `where` their values, in the dtype they will be saved in."""
        dtype = self.decoder.module.dtype
        for name, tensor in tensors.items():
            value = tensor.to(self.stored).to(self.dense.device, dtype).contiguous()
            set_parameter(self.decoder.module, f"{where}{name}", value)

    def finish(self, part: int) -> None:
        """Block `part` is in place, or a piece of `OUTER`; that of a skeleton goes to disk and is let go."""
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
        """Let the weights below the path `where` go; only their shapes stay."""
        for name, parameter in self._below(where).items():
            set_parameter(self.decoder.module, name, parameter.to("meta"))
        if not where:
            self.decoder.module.tie_weights()
        return_freed_memory()

    def keep_outer(self) -> None:
        """Leave what is outside the blocks as it is: shared, or read from where a skeleton reads it."""
        if not self.dense.is_skeleton:
            for name, parameter in self.dense.module.named_parameters():
                if not name.startswith(self._blocks):
                    set_parameter(self.decoder.module, name, parameter.to(self.dense.device))
            self.decoder.module.tie_weights()

    def _below(self, where: str) -> dict[str, torch.nn.Parameter]:
        """Parameters below a path; below the empty path those of no block."""
        named = self.decoder.module.named_parameters()
        return {n: one for n, one in named if n.startswith(where) and (where or not n.startswith(self._blocks))}

    def result(self, edit: dict[str, Any]) -> Decoder:
        """Return the finished model; `edit` says what was done, for its fingerprint."""
        shards, before = None, self.dense.shards
        if before is not None:
            parts = {part: before.edited[part] for part in (OUTER,) if part in before.edited} | self._parts
            shards = Shards(before.folder, self._blocks.removesuffix("."), files=before.files, device=before.device)
            shards = dataclasses.replace(shards, edited=parts)
        return dataclasses.replace(self.decoder, shards=shards, fingerprint=of_edit(self.dense.fingerprint, edit))
