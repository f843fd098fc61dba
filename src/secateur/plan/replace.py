"""Edit of whole blocks: a window of neighbours becomes one light network, trained when the plan is applied."""

from __future__ import annotations

from typing import ClassVar, Literal

from secateur.errors import InputError
from secateur.plan.depth import Span, require_span
from secateur.plan.hidden import StreamSizes
from secateur.plan.step import Sizes, Step

Network = Literal["block", "ffn", "swiglu"]
"""What stands in for a window: a block of the same kind, or an MLP of one of two kinds, each with its residual."""


class ReplaceBlocks(Step):
    """Put one light network in the place of a window of neighbouring blocks.

    Attributes:
        window: first and last block of the window; the network takes the place of the first.
        network: its kind; a block starts from the window's first, an MLP from giving nothing.
        inner: channels of an MLP; 0 for a block.
        sizes: of a model with an MLP in it, what stands on its residual stream; None for a block.
        train_tokens: tokens of text it is trained on.
        cosine: mean cosine of what enters and what leaves the window, as measured when it was decided.
    """

    measures: ClassVar[bool] = True

    kind: Literal["replace-blocks"] = "replace-blocks"
    window: Span
    network: Network
    inner: int = 0
    sizes: StreamSizes | None = None
    train_tokens: int
    cosine: float | None = None

    def kept(self, count: int) -> tuple[int, ...]:
        """Return the blocks that stay, of `count`, the first of the window, which becomes the network, among them.

        Raises:
            InputError: a window of blocks that do not exist, of fewer than two, or an MLP without its sizes.
        """
        low, high = self.window
        require_span(low, high, count, "replaces")
        if low == high:
            raise InputError(f"the plan replaces block {low} alone by a network; a window has at least two blocks.")
        if (self.network == "block") != (self.sizes is None):
            raise InputError(f"the plan puts in a network of kind {self.network}: sizes belong to ffn and swiglu only.")
        if self.sizes is not None and len(self.sizes.fixed) != count - (high - low):
            raise InputError("the plan's sizes are for another number of blocks than its window leaves.")
        return tuple(block for block in range(count) if not low < block <= high)

    def left(self, sizes: Sizes) -> Sizes:
        """Return the sizes with the network in the window's place; an MLP puts the whole model in its folded form."""
        kept = self.kept(len(sizes.blocks))
        if self.sizes is None:
            return Sizes(tuple(sizes.blocks[block] for block in kept), sizes.other)
        points = (1 if self.sizes.parallel else 2) * len(kept)
        return self.sizes.at([self.sizes.width] * (points + 1), [False] * points)

    def forwards(self, tokens: int) -> float:
        """Forward passes for the targets, and forward and backward passes of what is trained, over its own text."""
        passes = {"mse": 1.0, "lm": 2.5, "mse+lm": 3.5}[self.settings.get("loss", "mse")]
        return passes * self.train_tokens / tokens

    def disk_bytes(self, width: int, *, skeleton: bool) -> int:
        """Bytes of hidden-state pairs kept on disk while it is trained; 0 where they are computed anew."""
        stored = self.settings.get("pairs") == "disk" or (skeleton and self.settings.get("pairs") is None)
        return 2 * self.train_tokens * width * 2 if stored else 0

    @property
    def rebuilds(self) -> bool:
        """An MLP in the window's place puts the whole model in its folded form."""
        return self.sizes is not None

    def describe(self) -> tuple[str, str]:
        """Name the window and what it becomes."""
        low, high = self.window
        what = "one block" if self.network == "block" else f"one {self.network} of {self.inner} channels"
        how = self.settings.get("loss", "mse")
        return "replaces", f"{low} to {high} by {what}, trained on {self.train_tokens:,} tokens ({how} loss)"
