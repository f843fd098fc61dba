"""Candidate widths that treat all blocks alike, and the choice among them by a budget.

Channels are removed in multiples of 256 in large MLPs, of 64 or 8 in smaller ones: quantised formats and matrix kernels
prefer that. What the rounding costs compared with single channels is recorded in the plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat

from secateur.errors import InputError, ModelError
from secateur.methods.budget import Budget, choose_size
from secateur.methods.method import Settings
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths
from secateur.plan.amount import read_fraction
from secateur.plan.steps import Target, Widths
from secateur.surgery.width.target import all_widths, dense_widths, reason_against_heads, stock_config, width_sizes

AllWidths = tuple[Widths, ...]
Heads = Literal["last", "even", "never"]

_MULTIPLES = (256, 64, 8)
_FEWEST_STEPS = 8
_OF_EXPERTS = 8
_LEVELS = 512
"""Maximum number of fractions tried when channels are removed singly."""
_FLOOR = 0.25
"""`heads="last"`: share of the channels that is left when heads begin to be removed."""
TOLD = 0.0005
"""Differences due to rounding below this share of the parameters are not reported."""


def rounding_for(decoder: Decoder, free: range, given: int | None = None) -> int:
    """Return the multiple to which channels of the free blocks are rounded.

    As requested, or 256, 64 or 8 if the smallest MLP has eight such steps, else 1; for experts always multiples of 8,
    because grouped matrix products need rows that start at multiples of 16 bytes.
    """
    found = [block_widths(decoder, block) for block in free]
    channels = min((one.channels for one in found if one.channels), default=0)
    multiple = given or next((one for one in _MULTIPLES if channels >= _FEWEST_STEPS * one), 1)
    return math.lcm(multiple, _OF_EXPERTS) if any(one.experts for one in found) else multiple


def rounded(channels: float, dense: int, multiple: int) -> int:
    """Round a number of channels to the nearest multiple, at least one and no more than there are."""
    return min(dense, max(multiple, int(channels / multiple + 0.5) * multiple))


class Candidates:
    """Widths that treat all free blocks alike, from the smallest cut to the largest.

    Attributes:
        multiple: channels are rounded to multiples of this.
        stock: whether a stock configuration can express them; else they need the modelling file.
        sizes: parameters of the result by unit.
    """

    def __init__(self, decoder: Decoder, free: range, heads: Heads, rounding: int | None) -> None:
        """Collect the candidates for a model.

        Raises:
            InputError: no block is free.
            ModelError: its widths cannot be pruned.
        """
        if not free:
            raise InputError(f"all {decoder.block_count} blocks are protected; lower protect_first or protect_last.")
        self._decoder, self._free = decoder, free
        self._dense = dense_widths(decoder)
        self._mixed = [bool(one.experts) for one in all_widths(decoder)]
        inner = {kind: [self._dense[b].channels for b in free if self._mixed[b] == kind] for kind in (False, True)}
        self._narrowest = {kind: min(filter(None, found), default=0) for kind, found in inner.items()}
        self.multiple = rounding_for(decoder, free, rounding)
        self._way: Heads = "never" if reason_against_heads(decoder) else heads
        self.stock = stock_config(decoder, self._at(0.5, self.multiple)) is not None
        self._levels = self._head_levels()
        if self._way == "even" and self.stock and len(self._levels) == 1 < self._full.groups * self._full.queries:
            self.stock = False
            self._levels = self._head_levels()
        self.sizes = width_sizes(decoder, stock=self.stock)

    @property
    def _full(self) -> Widths:
        """The widths of the first free block that has attention; of the first, if none has."""
        dense = [self._dense[block] for block in self._free]
        return next((one for one in dense if one.groups), dense[0])

    def _head_levels(self) -> list[tuple[int, int]]:
        """Return possible (groups, queries), largest first: whole groups, or queries if there is one group."""
        full = self._full
        levels = [(full.groups, full.queries)]
        heads = {(self._dense[b].groups, self._dense[b].queries) for b in self._free if self._dense[b].groups}
        if len(heads) > 1 or self._way == "never":
            return levels
        if full.groups > 1:
            fewer = [(count, full.queries) for count in range(full.groups - 1, 0, -1)]
        else:
            fewer = [(1, count) for count in range(full.queries - 1, 0, -1)]
        return levels + [one for one in fewer if not self.stock or self._allowed(one)]

    def _allowed(self, level: tuple[int, int]) -> bool:
        return stock_config(self._decoder, self._with(level, self._dense)) is not None

    def _with(self, level: tuple[int, int], widths: Sequence[Widths]) -> AllWidths:
        changed = {"groups": level[0], "queries": level[1]}
        return tuple(
            one.model_copy(update=changed) if b in self._free and one.groups else one for b, one in enumerate(widths)
        )

    def _at(self, fraction: float, multiple: int) -> AllWidths:
        """Return the widths when this fraction of the channels is removed; multiples of the narrowest MLP stay so."""
        widths = list(self._dense)
        for block in self._free:
            dense, narrowest = widths[block].channels, self._narrowest[self._mixed[block]]
            base = dense if narrowest == 0 or dense % narrowest else narrowest
            left = rounded((1 - fraction) * base, base, multiple) * (dense // base if base else 1)
            widths[block] = widths[block].model_copy(update={"channels": left})
        return tuple(widths)

    def ratio(self, fraction: float) -> AllWidths:
        """Return the widths when this fraction of the channels is removed, and of the heads as `heads="even"` says."""
        widths = self._at(fraction, self.multiple)
        if self._way != "even":
            return widths
        full = self._levels[0][0] * self._levels[0][1]
        return self._with(min(self._levels, key=lambda one: abs(one[0] * one[1] - (1 - fraction) * full)), widths)

    def path(self, multiple: int) -> list[AllWidths]:
        """Return all candidates, the smallest cut first."""
        most = max(self._dense[block].channels for block in self._free)
        steps = min(_LEVELS, max(1, most // multiple))
        fractions = [number / steps for number in range(1, steps + 1)]
        if self._way == "even":
            found = [self.ratio(one) for one in fractions]
        else:
            found = [self._at(one, multiple) for one in fractions if one <= 1 - _FLOOR]
            lowest = found[-1] if found else self._dense
            found += [self._with(level, lowest) for level in self._levels[1:]]
            found += [self._with(self._levels[-1], self._at(one, multiple)) for one in fractions if one > 1 - _FLOOR]
        return list(dict.fromkeys(one for one in found if one != self._dense))

    def meet(self, budget: Budget) -> tuple[AllWidths, float | None]:
        """Return the widths that meet a number of parameters, and the fraction removed with single channels if other.

        Raises:
            InputError: the budget is out of reach.
        """
        total = self._decoder.parameter_count
        path = self.path(self.multiple)
        if not path:
            most = max(self._dense[block].channels for block in self._free)
            raise InputError(f"rounding={self.multiple}: MLPs have only {most} channels.")
        after = [self.sizes.sizes_at(one) for one in path]
        widths = path[choose_size(budget, [one.total for one in after], total, units=[one.units for one in after])]
        if self.multiple == 1:
            return widths, None
        fine = [self.sizes.sizes_at(one) for one in self.path(1)]
        sizes = [one.total for one in fine]
        best = 1 - sizes[choose_size(budget, sizes, total, units=[one.units for one in fine])] / total
        got = 1 - self.sizes.sizes_at(widths).total / total
        return widths, best if abs(best - got) > TOLD else None

    def given(self, ffn: int | None, groups: int | None, queries: int | None) -> AllWidths:
        """Return the widths that were requested by number.

        Raises:
            InputError: they do not fit the model.
        """
        wanted = {"channels": ffn, "groups": groups, "queries": queries}
        asked = {name: value for name, value in wanted.items() if value is not None}
        dense = [self._dense[block] for block in self._free]
        for name, value in asked.items():
            found = {getattr(one, name) for one in dense} - {0} or {0}  # a block may lack attention, or an MLP
            knob = "ffn" if name == "channels" else name
            if len(found) > 1:
                raise InputError(f"{knob}={value}: blocks differ ({sorted(found)}); give ratio or remove instead.")
            if not 1 <= value <= min(found):
                raise InputError(f"{knob}={value}: must be between 1 and {min(found)}.")
        if ffn is not None and ffn % _OF_EXPERTS and any(block_widths(self._decoder, b).experts for b in self._free):
            raise InputError(f"ffn={ffn}: channels of experts stay in multiples of {_OF_EXPERTS}.")
        reason = reason_against_heads(self._decoder)
        if reason and any(name != "channels" and value < getattr(self._full, name) for name, value in asked.items()):
            raise ModelError(f"{self._decoder.source}: no head can be removed: {reason}.")
        widths = tuple(
            one.model_copy(update={name: value for name, value in asked.items() if getattr(one, name)})
            if block in self._free
            else one
            for block, one in enumerate(self._dense)
        )
        if self.stock and stock_config(self._decoder, widths) is None:
            self.stock, self.sizes = False, width_sizes(self._decoder, stock=False)
        return widths


Ratio = Annotated[float, BeforeValidator(lambda given: read_fraction(given, "ratio", zero=True))]
Share = Annotated[float, BeforeValidator(lambda given: read_fraction(given, "hidden", zero=True))]


class WidthSettings(Settings):
    """Settings of all width methods."""

    ratio: Ratio | None = Field(
        None,
        description="share of the channels (and of heads that go with them) to remove; sets the amount",
    )
    rounding: int | None = Field(
        None, ge=1, description="channels stay in multiples of this; by default 256, 64, 8 or 1, by the MLP's width"
    )
    repair: bool = Field(
        True, description="refit the remaining weights by least squares, where that is better on held-out windows"
    )
    ridge: PositiveFloat | Literal["auto"] = Field(
        "auto", description="regularisation toward the original weights; by default chosen on held-out windows"
    )

    def own_amount(self) -> Budget | None:
        """Return the papers' ratio."""
        return None if self.ratio is None else Budget("ratio", self.ratio, knob="ratio")


