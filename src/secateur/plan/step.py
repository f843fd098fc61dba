"""The base of all edits: what they do to the sizes and units of a model, and how they describe themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny
from pydantic_core import PydanticCustomError

from secateur.plan.units import BlockChange, Removal, UnitKind
from secateur.plan.work import Work
from secateur.plugins import Registry

Units = Mapping[UnitKind, tuple[int, ...]]
"""How many units of a kind each block has."""


@dataclass(frozen=True)
class Sizes:
    """How large a model is.

    Attributes:
        blocks: parameters of each block.
        other: parameters of everything else (tied tensors counted once).
        units: number of units in each block, by kind; unknown kinds are left out.
    """

    blocks: tuple[int, ...]
    other: int
    units: Units = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.blocks) + self.other

    def with_blocks(self, kept: Sequence[int]) -> Sizes:
        """Return the sizes of the model with only these blocks."""
        units = {kind: tuple(counts[block] for block in kept) for kind, counts in self.units.items()}
        return Sizes(tuple(self.blocks[block] for block in kept), self.other, units)


STEPS: Registry[type[Step]] = Registry(
    "kind of step", package="secateur.plan", groups=("secateur.steps", "secateur.methods")
)
"""Every kind of step a plan file can hold, by `kind`."""


class Step(BaseModel, ABC):
    """One edit; block numbers refer to the model that the previous step leaves.

    A subclass with a default for `kind` is registered under it.

    Attributes:
        kind: name of this kind of step in plan files.
        method: the method that chose it.
        settings: the method's settings, recorded for readers; what applying needs are fields of the step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    measures: ClassVar[bool] = False
    """Whether applying it reads calibration texts, because bases or matrices are measured then."""

    kind: str
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Register the class."""
        kind = cls.model_fields["kind"].default
        if isinstance(kind, str):
            STEPS.add(kind, cls, module=cls.__module__)

    @abstractmethod
    def kept_blocks(self, count: int) -> tuple[int, ...]:
        """Return the blocks of `count` that still exist afterwards, changed or not.

        Raises:
            InputError: the step cannot be applied to that many blocks.
        """

    @abstractmethod
    def sizes_after(self, sizes: Sizes) -> Sizes:
        """Return the sizes of the model after this step.

        Raises:
            InputError: the step cannot be applied to a model of these sizes.
        """

    @abstractmethod
    def describe(self) -> tuple[str, str]:
        """Describe in a few words what is done, and to what: `("removes", "4, 5")`."""

    def removes(self, sizes: Sizes) -> tuple[Removal, ...]:
        """Return the removed units: whole blocks, then units of the remaining blocks, as far as `sizes` knows them."""
        count = len(sizes.blocks)
        kept, after = self.kept_blocks(count), self.sizes_after(sizes)
        gone = tuple(block for block in range(count) if block not in kept)
        found = [Removal(unit=UnitKind.BLOCK, count=len(gone), total=count, indices=gone)] if gone else []
        for kind, left in after.units.items():
            before = sizes.units.get(kind)
            for block, now in zip(kept, left, strict=True):
                if before is not None and now < before[block]:
                    found.append(Removal(unit=kind, count=before[block] - now, total=before[block], block=block))
        return tuple(found)

    def block_changes(self, sizes: Sizes, numbers: Sequence[int]) -> dict[int, BlockChange]:
        """Return what happens to each block that changes, by its position in the model the step is applied to.

        Args:
            sizes: of the model the step is applied to.
            numbers: the number of each of its blocks in the original model, used in the text.
        """
        after = dict(zip(self.kept_blocks(len(numbers)), self.sizes_after(sizes).blocks, strict=True))
        changes = {
            place: BlockChange(state="removed", text="removed", share=0.0)
            for place in range(len(numbers))
            if place not in after
        }
        inside: dict[int, list[str]] = {}
        for one in self.removes(sizes):
            if one.block is not None:
                inside.setdefault(one.block, []).append(str(one))
        for place, parts in inside.items():
            share = after[place] / sizes.blocks[place]
            changes[place] = BlockChange(state="reduced", text=", ".join(parts), share=share)
        return changes

    @property
    def merged_spans(self) -> tuple[tuple[int, int], ...]:
        """First and last block of each run of neighbours that is merged into one block."""
        return ()

    def forwards(self, tokens: int) -> Work | float:
        """Return the work of applying it to windows of `tokens` tokens in all; a number is plain forward passes."""
        return 0.0

    def disk_bytes(self, width: int, *, skeleton: bool) -> int:
        """Return the bytes kept on disk while it is applied to a model of this hidden size."""
        return 0

    @property
    def rebuilds(self) -> bool:
        """Whether applying it creates all weights anew, next to the existing ones."""
        return False


def read_step(data: Any) -> Any:
    """Convert the data of a step to a step of its kind; anything else is passed on.

    Raises:
        InputError: an installed package that may define the kind cannot be imported.
    """
    if not isinstance(data, Mapping):
        return data
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in STEPS:
        raise PydanticCustomError(
            "unknown_step",
            "unknown kind of step '{kind}'; known: {known}. A package that adds it may not be installed",
            {"kind": str(kind), "known": ", ".join(STEPS)},
        )
    return STEPS[kind].model_validate(data)


AnyStep = Annotated[SerializeAsAny[Step], BeforeValidator(read_step)]
"""A step of any registered kind, as data or as an object."""
