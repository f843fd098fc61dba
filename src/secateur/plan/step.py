"""What every edit of a plan is: what it does to the numbers of blocks and parameters, and how it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field


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
        """Return the blocks of `count` that are still there afterwards, changed or not.

        Raises:
            InputError: the step cannot be applied to so many blocks.
        """

    @abstractmethod
    def left(self, sizes: Sizes) -> Sizes:
        """Return the sizes of what is left.

        Raises:
            InputError: the step cannot be applied to a model of these sizes.
        """

    def forwards(self, tokens: int) -> float:
        """What applying it costs, in plain forward passes over the calibration windows, which hold so many tokens."""
        return 0.0

    def disk_bytes(self, width: int, *, skeleton: bool) -> int:
        """Bytes kept on disk while it is applied, to a model of this hidden size."""
        return 0

    @property
    def rebuilds(self) -> bool:
        """Whether applying it makes all weights anew, beside those there are."""
        return False

    @abstractmethod
    def describe(self) -> tuple[str, str]:
        """Say in a few words what is done, and to what: `("takes out", "4, 5")`."""
