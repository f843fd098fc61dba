"""Stability of a pruned model's answers to multiple-choice questions (METHODS §10).

Chen et al. 2024, "Streamlining Redundant Layers to Compress Large Language Models" (LLM-Streamline), section 3.4: how
much of what the original model knew, weighted by how sure it was, is still answered the same way. Departure from the
released script: the weights that are summed are those of the questions on which both models agree, not the first of
all weights, as many as there are such questions.

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
    """Softmax over the questions of one task, safe for large values."""
    raised = np.exp(confidences - confidences.max())
    return np.asarray(raised / raised.sum(), dtype=np.float64)


def stability(original: Sequence[Answer], pruned: Sequence[Answer]) -> float:
    """Weigh the questions that both models get right, or both wrong: `Σ_i w_i`, in [0, 1].

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
    """Share of the questions to which the pruned model gives another answer, right or wrong.

    Raises:
        InputError: there are no questions, or the models were asked different ones.
        NumericsError: a log-likelihood is NaN or infinite.
    """
    _require_same_questions(original, pruned)
    changed = [before.chosen() != after.chosen() for before, after in zip(original, pruned, strict=True)]
    return sum(changed) / len(changed)


def accuracy(answers: Sequence[Answer]) -> float:
    """Share of the questions answered right by mean loss per token."""
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
    """What a model makes of one question.

    Attributes:
        sums: log-likelihood of each option, summed over its tokens.
        tokens: number of tokens of each option.
        gold: the right option; several where the task allows several.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]
    gold: frozenset[int]

    def losses(self) -> Values:
        """Mean loss per token of each option, in nats."""
        return -np.asarray(self.sums, dtype=np.float64) / np.asarray(self.tokens, dtype=np.float64)

    def chosen(self) -> int:
        """Return the option of lowest mean loss per token; of several the first."""
        return int(np.argmin(self.losses()))

    def right(self) -> bool:
        """Whether the chosen option is the right one."""
        return self.chosen() in self.gold


@dataclass(frozen=True)
class Outcome:
    """What one model makes of one task.

    Attributes:
        task: its name.
        metrics: the harness's own, by name (`acc`, `acc_norm`, `exact_match`, …).
        errors: standard errors of those that are means over questions.
        answers: one per question; empty for tasks without options.
        settings: version of the task, examples shown, number of questions.
        fingerprint: of the questions as they were put to the model.
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
        """Make an outcome of what `as_dict` gave."""
        answers = (Answer(tuple(one["sums"]), tuple(one["tokens"]), frozenset(one["gold"])) for one in data["answers"])
        return cls(**(data | {"answers": tuple(answers)}))
