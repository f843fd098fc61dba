"""Run tasks on a model and on the one it is compared with, and turn the answers into results, stability and flips."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.errors import InputError
from secateur.evaluation.catalogue import task_names
from secateur.evaluation.results import Result, result_of
from secateur.evaluation.stability import Outcome, accuracy, flips, stability
from secateur.models.decoder import Decoder
from secateur.models.placement import free_memory
from secateur.run_options import DEFAULTS, RunOptions

AVERAGE = "average"
PER_TOKEN = "acc_per_token"
"""Accuracy by the lowest mean loss per token, the criterion of stability."""
_BATCH = {"cpu": 8, "cuda": 64}
_LENGTH = 1024
"""Assumed tokens of a long question, for choosing the batch size."""
_SHARE_OF_MEMORY = 0.4


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """Which tasks to run, and how.

    Attributes:
        names: names of tasks, with `commonsense` expanded.
        limit: questions per task; None asks all.
        shots: examples before each question; None as each task says.
        stability: measure stability and answer flips against the dense model.
    """

    names: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    stability: bool = False

    @classmethod
    def of(
        cls,
        tasks: str | Sequence[str] | TaskRequest,
        *,
        limit: int | None = None,
        shots: int | None = None,
        stability: bool = False,
    ) -> TaskRequest:
        """Read names, separated by commas or in a list.

        Raises:
            InputError: an unknown task, or a number out of range.
        """
        if isinstance(tasks, TaskRequest):
            return tasks
        if limit is not None and limit < 1:
            raise InputError(f"limit {limit}: must be at least 1.")
        if shots is not None and shots < 0:
            raise InputError(f"shots {shots}: must be 0 or more.")
        names = task_names(tasks) if isinstance(tasks, str) else task_names(",".join(tasks))
        return cls(names=tuple(names), limit=limit, shots=shots, stability=stability)


def ask_tasks(
    models: Mapping[str, Decoder], asked: TaskRequest, *, options: RunOptions = DEFAULTS
) -> dict[str, list[Outcome]]:
    """Ask every model the same questions; return the outcomes task by task, by role (`model`, `against`).

    Raises:
        InputError: an unknown task, unavailable data, a model without tokenizer, a number below 1, or stability for a
            task without options.
    """
    from secateur.evaluation import harness  # imported here: it takes seconds, and most commands do not need it

    if options.batch_size is not None and options.batch_size < 1:
        raise InputError(f"batch size {options.batch_size}: must be at least 1.")
    first = next(iter(models.values()))
    if first.tokenizer is None:
        raise InputError(f"{first.source}: tasks need a tokenizer, and there is none; give one (--tokenizer).")
    loaded = harness.load_tasks(list(asked.names), first.tokenizer)
    without = [one.task_name for one in loaded if not harness.is_comparable(one)]
    if asked.stability and without:
        raise InputError(
            f"{without[0]} has neither options to choose among nor one exact answer, so its stability is undefined; "
            "leave it out."
        )
    outcomes: dict[str, list[Outcome]] = {}
    for role, model in models.items():
        with model.whole() as module:
            outcomes[role] = harness.run_tasks(
                module,
                first.tokenizer,
                loaded,
                limit=asked.limit,
                shots=asked.shots,
                options=replace(options, batch_size=options.batch_size or batch_for(model)),
            )
    return outcomes


def batch_for(model: Decoder) -> int:
    """Return how many questions to ask at a time: the harness holds the logits of all their tokens twice.

    On a GPU as many long questions as fit, 64 at most; the model's weights are already in memory.
    """
    if model.device.type != "cuda":
        return _BATCH["cpu"]
    tokens = min(model.max_positions or _LENGTH, _LENGTH)
    each = tokens * model.module.get_input_embeddings().num_embeddings * (model.module.dtype.itemsize + 4)
    return max(1, min(_BATCH["cuda"], int(_SHARE_OF_MEMORY * free_memory(model.device) / each)))


def task_results(
    models: Mapping[str, Decoder],
    outcomes: Mapping[str, Sequence[Outcome]],
    *,
    limit: int | None,
    stable_to: Sequence[Outcome] | None = None,
) -> list[Result]:
    """Return results of the models' answers, task by task; with `stable_to`, also stability and flips against these.

    Raises:
        InputError: the questions were not the same ones.
        NumericsError: NaN or infinity among the answers.
    """
    count = len(next(iter(outcomes.values())))
    results = [
        _result(models[role], role, measure, value, outcome, limit)
        for position in range(count)
        for role, found in outcomes.items()
        for outcome in found[position : position + 1]
        for measure, value in _measures(outcome)
    ]
    if stable_to is not None:
        for before, after in zip(stable_to, outcomes["model"], strict=True):
            results += [
                _result(models["model"], "model", measure, value, after, limit)
                for measure, value in _compared(before, after)
            ]
    return results + _averages(models, results, count)


def _measures(outcome: Outcome) -> Iterable[tuple[str, float]]:
    yield from outcome.metrics.items()
    if outcome.answers and outcome.answers[0].exact is None:
        yield PER_TOKEN, accuracy(outcome.answers)


def _compared(before: Outcome, after: Outcome) -> Iterable[tuple[str, float]]:
    yield "stability", stability(before.answers, after.answers)
    yield "flips", flips(before.answers, after.answers)


def _result(model: Decoder, role: str, measure: str, value: float, outcome: Outcome, limit: int | None) -> Result:
    return result_of(
        model,
        role,
        measure,
        value,
        task=outcome.task,
        spread={"stderr": outcome.errors[measure]} if measure in outcome.errors else {},
        texts={"source": outcome.task, "fingerprint": outcome.fingerprint},
        settings=outcome.settings | {"limit": limit},
    )


def _averages(models: Mapping[str, Decoder], results: Sequence[Result], count: int) -> list[Result]:
    """Return means over the tasks, for the measures that every task has."""
    if count < 2:
        return []
    grouped: dict[tuple[str, str], list[float]] = {}
    for one in results:
        grouped.setdefault((one.role, one.measure), []).append(one.value)
    facts: dict[str, Any] = {"tasks": list(dict.fromkeys(one.task for one in results))}
    return [
        result_of(models[role], role, measure, statistics.fmean(values), task=AVERAGE, settings=facts)
        for (role, measure), values in grouped.items()
        if len(values) == count
    ]
