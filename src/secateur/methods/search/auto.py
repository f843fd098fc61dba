"""Depth, experts and width together: how many blocks to remove, how many experts, and which method prunes the rest.

Secateur's own (docs/methods/auto.md). A candidate is a single method, or one that removes 1, 2, 3, … blocks and one
that brings the remaining model down to the request; in a mixture of experts, also one that leaves fewer experts, alone
or for a share of what is left to remove. Candidates are made and measured as `prune` would make them, though on some of
the windows: single methods first, then what is next to the best so far (`splits.py`). Their losses are measured on
windows held back: matrices and repairs are least-squares fits to the windows they are measured on, so the loss there
favours whatever fits most parameters. The best is then decided on all windows, so that a single method gives what it
gives by itself.

Candidates share measurements: scores and errors of the dense model are measured once, a model with fewer blocks is made
once for every width tried on it, whichever method it comes from, and no plan is measured twice. Every candidate removes
the requested amount, except for at most a twentieth of it, so that none wins by being larger. Models with fewer blocks
on the way there are measured too, at little cost: they show on the front what a smaller cut would cost, and if one
already loses more than the best plan so far, no width is tried on it, which would lose still more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from secateur.calibration.walk import mean_loss_of_sources
from secateur.data.windows import Windows
from secateur.errors import InputError, ModelError, SecateurError, unknown
from secateur.evaluation.gate import Gate
from secateur.methods.asked import Asked
from secateur.methods.budget import Budget, already
from secateur.methods.drop_experts import ExpertSettings
from secateur.methods.method import METHODS, Decision, Measurements, Method, MethodSettings, apply_step, method
from secateur.methods.search.guard import Guard
from secateur.methods.search.splits import Split, all_splits, search
from secateur.methods.search.trials import FAILURES, Made, Member, TrialLog, Trials, kind_of
from secateur.models.decoder import Decoder
from secateur.models.experts import has_experts, mixture_of
from secateur.plan.plan import Candidate, Search, pareto_front
from secateur.plan.work import Work

_NONE = "none"
_TRAINING_FREE: dict[str, dict[str, Any]] = {"streamline": {"network": "none"}}
"""Settings with which a method needs no training, so that it can be tried."""
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"allocated": ("obs-width", {"allocation": "global"})}
"""Names of methods with settings that make them another one."""
_GATE_FORWARDS = 1.3 / 24
"""Cost of a question of every probe in plain forward passes over 32 windows of 512."""
Side = Literal["depth", "experts", "width"]
_SIDES: tuple[Side, ...] = ("depth", "experts", "width")


class AutoSettings(MethodSettings):
    """Settings of `auto`."""

    depth: str = Field(
        "none,replaceme,streamline",
        description="methods that may remove blocks; with none among them, width alone is tried too",
    )
    width: str = Field(
        "none,obs-width,allocated",
        description="methods that may slice or prune widths afterwards (allocated: obs-width with allocation=global); "
        "with none among them, depth alone is tried too",
    )
    experts: str | None = Field(
        "none,reap",
        description="methods that may leave fewer experts of a mixture, after blocks and before widths; not for others",
    )
    trials: int = Field(16, ge=1, description="maximum number of plans measured; single methods come first")
    patience: int = Field(
        3,
        ge=1,
        description="plans of several methods, one after the other, no better than the best, that end the search",
    )
    windows: int = Field(
        32,
        ge=2,
        description="calibration windows on which plans are compared, evenly of all; the best is decided on all",
    )
    skip_hopeless: bool = Field(
        True, description="skip plans whose removed blocks alone already cost more than the best plan so far"
    )
    held_back: float = Field(
        0.25, gt=0, lt=1, description="share of these windows on which losses are measured, and nothing is fitted"
    )
    gate: str | None = Field(
        None, description="share of what the dense model can do that a plan must keep, such as probes:0.9"
    )
    gate_questions: int = Field(24, ge=1, description="questions of each probe of the gate, put to every plan")
    of: dict[str, dict[str, Any]] | None = Field(
        None, description="settings of the methods involved, each as METHOD.SETTING"
    )

    @field_validator("gate")
    @classmethod
    def _of_probes(cls, given: str | None) -> str | None:
        if given is not None:
            Gate.read(given)
        return given

    def side(self, name: Side) -> list[str | None]:
        """List the methods for one side; None if the others may do everything."""
        typed = dict.fromkeys(one.strip() for one in (getattr(self, name) or _NONE).split(","))
        return [None if one == _NONE else one for one in typed]

    @classmethod
    def gathered(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Put `replaceme.max_window` into `of`."""
        plain = {name: value for name, value in given.items() if "." not in name}
        dotted: dict[str, dict[str, Any]] = {}
        for name, value in given.items():
            owner, dot, setting = name.partition(".")
            if dot:
                dotted.setdefault(owner, {})[setting] = value
        return plain | ({"of": dotted} if dotted else {})


