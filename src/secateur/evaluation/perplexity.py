"""Perplexity: exp of the mean next-token loss over non-overlapping windows.

The text is joined, tokenised once and cut into windows; the last, partial window is dropped, with a note. Each window
starts with the tokenizer's default beginning-of-sequence token, so a window of T tokens makes T − 1 predictions.
"""

from __future__ import annotations

from secateur.calibration.walk import mean_loss, perplexity_of
from secateur.data.windows import Windows
from secateur.evaluation.results import Result, result_of
from secateur.models.decoder import Decoder
from secateur.run_options import DEFAULTS, RunOptions


def measure_perplexity(model: Decoder, role: str, windows: Windows, options: RunOptions = DEFAULTS) -> Result:
    """Measure the perplexity of one model on windows, block by block for a skeleton.

    Raises:
        NumericsError: NaN or infinity on the way; it never becomes a perplexity.
    """
    loss = mean_loss(model, windows, options=options)
    return result_of(model, role, "perplexity", perplexity_of(loss), texts=windows.describe())
