"""Edits of whole blocks: removed, merged, or replaced by a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from secateur.errors import InputError
from secateur.plan.step import Sizes, Step
from secateur.plan.units import BlockChange
from secateur.plan.work import Work


class DropBlocks(Step):
    """Remove blocks."""

    kind: Literal["drop-blocks"] = "drop-blocks"
    blocks: tuple[int, ...]

    def kept_blocks(self, count: int) -> tuple[int, ...]:
        """Return the blocks that remain, of `count`.

        Raises:
            InputError: a block number does not exist or appears twice, or no block remains.
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

    def sizes_after(self, sizes: Sizes) -> Sizes:
        """Return the sizes without the removed blocks."""
        return sizes.with_blocks(self.kept_blocks(len(sizes.blocks)))

    def describe(self) -> tuple[str, str]:
        """Name the removed blocks."""
        return "removes", ", ".join(map(str, self.blocks)) or "nothing"


Span = tuple[int, int]
"""First and last of a run of neighbouring blocks, both included."""

Rule = Literal["highest", "top", "delta-sum", "mean", "weighted"]
"""How the weights of a window of blocks are merged into those of one block."""


class MergeBlocks(Step):
    """Merge each window of neighbouring blocks into one block, at the position of its lowest.

    Attributes:
        windows: lowest and highest block of each window.
        rule: how their weights are merged.
        influence: block influence of every block; required by the rule `weighted`, empty otherwise.
        across_types: whether blocks of different layer types may be merged; the result has the lowest block's type.
        similarity: similarity of the final hidden states to the original model's, measured when the plan was made.
        threshold: the threshold that gives these windows; None if they are an intermediate stage of such a run.
    """

    kind: Literal["merge-blocks"] = "merge-blocks"
    windows: tuple[Span, ...]
    rule: Rule
    influence: tuple[float, ...] = ()
    across_types: bool = False
    similarity: float | None = None
    threshold: float | None = None

    def kept_blocks(self, count: int) -> tuple[int, ...]:
        """Return the blocks that remain, of `count`: the lowest of each window, and all outside the windows.

        Raises:
            InputError: a window of blocks that do not exist, of fewer than two blocks, or that overlaps another; or
                the rule needs block influences and there is not one for each block.
        """
        absorbed: set[int] = set()
        touched: set[int] = set()
        for low, high in self.windows:
            require_span(low, high, count, "merges")
            if low == high:
                raise InputError(f"the plan merges block {low} alone; a window has at least two blocks.")
            if touched & set(range(low, high + 1)):
                raise InputError(f"the plan merges a block twice: {[list(window) for window in self.windows]}.")
            touched |= set(range(low, high + 1))
            absorbed |= set(range(low + 1, high + 1))
        if self.rule == "weighted" and self.windows:
            _require_influence(self.influence, count)
        return tuple(block for block in range(count) if block not in absorbed)

    def sizes_after(self, sizes: Sizes) -> Sizes:
        """Return the sizes with each window replaced by one block."""
        return sizes.with_blocks(self.kept_blocks(len(sizes.blocks)))

    @property
    def merged_spans(self) -> tuple[Span, ...]:
        """The windows."""
        return self.windows

    def describe(self) -> tuple[str, str]:
        """Name the windows."""
        windows = ", ".join(f"{low} to {high}" for low, high in sorted(self.windows))
        return "merges", f"{windows} ({self.rule})" if windows else "nothing"

    def block_changes(self, sizes: Sizes, numbers: Sequence[int]) -> dict[int, BlockChange]:
        """Return what happens to the blocks in the windows."""
        changes = {}
        for low, high in self.windows:
            changes[low] = BlockChange(
                state="merged", text=f"blocks {numbers[low]} to {numbers[high]} merged into this one"
            )
            for place in range(low + 1, high + 1):
                changes[place] = BlockChange(state="absorbed", text=f"merged into block {numbers[low]}", share=0.0)
        return changes


class LinearReplacement(Step):
    """Remove windows of neighbouring blocks, each replaced by a matrix on the MLP output of the block before it.

    The plan does not contain the matrices: they are measured when it is applied.

    Attributes:
        windows: first and last block of each removed window.
        ridge: how strongly a matrix is regularised toward the identity, in mean squares of the MLP's output; "auto"
            is chosen on held-out windows when the plan is applied.
        objective: what the matrices minimise: the squared error of the state, or one minus its cosine.
        error: for each window, the share of its output that is not reproduced on held-out windows, measured when the
            plan was made; empty if that was not measured.
    """

    measures: ClassVar[bool] = True

    kind: Literal["linear-replacement"] = "linear-replacement"
    windows: tuple[Span, ...] = Field(min_length=1)
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"]
    objective: Literal["least-squares", "cosine"] = "least-squares"
    error: tuple[float, ...] = ()

    def kept_blocks(self, count: int) -> tuple[int, ...]:
        """Return the blocks that remain, of `count`.

        Raises:
            InputError: a window of blocks that do not exist, without a remaining block before it, or that overlaps
                another.
        """
        gone: set[int] = set()
        for low, high in self.windows:
            require_span(low, high, count, "replaces")
            if gone & set(range(low, high + 1)):
                raise InputError(f"the plan replaces a block twice: {[list(window) for window in self.windows]}.")
            gone |= set(range(low, high + 1))
        for low, high in self.windows:
            if low == 0 or low - 1 in gone:
                raise InputError(f"the plan replaces blocks {low} to {high}, but the block before them does not stay.")
        return tuple(block for block in range(count) if block not in gone)

    def sizes_after(self, sizes: Sizes) -> Sizes:
        """Return the sizes without the removed blocks."""
        return sizes.with_blocks(self.kept_blocks(len(sizes.blocks)))

    def describe(self) -> tuple[str, str]:
        """Name the windows."""
        return "replaces", ", ".join(f"{low} to {high}" for low, high in sorted(self.windows)) + " (a matrix each)"

    def block_changes(self, sizes: Sizes, numbers: Sequence[int]) -> dict[int, BlockChange]:
        """Return what happens to the blocks in the windows."""
        return {
            place: BlockChange(state="replaced", text=f"replaced by a matrix in block {numbers[low - 1]}", share=0.0)
            for low, high in self.windows
            for place in range(low, high + 1)
        }

    def forwards(self, tokens: int) -> Work:
        """Return the work of one walk, which accumulates the statistics that determine the matrices."""
        return linear_replacement_work()


def linear_replacement_work() -> Work:
    """Return the work of measuring replacement matrices: products of the states beside some blocks are summed."""
    return Work(1.0, covariances=0.5)


def require_span(low: int, high: int, count: int, does: str) -> None:
    """Refuse a window of blocks that a model of `count` blocks does not have.

    Raises:
        InputError: saying what the plan does to them.
    """
    if not 0 <= low <= high < count:
        raise InputError(f"the plan {does} blocks {low} to {high}, but this model has blocks 0 to {count - 1}.")


def _require_influence(influence: tuple[float, ...], count: int) -> None:
    if len(influence) != count:
        raise InputError(
            f"the plan merges by block influence, but names {len(influence)} influences for {count} blocks."
        )
    if not all(0 <= value < float("inf") for value in influence):
        raise InputError("the plan merges by block influence, but one is negative or not a number.")
