"""What structured pruning removes: units of a model, and what a step does to each block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class UnitKind(StrEnum):
    """The kinds of units that can be removed; the value is the name of one of them."""

    BLOCK = "block"
    ATTENTION = "attention branch"
    MLP = "MLP branch"
    QUERY_HEAD = "query head"
    KEY_VALUE_GROUP = "key/value group"
    CHANNEL = "channel"
    DIRECTION = "hidden direction"
    EXPERT = "expert"

    @property
    def plural(self) -> str:
        """The name in the plural."""
        return f"{self.value}es" if self.value.endswith("ch") else f"{self.value}s"

    def counted(self, count: int, *, of: int | None = None) -> str:
        """Write `1 block`, `64 experts` or `64 of 128 experts`."""
        name = self.value if (count if of is None else of) == 1 else self.plural
        return f"{count:,} {name}" if of is None else f"{count:,} of {of:,} {name}"


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Units of one kind that a step removes.

    Attributes:
        unit: their kind.
        count: how many are removed.
        total: how many there were; None if that is not known.
        block: the block they are in; None for whole blocks. Numbered as in the model that the previous step leaves.
        indices: which of them are removed; empty if that is measured when the step is applied.
    """

    unit: UnitKind
    count: int
    total: int | None = None
    block: int | None = None
    indices: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Describe what remains: `12 of 16 query heads`, or what is removed if the total is unknown."""
        if self.total is None:
            return f"without {self.unit.counted(self.count)}"
        if self.total == self.count:
            return f"without its {self.unit.value if self.total == 1 else self.unit.plural}"
        return self.unit.counted(self.total - self.count, of=self.total)


def summary(removals: Iterable[Removal]) -> str:
    """Add up removals by kind: `2 blocks; 96 query heads in 6 blocks`; empty if nothing is removed."""
    counts: dict[UnitKind, int] = {}
    places: dict[UnitKind, set[int]] = {}
    for one in removals:
        counts[one.unit] = counts.get(one.unit, 0) + one.count
        places.setdefault(one.unit, set()).update(() if one.block is None else (one.block,))
    parts = []
    for unit, count in counts.items():
        blocks = len(places[unit])
        parts.append(unit.counted(count) + (f" in {UnitKind.BLOCK.counted(blocks)}" if blocks else ""))
    return "; ".join(parts)


BlockState = Literal["removed", "merged", "absorbed", "replaced", "network", "reduced", "changed"]
"""What a step does to a block: it is removed, is the result of a merge, is absorbed by one, is replaced by a matrix or
network, becomes that network, gets smaller inside, or gets other weights."""


@dataclass(frozen=True, kw_only=True)
class BlockChange:
    """What a step does to one block.

    Attributes:
        state: in one word.
        text: in a few words, for users.
        share: share of its width that remains, in [0, 1]; 0 if the block is gone.
        branches: the same for attention and for the MLP, where they differ.
    """

    state: BlockState
    text: str
    share: float = 1.0
    branches: tuple[float, float] | None = None
