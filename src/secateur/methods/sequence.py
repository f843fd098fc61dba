"""Several methods in sequence, each on what the previous one left, with one budget split between them.

`swm:0.5,slicegpt:0.5` gives each half of the amount; shares are of parameters of the dense model, and what one step
misses the next makes up for. Put methods that remove blocks before those that slice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from secateur.errors import InputError, unknown
from secateur.methods.asked import Asked
from secateur.methods.budget import Budget, already
from secateur.methods.method import Method, MethodSettings, find_method
from secateur.models.decoder import Decoder
from secateur.plan.amount import Amount
from secateur.plan.work import Work


@dataclass(frozen=True)
class Part:
    """One method of a sequence.

    Attributes:
        settings: its settings.
        share: its share of the amount; those of a sequence sum to 1.
    """

    method: Method
    settings: MethodSettings
    share: float

    def refits(self, asked: Asked) -> bool:
        """Return whether output projections are refitted, which takes more text than choosing."""
        return Work.of(self.method.apply_forwards(asked, self.settings, 1)).fits > 0


def read_sequence(spec: str, settings: dict[str, Any]) -> tuple[Part, ...]:
    """Read `streamline` or `swm:0.5,slicegpt:0.5`.

    Args:
        spec: names, each with its share; without shares all are equal.
        settings: settings by name; in a sequence with the method before a dot, `swm.rule`.

    Raises:
        InputError: an unknown method or setting, or shares that are no positive numbers.
    """
    methods = [find_method(name) for name in names_in(spec)]
    shares = [_share(entry.partition(":")[2], spec) for entry in spec.split(",")]
    known = [method.name for method in methods]
    by_method: dict[str, dict[str, Any]] = {name: {} for name in known}
    for key, value in settings.items():
        owner, dot, name = key.partition(".")
        if len(methods) == 1 and owner != known[0]:
            owner, name = known[0], key
        elif not dot:
            raise InputError(f"{key}: say whose setting it is, such as {known[0]}.{key}.")
        if owner not in by_method:
            raise unknown("method in the sequence", owner, known)
        by_method[owner][name] = value
    return tuple(
        Part(method, method.read_settings(by_method[method.name]), share / sum(shares))
        for method, share in zip(methods, shares, strict=True)
    )


def parts_for(parts: tuple[Part, ...], decoder: Decoder) -> tuple[Part, ...]:
    """Return the parts with their settings as they are for this model.

    Raises:
        InputError: a setting asks for what this model cannot have.
        ModelError: a method cannot cut it.
    """
    return tuple(replace(part, settings=part.method.settings_for(decoder, part.settings)) for part in parts)


def names_in(spec: str) -> list[str]:
    """Return the methods' names of `swm:0.5,slicegpt:0.5` in order, as written."""
    return [entry.partition(":")[0].strip() for entry in spec.split(",")]


def _share(text: str, spec: str) -> float:
    try:
        share = float(text) if text.strip() else 1.0
    except ValueError as error:
        raise InputError(f"{spec}: '{text}' is not a number; write swm:0.5,slicegpt:0.5.") from error
    if not 0 < share < float("inf"):
        raise InputError(f"{spec}: shares must be positive numbers.")
    return share


def whole_budget(parts: tuple[Part, ...], amount: Amount) -> Budget:
    """Return the total amount: the one given, or what a setting of a single method requests.

    Raises:
        InputError: no amount or two, or one that these methods do not count in.
    """
    own = [setting for part in parts if (setting := part.settings.own_amount()) is not None]
    if own and (len(parts) > 1 or amount.given):
        raise InputError(f"{own[0].knob} and another amount contradict each other; give one of them.")
    budget = own[0] if own else Budget.of(amount)
    if budget.aim in ("blocks", "slice", "ratio"):
        if len(parts) > 1:
            raise InputError(f"several methods share one budget: give remove or target-params, not {budget.aim}.")
        if budget.aim != parts[0].method.native:
            unit = f"{parts[0].method.native}, " if parts[0].method.native else ""
            raise InputError(
                f"{parts[0].method.name} does not count in {budget.aim}; give {unit}remove or target-params."
            )
    return budget


def part_of(budget: Budget, parts: tuple[Part, ...], number: int, dense: int, current: int) -> Budget | None:
    """Return what part `number` is to remove of a model that has `current` of `dense` parameters left.

    None if the previous parts have removed that much already.

    Raises:
        InputError: the model is already that small.
    """
    if len(parts) == 1:
        return budget
    whole, now = (dense, current) if budget.cost is None else (budget.cost.dense, budget.cost.total)
    limit = budget.limit(whole)
    if limit >= whole:
        raise InputError(already(budget, whole))
    if number + 1 == len(parts) and budget.is_target:
        return budget if now > limit else None
    gone = (1 - limit / whole) * dense
    after = dense - gone * sum(part.share for part in parts[: number + 1])
    return Budget("remove", 1 - after / current, is_rest=number > 0) if after < current else None
