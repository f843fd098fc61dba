"""Decide with one or several methods, and apply a plan, without knowing any method or kind of step by name."""

from __future__ import annotations

import dataclasses
import warnings
from datetime import UTC, datetime
from typing import Any

from secateur.data.texts import Texts, windows_for
from secateur.data.windows import Windows
from secateur.errors import InputError, ModelError, SecateurWarning, TextsWarning
from secateur.methods.budget import Budget, TooSmall, expected, with_cost
from secateur.methods.method import Decision, Measurements, apply_step
from secateur.methods.sequence import Part, part_of
from secateur.models.decoder import Decoder
from secateur.models.widths import unit_counts
from secateur.plan.plan import ModelRef, Plan
from secateur.plan.steps import AnyStep
from secateur.progress import SILENT, Progress
from secateur.run_options import RunOptions


@dataclasses.dataclass(frozen=True)
class Decided:
    """What the methods of a sequence decided together.

    Attributes:
        decision: their steps in order, and the last search there was.
        counted: for a target in bytes or seconds, what it is based on and what is expected.
    """

    decision: Decision
    counted: dict[str, Any]


def decide(parts: tuple[Part, ...], budget: Budget, measurements: Measurements) -> Decided:
    """Let each method decide on the model that the previous methods leave.

    Raises:
        InputError: the budget cannot be reached.
        ModelError: a method cannot cut this model.
        NumericsError: NaN or infinity while measuring.
    """
    dense = measurements.decoder.parameter_count
    steps: list[AnyStep] = []
    counted: dict[str, Any] = {}
    search = None
    for number, part in enumerate(parts):
        budget = with_cost(budget, measurements.decoder, part.method.speed_model_of(part.settings))
        own = part_of(budget, parts, number, dense, measurements.decoder.parameter_count)
        found = Decision(()) if own is None else _decide_part(part, measurements, own)
        steps += found.steps
        search = found.search or search
        counted = expected(budget, measurements.decoder, found.steps)
        if number + 1 < len(parts):
            for step in found.steps:
                measurements = measurements.on(apply_step(measurements, step).decoder)
    return Decided(Decision(tuple(steps), search), counted)


def _decide_part(part: Part, measurements: Measurements, budget: Budget) -> Decision:
    try:
        return part.method.decision(measurements, part.settings, budget)
    except TooSmall:
        if not budget.is_rest:
            raise
        warnings.warn(
            f"{part.method.name} skipped: the remaining budget is below half its smallest cut",
            SecateurWarning,
            stacklevel=4,
        )
        return Decision(())


def model_ref(model: Decoder) -> ModelRef:
    """Return the reference to a model that plans store."""
    sizes = model.block_parameter_counts()
    return ModelRef(
        source=model.source,
        fingerprint=model.fingerprint,
        family=model.anatomy.family.model_type,
        block_parameters=sizes,
        other_parameters=model.parameter_count - sum(sizes),
        units=unit_counts(model),
    )


def require_made_for(plan: Plan, model: Decoder) -> None:
    """Refuse a plan made for another model.

    Raises:
        InputError: naming both.
    """
    if plan.model.fingerprint != model.fingerprint:
        raise InputError(
            f"this plan is for another model: it was made for {plan.model.source} "
            f"(fingerprint {plan.model.fingerprint[:12]}), this is {model.source} ({model.fingerprint[:12]})."
        )


def apply_plan(plan: Plan, measurements: Measurements) -> Decoder:
    """Apply the steps of a plan to the model it was made for.

    Raises:
        InputError: a step cannot be applied to this model.
        ModelError: the result does not have the size that the plan counts.
    """
    model = measurements.decoder
    pruned, facts = model, dict[str, Any]()
    for step in plan.steps:
        applied = apply_step(measurements.on(pruned), step)
        pruned = applied.decoder
        for name, value in applied.facts.items():
            facts[name] = facts[name] + value if isinstance(value, list) and name in facts else value
    if pruned.parameter_count != plan.parameters_after:
        raise ModelError(
            f"the result has {pruned.parameter_count:,} parameters where the plan counts {plan.parameters_after:,}."
        )
    entry = {"plan": plan.model_dump(mode="json"), "applied": datetime.now(UTC).isoformat(timespec="seconds")} | facts
    return dataclasses.replace(pruned, history=(*model.history, entry))


def windows_of_plan(model: Decoder, plan: Plan, texts: Texts = None, *, progress: Progress = SILENT) -> Windows:
    """Open the calibration windows a plan was made on, or the given ones instead.

    Raises:
        InputError: the plan names no texts that can be opened again, and none are given.
    """
    recorded = plan.texts or {}
    if texts is None and not recorded:
        raise InputError("this plan's edits are measured on texts, but it names none; give them (--texts).")
    try:
        found = windows_for(
            model,
            texts if texts is not None else recorded["source"],
            windows=recorded.get("windows", 32),
            seq_len=recorded.get("seq_len"),
            options=RunOptions(seed=plan.seed, progress=progress),
        )
    except InputError as error:
        if texts is not None:
            raise
        raise InputError(
            f"the texts this plan was made on cannot be opened again; give them (--texts). {error}"
        ) from error
    if not model.for_estimate and recorded and found.fingerprint != recorded.get("fingerprint"):
        warnings.warn(
            f"the texts differ from those the plan was made on ({found.fingerprint} instead of "
            f"{recorded.get('fingerprint')}); bases and matrices are measured on them as they are now.",
            TextsWarning,
            stacklevel=3,
        )
    return found
