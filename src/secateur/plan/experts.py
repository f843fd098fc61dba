"""Edits of mixtures of experts: fewer experts in each block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from secateur.errors import InputError
from secateur.plan.step import Sizes, Step
from secateur.plan.units import BlockChange, Removal, UnitKind


class ExpertSizes(BaseModel):
    """The experts of a block.

    Attributes:
        count: how many there are.
        parameters: parameters of each, with its row of the router.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=1)
    parameters: int = Field(ge=0)


class FewerExperts(Step):
    """Keep fewer experts in every block that has any, the same number in all.

    Attributes:
        sizes: the experts of each block; None for a block whose MLP is dense.
    """

    sizes: tuple[ExpertSizes | None, ...]

    @abstractmethod
    def counts(self) -> tuple[int, ...]:
        """Return how many experts each block keeps; 0 for a block whose MLP is dense."""

    @property
    def keeps(self) -> int:
        """The number of experts that is left in each block that has any."""
        return max(self.counts())

    def kept_blocks(self, count: int) -> tuple[int, ...]:
        """Return all blocks: none is removed.

        Raises:
            InputError: experts for another number of blocks, none or more than there are, or blocks that differ.
        """
        left = self.counts()
        if not len(left) == len(self.sizes) == count:
            raise InputError(f"the plan has experts for {len(left)} blocks, but this model has {count}.")
        for block, (kept, sizes) in enumerate(zip(left, self.sizes, strict=True)):
            most = 0 if sizes is None else sizes.count
            if not min(1, most) <= kept <= most:
                raise InputError(f"the plan keeps {kept} experts in block {block}; there are {most}.")
        if len({kept for kept, sizes in zip(left, self.sizes, strict=True) if sizes is not None}) > 1:
            raise InputError("the plan keeps more experts in one block than in another; a model has as many in each.")
        return tuple(range(count))

    def sizes_after(self, sizes: Sizes) -> Sizes:
        """Return the sizes of the model with fewer experts."""
        self.kept_blocks(len(sizes.blocks))
        left = self.counts()
        blocks = tuple(
            total - (0 if own is None else (own.count - kept) * own.parameters)
            for total, own, kept in zip(sizes.blocks, self.sizes, left, strict=True)
        )
        return Sizes(blocks, sizes.other, {**sizes.units, UnitKind.EXPERT: left})

    def removes(self, sizes: Sizes) -> tuple[Removal, ...]:
        """Return the removed experts, block by block."""
        return tuple(
            Removal(
                unit=UnitKind.EXPERT, count=own.count - kept, total=own.count, block=block, indices=self.removed(block)
            )
            for block, (own, kept) in enumerate(zip(self.sizes, self.counts(), strict=True))
            if own is not None and kept < own.count
        )

    def removed(self, block: int) -> tuple[int, ...]:
        """Return the numbers of the experts that a block loses; empty if that is measured when it is applied."""
        return ()

    def block_changes(self, sizes: Sizes, numbers: Sequence[int]) -> dict[int, BlockChange]:
        """Return what happens to each block; the share is that of its experts."""
        changes = super().block_changes(sizes, numbers)
        left = self.counts()
        return {
            place: replace(change, share=left[place] / own.count)
            for place, change in changes.items()
            if (own := self.sizes[place]) is not None
        }

    @property
    def rebuilds(self) -> bool:
        """Whether all weights are rebuilt: always."""
        return True

    def _extent(self) -> str:
        most = max((one.count for one in self.sizes if one is not None), default=0)
        dense = sum(one is None for one in self.sizes)
        besides = f"; {UnitKind.BLOCK.counted(dense)} without experts" if dense else ""
        return f"{UnitKind.EXPERT.counted(self.keeps, of=most)} in each block{besides}"