def _members(settings: AutoSettings) -> dict[str, Member]:
    """Look up the methods involved.

    Raises:
        InputError: an unknown method, one on the wrong side, or none at all.
    """
    known = {name: method for name, method in METHODS.items() if _side_of(method) is not None}
    known |= {name: known[owner] for name, (owner, _) in _VARIANTS.items()}
    sides = {side: settings.side(side) for side in _SIDES}
    for side, wanted in sides.items():
        fitting = [name for name, method in known.items() if _side_of(method) == side]
        for name in wanted:
            if name is not None and name not in fitting:
                raise unknown(f"method for {side}", name, [_NONE, *fitting])
    names = [name for wanted in sides.values() for name in wanted if name]
    if not names:
        raise InputError("auto: none on every side leaves nothing to try; name a method.")
    given = settings.of or {}
    for name in given:
        if name not in names:
            raise unknown("method that takes part", name, names)
    return {name: _member(known[name], given.get(name, {}) | _VARIANTS.get(name, ("", {}))[1]) for name in names}


def _side_of(method: Method) -> Side | None:
    """Return the side on which a method may take part."""
    if issubclass(method.settings, ExpertSettings):
        return "experts"
    return None if method.native is None else "depth" if method.native == "blocks" else "width"


def settings_for(decoder: Decoder, settings: AutoSettings) -> AutoSettings:
    """Return the settings as they are for a model: without methods of experts where it has none and others may do it.

    Raises:
        InputError: a setting names what cannot take part.
        ModelError: experts must go, and it has none.
    """
    _members(settings)
    if any(has_experts(block, decoder.anatomy.family) for block in decoder.block_list):
        return settings
    if None not in settings.side("experts"):
        mixture_of(decoder)
    return settings.model_copy(update={"experts": None})


def _member(method: Method, given: dict[str, Any]) -> Member:
    fixed = _TRAINING_FREE.get(method.name, {})
    wrong = [name for name, value in fixed.items() if given.get(name, value) != value]
    if wrong:
        raise InputError(f"{method.name}.{wrong[0]}={given[wrong[0]]}: auto trains nothing; leave it out.")
    settings = method.read_settings(given | fixed)
    amount = settings.own_amount()
    if amount is not None:
        raise InputError(f"{method.name}.{amount.knob}: auto decides how much each method takes; leave it out.")
    return Member(method, settings)


def _forwards(asked: Asked, settings: AutoSettings, windows: Windows) -> Work:
    """Return the work of every single method, and of as many of several as are expected to be no better."""
    work = {
        name: one.method.forwards(asked, one.settings, windows)
        + Work.of(one.method.apply_forwards(asked, one.settings, 1))
        for name, one in _members(settings).items()
    }
    together = max(0, min(settings.patience, settings.trials - len(work)))
    last = max((work[name] for name in settings.side("width") if name), key=lambda one: one.forwards, default=Work())
    plans = min(settings.trials, len(work)) + together
    gated = _GATE_FORWARDS * settings.gate_questions * (plans + 1) if settings.gate else 0.0
    losses = Work(settings.held_back, losses=settings.held_back) * (plans + 1)
    compared = Work.total(work.values()) + together * last + losses
    dearest = max(work.values(), key=lambda one: one.forwards)
    return compared.on_share(min(1.0, settings.windows / len(windows))) + gated + dearest


def _apply_forwards(asked: Asked, settings: AutoSettings, tokens: int) -> Work:
    """Return the work of the method of each side that reads the windows most often."""
    members = _members(settings).items()
    work = {name: Work.of(one.method.apply_forwards(asked, one.settings, tokens)) for name, one in members}
    sides = ([work.get(name or _NONE, Work()) for name in settings.side(side)] for side in _SIDES)
    return Work.total(max(side, key=lambda one: one.forwards) for side in sides)


@method(
    order=90,
    name="auto",
    summary="split the amount between blocks, experts and widths by trying: the lowest loss on held-back windows",
    paper="secateur's own (docs/methods/auto.md)",
    settings=AutoSettings,
    native=None,
    forwards=_forwards,
    apply_forwards=_apply_forwards,
    settings_for=settings_for,
)
def decide(measurements: Measurements, settings: AutoSettings, budget: Budget) -> Decision:
    """Try candidates; return the steps of the best as they are on all windows, and the record of all.

    Raises:
        InputError: no candidate meets the budget or passes the gate, the dense model can do nothing that the gate
            asks for, a setting names what cannot take part, or there is one window.
        ModelError: no candidate can cut this model.
        NumericsError: the dense model, or every candidate, has no loss.
    """
    members = _members(settings)
    whole = measurements.decoder.parameter_count if budget.cost is None else budget.cost.total
    if budget.limit(whole) >= whole:
        raise InputError(already(budget, whole))
    fitted, held_back = measurements.need_windows().at_most(settings.windows).split_off(settings.held_back)
    dense_loss = mean_loss_of_sources(measurements.decoder, held_back, options=measurements.options)
    to_fit = dataclasses.replace(measurements, windows=fitted, known=None, cache={})  # scores are of all windows
    guard = _guard(measurements, settings)
    trials = Trials(to_fit, held_back, budget, members, apply_step, guard)
    log = TrialLog(measurements, settings.model_dump(mode="json"), repr(budget))
    tried = _Tried(trials, log, skip_hopeless=settings.skip_hopeless)
    depth, experts, width = (settings.side(side) for side in _SIDES)
    splits = all_splits(depth, width, trials.most_blocks(), experts)
    search(
        splits,
        tried.measure,
        trials=settings.trials,
        patience=settings.patience,
        progress=measurements.options.progress,
    )
    best, split = tried.best()
    steps = Trials(measurements, held_back, budget, members, apply_step).decide(split)
    record = Search(
        fitted=len(fitted),
        held_back=len(held_back),
        dense_loss=round(dense_loss, 6),
        candidates=tuple(tried.candidates),
        front=front([(one.parameters, None if one.refused else one.loss) for one in tried.candidates]),
        best=best,
        settings=settings.model_dump(mode="json"),
        probes={} if guard is None else {name: round(value, 4) for name, value in guard.dense.items()},
    )
    return Decision(steps, record)


