"""Settings, outcome and status line of a training run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from secateur.errors import TrainingWarning

StopReason = Literal["nan", "no-gain"]
"""Why a run ended early: the loss or its gradient became NaN or infinite, or held-out loss no longer fell."""

SMALLEST_RUN = 500
"""Optimiser steps a run should have; with too little data for that, the default batch is smaller."""


class TrainingSettings(BaseModel):
    """Settings of one run; the defaults are those of LLM-Streamline.

    Chen et al. 2024, "Streamlining Redundant Layers to Compress Large Language Models": AdamW, learning rate from 2e-4
    to 5e-5 along a cosine, weight decay 1e-3, gradient clipping at 5, one epoch, the weights of the lowest validation
    loss.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False, description="peak learning rate of AdamW")
    final_learning_rate: float = Field(
        5e-5, ge=0, allow_inf_nan=False, description="learning rate at the end of the cosine"
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps in which the learning rate rises from 0")
    weight_decay: float = Field(1e-3, ge=0, allow_inf_nan=False, description="weight decay of AdamW")
    clip: float = Field(5.0, gt=0, description="gradient norm above which gradients are clipped")
    batch_size: int | None = Field(
        None, ge=1, description="windows per optimiser step; by default 128, or fewer if that makes under 500 steps"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="windows per forward pass; by default set by the device, halved when memory runs out"
    )
    epochs: int = Field(1, ge=1, description="passes over the text; a second pass is known to cost knowledge")
    evaluations: int = Field(10, ge=1, description="evaluations on held-out text over the run")
    patience: int = Field(3, ge=1, description="stop after this many evaluations in a row without improvement")
    save_minutes: float = Field(10.0, gt=0, description="minutes between saved states")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="precision of matrix products; auto is bf16 on CUDA and fp32 elsewhere"
    )

    def autocasts(self, device: torch.device) -> bool:
        """Return whether matrix products are in bfloat16 whatever the dtype of the weights."""
        return self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")

    def evens_out(self, device: torch.device) -> bool:
        """Return whether bfloat16 and float32 weights can be mixed; CUDA's autocast covers all operations."""
        return device.type == "cuda" and self.autocasts(device)

    def windows_per_step(self, available: int, processes: int = 1) -> int:
        """Return the number of windows per optimiser step, a multiple of the number of processes."""
        wanted = self.batch_size or max(1, min(128, available * self.epochs // SMALLEST_RUN))
        return max(1, wanted // processes) * processes


@dataclass
class Outcome:
    """Result of a run.

    Attributes:
        planned: optimiser steps that data and settings amount to.
        steps: optimiser steps taken.
        tokens: tokens seen, padding included.
        start_loss: held-out loss before the first step.
        best_loss: the lowest held-out loss; the weights are the ones that reached it.
        best_step: the step at which it was measured; 0 if training never helped.
        stop_reason: why the run ended before the last planned step; None if it did not.
        stopped: the same as text, with the step.
        without_gain: evaluations in a row without improvement.
        curve: training losses by step and held-out losses, as logged.
    """

    planned: int
    steps: int = 0
    tokens: int = 0
    start_loss: float = math.inf
    best_loss: float = math.inf
    best_step: int = 0
    stop_reason: StopReason | None = None
    stopped: str | None = None
    without_gain: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """Return the outcome as plain data for a record, without the curve, which is in the log."""
        facts = asdict(self)
        del facts["curve"], facts["without_gain"]
        return facts

    def sketch(self, points: int = 200) -> list[dict[str, Any]]:
        """Return the curve with about `points` of its training losses and all held-out ones, for a record or a plot."""
        every = -(-self.steps // points) or 1
        return [entry for entry in self.curve if "held_out_loss" in entry or entry["step"] % every == 0]


def warn_of(facts: Mapping[str, Any], what: str) -> None:
    """Warn about a run (as returned by `describe`) that was stopped by NaN or brought no improvement."""
    if facts["stop_reason"] == "nan":
        message = f"{facts['stopped']}; the weights of step {facts['best_step']} are kept. Try a lower learning_rate."
    elif facts["best_step"] == 0:
        message = "no step lowered the loss on held-out text; the weights are unchanged."
    else:
        return
    warnings.warn(f"{what}: {message}", TrainingWarning, stacklevel=3)


class Status:
    """Description of a progress bar, which is read each time the bar is drawn."""

    def __init__(self, what: str) -> None:
        """Start with what is being done."""
        self.what, self.now = what, ""

    def __str__(self) -> str:
        return f"{self.what}{self.now}"
