"""Parameters outside the blocks that hold a part for each block, such as the per-layer embeddings of Gemma 4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import ModelError
from secateur.models.anatomy import Family, parts_of, text_config
from secateur.models.depth import config_with_blocks
from secateur.models.shrinking import FAILURES
from secateur.models.wrappers import auto_class


@dataclass(frozen=True)
class Packed:
    """The parts that a model keeps of the parameters packed block by block in a checkpoint.

    Attributes:
        axes: names of the parameters in the model, with the axis along which the parts follow each other.
        count: number of blocks in the checkpoint.
        kept: for each block of the model, its number in the checkpoint; None means all, in order.
    """

    axes: Mapping[str, int] = field(default_factory=dict)
    count: int = 0
    kept: tuple[int, ...] | None = None

    def select(self, kept: Sequence[int]) -> Packed:
        """Return what a model keeps that has only these blocks (numbers in this model)."""
        return replace(self, kept=tuple(self.kept[i] if self.kept else i for i in kept))

    def cut(self, slices: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yield opened tensors of a checkpoint by name; of the packed ones only the parts that are kept."""
        ends = {f".{'.'.join(name.split('.')[-2:])}": axis for name, axis in self.axes.items()}
        for name, piece in slices:
            axis = next((axis for end, axis in ends.items() if f".{name}".endswith(end)), None)
            yield name, piece if axis is None or self.kept is None else _Parts(piece, axis, self.count, self.kept)


class _Parts:
    """Stands for an opened tensor of safetensors; reading all of it gives the parts of some blocks."""

    def __init__(self, piece: Any, axis: int, count: int, kept: Sequence[int]) -> None:
        self.piece, self.axis, self.count, self.kept = piece, axis, count, kept

    def get_dtype(self) -> str:
        return str(self.piece.get_dtype())

    def get_shape(self) -> list[int]:
        shape = list(self.piece.get_shape())
        shape[self.axis] = shape[self.axis] // self.count * len(self.kept)
        return shape

    def __getitem__(self, _: Any) -> torch.Tensor:
        return parts_of(self.piece[...], self.axis, self.count, self.kept)


def packed_parameters(
    module: PreTrainedModel, family: Family, *, trust_remote_code: bool
) -> tuple[tuple[str, int], ...]:
    """Return the parameters outside the blocks that lack a part in a model with one block less, and the axis."""
    count = text_config(module.config).num_hidden_layers
    whole = _outside(module, family)
    for gone in range(count):
        try:
            config = config_with_blocks(module.config, family, [index for index in range(count) if index != gone])
            with torch.device("meta"):
                shorter = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        except (*FAILURES, ModelError):
            continue
        left = _outside(shorter, family)
        pairs = ((name, whole[name], left.get(name, whole[name])) for name in whole)
        return tuple(
            (name, axis)
            for name, before, after in pairs
            for axis, (old, new) in enumerate(zip(before, after, strict=False))
            if old != new and old * (count - 1) == new * count
        )
    return ()


def _outside(module: nn.Module, family: Family) -> dict[str, torch.Size]:
    return {name: one.shape for name, one in module.named_parameters() if not name.startswith(f"{family.blocks}.")}
