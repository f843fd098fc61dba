"""How a training run goes: rates, batches, when to look at held-out text and when to stop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from secateur.errors import TrainingWarning

SMALLEST_RUN = 500
"""Steps a run should have; with less data than that takes at the largest batch, the batch shrinks."""


class TrainingSettings(BaseModel):
    """Settings of one run; the defaults are LLM-Streamline's (Chen et al. 2024, METHODS §4)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False, description="of AdamW, at its highest")
    final_learning_rate: float = Field(5e-5, ge=0, allow_inf_nan=False, description="where the cosine ends")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps in which the rate rises from 0")
    weight_decay: float = Field(1e-3, ge=0, allow_inf_nan=False, description="of AdamW")
    clip: float = Field(5.0, gt=0, description="largest norm of the gradient")
    batch_size: int | None = Field(
        None, ge=1, description="windows per optimiser step; by itself 128, or fewer where that makes under 500 steps"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="windows per forward; by itself by the device, halved when memory runs out"
    )
    epochs: int = Field(1, ge=1, description="times the text is seen; a second time is known to cost knowledge")
    evaluations: int = Field(10, ge=1, description="how often held-back text is looked at over the run")
    patience: int = Field(3, ge=1, description="stop after so many looks in a row without a gain")
    save_minutes: float = Field(10.0, gt=0, description="minutes between two saved states")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of matrix products; auto is bf16 on CUDA and fp32 elsewhere"
    )

    def autocasts(self, device: torch.device) -> bool:
        """Whether matrix products are in bfloat16 whatever the weights are in."""
        return self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")

    def evens_out(self, device: torch.device) -> bool:
        """Whether weights in bfloat16 and in float32 can stand in one model; CUDA's autocast knows all operations."""
        return device.type == "cuda" and self.autocasts(device)

    def windows_per_step(self, available: int, processes: int = 1) -> int:
        """Return the windows of one optimiser step, a multiple of the number of processes."""
        wanted = self.batch_size or max(1, min(128, available * self.epochs // SMALLEST_RUN))
        return max(1, wanted // processes) * processes


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
        """Return what a record of the run says about it; the curve stays in the log."""
        facts = asdict(self)
        del facts["curve"], facts["without_gain"]
        return facts

    def sketch(self, points: int = 200) -> list[dict[str, Any]]:
        """Return the curve with about so many of its training losses and all held-out ones, for a record or a plot."""
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
