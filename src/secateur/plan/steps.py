"""The edits that come with secateur, and the units they count in."""

from __future__ import annotations

from secateur.plan.depth import DropBlocks, LinearReplacement, MergeBlocks, Rule, Span
from secateur.plan.experts import DropExperts, ExpertSizes, MergeExperts, RefitExperts
from secateur.plan.hidden import Signals, SliceHidden, StreamSizes
from secateur.plan.replace import Loss, Network, Pairs, ReplaceBlocks
from secateur.plan.step import AnyStep, Sizes, Step
from secateur.plan.units import BlockChange, Removal, UnitKind
from secateur.plan.width import BlockSizes, Choice, PruneWidth, Target, Widths, WidthSizes

__all__ = [
    "AnyStep",
    "BlockChange",
    "BlockSizes",
    "Choice",
    "DropBlocks",
    "DropExperts",
    "ExpertSizes",
    "LinearReplacement",
    "Loss",
    "MergeBlocks",
    "MergeExperts",
    "Network",
    "Pairs",
    "PruneWidth",
    "RefitExperts",
    "Removal",
    "ReplaceBlocks",
    "Rule",
    "Signals",
    "Sizes",
    "SliceHidden",
    "Span",
    "Step",
    "StreamSizes",
    "Target",
    "UnitKind",
    "WidthSizes",
    "Widths",
]
