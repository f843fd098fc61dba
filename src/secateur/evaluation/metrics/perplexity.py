"""Perplexity: exp of the mean next-token loss over non-overlapping windows.

The text is joined, tokenised once and cut into windows; the last partial window is dropped, and that is said. The
tokenizer's default beginning-of-sequence token starts each window, so a window of T tokens makes T − 1 predictions.
"""

from __future__ import annotations

from secateur.calibration.walk import mean_loss, perplexity_of
from secateur.data.windows import Windows
from secateur.evaluation.metrics.metric import metric
from secateur.models.decoder import Decoder
from secateur.run_options import RunOptions


@metric("perplexity", order=10)
def perplexity(model: Decoder, windows: Windows, options: RunOptions) -> float:
    """Return exp(mean loss), block by block for a skeleton.

    Raises:
        NumericsError: NaN or infinity on the way; it never becomes a perplexity.
    """
    return perplexity_of(mean_loss(model, windows, options=options))
