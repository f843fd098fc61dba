"""The edits a plan can hold, as data."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from secateur.plan.depth import DropBlocks, LinearReplacement, MergeBlocks, Rule, Span
from secateur.plan.hidden import SliceHidden, StreamSizes
from secateur.plan.replace import Network, ReplaceBlocks
from secateur.plan.step import Sizes, Step
from secateur.plan.width import BlockSizes, Choice, PruneWidth, Widths, WidthSizes

AnyStep = Annotated[
    DropBlocks | MergeBlocks | LinearReplacement | ReplaceBlocks | SliceHidden | PruneWidth,
    Field(discriminator="kind"),
]
"""Every kind of step a plan file can hold."""

__all__ = [
    "AnyStep",
    "BlockSizes",
    "Choice",
    "DropBlocks",
    "LinearReplacement",
    "MergeBlocks",
    "Network",
    "PruneWidth",
    "ReplaceBlocks",
    "Rule",
    "Sizes",
    "SliceHidden",
    "Span",
    "Step",
    "StreamSizes",
    "WidthSizes",
    "Widths",
]
