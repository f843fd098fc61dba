"""The perplexity of one model, as a result."""

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
