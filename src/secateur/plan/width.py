"""Edits inside blocks: fewer heads, key/value groups and channels; with none left the branch is absent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from secateur.errors import InputError
from secateur.plan.step import Sizes, Step, Units
from secateur.plan.units import BlockChange, Removal, UnitKind
from secateur.plan.work import Work


class Widths(BaseModel):
    """The widths inside a block.

    Attributes:
        groups: key/value heads; 0 if the block has no attention.
        queries: query heads of each group.
        channels: inner width of the MLP, or of each of its experts; 0 if the block has no MLP.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    groups: int = Field(ge=0)
    queries: int = Field(ge=1)
    channels: int = Field(ge=0)

    @property
    def is_empty(self) -> bool:
        """Whether neither attention nor an MLP remains, so that the block computes nothing."""
        return not self.groups and not self.channels

    def units(self) -> dict[UnitKind, int]:
        """Return the number of units of each kind."""
        return {
            UnitKind.ATTENTION: int(self.groups > 0),
            UnitKind.MLP: int(self.channels > 0),
            UnitKind.QUERY_HEAD: self.groups * self.queries,
            UnitKind.KEY_VALUE_GROUP: self.groups,
            UnitKind.CHANNEL: self.channels,
        }


class BlockSizes(BaseModel):
    """Parameters of a block by unit, in the form the result has.

    Attributes:
        dense: widths before pruning.
        group: parameters of a key/value group without its query heads.
        query: parameters of a query head.
        channel: parameters of a channel, summed over all experts.
        fixed: all other parameters.
        attention: how many of those are gone if the block has no attention, such as the bias of its output.
        mlp: how many of those are gone if the block has no MLP.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense: Widths
    group: int
    query: int
    channel: int
    fixed: int
    attention: int = 0
    mlp: int = 0

    def goes_at(self, widths: Widths) -> bool:
        """Return whether the block goes as a whole: it had units, and none of them is left."""
        return widths.is_empty and not self.dense.is_empty

    def parameters_at(self, widths: Widths) -> int:
        """Count the parameters of the block at these widths; 0 if it goes as a whole."""
        if self.goes_at(widths):
            return 0
        heads = widths.groups * widths.queries
        no_attention, no_mlp = self.dense.groups and not widths.groups, self.dense.channels and not widths.channels
        gone = self.attention * bool(no_attention) + self.mlp * bool(no_mlp)
        return self.fixed - gone + widths.groups * self.group + heads * self.query + widths.channels * self.channel


class WidthSizes(BaseModel):
    """Parameters of a model by unit: block by block, and outside the blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocks: tuple[BlockSizes, ...]
    other: int

    def kept_blocks(self, widths: Sequence[Widths]) -> tuple[int, ...]:
        """Return the blocks that do not go as a whole at these widths."""
        pairs = enumerate(zip(self.blocks, widths, strict=True))
        return tuple(block for block, (sizes, own) in pairs if not sizes.goes_at(own))

    def sizes_at(self, widths: Sequence[Widths]) -> Sizes:
        """Count parameters and units at these widths, of the blocks that remain."""
        left = [(self.blocks[block], widths[block]) for block in self.kept_blocks(widths)]
        return Sizes(tuple(one.parameters_at(own) for one, own in left), self.other, units_of(own for _, own in left))


def units_of(widths: Iterable[Widths]) -> Units:
    """Return the number of units of each kind in blocks with these widths."""
    counts = [own.units() for own in widths]
    return {kind: tuple(one[kind] for one in counts) for kind in _KINDS}


_KINDS = (UnitKind.ATTENTION, UnitKind.MLP, UnitKind.QUERY_HEAD, UnitKind.KEY_VALUE_GROUP, UnitKind.CHANNEL)
_BRANCHES = {
    UnitKind.ATTENTION: (UnitKind.QUERY_HEAD, UnitKind.KEY_VALUE_GROUP),
    UnitKind.MLP: (UnitKind.CHANNEL,),
}
"""The units of each branch."""


Choice = Literal["fluctuation", "weighted-norm", "magnitude", "activation-norm", "taylor", "brain-surgeon"]
"""What decides which units of a block are removed."""


Target = Literal["dense", "block"]
"""What a refitted MLP is to write: what brings the states back to those of the dense model, or what it wrote before."""


