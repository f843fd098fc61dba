"""Settings of the methods that narrow blocks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from secateur.errors import InputError
from secateur.methods.budget import Budget, read_fraction
from secateur.methods.inner_widths import Heads
from secateur.methods.method import Settings

Ratio = Annotated[float, BeforeValidator(lambda given: read_fraction(given, "ratio", zero=True))]
Share = Annotated[float, BeforeValidator(lambda given: read_fraction(given, "hidden", zero=True))]


class NarrowSettings(Settings):
    """Settings all methods have that narrow blocks."""

    ratio: Ratio | None = Field(
        None,
        description="share of the channels (and of heads that go with them) to take out; an amount by itself",
    )
    rounding: int | None = Field(
        None, ge=1, description="channels stay in multiples of this; by itself 256, 64, 8 or 1, by the MLP's width"
    )
    repair: bool = Field(True, description="fit what writes by least squares to what it wrote before")

    def own_amount(self) -> Budget | None:
        """Give the papers' ratio."""
        return None if self.ratio is None else Budget("ratio", self.ratio, knob="ratio")


class FlapSettings(NarrowSettings):
    """Settings of `flap`."""

    heads: Literal["even", "never"] = Field("even", description="heads compete with channels (even), or stay (never)")
    bias: Literal["auto", "off"] = Field(
        "auto",
        description="put back the mean of what goes as a bias: where the result can hold one (auto), or not (off)",
    )


class EvenSettings(NarrowSettings):
    """Settings of methods that narrow all blocks alike."""

    heads: Heads = Field(
        "last", description="heads go when a quarter of the channels is left (last), as channels do (even), or never"
    )
    ffn: int | None = Field(None, ge=1, description="channels of every MLP that stay; an amount by itself")
    groups: int | None = Field(None, ge=1, description="key/value groups that stay; an amount by itself")
    queries: int | None = Field(
        None, ge=1, description="query heads that stay in each key/value group; an amount by itself"
    )

    def own_amount(self) -> Budget | None:
        """Give the ratio, or the first of the numbers that stay."""
        given = {name: getattr(self, name) for name in ("ffn", "groups", "queries")}
        named = {name: value for name, value in given.items() if value is not None}
        if self.ratio is not None:
            if named:
                raise InputError(f"ratio and {next(iter(named))} contradict each other; give one of them.")
            return super().own_amount()
        return Budget("own", next(iter(named.values())), knob=next(iter(named))) if named else None


class PrunerSettings(EvenSettings):
    """Settings of `llm-pruner`."""

    protect_first: int = Field(4, ge=0, description="how many of the first blocks are never touched")
    protect_last: int = Field(2, ge=0, description="how many of the last blocks are never touched")


class MinitronSettings(EvenSettings):
    """Settings of `minitron-width`."""

    hidden: Share = Field(
        0.0, description="share of the hidden directions that goes too, before anything else (alone: with ratio=0)"
    )

    def own_amount(self) -> Budget | None:
        """Give the ratio or the first number that stays; the share of hidden directions where nothing else is to go."""
        if self.hidden and self.ratio == 0:
            return Budget("own", self.hidden, knob="hidden")
        return super().own_amount()
