"""Answers to multiple-choice questions, and how stable they are under pruning.

Chen et al. 2024, "Streamlining Redundant Layers to Compress Large Language Models" (LLM-Streamline), section 3.4: how
much of what the original model answers, weighted by its confidence, is still answered the same way. With c_i the
standard deviation of the original model's losses over the options of question i and w = softmax(c),

    stability = Σ w_i over the questions that both models get right, or both wrong.

The released script sums the first k of all weights instead, k being the number of such questions.

Legend: Q questions; the loss of an option is the model's mean loss per token in nats, `−log p(option | question) / n`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.errors import InputError, NumericsError


def weights(confidences: Values) -> Values:
    """Return the softmax over the questions of one task, without overflow."""
    raised = np.exp(confidences - confidences.max())
    return np.asarray(raised / raised.sum(), dtype=np.float64)


def stability(original: Sequence[Answer], pruned: Sequence[Answer]) -> float:
    """Return the stability, `Σ_i w_i` over the questions that both models get right, or both wrong, in [0, 1].

    `w = softmax(c)` over the questions of the task, `c_i` the standard deviation (ddof 0) of the original model's
    losses over the options of question i. A model against itself has stability 1.

    Args:
        original: answers of the original model to the questions of one task.
        pruned: answers of the pruned model to the same questions, in the same order.

    Raises:
        InputError: there are no questions, or the models were asked different ones.
        NumericsError: a log-likelihood is NaN or infinite.
    """
    _require_same_questions(original, pruned)
    share = weights(np.array([one.losses().std() for one in original]))
    agree = [before.right() == after.right() for before, after in zip(original, pruned, strict=True)]
    return math.fsum(share[agree]) / math.fsum(share)  # exactly 1 where all agree


def flips(original: Sequence[Answer], pruned: Sequence[Answer]) -> float:
    """Return the share of questions to which the pruned model gives a different answer, right or wrong.

    Raises:
        InputError: there are no questions, or the models were asked different ones.
        NumericsError: a log-likelihood is NaN or infinite.
    """
    _require_same_questions(original, pruned)
    changed = [before.given() != after.given() for before, after in zip(original, pruned, strict=True)]
    return sum(changed) / len(changed)


def accuracy(answers: Sequence[Answer]) -> float:
    """Return the share of questions answered right by mean loss per token."""
    return sum(one.right() for one in answers) / len(answers)


def _require_same_questions(original: Sequence[Answer], pruned: Sequence[Answer]) -> None:
    if not original:
        raise InputError("no questions: stability and flips need at least one.")
    if [(one.tokens, one.gold) for one in original] != [(one.tokens, one.gold) for one in pruned]:
        raise InputError("the two models were not asked the same questions with the same tokens.")
    for answers in (original, pruned):
        if not all(math.isfinite(value) for one in answers for value in one.sums):
            raise NumericsError("NaN or infinity among the log-likelihoods of the options; the weights may be damaged.")


Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question.

    Attributes:
        sums: log-likelihood of each option, summed over its tokens.
        tokens: number of tokens of each option.
        gold: the right option; several where the task allows several.
        exact: for a task with one answer, whether greedy decoding gives it; None for a choice among options.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]
    gold: frozenset[int]
    exact: bool | None = None

    def losses(self) -> Values:
        """Return the mean loss per token of each option, in nats."""
        return -np.asarray(self.sums, dtype=np.float64) / np.asarray(self.tokens, dtype=np.float64)

    def chosen(self) -> int:
        """Return the option with the lowest mean loss per token, the first of equals."""
        return int(np.argmin(self.losses()))

    def right(self) -> bool:
        """Return whether the chosen option is a right one, or the only answer the one that is given."""
        return self.chosen() in self.gold if self.exact is None else self.exact

    def given(self) -> int | bool:
        """Return what two models may differ in: the chosen option, or whether the only answer is given."""
        return self.chosen() if self.exact is None else self.exact


@dataclass(frozen=True)
class Outcome:
    """A model's results on one task.

    Attributes:
        task: its name.
        metrics: the harness's metrics by name (`acc`, `acc_norm`, `exact_match`, …).
        errors: standard errors of metrics that are means over questions.
        answers: one per question; empty for tasks whose answers cannot be compared.
        settings: version of the task, examples shown, number of questions.
        fingerprint: of the questions as the model was asked them.
    """

    task: str
    metrics: dict[str, float]
    errors: dict[str, float]
    answers: tuple[Answer, ...]
    settings: dict[str, Any]
    fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as plain data."""
        return asdict(self) | {"answers": [asdict(one) | {"gold": sorted(one.gold)} for one in self.answers]}

    @classmethod
    def of(cls, data: dict[str, Any]) -> Outcome:
        """Return the outcome that `as_dict` returned as plain data."""
        answers = (
            Answer(tuple(one["sums"]), tuple(one["tokens"]), frozenset(one["gold"]), one.get("exact"))
            for one in data["answers"]
        )
        return cls(**(data | {"answers": tuple(answers)}))