class PruneWidth(Step):
    """Keep some heads, key/value groups and channels of each block, or none: then that branch of the block is removed.

    The plan says how many. Which ones, and the weights refitted to compensate for the others, are measured on the texts
    when it is applied, block by block on the model as pruned so far.

    Attributes:
        widths: what each block keeps.
        choose: what decides which units of a block are removed.
        candidates: channels that a greedy choice removes are among the smallest, this share of all; None: among all.
        stock: the result keeps its architecture, a stock one unless it has the modelling file; else it gets that.
        repair: refit output projections by least squares, where that is better on held-out windows.
        ridge: ridge of that fit; "auto" is chosen on held-out windows.
        target: what a refitted MLP is to write.
        refitted: blocks whose MLP is refitted to the dense states even if nothing is removed from it.
        align: bring what branches read and what attention writes back to that of the dense model too.
        bias: put what a constant can compensate for into biases, where the result has a place for them.
        without_bias: blocks with an output projection that has no place for a bias.
        rounding: channels were rounded to multiples of this.
        unrounded: the fraction of all parameters that would be removed without that rounding; None if it is the same.
        sizes: parameters of the result by unit.
    """

    kind: Literal["prune-width"] = "prune-width"
    measures: ClassVar[bool] = True
    widths: tuple[Widths, ...]
    choose: Choice
    candidates: float | None = Field(None, gt=0, le=1)
    stock: bool
    repair: bool = True
    ridge: float | Literal["auto"] = "auto"
    target: Target = "block"
    refitted: tuple[int, ...] = ()
    align: bool = False
    bias: bool = False
    without_bias: int = 0
    rounding: int = Field(1, ge=1)
    unrounded: float | None = None
    sizes: WidthSizes

    def kept_blocks(self, count: int) -> tuple[int, ...]:
        """Return the blocks that do not go as a whole.

        Raises:
            InputError: widths for another number of blocks, more than there is, fewer groups and queries, or nothing is
                left at all.
        """
        if not len(self.widths) == len(self.sizes.blocks) == count:
            raise InputError(f"the plan has widths for {len(self.widths)} blocks, but this model has {count}.")
        for block, (keep, sizes) in enumerate(zip(self.widths, self.sizes.blocks, strict=True)):
            for name, value in keep:
                if value > getattr(sizes.dense, name):
                    raise InputError(
                        f"the plan keeps {value} {name} in block {block}; there are {getattr(sizes.dense, name)}."
                    )
            if keep.groups < sizes.dense.groups and keep.queries < sizes.dense.queries:
                raise InputError(
                    f"the plan keeps fewer groups in block {block} and fewer queries in each; only one of them may go."
                )
        if all(keep.is_empty for keep in self.widths):
            raise InputError("the plan leaves nothing in any block; keep some groups or channels.")
        return self.sizes.kept_blocks(self.widths)

    def _gone(self) -> tuple[int, ...]:
        """Return the blocks that go as a whole."""
        kept = self.sizes.kept_blocks(self.widths)
        return tuple(block for block in range(len(self.widths)) if block not in kept)

    def sizes_after(self, sizes: Sizes) -> Sizes:
        """Return the sizes of the pruned model."""
        kept = self.kept_blocks(len(sizes.blocks))
        counted = self.sizes.sizes_at(self.widths)
        return replace(counted, units={**sizes.with_blocks(kept).units, **counted.units})

    def removes(self, sizes: Sizes) -> tuple[Removal, ...]:
        """Return the removed units: whole blocks, then branches or what is inside them, block by block."""
        count = len(self.widths)
        gone = self._gone()
        found = [Removal(unit=UnitKind.BLOCK, count=len(gone), total=count, indices=gone)] if gone else []
        for block, (keep, one) in enumerate(zip(self.widths, self.sizes.blocks, strict=True)):
            if block in gone:
                continue
            now, before = keep.units(), one.dense.units()
            for branch, inside in _BRANCHES.items():
                for kind in (branch,) if now[branch] < before[branch] else inside:
                    if now[kind] < before[kind]:
                        removed = before[kind] - now[kind]
                        found.append(Removal(unit=kind, count=removed, total=before[kind], block=block))
        return tuple(found)

    def block_changes(self, sizes: Sizes, numbers: Sequence[int]) -> dict[int, BlockChange]:
        """Return what happens to each block; the share is that of the parameters of its units."""
        shares = [
            (one.parameters_at(keep) - one.fixed) / max(1, one.parameters_at(one.dense) - one.fixed)
            for keep, one in zip(self.widths, self.sizes.blocks, strict=True)
        ]
        changes = super().block_changes(sizes, numbers)
        return {
            place: replace(change, share=max(0.0, shares[place]), branches=self._branches(place))
            for place, change in changes.items()
        }

    def _branches(self, block: int) -> tuple[float, float] | None:
        """Return the shares of attention and MLP that stay in a block, if they differ."""
        keep, dense = self.widths[block], self.sizes.blocks[block].dense
        heads = keep.groups * keep.queries / max(1, dense.groups * dense.queries)
        channels = keep.channels / max(1, dense.channels)
        return None if heads == channels else (heads, channels)

    def forwards(self, tokens: int) -> Work:
        """Return the work of measuring and pruning."""
        pairs = zip(self.widths, (one.dense for one in self.sizes.blocks), strict=True)
        heads = any(0 < keep.groups * keep.queries < dense.groups * dense.queries for keep, dense in pairs)
        return width_work(self.choose, self.target, repair=self.repair, heads=heads, align=self.align)

    @property
    def rebuilds(self) -> bool:
        """Whether all weights are rebuilt: always."""
        return True

    def describe(self) -> tuple[str, str]:
        """Describe what remains."""
        dense = [one.dense for one in self.sizes.blocks]
        attending = [(keep, one) for keep, one in zip(self.widths, dense, strict=True) if keep.groups]
        with_mlp = [(keep, one) for keep, one in zip(self.widths, dense, strict=True) if keep.channels]
        parts = []
        if attending:
            heads = [(keep.groups * keep.queries, one.groups * one.queries) for keep, one in attending]
            parts.append(_span(heads) + " query heads")
            parts.append(_span([(keep.groups, one.groups) for keep, one in attending]) + " key/value groups")
        if with_mlp:
            parts.append(_span([(keep.channels, one.channels) for keep, one in with_mlp]) + " channels")
        how = "same architecture" if self.stock else "with its modelling file"
        text = f"{', '.join(parts)} in each block{self._without()}; {how}"
        if self.rounding > 1:
            text += f"; channels in multiples of {self.rounding}"
        if self.unrounded is not None:
            text += f" (single channels would come to {self.unrounded:.1%})"
        if self.bias and self.without_bias:
            text += f"; no compensating bias in {self.without_bias} blocks, which cannot hold one"
        return "keeps", text

    def _without(self) -> str:
        """Name the blocks that lose a branch, and those that are removed."""
        pairs = list(enumerate(zip(self.widths, (one.dense for one in self.sizes.blocks), strict=True)))
        lost = {
            "attention": [block for block, (keep, one) in pairs if one.groups and not keep.groups and keep.channels],
            "MLP": [block for block, (keep, one) in pairs if one.channels and not keep.channels and keep.groups],
        }
        said = [f"no {branch} in {', '.join(map(str, blocks))}" for branch, blocks in lost.items() if blocks]
        gone = self._gone()
        if gone:
            said.append(f"without {', '.join(map(str, gone))}")
        return "".join(f"; {one}" for one in said)


