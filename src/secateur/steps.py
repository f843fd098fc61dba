"""The edits a plan can hold, as data: what each does to the number of blocks and of parameters, and how it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from secateur.errors import InputError


@dataclass(frozen=True)
class Sizes:
    """Parameters of each block, and of everything else (tied tensors counted once)."""

    blocks: tuple[int, ...]
    other: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.blocks) + self.other


class Step(BaseModel, ABC):
    """One edit; block numbers refer to the model as the step before left it.

    Attributes:
        method: the method that decided it.
        settings: the method's settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    measures: ClassVar[bool] = False
    """Whether applying it reads calibration texts, because bases or matrices are computed anew."""

    method: str
    settings: dict[str, Any] = Field(default_factory=dict)

    @abstractmethod
    def kept(self, count: int) -> tuple[int, ...]:
        """Give the blocks of `count` that are still there afterwards, changed or not.

        Raises:
            InputError: the step cannot be applied to so many blocks.
        """

    @abstractmethod
    def left(self, sizes: Sizes) -> Sizes:
        """Give the sizes of what is left.

        Raises:
            InputError: the step cannot be applied to a model of these sizes.
        """

    @abstractmethod
    def says(self) -> tuple[str, str]:
        """Say in a few words what is done, and to what: `("takes out", "4, 5")`."""


class DropBlocks(Step):
    """Take blocks out."""

    kind: Literal["drop-blocks"] = "drop-blocks"
    blocks: tuple[int, ...]

    def kept(self, count: int) -> tuple[int, ...]:
        """Give the blocks that stay, of `count`.

        Raises:
            InputError: a block number that does not exist or is named twice, or no block left.
        """
        wrong = sorted(block for block in self.blocks if not 0 <= block < count)
        if wrong:
            raise InputError(f"the plan drops block {wrong[0]}, but this model has blocks 0 to {count - 1}.")
        if len(set(self.blocks)) < len(self.blocks):
            raise InputError(f"the plan names a block twice: {list(self.blocks)}.")
        stay = tuple(block for block in range(count) if block not in self.blocks)
        if not stay:
            raise InputError("the plan drops every block; at least one must stay.")
        return stay

    def left(self, sizes: Sizes) -> Sizes:
        """Give the sizes without the blocks that go."""
        return Sizes(tuple(sizes.blocks[block] for block in self.kept(len(sizes.blocks))), sizes.other)

    def says(self) -> tuple[str, str]:
        """Name the blocks that go."""
        return "takes out", ", ".join(map(str, self.blocks)) or "nothing"


AnyStep = DropBlocks
"""Every kind of step a plan file can hold."""
