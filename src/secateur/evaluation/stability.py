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

import numpy as np

from secateur.errors import InputError, NumericsError
from secateur.evaluation.answers import Answer, Values


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