def _span(pairs: list[tuple[int, int]]) -> str:
    """Write `3 to 5 of 8` of what is kept and what there was."""
    kept = [one for one, _ in pairs]
    low, high = min(kept), max(kept)
    return f"{low if low == high else f'{low} to {high}'} of {max(dense for _, dense in pairs)}"


_EXCHANGED, _ATTENTION = 0.3, 0.4
"""Time of the MLP's output projection, and of attention, as a share of that of its block, about."""
_SMALL_FITS = 0.2
"""Time of three fits of as many inputs as there are hidden directions, as a share of that of the MLP's."""


def width_work(
    choose: Choice, target: Target = "block", *, repair: bool = True, heads: bool = False, align: bool = False
) -> Work:
    """Return the work of width pruning.

    Each block is run to measure attention if some of its heads go, to measure its MLP, and for the dense states if they
    are the target. There the MLP's output projection alone is run once edited, where memory has room for its inputs
    (`surgery/width/exchange.py`); elsewhere the block is. Taylor scores take a pass forward and one back before that.

    Args:
        choose: what decides which units remain.
        target: what refitted projections aim at.
        repair: whether they are refitted.
        heads: whether heads go.
        align: whether attention is run twice more, to refit what it writes, and what the MLP reads.
    """
    greedy, taylor = choose == "brain-surgeon", choose == "taylor"
    follows = repair and target == "dense"
    forwards = 2.0 + heads * (not align) + _EXCHANGED * follows + 2 * _ATTENTION * (follows and align) + 4.0 * taylor
    rest = Work(losses=3.0 * taylor, sums=float(repair or greedy), fits=float(repair), orders=float(greedy))
    return rest + forwards + Work(covariances=1.5, fits=_SMALL_FITS) * (follows and align)
