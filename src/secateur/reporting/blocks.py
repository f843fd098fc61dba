"""What plans did to each block of the dense model: the picture of the decoder, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from secateur.plan.plan import Plan
from secateur.plan.units import BlockChange, BlockState

State = Literal["kept"] | BlockState

LEGEND: dict[State, str] = {
    "kept": "kept",
    "reduced": "smaller: height is the share that stays; two bars where attention (left) and MLP differ",
    "changed": "other weights",
    "merged": "merged: several blocks in one",
    "absorbed": "merged into the block before",
    "replaced": "replaced by a matrix or network",
    "network": "a light network in its place",
    "removed": "removed",
}


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of the dense model.

    Attributes:
        number: in the dense model.
        state: what became of it.
        share: of its width that stays, in [0, 1]; 0 where it is gone.
        text: the same in words.
        branches: the shares of attention and of the MLP that stay, where they differ.
    """

    number: int
    state: State = "kept"
    share: float = 1.0
    text: str = "kept"
    branches: tuple[float, float] | None = None


def picture(plans: Sequence[Plan]) -> list[Block]:
    """Return every block of the model that the first plan is for, as the last plan leaves it."""
    if not plans:
        return []
    blocks = [Block(number=number) for number in range(len(plans[0].model.block_parameters))]
    left = list(range(len(blocks)))
    for plan in plans:
        for number, change in plan.block_changes(left):
            blocks[number] = _changed(blocks[number], change)
        left = [left[place] for place in plan.kept_blocks()]
    return blocks


def _changed(block: Block, change: BlockChange) -> Block:
    """Return the block after a change; what only makes it smaller, or changes weights, adds to what became of it."""
    if change.share == 0 or block.state == "kept" or change.state not in ("reduced", "changed"):
        text = change.text
        return replace(block, state=change.state, share=block.share * change.share, text=text, branches=change.branches)
    state = change.state if block.state == "changed" else block.state
    before, now = (one.branches or (one.share, one.share) for one in (block, change))
    branches = (before[0] * now[0], before[1] * now[1])
    return replace(
        block,
        state=state,
        share=block.share * change.share,
        text=f"{block.text}; {change.text}",
        branches=None if branches[0] == branches[1] else branches,
    )