class DropExperts(FewerExperts):
    """Remove experts with their rows of the router; the others stay as they are.

    Attributes:
        kept: the experts that each block keeps, in order; empty for a block whose MLP is dense.
        scores: the score of each expert of each block by which they were chosen, for readers.
    """

    kind: Literal["drop-experts"] = "drop-experts"
    kept: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float, ...], ...] = ()

    def counts(self) -> tuple[int, ...]:
        """Return how many experts each block keeps."""
        return tuple(map(len, self.kept))

    def kept_blocks(self, count: int) -> tuple[int, ...]:
        """Return all blocks: none is removed.

        Raises:
            InputError: as for every such step, or an expert that does not exist, or out of order.
        """
        for block, (kept, sizes) in enumerate(zip(self.kept, self.sizes, strict=False)):
            most = 0 if sizes is None else sizes.count
            wrong = [expert for expert in kept if not 0 <= expert < most]
            if wrong:
                raise InputError(f"the plan keeps expert {wrong[0]} of block {block}, which has {most}.")
            if any(low >= high for low, high in pairwise(kept)):
                raise InputError(f"the plan names the experts of block {block} twice or out of order: {list(kept)}.")
        return super().kept_blocks(count)

    def removed(self, block: int) -> tuple[int, ...]:
        """Return the numbers of the experts that a block loses."""
        own = self.sizes[block]
        return () if own is None else tuple(sorted(set(range(own.count)) - set(self.kept[block])))

    def describe(self) -> tuple[str, str]:
        """Describe what remains."""
        return "keeps", self._extent()


class RefitExperts(DropExperts):
    """Remove experts, and refit what the others write so that blocks write what those of the dense model do.

    Attributes:
        ridge: ridge of that fit; "auto" is chosen on held-out windows.
    """

    measures: ClassVar[bool] = True

    kind: Literal["refit-experts"] = "refit-experts"  # type: ignore[assignment]
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = "auto"

    def forwards(self, tokens: int) -> float:
        """Return the cost of two walks, dense and pruned, with the pruned block run once more after the refit."""
        return refit_forwards()

    def describe(self) -> tuple[str, str]:
        """Describe what remains."""
        return "keeps", f"{self._extent()}; their output projections refitted"


Grouping = Literal["nearest", "salient"]
"""Which experts are merged: each with the most similar one that stays, or the most salient take the most similar."""


Average = Literal["saliency", "frequency"]
"""What the weights of merged experts are averaged by."""


class MergeExperts(FewerExperts):
    """Merge experts into those that stay, block after block, each measured on the model as merged so far.

    The plan says how many stay. Which ones, and what is merged into them, is measured when it is applied.

    Attributes:
        keep: the number of experts each block with experts keeps.
        grouping: which are merged.
        group: largest number of experts merged into one, with itself.
        average: what weights are averaged by.
        align: match the channels of merged experts before averaging.
        repair: refit what the experts write, so that blocks write what those of the dense model do.
        ridge: ridge of that fit; "auto" is chosen on held-out windows.
    """

    measures: ClassVar[bool] = True

    kind: Literal["merge-experts"] = "merge-experts"
    keep: int = Field(ge=1)
    grouping: Grouping
    group: int = Field(ge=2)
    average: Average = "saliency"
    align: bool = True
    repair: bool = False
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = "auto"

    def counts(self) -> tuple[int, ...]:
        """Return how many experts each block keeps."""
        return tuple(0 if own is None else min(self.keep, own.count) for own in self.sizes)

    def forwards(self, tokens: int) -> float:
        """Return the cost of measuring each block and running it once merged."""
        return merge_forwards(repair=self.repair)

    def describe(self) -> tuple[str, str]:
        """Describe what remains."""
        return "merges", f"into {self._extent()}" + ("; output projections refitted" if self.repair else "")


def refit_forwards() -> float:
    """Return the cost of dropping and refitting experts, in plain forward passes."""
    return 3.5


def merge_forwards(*, repair: bool) -> float:
    """Return the cost of merging experts, in plain forward passes; similarities take a sample of the tokens."""
    return 3.0 + 2.5 * repair
