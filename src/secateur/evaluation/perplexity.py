"""Perplexity: exp of the mean next-token loss over non-overlapping windows.

The text is joined, tokenised once and cut into windows; the last, partial window is dropped, with a note. Each window
starts with the tokenizer's default beginning-of-sequence token, so a window of T tokens makes T − 1 predictions.
"""

from __future__ import annotations

from secateur.data.windows import Windows
from secateur.evaluation.metrics.metric import measure
from secateur.evaluation.results import Result
from secateur.models.decoder import Decoder
from secateur.run_options import DEFAULTS, RunOptions


def measure_perplexity(model: Decoder, role: str, windows: Windows, options: RunOptions = DEFAULTS) -> Result:
    """Measure the perplexity of one model on windows, block by block for a skeleton.

    Raises:
        NumericsError: NaN or infinity on the way; it never becomes a perplexity.
    """
    (result,) = measure(("perplexity",), model, role, windows, options)
    return result
