"""What every edit of a plan is: what it does to the sizes and units of a model, and how it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny
from pydantic_core import PydanticCustomError

from secateur.plan.units import BlockChange, Removal, UnitKind
from secateur.plugins import Registry

Units = Mapping[UnitKind, tuple[int, ...]]
"""How many units of a kind each block has."""


@dataclass(frozen=True)
class Sizes:
    """How large a model is.

    Attributes:
        blocks: parameters of each block.
        other: parameters of everything else (tied tensors counted once).
        units: how many units each block has, by kind; kinds that are not known are left out.
    """

    blocks: tuple[int, ...]
    other: int
    units: Units = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.blocks) + self.other

    def with_blocks(self, kept: Sequence[int]) -> Sizes:
        """Return the sizes of the model that has only these blocks."""
        units = {kind: tuple(counts[block] for block in kept) for kind, counts in self.units.items()}
        return Sizes(tuple(self.blocks[block] for block in kept), self.other, units)


STEPS: Registry[type[Step]] = Registry(
    "kind of step", package="secateur.plan", groups=("secateur.steps", "secateur.methods")
)
"""Every kind of step a plan file can hold, by `kind`."""


class Step(BaseModel, ABC):
    """One edit; block numbers refer to the model as the step before left it.

    A subclass with a default for `kind` is registered under it.

    Attributes:
        kind: what plan files call this kind of step.
        method: the method that decided it.
        settings: the method's settings, a record for readers; what applying needs are fields of the step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    measures: ClassVar[bool] = False
    """Whether applying it reads calibration texts, because bases or matrices are computed anew."""

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
        """Return the blocks of `count` that are still there afterwards, changed or not.

        Raises:
            InputError: the step cannot be applied to so many blocks.
        """

    @abstractmethod
    def sizes_after(self, sizes: Sizes) -> Sizes:
        """Return the sizes of the model after this step.

        Raises:
            InputError: the step cannot be applied to a model of these sizes.
        """

    @abstractmethod
    def describe(self) -> tuple[str, str]:
        """Say in a few words what is done, and to what: `("removes", "4, 5")`."""

    def removes(self, sizes: Sizes) -> tuple[Removal, ...]:
        """Return the units that go: whole blocks, then units of the blocks that stay, as far as `sizes` knows them."""
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
        """Return what becomes of each block that is changed, by its place among those the step finds.

        Args:
            sizes: of the model that the step finds.
            numbers: what each of its blocks is called in the text, its number in the original model.
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
        """First and last block of each run of neighbours that becomes one block."""
        return ()

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


def read_step(data: Any) -> Any:
    """Turn the data of a step into a step of its kind; anything else is passed on.

    Raises:
        InputError: an installed package that may hold the kind cannot be imported.
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
