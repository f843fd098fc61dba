"""Make a plan with any method, and apply one. Neither knows a method or an edit by name."""

from __future__ import annotations

import dataclasses
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secateur.data.texts import Texts, windows_for
from secateur.data.windows import Windows
from secateur.errors import InputError, ModelError, SecateurWarning, TextsWarning
from secateur.methods.budget import Budget, TooSmall
from secateur.methods.method import Evidence
from secateur.methods.registry import APPLY
from secateur.methods.sequence import Part, part_of, read_sequence, whole_budget
from secateur.methods.targets import expected, with_cost
from secateur.models.decoder import Decoder
from secateur.plan.plan import ModelRef, Plan
from secateur.plan.steps import AnyStep
from secateur.progress import SILENT, Progress
from secateur.scores.profile import Scores
from secateur.versions import __version__


def make_plan(
    model: Decoder,
    *,
    method: str,
    remove: float | str | None = None,
    target_params: float | str | None = None,
    blocks: int | None = None,
    slice: float | str | None = None,
    target_memory: float | str | None = None,
    target_speedup: float | str | None = None,
    context: int | None = None,
    texts: Texts = None,
    windows: int | None = 32,
    seq_len: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    settings: dict[str, Any] | None = None,
    scores: Scores | None = None,
    work: str | Path | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """Decide what to cut.

    Args:
        model: the open model; it is not changed.
        method: a name of `secateur methods`, such as `streamline`; or several that are applied one after the other,
            each with its share of what is to go: `swm:0.5,slicegpt:0.5`.
        remove: fraction of all parameters to take away, 0.25 or "25%".
        target_params: parameters to stay at or below, such as "5.5B".
        blocks: number of blocks to take out, for methods that take out blocks.
        slice: fraction of the hidden directions to slice away, for methods that slice.
        target_memory: bytes that weights and the cache of one sequence may take, "12GB"; in the checkpoint's dtype.
        target_speedup: how many times as fast a request is to be answered, 1.3; times of blocks are measured now, on
            the model's device. Exactly one of these amounts is given, or one of the method's own settings that is an
            amount, such as `window`.
        context: tokens in the cache that `target_memory` counts; None takes 4096, or the model's positions if fewer.
        texts: what the model is measured on: see `secateur texts`; None is `python-stdlib`.
        windows: number of windows; None takes all.
        seq_len: tokens per window; None takes 512, or the model's positions if those are fewer.
        seed: of everything drawn at random.
        batch_size: windows per batch; None chooses by the device.
        settings: the method's own settings by name; of several methods as `swm.rule`.
        scores: scores of this model measured earlier, so that they are not measured again.
        work: folder in which a search keeps what it measured, and training its states (of methods that are not the
            last); after a kill the same call goes on there. None keeps none. The caller removes it.
        progress: shows how far it is.

    Raises:
        InputError: an unknown method or setting, an amount that cannot be reached, unusable texts, or scores
            of another model.
        NumericsError: NaN or infinity while measuring.
    """
    parts = read_sequence(method, dict(settings or {}))
    amounts = {
        "blocks": blocks,
        "remove": remove,
        "target_params": target_params,
        "slice": slice,
        "target_memory": target_memory,
        "target_speedup": target_speedup,
        "context": context,
    }
    budget = whole_budget(parts, amounts)
    if scores is not None and scores.fingerprint != model.fingerprint:
        raise InputError(f"the scores are of another model ({scores.model}); measure this one.")
    used: Windows | None = None
    if any(part.method.needs_texts(part.settings) for part in parts) and not budget.is_zero:
        used = windows_for(model, texts, windows=windows, seq_len=seq_len, seed=seed)
        if scores is not None and not scores.are_of(used):
            warnings.warn(
                f"the scores are of other texts ({(scores.texts or {}).get('source')}) and are measured anew",
                TextsWarning,
                stacklevel=2,
            )
            scores = None
    evidence = Evidence(model, used, scores, batch_size, seed, progress, None if work is None else Path(work))
    steps, counted = _decide(parts, budget, evidence)
    return Plan(
        version=__version__,
        model=model_ref(model),
        requested=budget.describe() | ({"methods": method} if len(parts) > 1 else {}),
        texts=used.describe() if used is not None else None,
        seed=seed,
        steps=steps,
        counts_on=counted,
        search=evidence.facts.get("search"),
    )


def _decide(parts: tuple[Part, ...], budget: Budget, evidence: Evidence) -> tuple[tuple[AnyStep, ...], dict[str, Any]]:
    """Let each part decide on what the parts before it leave; gives the steps, and what their amount was counted on."""
    dense = evidence.decoder.parameter_count
    steps: list[AnyStep] = []
    counted: dict[str, Any] = {}
    for number, part in enumerate(parts):
        budget = with_cost(budget, evidence.decoder, part.method.speed_model_of(part.settings))
        own = part_of(budget, parts, number, dense, evidence.decoder.parameter_count)
        found = () if own is None else _decide_part(part, evidence, own)
        steps += found
        counted = expected(budget, evidence.decoder, found)
        if number + 1 < len(parts):
            for step in found:
                left = APPLY[step.kind](evidence, step)
                evidence = evidence.of(left)
    return tuple(steps), counted


def _decide_part(part: Part, evidence: Evidence, budget: Budget) -> tuple[AnyStep, ...]:
    try:
        return part.method.steps(evidence, part.settings, budget)
    except TooSmall:
        if not budget.is_rest:
            raise
        warnings.warn(
            f"nothing goes by {part.method.name}: what the methods before it left to do is less than half of its "
            "smallest cut",
            SecateurWarning,
            stacklevel=4,
        )
        return ()


def model_ref(model: Decoder) -> ModelRef:
    """Describe a model as plans name it."""
    sizes = model.block_parameter_counts()
    return ModelRef(
        source=model.source,
        fingerprint=model.fingerprint,
        family=model.anatomy.family.model_type,
        block_parameters=sizes,
        other_parameters=model.parameter_count - sum(sizes),
    )


def prune(
    model: Decoder,
    plan: Plan | str | Path,
    *,
    texts: Texts = None,
    batch_size: int | None = None,
    work: str | Path | None = None,
    progress: Progress = SILENT,
) -> Decoder:
    """Apply a plan; the given model stays as it is and shares its weights with the result where it can.

    Args:
        model: the model the plan was made for.
        plan: the plan, or the path of a plan file.
        texts: what edits that measure are measured on; None takes what the plan names. Others than the plan was
            made on give a warning.
        batch_size: windows per batch; None chooses by the device.
        work: folder in which what is trained keeps its states; after a kill the same call goes on there. None keeps
            none. The caller removes it once the result is saved.
        progress: shows how far it is.

    Raises:
        InputError: the plan is for another model, cannot be applied to this one, or needs texts that are gone.
    """
    plan = plan if isinstance(plan, Plan) else Plan.read(plan)
    if plan.model.fingerprint != model.fingerprint:
        raise InputError(
            f"this plan is for another model: it was made for {plan.model.source} "
            f"(fingerprint {plan.model.fingerprint[:12]}), this is {model.source} ({model.fingerprint[:12]})."
        )
    windows = windows_of_plan(model, plan, texts) if any(step.measures for step in plan.steps) else None
    pruned, facts = model, dict[str, Any]()
    for step in plan.steps:
        evidence = Evidence(
            pruned,
            windows,
            batch_size=batch_size,
            seed=plan.seed,
            progress=progress,
            work=None if work is None else Path(work),
            facts=facts,
        )
        pruned = APPLY[step.kind](evidence, step)
    if pruned.parameter_count != plan.parameters_after:
        raise ModelError(
            f"the result has {pruned.parameter_count:,} parameters where the plan counts {plan.parameters_after:,}."
        )
    entry = {"plan": plan.model_dump(mode="json"), "applied": datetime.now(UTC).isoformat(timespec="seconds")} | facts
    return dataclasses.replace(pruned, history=(*model.history, entry))


def windows_of_plan(model: Decoder, plan: Plan, texts: Texts = None) -> Windows:
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
            seed=plan.seed,
        )
    except InputError as error:
        if texts is not None:
            raise
        raise InputError(
            f"the texts this plan was made on cannot be opened again; give them (--texts). {error}"
        ) from error
    if recorded and found.fingerprint != recorded.get("fingerprint"):
        warnings.warn(
            f"the texts differ from those the plan was made on ({found.fingerprint} instead of "
            f"{recorded.get('fingerprint')}); bases and matrices are measured on them as they are now.",
            TextsWarning,
            stacklevel=3,
        )
    return found
