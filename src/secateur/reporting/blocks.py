"""What plans did to each block of the dense model: the picture of the decoder, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from secateur.plan.plan import Plan
from secateur.plan.steps import (
    AnyStep,
    DropBlocks,
    LinearReplacement,
    MergeBlocks,
    PruneWidth,
    ReplaceBlocks,
    SliceHidden,
)

State = Literal["kept", "dropped", "merged", "absorbed", "replaced", "network", "narrowed"]

LEGEND: dict[State, str] = {
    "kept": "kept",
    "narrowed": "sliced or narrowed: height is the width that stays",
    "merged": "merged: several blocks in one",
    "absorbed": "gone into the block before",
    "replaced": "replaced by a matrix or network",
    "network": "a light network in its place",
    "dropped": "taken out",
}


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of the dense model.

    Attributes:
        number: in the dense model.
        state: what became of it.
        share: of its width that stays, in [0, 1]; 0 where it is gone.
        says: the same in words.
    """

    number: int
    state: State = "kept"
    share: float = 1.0
    says: str = "kept"


def picture(plans: Sequence[Plan]) -> list[Block]:
    """Return every block of the model that the first plan is for, as the last plan leaves it."""
    if not plans:
        return []
    blocks = [Block(number=number) for number in range(len(plans[0].model.block_parameters))]
    left = list(range(len(blocks)))
    for step in (step for plan in plans for step in plan.steps):
        for position, changed in _changes(step, [blocks[number] for number in left]).items():
            blocks[left[position]] = changed
        left = [left[position] for position in step.kept(len(left))]
    return blocks


def _changes(step: AnyStep, blocks: Sequence[Block]) -> dict[int, Block]:
    """Return the blocks that a step changes, by their place among those that it finds."""
    if isinstance(step, DropBlocks):
        return {place: _gone(blocks[place], "dropped", "taken out") for place in step.blocks}
    if isinstance(step, MergeBlocks):
        return {place: block for low, high in step.windows for place, block in _merged(blocks, low, high)}
    if isinstance(step, LinearReplacement):
        return {
            place: _gone(blocks[place], "replaced", f"replaced by a matrix in block {blocks[low - 1].number}")
            for low, high in step.windows
            for place in range(low, high + 1)
        }
    if isinstance(step, ReplaceBlocks):
        low, high = step.window
        what = "one trained block" if step.network == "block" else f"a {step.network} of {step.inner} channels"
        span = f"{blocks[low].number} to {blocks[high].number}"
        first = replace(blocks[low], state="network", says=f"{what} in the place of blocks {span}")
        others = range(low + 1, high + 1)
        return {low: first} | {
            place: _gone(blocks[place], "replaced", f"replaced by {what} in block {blocks[low].number}")
            for place in others
        }
    if isinstance(step, SliceHidden):
        return {
            place: _narrowed(blocks[place], width / step.sizes.width, f"{width} of {step.sizes.width} directions")
            for place, width in enumerate(step.widths)
        }
    assert isinstance(step, PruneWidth)
    return dict(_narrow(step, blocks))


def _gone(block: Block, state: State, says: str) -> Block:
    return replace(block, state=state, share=0.0, says=says)


def _merged(blocks: Sequence[Block], low: int, high: int) -> list[tuple[int, Block]]:
    span = f"{blocks[low].number} to {blocks[high].number}"
    first = replace(blocks[low], state="merged", says=f"blocks {span} merged into this one")
    into = f"merged into block {blocks[low].number}"
    return [(low, first), *((place, _gone(blocks[place], "absorbed", into)) for place in range(low + 1, high + 1))]


def _narrow(step: PruneWidth, blocks: Sequence[Block]) -> list[tuple[int, Block]]:
    changed = []
    for place, (keep, sizes) in enumerate(zip(step.widths, step.sizes.blocks, strict=True)):
        heads, before = keep.groups * keep.queries, sizes.dense.groups * sizes.dense.queries
        says = f"{heads} of {before} heads, {keep.channels} of {sizes.dense.channels} channels"
        units = (sizes.at(keep) - sizes.fixed) / max(1, sizes.at(sizes.dense) - sizes.fixed)
        changed.append((place, _narrowed(blocks[place], units, says)))
    return changed


def _narrowed(block: Block, share: float, says: str) -> Block:
    if share >= 1:
        return block
    state: State = "narrowed" if block.state == "kept" else block.state
    said = says if block.says == "kept" else f"{block.says}; {says}"
    return replace(block, state=state, share=block.share * share, says=said)
