"""Perplexity: exp of the mean next-token loss over non-overlapping windows.

The text is joined, tokenised once and cut into windows; the last, partial window is dropped, with a note. Each window
starts with the tokenizer's default beginning-of-sequence token, so a window of T tokens makes T − 1 predictions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import geometric_mean

from secateur.calibration.walk import mean_loss, perplexity_of
from secateur.data.windows import Windows
from secateur.evaluation.metrics.metric import metric
from secateur.evaluation.results import Result, result_of
from secateur.models.decoder import Decoder
from secateur.run_options import RunOptions


@metric("perplexity", order=10)
def perplexity(model: Decoder, windows: Windows, options: RunOptions) -> float:
    """Return exp(mean loss), block by block for a skeleton.

    Raises:
        NumericsError: NaN or infinity on the way; it never becomes a perplexity.
    """
    return perplexity_of(mean_loss(model, windows, options=options))


GEOMEAN = "perplexity_ratio_geomean"
"""Geometric mean over sources of a model's perplexity divided by the dense model's."""


def mean_over_sources(values: Iterable[float]) -> float:
    """Return the geometric mean of perplexities or their ratios; a single one unchanged, to the last digit."""
    found = list(values)
    return found[0] if len(found) == 1 else geometric_mean(found)


def ratios_by_source(results: Iterable[Result]) -> dict[str, float]:
    """Return a model's perplexity ÷ the dense model's by source, of the texts that both have read."""
    found: dict[str, dict[str, Result]] = {}
    for one in (one for one in results if one.measure == "perplexity"):
        found.setdefault(one.texts["fingerprint"], {})[one.role] = one
    pairs = [(both["model"], both["against"]) for both in found.values() if {"model", "against"} <= set(both)]
    return {own.texts["source"]: own.value / dense.value for own, dense in pairs}


def mean_ratio(model: Decoder, results: Sequence[Result]) -> list[Result]:
    """Return the geometric mean of the ratios over sources, of results of both models; none for a single source.

    `spread` holds the best ratio as `low` and the worst as `high`, `settings` each source's.
    """
    ratios = ratios_by_source(results)
    if len(ratios) < 2:
        return []
    found = dict.fromkeys(one.texts["fingerprint"] for one in results if one.measure == "perplexity")
    value = mean_over_sources(ratios.values())
    spread = {"low": min(ratios.values()), "high": max(ratios.values())}
    texts = {"source": ",".join(ratios), "fingerprint": ", ".join(found)}
    return [result_of(model, "model", GEOMEAN, value, spread=spread, texts=texts, settings={"ratios": ratios})]
