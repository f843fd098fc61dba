"""Perplexity: exp of the mean next-token loss over non-overlapping windows (METHODS §10)."""

from __future__ import annotations

from secateur.calibration.progress import Progress
from secateur.calibration.stream import mean_loss, perplexity_of
from secateur.calibration.windows import Windows
from secateur.evaluation.results import Result, result_of
from secateur.models.decoder import Decoder


def measure_perplexity(
    model: Decoder, role: str, windows: Windows, batch_size: int | None, progress: Progress
) -> Result:
    """Measure the perplexity of one model on windows, block by block for a skeleton.

    Raises:
        NumericsError: NaN or infinity on the way; it never becomes a perplexity.
    """
    loss = mean_loss(model, windows, batch_size=batch_size, progress=progress)
    return result_of(model, role, "perplexity", perplexity_of(loss), texts=windows.describe())
