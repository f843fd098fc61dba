"""Edits of the residual stream: fewer hidden directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from secateur.errors import InputError
from secateur.plan.step import Sizes, Step
from secateur.plan.units import BlockChange, Removal, UnitKind
from secateur.plan.work import Work

Signals = Literal["raw", "normed"]
"""Whether states are used raw, or scaled to a mean square of 1 as by the norm that reads them."""


class StreamSizes(BaseModel):
    """Parameters per residual dimension.

    A reading point is where a norm reads the stream: attention and MLP of each block (one point if they run in
    parallel), last the head. "Rows" are counted per direction: a block's attention that reads with 96 rows has 96 · d
    parameters there, d being the width of the stream at that point.

    Attributes:
        width: D, the number of directions before slicing.
        parallel: attention and MLP share one reading point.
        attention_in, attention_out, mlp_in, mlp_out: rows that read and columns that write, block by block, vectors
            along the stream (norm weights, biases of what writes) included.
        fixed: parameters of each block that do not depend on the width of the stream.
        tables: rows of the embedding tables, which write to the stream first.
        head: rows of the head, which reads it last.
        other_fixed: parameters outside the blocks that do not depend on the width of the stream.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int
    parallel: bool
    attention_in: tuple[int, ...]
    attention_out: tuple[int, ...]
    mlp_in: tuple[int, ...]
    mlp_out: tuple[int, ...]
    fixed: tuple[int, ...]
    tables: int
    head: int
    other_fixed: int

    @property
    def points_per_block(self) -> int:
        """Number of reading points in each block."""
        return 1 if self.parallel else 2

    def sizes_at(self, widths: Sequence[int], shortcuts: Sequence[bool]) -> Sizes:
        """Count parameters at these widths of the reading points, with these shortcut matrices between them."""
        points = self.points_per_block
        matrices = [
            before * after * matrix for before, after, matrix in zip(widths, widths[1:], shortcuts, strict=False)
        ]
        blocks = []
        for block, fixed in enumerate(self.fixed):
            first = points * block
            entering, leaving = widths[first], widths[first + points]
            middle = (entering, leaving) if self.parallel else (widths[first + 1],) * 2
            blocks.append(
                fixed
                + self.attention_in[block] * entering
                + self.attention_out[block] * middle[1]
                + self.mlp_in[block] * middle[0]
                + self.mlp_out[block] * leaving
                + sum(matrices[first : first + points])
            )
        return Sizes(tuple(blocks), self.tables * widths[0] + self.head * widths[-1] + self.other_fixed)


