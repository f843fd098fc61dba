"""How a training run went, what a progress bar says of it, and what its user should be told."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.errors import TrainingWarning


@dataclass
class Outcome:
    """How a run went.

    Attributes:
        steps: optimiser steps taken, of `planned`.
        planned: steps the data and settings make.
        tokens: tokens seen, padding included.
        start_loss: held-out loss before the first step.
        best_loss: the lowest held-out loss; the weights are those that gave it.
        best_step: after how many steps it was measured; 0 where no training was better than none.
        stopped: why the run ended before the last planned step, if it did.
        curve: training losses by step and held-out losses, as logged.
    """

    planned: int
    steps: int = 0
    tokens: int = 0
    start_loss: float = math.inf
    best_loss: float = math.inf
    best_step: int = 0
    stopped: str | None = None
    without_gain: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """Give what a record of the run says about it; the curve stays in the log."""
        facts = asdict(self)
        del facts["curve"], facts["without_gain"]
        return facts

    def sketch(self, points: int = 200) -> list[dict[str, Any]]:
        """Give the curve with about so many of its training losses and all held-out ones, for a record or a plot."""
        every = -(-self.steps // points) or 1
        return [entry for entry in self.curve if "held_out_loss" in entry or entry["step"] % every == 0]


def warn_of(facts: Mapping[str, Any], what: str) -> None:
    """Say what the user should know of a run, as `describe` gives it, that was cut short by NaN or gained nothing."""
    if facts["stopped"] and "NaN" in facts["stopped"]:
        message = f"{facts['stopped']}; the weights of step {facts['best_step']} are kept. Try a lower learning_rate."
    elif facts["best_step"] == 0:
        message = "no step lowered the loss on held-back text; the weights are as before."
    else:
        return
    warnings.warn(f"{what}: {message}", TrainingWarning, stacklevel=3)


class Status:
    """What a progress bar says: read anew each time it is drawn."""

    def __init__(self, what: str) -> None:
        """Begin with what is being done."""
        self.what, self.now = what, ""

    def __str__(self) -> str:
        return f"{self.what}{self.now}"
