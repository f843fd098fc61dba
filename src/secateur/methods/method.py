"""What a method is: settings, and a function that decides. One function per kind of step applies it for all methods."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from secateur.data.windows import Windows
from secateur.distributed import from_main_process
from secateur.errors import InputError
from secateur.methods.asked import Asked
from secateur.methods.budget import Budget, Native
from secateur.methods.cost import SpeedModel
from secateur.models.decoder import Decoder
from secateur.plan.plan import Search
from secateur.plan.step import AnyStep, Step
from secateur.plan.work import Work
from secateur.plugins import Registry
from secateur.run_options import DEFAULTS, RunOptions
from secateur.scores.measure import score_model
from secateur.scores.profile import Kind, Scores
from secateur.settings import read_settings


class MethodSettings(BaseModel):
    """Settings of a method; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def gathered(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return settings by their names in this class, given the names as typed."""
        return given

    def own_amount(self) -> Budget | None:
        """Return the amount that one of these settings requests, as the papers' parameters do; None if none does."""
        return None


class Settings(MethodSettings):
    """Settings of every method that removes blocks."""

    protect_first: int = Field(0, ge=0, description="number of blocks at the start that never change")
    protect_last: int = Field(0, ge=0, description="number of blocks at the end that never change")

    def free_blocks(self, count: int) -> range:
        """Return the removable blocks, of `count`."""
        return range(self.protect_first, max(self.protect_first, count - self.protect_last))

    def some_free_blocks(self, count: int) -> range:
        """Return the removable blocks, of `count`.

        Raises:
            InputError: there is none.
        """
        free = self.free_blocks(count)
        if not free:
            raise InputError(f"all {count} blocks are protected; lower protect_first or protect_last.")
        return free


@dataclass
class Measurements:
    """What a method may look at to decide; scores are measured once, on first use.

    Attributes:
        decoder: the model.
        windows: calibration windows; None if the method needs none.
        options: batch size, seed, progress, and the folder in which training and searches save their state.
        known: scores measured earlier for this model and these windows.
        cache: other measurements of this model on these windows that may be needed again, by key.
    """

    decoder: Decoder
    windows: Windows | None
    options: RunOptions = DEFAULTS
    known: Scores | None = None
    cache: dict[Hashable, Any] = field(default_factory=dict)

    def on(self, decoder: Decoder) -> Measurements:
        """Return measurements of another model on the same windows; nothing measured on this one is reused."""
        return replace(self, decoder=decoder, known=None, cache={})

    def scores(self, *kinds: Kind) -> Scores:
        """Return scores that hold at least these kinds."""
        if self.known is None or not self.known.has(kinds):
            self.known = score_model(self.decoder, self.windows, kinds, options=self.options)
        return self.known

    def block_influence(self) -> tuple[float, ...]:
        """Return BI(l) = 1 − E cos(X^l, X^{l+1}) of every block."""
        found = self.scores("cosine").block_influence
        assert found is not None, "scores of the kind cosine hold it"
        return found

    def need_windows(self) -> Windows:
        """Return the windows.

        Raises:
            InputError: there are none.
        """
        if self.windows is None:
            raise InputError("this method needs texts to measure on; give --texts.")
        return self.windows


@dataclass(frozen=True)
class Decision:
    """What a method decided.

    Attributes:
        steps: the steps of the plan, in order.
        search: how they were found, if by a search.
    """

    steps: tuple[AnyStep, ...]
    search: Search | None = None


@dataclass(frozen=True)
class Applied:
    """The result of applying a step.

    Attributes:
        decoder: the new model.
        facts: what was found while applying it, by name, for the record of the result.
    """

    decoder: Decoder
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to prune.

    Attributes:
        name: the name known from the paper.
        summary: one line for `secateur methods`.
        paper: authors, year, title.
        settings: its settings and their defaults.
        decide: measurements, settings and budget to the steps of a plan.
        native: its native unit: whole blocks, directions sliced away, or a share of what is inside blocks; None if only
            the amounts common to all methods make sense.
        needs_texts: whether deciding or applying measures the model on texts, given its settings.
        forwards: the work of deciding, given what is asked, the settings, and the windows; a number is plain forward
            passes over the windows.
        apply_forwards: the work of applying its steps, given what is asked, the settings and the number of tokens; once
            there is a plan, the work of its steps counts instead.
        scores: given its settings, the scores that deciding reads and that no single pass gives; a study measures them
            once for all amounts.
        speed_model: given its settings, how fast its models run; None if the time in blocks follows their size.
        settings_for: its settings as they are for a model, from what can be known without reading texts or weights; it
            raises `ModelError` for a model that it cannot cut.
    """

    name: str
    summary: str
    paper: str
    settings: type[MethodSettings]
    decide: Callable[[Measurements, Any, Budget], Sequence[AnyStep] | Decision]
    native: Native | None = "blocks"
    needs_texts: Callable[[Any], bool] = lambda _: True
    forwards: Callable[[Asked, Any, Windows], Work | float] = lambda _asked, _settings, _windows: 1.0
    apply_forwards: Callable[[Asked, Any, int], Work | float] = lambda _asked, _settings, _tokens: 0.0
    scores: Callable[[Any], tuple[Kind, ...]] = lambda _: ()
    speed_model: Callable[[Any], SpeedModel] | None = None
    settings_for: Callable[[Decoder, Any], Any] = lambda _decoder, settings: settings

    def decision(self, measurements: Measurements, settings: Any, budget: Budget) -> Decision:
        """Decide; with several processes, all continue with the decision of the main one."""
        found = self.decide(measurements, settings, budget)
        return from_main_process(found if isinstance(found, Decision) else Decision(tuple(found)))

    def speed_model_of(self, settings: Any) -> SpeedModel | None:
        """Return how the models it makes with these settings run; None if time follows size."""
        return None if self.speed_model is None else self.speed_model(settings)

    def read_settings(self, given: dict[str, Any]) -> Any:
        """Check settings given by name.

        Raises:
            InputError: an unknown setting (the known ones are named) or a value it cannot take.
        """
        return read_settings(self.name, self.settings, self.settings.gathered(given))


METHODS: Registry[Method] = Registry("method", package="secateur.methods", groups=("secateur.methods",))
"""All methods by name, those of installed packages too."""

Decide = TypeVar("Decide", bound=Callable[..., Sequence[AnyStep] | Decision])
Apply = TypeVar("Apply", bound=Callable[[Measurements, Any], Decoder | Applied])

APPLY: dict[type[Step], Callable[[Measurements, Any], Decoder | Applied]] = {}
"""The function that applies each kind of step, from measurements of the model before it and the step."""


def method(*, order: int = 50, **row: Any) -> Callable[[Decide], Decide]:
    """Register the decorated deciding function as a method.

    Args:
        order: its place in listings; methods of the same order are sorted by file, then as the file defines them.
        row: the other fields of `Method`: name, summary, paper, settings, and whatever differs from its defaults.
    """

    def register(decide: Decide) -> Decide:
        found = Method(decide=decide, **row)
        METHODS.add(found.name, found, module=decide.__module__, order=order)
        return decide

    return register


def applies(step: type[Step]) -> Callable[[Apply], Apply]:
    """Register the decorated function as the one that applies this kind of step."""

    def register(apply: Apply) -> Apply:
        if step in APPLY:
            raise InputError(f"{step.__name__} is applied by {APPLY[step].__module__} and by {apply.__module__}.")
        APPLY[step] = apply
        return apply

    return register


def find_method(name: str) -> Method:
    """Return the method of this name.

    Raises:
        InputError: no such method; the known ones are named.
    """
    return METHODS.find(name)


def apply_step(measurements: Measurements, step: Step) -> Applied:
    """Apply one step to the model that `measurements` are of.

    Raises:
        InputError: the step cannot be applied to this model, or no function applies steps of its kind.
    """
    METHODS.load()
    if type(step) not in APPLY:
        raise InputError(f"no function applies steps of kind '{step.kind}'; register one with @applies.")
    found = APPLY[type(step)](measurements, step)
    return found if isinstance(found, Applied) else Applied(found)
