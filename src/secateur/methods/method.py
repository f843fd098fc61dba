"""What a method is: settings, and a function that decides. How plans are applied is shared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from secateur.data.windows import Windows
from secateur.distributed import from_main_process
from secateur.errors import InputError
from secateur.methods.budget import Budget, Native
from secateur.methods.cost import SpeedModel
from secateur.models.decoder import Decoder
from secateur.plan.steps import AnyStep
from secateur.progress import SILENT, Progress
from secateur.scores.measure import score_model
from secateur.scores.profile import Kind, Scores
from secateur.settings import read_settings


class MethodSettings(BaseModel):
    """Settings of a method; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def gathered(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return settings by the names they have here, of those by the names under which they are typed."""
        return given

    def own_amount(self) -> Budget | None:
        """Return the amount that one of these settings asks for by itself, as the papers' knobs do; None without."""
        return None


class Settings(MethodSettings):
    """Settings every method that takes out blocks has."""

    protect_first: int = Field(0, ge=0, description="how many of the first blocks are never touched")
    protect_last: int = Field(0, ge=0, description="how many of the last blocks are never touched")

    def free_blocks(self, count: int) -> range:
        """Return the blocks that may go, of `count`."""
        return range(self.protect_first, max(self.protect_first, count - self.protect_last))


@dataclass
class Evidence:
    """What a method may look at to decide; scores are measured once, when first asked for.

    Attributes:
        decoder: the model.
        windows: calibration windows, None where the method needs none.
        known: scores measured earlier for this model and these windows.
        work: folder in which training and searches keep what they go on from after a kill; None keeps none.
        facts: what deciding or applying found out, by name: `search` goes into the plan, what applying a step
            measured into the record of the result.
        measured: what was measured on this model and these windows and may be asked for again, by what it is.
    """

    decoder: Decoder
    windows: Windows | None
    known: Scores | None = None
    batch_size: int | None = None
    seed: int = 0
    progress: Progress = field(default=SILENT)
    work: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    measured: dict[Hashable, Any] = field(default_factory=dict)

    def of(self, decoder: Decoder) -> Evidence:
        """Return the evidence on another model: what was measured on this one does not count there."""
        return replace(self, decoder=decoder, known=None, measured={})

    def scores(self, *kinds: Kind) -> Scores:
        """Return scores that hold at least these kinds."""
        if self.known is None or not self.known.has(kinds):
            self.known = score_model(
                self.decoder,
                self.windows,
                kinds,
                batch_size=self.batch_size,
                seed=self.seed,
                progress=self.progress,
            )
        return self.known

    def need_windows(self) -> Windows:
        """Return the windows.

        Raises:
            InputError: there are none.
        """
        if self.windows is None:
            raise InputError("this method needs texts to measure on; give --texts.")
        return self.windows


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to prune.

    Attributes:
        name: the name people know from the paper.
        summary: one line for `secateur methods`.
        paper: authors, year, title.
        settings: its settings and their defaults.
        decide: evidence, settings and budget to the steps of a plan.
        native: what it counts in by itself: whole blocks, directions sliced away, or a share of what is inside blocks;
            None where only amounts common to all methods make sense.
        needs_texts: whether the model is measured on texts to decide or to apply, given its settings.
        forwards: what deciding costs, in plain forward passes over the windows, given the number of blocks, the
            number to go, and the settings.
        scores: given its settings, the scores that deciding reads and that no single pass gives; a study measures them
            once for all amounts.
        speed_model: given its settings, how fast the models run that it makes without taking blocks out; None where
            the time in blocks follows their size.
    """

    name: str
    summary: str
    paper: str
    settings: type[MethodSettings]
    decide: Callable[[Evidence, Any, Budget], Sequence[AnyStep]]
    native: Native | None = "blocks"
    needs_texts: Callable[[Any], bool] = lambda _: True
    forwards: Callable[[int, int, Any], float] = lambda _blocks, _gone, _settings: 1.0
    scores: Callable[[Any], tuple[Kind, ...]] = lambda _: ()
    speed_model: Callable[[Any], SpeedModel] | None = None

    def steps(self, evidence: Evidence, settings: Any, budget: Budget) -> tuple[AnyStep, ...]:
        """Decide; of several processes all go on with what the first has decided."""
        return from_main_process(tuple(self.decide(evidence, settings, budget)))

    def speed_model_of(self, settings: Any) -> SpeedModel | None:
        """Return how the models run that it makes with these settings; None where time follows size."""
        return None if self.speed_model is None else self.speed_model(settings)

    def read_settings(self, given: dict[str, Any]) -> Any:
        """Check settings given by name.

        Raises:
            InputError: an unknown setting (the known ones are named) or a value it cannot take.
        """
        return read_settings(self.name, self.settings, self.settings.gathered(given))
