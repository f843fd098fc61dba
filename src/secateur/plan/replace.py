"""Edit of whole blocks: a window of neighbours is replaced by one light network, trained when the plan is applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from secateur.errors import InputError
from secateur.plan.depth import Span, require_span
from secateur.plan.hidden import StreamSizes
from secateur.plan.step import Sizes, Step, Units
from secateur.plan.units import BlockChange, UnitKind

Network = Literal["block", "ffn", "swiglu"]
"""What replaces a window: a block of the same kind, or an MLP of one of two kinds, each with its residual."""


Loss = Literal["mse", "lm", "mse+lm"]
"""What a network is trained on: hidden states, the language-modelling loss, or one after the other."""

Pairs = Literal["recompute", "disk"]
"""Where the hidden states it is trained on come from: recomputed, or stored on disk."""


class ReplaceBlocks(Step):
    """Replace a window of neighbouring blocks by a light network: one block or two, or an MLP.

    Attributes:
        window: first and last block of the window; the network takes the place of the first.
        network: its kind; blocks start from the window's first ones, an MLP from an output of zero.
        network_blocks: number of blocks of a network of blocks.
        inner: channels of an MLP; 0 for a block.
        sizes: of a model with an MLP in it, its parameters per residual dimension; None for a block.
        train_tokens: number of training tokens.
        loss: training objective.
        pairs: where its training pairs come from; None stores those of a skeleton on disk.
        cosine: mean cosine between the input and output of the window, measured when the plan was made.
    """

    measures: ClassVar[bool] = True

    kind: Literal["replace-blocks"] = "replace-blocks"
    window: Span
    network: Network
    network_blocks: int = Field(1, ge=1, le=2)
    inner: int = 0
    sizes: StreamSizes | None = None
    train_tokens: int
    loss: Loss = "mse"
    pairs: Pairs | None = None
    cosine: float | None = None

    def kept_blocks(self, count: int) -> tuple[int, ...]:
        """Return the blocks that remain, of `count`, including the first of the window, which become the network.

        Raises:
            InputError: a window of blocks that do not exist, of no more than the network has, or an MLP without its
                sizes.
        """
        low, high = self.window
        require_span(low, high, count, "replaces")
        if low == high:
            raise InputError(f"the plan replaces block {low} alone by a network; a window has at least two blocks.")
        if high - low < self.network_blocks or (self.network != "block" and self.network_blocks != 1):
            raise InputError(
                f"the plan replaces blocks {low} to {high} by {self.network_blocks} of kind {self.network}; two can "
                "only be blocks, in place of at least three."
            )
        if (self.network == "block") != (self.sizes is None):
            raise InputError(f"the plan puts in a network of kind {self.network}: sizes belong to ffn and swiglu only.")
        if self.sizes is not None and len(self.sizes.fixed) != count - (high - low):
            raise InputError("the plan's sizes are for another number of blocks than its window leaves.")
        return tuple(block for block in range(count) if not low + self.network_blocks <= block <= high)

    def sizes_after(self, sizes: Sizes) -> Sizes:
        """Return the sizes with the network in place of the window; an MLP puts the whole model in its folded form."""
        kept = self.kept_blocks(len(sizes.blocks))
        left = sizes.with_blocks(kept)
        if self.sizes is None:
            return left
        points = self.sizes.points_per_block * len(kept)
        counted = self.sizes.sizes_at([self.sizes.width] * (points + 1), [False] * points)
        return replace(counted, units=_with_mlp(left.units, kept.index(self.window[0]), self.inner))

    def forwards(self, tokens: int) -> float:
        """Return the cost of computing the targets, and of training passes of the trained part over its own text."""
        return training_forwards(self.loss, self.train_tokens, tokens)

    def disk_bytes(self, width: int, *, skeleton: bool) -> int:
        """Return the bytes of hidden-state pairs stored on disk during training; 0 if they are recomputed."""
        return 2 * self.train_tokens * width * 2 if self.stores_pairs(skeleton=skeleton) else 0

    def stores_pairs(self, *, skeleton: bool) -> bool:
        """Return whether the hidden states it is trained on are stored on disk."""
        return self.pairs == "disk" or (self.pairs is None and skeleton)

    @property
    def rebuilds(self) -> bool:
        """Whether all weights are rebuilt: an MLP in place of the window puts the whole model in its folded form."""
        return self.sizes is not None

    def describe(self) -> tuple[str, str]:
        """Describe the window and its replacement."""
        low, high = self.window
        blocks = ("one block", "two blocks")[self.network_blocks - 1]
        what = blocks if self.network == "block" else f"one {self.network} of {self.inner} channels"
        return "replaces", f"{low} to {high} by {what}, trained on {self.train_tokens:,} tokens ({self.loss} loss)"

    def block_changes(self, sizes: Sizes, numbers: Sequence[int]) -> dict[int, BlockChange]:
        """Return what happens to the blocks of the window."""
        low, high = self.window
        stays = range(low, low + self.network_blocks)
        what = "one trained block" if self.network == "block" else f"a {self.network} of {self.inner} channels"
        places = f"block {numbers[low]}" if len(stays) == 1 else f"blocks {numbers[low]} and {numbers[low + 1]}"
        what = what if len(stays) == 1 else "two trained blocks"
        gone = BlockChange(state="replaced", text=f"replaced by {what} in {places}", share=0.0)
        first = f"{what} in the place of blocks {numbers[low]} to {numbers[high]}"
        network = BlockChange(state="network", text=first)
        return dict.fromkeys(stays, network) | dict.fromkeys(range(stays.stop, high + 1), gone)


def training_forwards(loss: Loss, train_tokens: int, tokens: int) -> float:
    """Return the cost of training a network, in plain forward passes over windows of `tokens` tokens in total."""
    return {"mse": 1.0, "lm": 2.5, "mse+lm": 3.5}[loss] * train_tokens / tokens


_INSIDE = {UnitKind.ATTENTION: 0, UnitKind.QUERY_HEAD: 0, UnitKind.KEY_VALUE_GROUP: 0, UnitKind.EXPERT: 0}


def _with_mlp(units: Units, place: int, channels: int) -> Units:
    """Return the units of the blocks when one of them becomes an MLP without attention."""
    own = _INSIDE | {UnitKind.CHANNEL: channels}
    return {
        kind: tuple(own.get(kind, count) if block == place else count for block, count in enumerate(counts))
        for kind, counts in units.items()
    }