class FlapSettings(WidthSettings):
    """Settings of `flap`."""

    heads: Literal["even", "never"] = Field("even", description="heads compete with channels (even), or stay (never)")
    bias: Literal["auto", "off"] = Field(
        "auto",
        description="put the mean of what is removed into a bias: where the result can hold one (auto), or not (off)",
    )


class EvenSettings(WidthSettings):
    """Settings of methods that prune all blocks alike."""

    heads: Heads = Field(
        "last",
        description="heads go once a quarter of the channels is left (last), like the channels (even), or never; with "
        "allocation=global those of some blocks (last), or never",
    )
    target: Target = Field(
        "dense",
        description="what repaired MLPs write: what brings states back to the dense model's, or what the block wrote",
    )
    ffn: int | None = Field(None, ge=1, description="channels of every MLP to keep; sets the amount")
    groups: int | None = Field(None, ge=1, description="key/value groups to keep; sets the amount")
    queries: int | None = Field(None, ge=1, description="query heads to keep in each key/value group; sets the amount")

    def own_amount(self) -> Budget | None:
        """Return the ratio, or the first number given."""
        given = {name: getattr(self, name) for name in ("ffn", "groups", "queries")}
        named = {name: value for name, value in given.items() if value is not None}
        if self.ratio is not None:
            if named:
                raise InputError(f"ratio and {next(iter(named))} contradict each other; give one of them.")
            return super().own_amount()
        return Budget("own", next(iter(named.values())), knob=next(iter(named))) if named else None


