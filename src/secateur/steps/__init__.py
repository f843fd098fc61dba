"""The edits a plan can hold, as data."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from secateur.steps.depth import DropBlocks, LinearizeBlocks, MergeBlocks, Rule, Span
from secateur.steps.narrow import BlockSizes, Choice, NarrowBlocks, NarrowSizes, Widths
from secateur.steps.replace import Network, ReplaceBlocks
from secateur.steps.step import Sizes, Step
from secateur.steps.width import SliceHidden, StreamSizes

AnyStep = Annotated[
    DropBlocks | MergeBlocks | LinearizeBlocks | ReplaceBlocks | SliceHidden | NarrowBlocks,
    Field(discriminator="kind"),
]
"""Every kind of step a plan file can hold."""

__all__ = [
    "AnyStep",
    "BlockSizes",
    "Choice",
    "DropBlocks",
    "LinearizeBlocks",
    "MergeBlocks",
    "NarrowBlocks",
    "NarrowSizes",
    "Network",
    "ReplaceBlocks",
    "Rule",
    "Sizes",
    "SliceHidden",
    "Span",
    "Step",
    "StreamSizes",
    "Widths",
]