class SliceHidden(Step):
    """Rotate the hidden states and keep their first directions.

    Attributes:
        widths: directions kept in each block.
        head_width: directions the head reads.
        bases: first block of each shared basis; None gives every reading point a basis of its own.
        stock: the result keeps its architecture, with a smaller hidden size.
        coordinates: keep the current basis; the directions with the largest activations remain.
        signals: states whose principal directions are measured.
        sensitivity: with shared bases, weight directions by how much the loss depends on them.
        reconstruct: with shared bases, refit the layers that read by least squares to the kept directions.
        sizes: parameters per residual dimension, in the form the result has.
    """

    kind: Literal["slice-hidden"] = "slice-hidden"
    measures: ClassVar[bool] = True
    widths: tuple[int, ...]
    head_width: int
    bases: tuple[int, ...] | None = None
    stock: bool = False
    coordinates: bool = False
    signals: Signals = "normed"
    sensitivity: bool = False
    reconstruct: bool = False
    sizes: StreamSizes

    def kept_blocks(self, count: int) -> tuple[int, ...]:
        """Return all blocks: none is removed.

        Raises:
            InputError: widths for another number of blocks, or widths that do not fit the bases.
        """
        if not len(self.widths) == len(self.sizes.fixed) == count:
            raise InputError(f"the plan has widths for {len(self.widths)} blocks, but this model has {count}.")
        wrong = [width for width in (*self.widths, self.head_width) if not 1 <= width <= self.sizes.width]
        if wrong:
            raise InputError(f"the plan keeps {wrong[0]} directions; there are {self.sizes.width}, at least one stays.")
        if self.bases is None:
            if self.stock:
                raise InputError("a stock result has one basis; this plan has one at every reading point.")
            return tuple(range(count))
        if self.bases[:1] != (0,) or list(self.bases) != sorted(set(self.bases)) or self.bases[-1] >= count:
            raise InputError(
                f"the plan's bases start at blocks {list(self.bases)}; the first must start at 0, each later."
            )
        if len({*self.widths, self.head_width}) > 1 or (self.stock and len(self.bases) > 1):
            raise InputError("blocks with shared bases keep one width, and a stock result has one basis.")
        if self.coordinates and len(self.bases) > 1:
            raise InputError("directions of largest activations are one basis.")
        return tuple(range(count))

    def points(self) -> tuple[list[int], list[bool]]:
        """Return the widths of all reading points, the head last, and which connections carry a shortcut matrix."""
        each = self.sizes.points_per_block
        widths = [width for width in self.widths for _ in range(each)] + [self.head_width]
        borders = None if self.bases is None else {each * start - 1 for start in self.bases}
        return widths, [borders is None or one in borders for one in range(len(widths) - 1)]

    def sizes_after(self, sizes: Sizes) -> Sizes:
        """Return the sizes of the sliced model, shortcut matrices and the untied head included."""
        self.kept_blocks(len(sizes.blocks))
        counted = self.sizes.sizes_at(*self.points())
        return replace(counted, units={**sizes.units, UnitKind.DIRECTION: self.widths})

    def removes(self, sizes: Sizes) -> tuple[Removal, ...]:
        """Return the removed directions, block by block."""
        return tuple(
            Removal(unit=UnitKind.DIRECTION, count=self.sizes.width - width, total=self.sizes.width, block=block)
            for block, width in enumerate(self.widths)
            if width < self.sizes.width
        )

    def block_changes(self, sizes: Sizes, numbers: Sequence[int]) -> dict[int, BlockChange]:
        """Return what happens to each block; the share is that of its directions."""
        changes = super().block_changes(sizes, numbers)
        share = {place: width / self.sizes.width for place, width in enumerate(self.widths)}
        return {place: replace(change, share=share[place]) for place, change in changes.items()}

    def forwards(self, tokens: int) -> Work:
        """Return the work of measuring and slicing."""
        return slicing_work(shared=self.bases is not None, sensitivity=self.sensitivity, reconstruct=self.reconstruct)

    @property
    def rebuilds(self) -> bool:
        """Whether all weights are rebuilt: always."""
        return True

    def describe(self) -> tuple[str, str]:
        """Describe how many directions remain."""
        low, high, width = min(self.widths), max(self.widths), self.sizes.width
        kept = f"{low}" if low == high else f"{low} to {high}"
        share = 1 - sum(self.widths) / len(self.widths) / width
        if self.bases is None:
            how = "a basis at every reading point, shortcut matrices between them, "
            how += "the head whole" if self.head_width == width else f"{self.head_width} of them read by the head"
        else:
            how = (
                "as they are"
                if self.coordinates
                else "one basis"
                if len(self.bases) == 1
                else f"{len(self.bases)} bases"
            )
            how += ", stock architecture" if self.stock else ", with its modelling file"
        return "keeps", f"{kept} of {width} hidden directions ({share:.1%} sliced away); {how}"


def slicing_work(*, shared: bool, sensitivity: bool = False, reconstruct: bool = False) -> Work:
    """Return the work of slicing.

    With a basis at every reading point one walk measures and slices; shared bases take one walk for measuring, with
    `sensitivity` a backward pass over all windows, and with `reconstruct` another walk.
    """
    if not shared:
        return Work(forwards=2.0, covariances=1.0, rotations=1.0)
    measured = Work(forwards=1.0 + 4.0 * sensitivity, losses=3.0 * sensitivity, covariances=1.0 + sensitivity)
    return measured + reconstruct * Work(forwards=1.0, covariances=2.0, rotations=1.0)
