"""How a training run goes: rates, batches, when to look at held-out text and when to stop."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

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
        """Give the windows of one optimiser step, a multiple of the number of processes."""
        wanted = self.batch_size or max(1, min(128, available * self.epochs // SMALLEST_RUN))
        return max(1, wanted // processes) * processes
