"""What a model makes of the questions of a task, as data: so that it can be compared later, and kept in a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
        """Give the option of lowest mean loss per token; of several the first."""
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
        """Give the outcome as plain data."""
        return asdict(self) | {"answers": [asdict(one) | {"gold": sorted(one.gold)} for one in self.answers]}

    @classmethod
    def of(cls, data: dict[str, Any]) -> Outcome:
        """Make an outcome of what `as_dict` gave."""
        answers = (Answer(tuple(one["sums"]), tuple(one["tokens"]), frozenset(one["gold"])) for one in data["answers"])
        return cls(**(data | {"answers": tuple(answers)}))