def _guard(measurements: Measurements, settings: AutoSettings) -> Guard | None:
    """Ask the dense model what the gate asks of every plan."""
    if settings.gate is None:
        return None
    return Guard(Gate.read(settings.gate), measurements.decoder, settings.gate_questions, measurements.options)


class _Tried:
    """What was tried, in order, and the results.

    Attributes:
        candidates: all of them.
    """

    def __init__(self, trials: Trials, log: TrialLog, *, skip_hopeless: bool) -> None:
        self.candidates: list[Candidate] = []
        self._trials, self._log, self._skips = trials, log, skip_hopeless
        self._enough: dict[int, Split] = {}
        self._failures: list[SecateurError] = []
        self._impossible = set[str]()
        self._on_the_way: dict[Split, Made | None] = {}
        self._hopeless: dict[str | None, int] = {}
        self._least = math.inf

    def measure(self, split: Split) -> float | None:
        """Try a split; return its loss, infinite if it does not pass the gate, or None if there is none.

        A method that cannot cut the model on its own is not tried again.
        """
        if self._impossible & split.methods:
            return None
        if split.blocks and not self._is_promising(split):
            return None
        made = self._note(split)
        return None if made is None else math.inf if made.fails else made.loss

    def _is_promising(self, split: Split) -> bool:
        """Measure what the first of several methods leaves: the others, or more blocks, will hardly improve it."""
        if split.blocks >= self._hopeless.get(split.depth, math.inf):
            return False
        first = split._replace(width=None, experts=None, share=1.0)
        if first not in self._on_the_way:
            self._on_the_way[first] = self._note(first)
        made = self._on_the_way[first]
        if made is None or made.enough:
            return False
        if not self._skips or made.loss < self._least:
            return True
        self._hopeless[split.depth] = split.blocks
        self.candidates.append(_named(split).model_copy(update={"refused": "the removed blocks alone cost more"}))
        return False

    def _note(self, split: Split) -> Made | None:
        made = self._log.known(split)
        if made is None:
            made = self._try(split)
            self._log.add(split, made)
        if not isinstance(made, Made):
            self._failures.append(made)
            self.candidates.append(_named(split).model_copy(update={"refused": str(made)}))
            if isinstance(made, ModelError) and len(split.methods) == 1:
                self._impossible |= split.methods
            return None
        if made.fails:
            self._failures.append(InputError(f"{_named(split).label} {made.fails}."))
        elif made.enough:
            self._enough[len(self.candidates)] = split
            self._least = min(self._least, made.loss)
        found = {"blocks": made.gone, "parameters": made.parameters, "loss": round(made.loss, 6), "enough": made.enough}
        self.candidates.append(_named(split).model_copy(update=found | {"refused": made.fails}))
        return made

    def _try(self, split: Split) -> Made | SecateurError:
        """Make and measure a candidate, or return why it cannot be made."""
        try:
            return self._trials.make(split)
        except FAILURES as error:
            return error

    def best(self) -> tuple[int, Split]:
        """Return the index of the candidate of lowest loss that removes enough, and its split.

        Raises:
            SecateurError: there is none; of the type of what went wrong.
        """
        if not self._enough:
            kinds = {kind_of(error) for error in self._failures}
            kind = kinds.pop() if len(kinds) == 1 else InputError
            raise kind(f"auto: no plan can be made. {' '.join(dict.fromkeys(map(str, self._failures)))}")
        place = min(self._enough, key=lambda one: (self.candidates[one].loss, self.candidates[one].parameters))
        return place, self._enough[place]


def _named(split: Split) -> Candidate:
    share = split.share if split.share < 1 else None
    return Candidate(
        depth=split.depth, blocks=split.blocks or None, width=split.width, experts=split.experts, share=share
    )


def front(found: Sequence[tuple[int | None, float | None]]) -> tuple[int, ...]:
    """Return the indices of the (parameters, loss) on the Pareto front, the largest model first.

    A point dominates another if it is no larger and no worse, and not equal in both; of equal points the first counts.
    Those without parameters or loss are left out.
    """
    numbers = [(size, loss, place) for place, (size, loss) in enumerate(found) if size is not None and loss is not None]
    best = pareto_front([(size, loss) for size, loss, _ in numbers])
    return tuple(numbers[place][2] for place in reversed(best))
