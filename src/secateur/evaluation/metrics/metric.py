"""What a metric is: a function of a model and windows of held-out text, known by a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from secateur.data.windows import Windows
from secateur.evaluation.results import Result, result_of
from secateur.models.decoder import Decoder
from secateur.plugins import Registry
from secateur.run_options import DEFAULTS, RunOptions

Metric = Callable[[Decoder, Windows, RunOptions], float]
"""Return one number: of a model, on windows, with the batch size and progress of the options."""

METRICS: Registry[Metric] = Registry("metric", package="secateur.evaluation.metrics", groups=("secateur.metrics",))
"""All metrics by name, those of installed packages too."""


def metric(name: str, *, order: int = 50) -> Callable[[Metric], Metric]:
    """Register the decorated function as a metric.

    Args:
        name: what results call it.
        order: its place in listings.
    """

    def register(function: Metric) -> Metric:
        METRICS.add(name, function, module=function.__module__, order=order)
        return function

    return register


def measure(
    names: Sequence[str], model: Decoder, role: str, windows: Windows, options: RunOptions = DEFAULTS
) -> list[Result]:
    """Measure a model by some metrics.

    Args:
        names: of the metrics.
        model: the open model; block by block for a skeleton, where the metric can.
        role: `model`, or `against` for the one it is compared with.
        windows: held-out windows.
        options: windows per batch, progress.

    Returns:
        One result per metric, in the order of the names.

    Raises:
        InputError: an unknown metric; the known ones are named.
        NumericsError: NaN or infinity on the way; it never becomes a number.
    """
    functions = [(name, METRICS.find(name)) for name in names]
    return [
        result_of(model, role, name, function(model, windows, options), texts=windows.describe())
        for name, function in functions
    ]
