"""Candidates of `auto`, made as `prune` would make them, and measured; nothing is made or measured twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from secateur.calibration.walk import mean_loss_of_sources
from secateur.data.windows import Windows
from secateur.distributed import from_main_process, is_main_process
from secateur.errors import InputError, ModelError, NumericsError, SecateurError
from secateur.files import replace_file
from secateur.methods.budget import Budget, weigh, with_cost
from secateur.methods.method import Applied, Measurements, Method
from secateur.methods.search.guard import Guard
from secateur.methods.search.splits import Split
from secateur.models.decoder import Decoder
from secateur.plan.steps import AnyStep, Sizes
from secateur.reading import MIB, FileKind
from secateur.versions import digest, versions

TRIAL_FILE = FileKind("result of a candidate", 16 * MIB)
SLACK = 0.05
"""Share of the requested removal by which a candidate may miss it."""

Steps = tuple[AnyStep, ...]
Apply = Callable[[Measurements, Any], Applied]


class Member(NamedTuple):
    """A method of the search, and its settings."""

    method: Method
    settings: Any

    def decide(self, measurements: Measurements, budget: Budget) -> Steps:
        """Return the steps by which it meets a budget."""
        return self.method.decision(measurements, self.settings, budget).steps


@dataclasses.dataclass(frozen=True)
class Cut:
    """A model with fewer blocks or experts, or the dense one.

    Attributes:
        steps: how it was made.
        kept: remaining blocks of the dense model.
        measurements: measurements of it.
    """

    steps: Steps
    kept: tuple[int, ...]
    measurements: Measurements


class Made(NamedTuple):
    """A candidate that was made and measured.

    Attributes:
        parameters: number of parameters it has left.
        gone: number of blocks removed.
        loss: on the held-back windows.
        enough: whether the requested amount was removed.
        fails: why it does not pass the gate; None if it does, or there is none.
    """

    parameters: int
    gone: int
    loss: float
    enough: bool
    fails: str | None = None


class Trials:
    """Makes and measures candidates; nothing twice."""

    def __init__(
        self,
        measurements: Measurements,
        held_back: Windows,
        budget: Budget,
        members: Mapping[str, Member],
        apply: Apply,
        guard: Guard | None = None,
    ) -> None:
        """Start with the dense model.

        Args:
            measurements: of the dense model, with the windows to which candidates are fitted.
            held_back: windows on which losses are measured.
            budget: the request that every candidate has to meet.
            members: methods of the search, by name.
            apply: how each kind of step is applied.
            guard: what else is asked of candidates that remove enough.
        """
        self._budget, self._held_back = budget, held_back
        self._members, self._apply, self._guard = members, apply, guard
        self._dense = Cut((), tuple(range(measurements.decoder.block_count)), measurements)
        self._cuts: dict[tuple[Hashable, ...], Cut] = {}
        self._evidence = {measurements.decoder.fingerprint: measurements}
        self._made: dict[tuple[str, str | None], Made] = {}
        self._whole = measurements.decoder.parameter_count if budget.cost is None else budget.cost.total

    def most_blocks(self) -> int:
        """Return how many blocks can be removed so that something is left for the other method."""
        decoder = self._dense.measurements.decoder
        weights, whole = weigh(self._budget, decoder.block_parameter_counts(), decoder.parameter_count)
        lightest = sorted(weights)
        wanted = whole - self._largest()
        return sum(sum(lightest[: count + 1]) < wanted for count in range(len(lightest) - 1))

    def make(self, split: Split) -> Made:
        """Make and measure a candidate.

        Raises:
            InputError: it cannot meet the budget.
            ModelError: a method cannot cut this model.
            NumericsError: NaN or infinity on the way.
        """
        cut = self._first(split)
        key = (cut.measurements.decoder.fingerprint, split.width)
        if key not in self._made:
            self._made[key] = self._measured(cut, split.width)
        return self._made[key]

    def decide(self, split: Split) -> Steps:
        """Return how a candidate is made, without making or measuring it.

        Raises:
            InputError: it cannot meet the budget.
            ModelError: a method cannot cut this model.
            NumericsError: NaN or infinity on the way.
        """
        cut = self._first(split)
        return cut.steps + (self._meet(cut, self._members[split.width]) if split.width else ())

    def _first(self, split: Split) -> Cut:
        """Do what a candidate does before its widths are pruned."""
        cut = self._dense if split.depth is None else self._without_blocks(split.depth, split.blocks)
        return cut if split.experts is None else self._without_experts(cut, split.experts, split.share)

    def _without_blocks(self, name: str, blocks: int) -> Cut:
        """Remove this many blocks, or, if nothing follows, as many as the budget requires."""
        if (name, blocks) not in self._cuts:
            member, dense = self._members[name], self._dense.measurements
            steps = member.decide(dense, Budget("blocks", blocks)) if blocks else self._meet(self._dense, member)
            self._cuts[name, blocks] = self._after(steps, self._dense)
        return self._cuts[name, blocks]

    def _without_experts(self, cut: Cut, name: str, share: float) -> Cut:
        """Leave fewer experts for a share of what is still to be removed, or, if it is 1, as the budget requires."""
        key = (cut.measurements.decoder.fingerprint, name, share)
        if key not in self._cuts:
            member, cost = self._members[name], self._budget_for(cut).cost
            if share == 1:
                steps = self._meet(cut, member)
            else:
                self._require_more(cut)
                now = cut.measurements.decoder.parameter_count if cost is None else cost.total
                steps = member.decide(
                    cut.measurements, Budget("remove", share * (1 - self._budget.limit(self._whole) / now))
                )
            self._cuts[key] = self._after(steps, cut)
        return self._cuts[key]

    def _after(self, steps: Steps, cut: Cut) -> Cut:
        kept, measurements = cut.kept, cut.measurements
        for step in steps:
            kept = tuple(kept[place] for place in step.kept_blocks(len(kept)))
            left = self._apply(measurements, step).decoder
            measurements = self._evidence.setdefault(left.fingerprint, measurements.on(left))
        return Cut(cut.steps + steps, kept, measurements)

    def _require_more(self, cut: Cut) -> None:
        """Refuse to remove more from a model that is small enough.

        Raises:
            InputError: saying so.
        """
        if self._is_enough(cut):
            raise InputError("what is removed first leaves nothing to do.")

    def _measured(self, cut: Cut, width: str | None) -> Made:
        measurements = cut.measurements
        decoder = measurements.decoder
        if width is not None:
            for step in self._meet(cut, self._members[width]):
                decoder = self._apply(measurements, step).decoder
                measurements = measurements.on(decoder)
        loss = from_main_process(mean_loss_of_sources(decoder, self._held_back, options=measurements.options))
        gone = len(self._dense.kept) - decoder.block_count
        enough = width is not None or self._is_enough(cut)
        fails = self._guard.failing(decoder) if self._guard is not None and enough else None
        return Made(decoder.parameter_count, gone, loss, enough, fails)

    def _meet(self, cut: Cut, member: Member) -> Steps:
        """Let a method bring a model down to the budget.

        A share to be removed is met as closely as the method can; if that misses it by more than the slack, the largest
        model that removes no less is taken.

        Raises:
            InputError: it cannot, or the model is as small as that already.
        """
        measurements = cut.measurements
        now = measurements.decoder.parameter_count
        self._require_more(cut)
        if self._budget.aim != "remove":
            return member.decide(measurements, self._budget_for(cut, member))
        wanted = self._budget.limit(self._whole)
        steps = member.decide(measurements, Budget("remove", 1 - wanted / now))
        if _parameters_after(measurements.decoder, steps) <= self._largest():
            return steps
        return member.decide(measurements, Budget("target_params", wanted))

    def _budget_for(self, cut: Cut, member: Member | None = None) -> Budget:
        """Return the budget, with the cost in bytes or seconds of this model and of the method that cuts it next."""
        decoder, cost = cut.measurements.decoder, self._budget.cost
        if cost is None:
            return self._budget
        speed_model = member.method.speed_model_of(member.settings) if member else None
        if speed_model is not None and cost.unit == "seconds":
            return with_cost(self._budget, decoder, speed_model)
        return dataclasses.replace(self._budget, cost=cost.after(cut.kept, decoder.parameter_count))

    def _largest(self) -> float:
        """Return the largest size, or cost, that a candidate may have."""
        if self._budget.aim != "remove":
            return self._budget.limit(self._whole)
        return self._whole * (1 - self._budget.value * (1 - SLACK))

    def _is_enough(self, cut: Cut) -> bool:
        cost = self._budget_for(cut).cost
        return (cut.measurements.decoder.parameter_count if cost is None else cost.total) <= self._largest()


def _parameters_after(decoder: Decoder, steps: Steps) -> int:
    inside = decoder.block_parameter_counts()
    sizes = Sizes(inside, decoder.parameter_count - sum(inside))
    for step in steps:
        sizes = step.sizes_after(sizes)
    return sizes.total


FAILURES = (InputError, ModelError, NumericsError)
"""Errors that may come of a candidate instead of a model."""


def kind_of(error: SecateurError) -> type[SecateurError]:
    """Return which of `FAILURES` an error is."""
    return next(kind for kind in FAILURES if isinstance(error, kind))


_MADE = TypeAdapter(Made)


class TrialLog:
    """Candidates and their results, one small file each; of several processes the first reads and writes."""

    def __init__(self, measurements: Measurements, *depends_on: Any) -> None:
        """Open the log of one search; without a work folder nothing is saved.

        Args:
            measurements: of the dense model, with all calibration windows.
            depends_on: what else the search depends on: settings, amount.
        """
        self._folder: Path | None = None
        if measurements.options.work is not None:
            decoder, windows = measurements.decoder, measurements.need_windows()
            place = (str(decoder.module.dtype), decoder.device.type)
            seed = measurements.options.seed
            key = digest(decoder.fingerprint, place, windows.fingerprint, seed, versions(), *depends_on)
            self._folder = measurements.options.work / f"search-{key}"

    def known(self, split: Split) -> Made | SecateurError | None:
        """Return the result of a candidate that was tried before; None if it was not, or its file is damaged."""
        path = self._path(split)
        if path is None:
            return None
        found: Made | SecateurError | None = from_main_process(_read(path) if is_main_process() else None)
        return found

    def add(self, split: Split, found: Made | SecateurError) -> None:
        """Save the result of a candidate.

        Raises:
            InputError: the folder cannot be written.
        """
        path = self._path(split)
        if path is None or not is_main_process():
            return
        entry = found._asdict() if isinstance(found, Made) else {"failed": kind_of(found).__name__, "why": str(found)}
        replace_file(path, json.dumps(entry) + "\n")

    def _path(self, split: Split) -> Path | None:
        name = f"{split.depth or 'none'}-{split.blocks}-{split.width or 'none'}"
        name += f"-{split.experts}-{split.share:g}" if split.experts else ""
        return None if self._folder is None else self._folder / f"{name}.json"


def _read(path: Path) -> Made | SecateurError | None:
    try:
        entry = TRIAL_FILE.json(path)
        failure = next((kind for kind in FAILURES if kind.__name__ == entry.get("failed")), None)
        return failure(entry["why"]) if failure else _MADE.validate_python(entry)
    except (ValueError, KeyError, TypeError, AttributeError, InputError):
        return None
