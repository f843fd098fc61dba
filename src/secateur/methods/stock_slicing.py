"""`stock-slicing`: hidden states in one basis for the whole model, which therefore keeps a stock architecture.

It is secateur's own (docs/methods/stock-slicing.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from pydantic import Field

from secateur.errors import InputError, SecateurWarning
from secateur.methods.budget import Budget, choose_size
from secateur.methods.method import Measurements, MethodSettings, method
from secateur.methods.slice_widths import rounded_width
from secateur.methods.sliced_speed import speed_with_shared_bases
from secateur.models.decoder import Decoder
from secateur.plan.hidden import Signals, SliceHidden, slicing_work
from secateur.plan.work import Work
from secateur.surgery.hidden.folding import folded_config, stream_sizes
from secateur.surgery.hidden.shared_basis import find_borders
from secateur.surgery.hidden.stock import stock_stream_sizes, width_step
from secateur.surgery.hidden.stream_trial import with_stream

_MISSED = 0.02
"""Share of the parameters by which an amount may be missed without a warning."""


class StockSettings(MethodSettings):
    """Settings of `stock-slicing`."""

    rounding: int = Field(8, ge=1, description="the kept width is a multiple of this (and of the heads if need be)")
    bases: int = Field(1, ge=1, description="number of bases; with more than one the result needs its modelling file")
    signals: Signals = Field("normed", description="covariances of the states as they are, or as normed")
    sensitivity: bool = Field(True, description="weight directions by the loss's sensitivity to them (a backward pass)")
    reconstruct: bool = Field(
        True,
        description="refit layers that read, by least squares, to the kept directions, where held-out windows gain",
    )


@method(
    order=60,
    name="stock-slicing",
    summary="one basis for the whole model, which stays a stock architecture with a smaller hidden size",
    paper="secateur's own (docs/methods.md)",
    settings=StockSettings,
    native="slice",
    forwards=lambda _asked, settings, _windows: Work(1.0, covariances=1.0) if settings.bases > 1 else Work(),
    apply_forwards=lambda _asked, settings, _tokens: slicing_work(
        shared=True, sensitivity=settings.sensitivity, reconstruct=settings.reconstruct
    ),
    speed_model=speed_with_shared_bases,
)
def decide_shared(measurements: Measurements, settings: StockSettings, budget: Budget) -> Sequence[SliceHidden]:
    """Keep one width everywhere; with several bases, place their borders where the states change most."""
    decoder = measurements.decoder
    if settings.bases > decoder.block_count:
        raise InputError(f"bases={settings.bases}: the model has only {decoder.block_count} blocks.")
    if budget.is_zero:
        return ()
    if settings.bases == 1:
        decoder = with_stream(decoder)
    step_of_stock = width_step(decoder, settings.rounding) if settings.bases == 1 else None
    stock = step_of_stock is not None
    sizes = stock_stream_sizes(decoder) if stock else stream_sizes(folded_config(decoder))
    rounding = step_of_stock or settings.rounding
    starts: tuple[int, ...] = (0,)
    if settings.bases > 1:
        starts = find_borders(
            decoder,
            measurements.need_windows(),
            settings.bases,
            signals=settings.signals,
            options=measurements.options,
        )

    def step(width: int) -> SliceHidden:
        return SliceHidden(
            method="stock-slicing",
            settings=settings.model_dump(),
            widths=(width,) * decoder.block_count,
            head_width=width,
            bases=starts,
            stock=stock,
            signals=settings.signals,
            sensitivity=settings.sensitivity,
            reconstruct=settings.reconstruct,
            sizes=sizes,
        )

    if budget.aim == "slice":
        return (step(rounded_width(budget.value, sizes.width, rounding)),)
    candidates = [step(width) for width in range(rounding, sizes.width, rounding)]
    left = [sizes.sizes_at(*one.points()).total for one in candidates]
    place = choose_size(budget, left, decoder.parameter_count)
    if budget.aim == "remove":
        _warn_of_coarse_steps(decoder, budget.value, rounding, [one.widths[0] for one in candidates], left, place)
    return (candidates[place],)


def _warn_of_coarse_steps(
    decoder: Decoder, asked: float, step: int, widths: Sequence[int], left: Sequence[int], place: int
) -> None:
    """Warn if the nearest width that the architecture allows misses the amount, with its neighbours and the reason."""
    removed = [1 - one / decoder.parameter_count for one in left]
    if abs(removed[place] - asked) <= _MISSED:
        return
    near = ", ".join(
        f"{removed[one]:.1%} at {widths[one]}" for one in (place + 1, place, place - 1) if 0 <= one < len(left)
    )
    reason = f"hidden sizes of this architecture are multiples of {step}"
    if decoder.anatomy.tied:
        reason += ", and its tied head has to become a matrix of its own"
    warnings.warn(
        f"stock-slicing removes {removed[place]:.1%} where {asked:.1%} was asked: {reason}. Possible are {near}; "
        "slicegpt and the width methods come closer.",
        SecateurWarning,
        stacklevel=4,
    )