class SurgeonSettings(EvenSettings):
    """Settings of `obs-width`."""

    candidates: float = Field(
        0.5,
        gt=0,
        le=1,
        description="channels that go are among the smallest, this share of all (or half as many more than go): what "
        "remains may fail to stand in for a large one on other texts; 1 is all",
    )
    allocation: Literal["uniform", "global"] = Field(
        "uniform",
        description="all blocks get the same widths, or each its own, down to none, by how much the predictions change",
    )
    attention: Literal["whole", "groups"] = Field(
        "whole",
        description="with allocation=global: attention of a block goes as a whole, or by single key/value groups; then "
        "blocks have different numbers of heads, which fewer engines read",
    )
    align: bool | Literal["auto"] = Field(
        "auto",
        description="with target=dense: also refit what branches read, and what attention writes, to that of the dense "
        "model; auto: where a third of the parameters goes or more",
    )
    refine: int = Field(
        0,
        ge=0,
        description="with allocation=global: rounds in which widths are exchanged between blocks, judged alike",
    )

    def own_amount(self) -> Budget | None:
        """Return the ratio, or the first number given, which are of uniform widths."""
        found = super().own_amount()
        if self.allocation == "global" and self.heads == "even":
            raise InputError("heads=even is of uniform widths; with allocation=global say last or never.")
        if self.allocation == "uniform" and self.attention == "groups":
            raise InputError("attention=groups is of allocation=global; for uniform widths say heads=even or groups=N.")
        if found is not None and self.allocation == "global":
            raise InputError(f"{found.knob}: sets uniform widths; with allocation=global ask for an amount (--remove).")
        return found


class PrunerSettings(EvenSettings):
    """Settings of `llm-pruner`."""

    protect_first: int = Field(4, ge=0, description="number of blocks at the start that never change")
    protect_last: int = Field(2, ge=0, description="number of blocks at the end that never change")


class MinitronSettings(EvenSettings):
    """Settings of `minitron-width`."""

    hidden: Share = Field(
        0.0, description="share of the hidden directions to remove as well, before anything else (alone: with ratio=0)"
    )

    def own_amount(self) -> Budget | None:
        """Return the ratio or the first number given; with ratio=0 the share of hidden directions."""
        if self.hidden and self.ratio == 0:
            return Budget("own", self.hidden, knob="hidden")
        return super().own_amount()
