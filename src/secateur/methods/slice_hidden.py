"""Methods that slice hidden states; they differ in how many directions each block keeps, and in the basis.

* SliceGPT: Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns".
* DynamicSlicing: Dumitru et al. 2024, "Change Is the Only Constant: Dynamic LLM Slicing based on Layer
  Redundancy":
  block l loses the fraction `FS(l) = SB + LR(l) · (SP − SB) / mean(LR)`.
* stock-slicing is secateur's own (docs/methods/stock-slicing.md): one basis for the whole model, which therefore keeps
  a stock architecture.

Legend: SP = mean fraction sliced away, SB = the fraction every block loses, LR = layer redundancy in [0, 1].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from secateur.data.texts import windows_for
from secateur.errors import InputError, SecateurWarning
from secateur.methods.budget import Budget, choose_size
from secateur.methods.method import Measurements, MethodSettings, applies, method
from secateur.methods.sliced_speed import speed_with_own_bases, speed_with_shared_bases
from secateur.models.decoder import Decoder
from secateur.plan.hidden import Signals, SliceHidden, StreamSizes, slicing_work
from secateur.plan.work import Work
from secateur.surgery.hidden.folding import folded_config, stream_sizes
from secateur.surgery.hidden.invariance import require_invariance
from secateur.surgery.hidden.own_bases import slice_by_principal_directions
from secateur.surgery.hidden.shared_basis import find_bases, find_borders, find_coordinates, slice_with_shared_bases
from secateur.surgery.hidden.stock import stock_stream_sizes, width_step

Normalise = Literal["minmax", "interior", "rank"]
Widths = tuple[int, ...]

_STEPS = 1000
"""Slice percentages tried when a number of parameters is requested."""
_BASES_TRIED = (1.0, 0.75, 0.5, 0.25, 0.0)
"""`slice_base="auto"`: shares of SP that are tried as SB; 1 is constant slicing."""
_MISSED = 0.02
"""Share of the parameters by which `stock-slicing` may miss an amount without a warning."""
_SWEEP = 0.02
"""`slice_base="sweep"`: distance of the bases that are tried, as in the released code."""


class ConstantSettings(MethodSettings):
    """Settings of `slicegpt`."""

    rounding: int = Field(8, ge=1, description="kept widths are rounded down to a multiple of this")
    signals: Signals = Field("normed", description="principal directions of the states as normed, or as they are (raw)")


class DynamicSettings(ConstantSettings):
    """Settings of `dynamic-slicing`."""

    slice_base: float | Literal["auto", "sweep"] = Field(
        "auto",
        description="fraction every block loses (the paper's SB); the best of five on the texts (auto), or of all "
        "multiples of 0.02 (sweep)",
    )
    score_texts: str | None = Field(
        None, description="texts that layer redundancy is measured on; by default the calibration texts"
    )
    score_windows: int = Field(32, ge=1, description="number of windows of score_texts")
    score_seq_len: int | None = Field(
        None, ge=2, description="tokens in a window of score_texts; by default as in the calibration texts"
    )
    normalise: Normalise = Field(
        "minmax", description="how layer redundancy maps to [0, 1]: the paper's minmax, without outer blocks, by rank"
    )
    cap: float = Field(0.9, gt=0, lt=1, description="largest fraction any block loses")
    slice_percentage: float | None = Field(
        None, ge=0, lt=1, description="mean fraction sliced away (the paper's SP); sets the amount, as --slice does"
    )

    def own_amount(self) -> Budget | None:
        """Return the paper's SP."""
        if self.slice_percentage is None:
            return None
        return Budget("slice", self.slice_percentage, knob="slice_percentage")


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


def slice_fractions(redundancy: Sequence[float], mean: float, base: float, cap: float = 0.9) -> list[float]:
    """Distribute the slicing over blocks: `FS(l) = SB + LR(l) · (SP − SB) / mean(LR)`, capped, the mean kept.

    Args:
        redundancy: LR of each block, in [0, 1], 1 the most redundant.
        mean: SP, the mean of the result.
        base: SB, from 0 to SP.
        cap: no block loses more; the excess goes to the others in proportion to FS − SB, or evenly.

    Raises:
        InputError: SP above the cap, or SB above SP.
    """
    if not 0 <= mean <= cap:
        raise InputError(f"slice={mean:.1%}: must be at most the cap, {cap:.0%} (--set cap=…).")
    if not 0 <= base <= mean:
        raise InputError(f"slice_base={base:g}: must be between 0 and the slice percentage, {mean:g}.")
    average = sum(redundancy) / len(redundancy)
    above = [(mean - base) * (one / average if average > 0 else 1.0) for one in redundancy]
    capped: set[int] = set()
    while True:
        over = {block for block, extra in enumerate(above) if base + extra > cap * (1 + 1e-12)}
        if not over:
            return [base + extra for extra in above]
        capped |= over
        free = [block for block in range(len(above)) if block not in capped]
        left = (mean - base) * len(above) - len(capped) * (cap - base)
        total = sum(above[block] for block in free)
        for block in capped:
            above[block] = cap - base
        for block in free:
            above[block] = left * above[block] / total if total > 0 else left / len(free)


def normalised(redundancy: Sequence[float], how: Normalise) -> list[float]:
    """Map layer redundancy E cos(X^l, X^{l+1}) to [0, 1].

    `minmax` is the paper's; `interior` takes smallest and largest of blocks 1 … L−2 and clips the outer two, so that
    one outlier does not make all others alike; `rank` spaces the blocks evenly by their order.
    """
    if how == "rank":
        order = sorted(range(len(redundancy)), key=lambda block: (redundancy[block], block))
        return [order.index(block) / max(1, len(order) - 1) for block in range(len(order))]
    inner = redundancy[1:-1] if how == "interior" and len(redundancy) > 2 else redundancy
    low, high = min(inner), max(inner)
    if high <= low:
        return [1.0] * len(redundancy)
    return [min(1.0, max(0.0, (one - low) / (high - low))) for one in redundancy]


def rounded_width(fraction: float, width: int, rounding: int) -> int:
    """Return the directions kept when a fraction is removed: rounded down to a multiple of `rounding`, at least one."""
    if fraction <= 0:
        return width
    return min(width, max(rounding, int(((1 - fraction) * width + 1e-9) // rounding) * rounding))


def _own_bases_work(_settings: Any, _tokens: int) -> Work:
    return slicing_work(shared=False)


@method(
    order=60,
    name="slicegpt",
    summary="keep the principal directions of the hidden states, the same number in every block",
    paper="Ashkboos et al. 2024, SliceGPT",
    settings=ConstantSettings,
    native="slice",
    forwards=lambda _blocks, _gone, _settings: 0.0,
    apply_forwards=_own_bases_work,
    speed_model=speed_with_own_bases,
)
def decide_constant(measurements: Measurements, settings: ConstantSettings, budget: Budget) -> Sequence[SliceHidden]:
    """Keep the same number of directions in every block."""
    if budget.is_zero:
        return ()
    sizes = stream_sizes(folded_config(measurements.decoder))
    widths = _constant_widths(sizes, settings.rounding, budget, measurements.decoder.parameter_count)
    return (_own_bases("slicegpt", settings, {}, widths, sizes),)


_JUDGING = Work(1.0, losses=1.0)
"""What it takes to judge a base."""


def _trials_expected(settings: DynamicSettings) -> int:
    """Return about how many bases are tried; a sweep as many as there are below a mean of 0.3."""
    return len(_bases_tried(settings, settings.slice_percentage or 0.3)) * isinstance(settings.slice_base, str)


@method(
    order=60,
    name="dynamic-slicing",
    summary="as slicegpt, but redundant blocks keep fewer directions",
    paper="Dumitru et al. 2024, DynamicSlicing",
    settings=DynamicSettings,
    native="slice",
    forwards=lambda _blocks, _gone, settings: (
        1.0 + _trials_expected(settings) * (slicing_work(shared=False) + _JUDGING)
    ),
    apply_forwards=_own_bases_work,
    speed_model=speed_with_own_bases,
)
def decide_by_redundancy(
    measurements: Measurements, settings: DynamicSettings, budget: Budget
) -> Sequence[SliceHidden]:
    """Slice redundant blocks more; `slice_base="auto"` takes the base that performs best on the texts.

    Every base that is tried removes at least as many parameters as constant slicing, which is tried too.
    """
    if budget.is_zero:
        return ()
    decoder = measurements.decoder
    sizes = stream_sizes(folded_config(decoder))
    cosines = _scored(measurements, settings).scores("cosine").cosine
    assert cosines is not None
    redundancy = normalised([cosines[block][block + 1] for block in range(decoder.block_count)], settings.normalise)
    search = _Search(redundancy, sizes, settings, decoder.parameter_count)
    if not isinstance(settings.slice_base, str):
        mean, widths = search.meet(budget, settings.slice_base)
        used: dict[str, Any] = {"slice": round(mean, 6), "slice_base": settings.slice_base}
        return (_own_bases("dynamic-slicing", settings, used, widths, sizes),)
    require_invariance(decoder)
    trials = list(search.trials(budget))
    losses = [
        slice_by_principal_directions(
            decoder, measurements.need_windows(), widths, signals=settings.signals, options=measurements.options
        )[1]
        for _, _, widths in measurements.options.progress(trials, "trying slice bases", len(trials))
    ]
    best = min(range(len(trials)), key=lambda place: losses[place])
    mean, base, widths = trials[best]
    tried = {f"{one:.3f}": round(loss, 4) for (_, one, _), loss in zip(trials, losses, strict=True)}
    used = {"slice": round(mean, 6), "slice_base": round(base, 6), "loss_by_slice_base": tried}
    return (_own_bases("dynamic-slicing", settings, used, widths, sizes),)


def _scored(measurements: Measurements, settings: DynamicSettings) -> Measurements:
    """Return measurements of the model on the texts that redundancy is measured on."""
    if settings.score_texts is None:
        return measurements
    windows = windows_for(
        measurements.decoder,
        settings.score_texts,
        windows=settings.score_windows,
        seq_len=settings.score_seq_len or measurements.need_windows().seq_len,
        options=measurements.options,
    )
    return replace(measurements, windows=windows, known=None, cache={})


def _bases_tried(settings: DynamicSettings, mean: float) -> Sequence[float]:
    """Return the shares of SP that are tried as SB, the largest first; 1 is constant slicing."""
    if settings.slice_base == "sweep":
        count = math.ceil(mean / _SWEEP - 1e-9)
        return (1.0, *(_SWEEP * number / mean for number in reversed(range(count))))
    return _BASES_TRIED


class _Search:
    """Finds slice percentages that meet a budget, for one model and its redundancy."""

    def __init__(self, redundancy: Sequence[float], sizes: StreamSizes, settings: DynamicSettings, total: int) -> None:
        self._redundancy, self._sizes, self._settings, self._total = redundancy, sizes, settings, total

    def meet(self, budget: Budget, base: float) -> tuple[float, Widths]:
        """Return SP, and the widths, for a fixed SB."""
        if budget.aim == "slice":
            return budget.value, self._widths(budget.value, base)
        if base > self._settings.cap:
            raise InputError(f"slice_base={base:g}: above the cap, {self._settings.cap:.0%}.")
        span = self._settings.cap - base
        means = [base + span * number / _STEPS for number in range(_STEPS + 1)]
        found = [self._widths(mean, base) for mean in means]
        place = choose_size(budget, [_parameters(self._sizes, one) for one in found], self._total)
        return means[place], found[place]

    def trials(self, budget: Budget) -> Iterator[tuple[float, float, Widths]]:
        """Yield SP, SB and widths of constant slicing, and of smaller bases that remove at least as much.

        A sweep at a given SP stays at that SP, as in the paper, whatever it removes.
        """
        constant = _constant_widths(self._sizes, self._settings.rounding, budget, self._total)
        allowed = _parameters(self._sizes, constant)
        mean = budget.value if budget.aim == "slice" else 1 - constant[0] / self._sizes.width
        yield mean, mean, constant
        seen = {constant}
        for share in _bases_tried(self._settings, mean)[1:]:
            fixed = budget.aim == "slice" and self._settings.slice_base == "sweep"
            found = (mean, self._widths(mean, share * mean)) if fixed else self._no_larger(mean, share, allowed)
            if found is not None and found[1] not in seen:
                seen.add(found[1])
                yield found[0], share * found[0], found[1]

    def _no_larger(self, start: float, share: float, allowed: int) -> tuple[float, Widths] | None:
        """Return the smallest SP from a little below `start` on whose model is no larger than allowed."""
        cap = self._settings.cap
        for number in range(_STEPS + 1):
            mean = min(cap, 0.8 * start) + (cap - min(cap, 0.8 * start)) * number / _STEPS
            widths = self._widths(mean, share * mean)
            if _parameters(self._sizes, widths) <= allowed:
                return mean, widths
        return None

    def _widths(self, mean: float, base: float) -> Widths:
        fractions = slice_fractions(self._redundancy, mean, base, self._settings.cap)
        return tuple(rounded_width(one, self._sizes.width, self._settings.rounding) for one in fractions)


@method(
    order=60,
    name="stock-slicing",
    summary="one basis for the whole model, which stays a stock architecture with a smaller hidden size",
    paper="secateur's own (docs/methods.md)",
    settings=StockSettings,
    native="slice",
    forwards=lambda _blocks, _gone, settings: Work(1.0, covariances=1.0) if settings.bases > 1 else Work(),
    apply_forwards=lambda settings, _tokens: slicing_work(
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


def _constant_widths(sizes: StreamSizes, rounding: int, budget: Budget, total: int) -> Widths:
    blocks = len(sizes.fixed)
    if budget.aim == "slice":
        return (rounded_width(budget.value, sizes.width, rounding),) * blocks
    candidates = [(width,) * blocks for width in range(rounding, sizes.width, rounding)]
    if not candidates:
        raise InputError(f"rounding={rounding}: the model has only {sizes.width} directions.")
    return candidates[choose_size(budget, [_parameters(sizes, one) for one in candidates], total)]


def _parameters(sizes: StreamSizes, widths: Widths) -> int:
    """Return the number of parameters with a basis of its own at every reading point."""
    points = [width for width in widths for _ in range(sizes.points_per_block)] + [sizes.width]
    return sizes.sizes_at(points, [True] * (len(points) - 1)).total


def _own_bases(
    name: str, settings: ConstantSettings, found: dict[str, Any], widths: Widths, sizes: StreamSizes
) -> SliceHidden:
    sliced = {"slice": round(1 - sum(widths) / len(widths) / sizes.width, 6)}
    return SliceHidden(
        method=name,
        settings=sliced | settings.model_dump(exclude_none=True) | found,
        widths=widths,
        head_width=sizes.width,
        signals=settings.signals,
        sizes=sizes,
    )


@applies(SliceHidden)
def apply(measurements: Measurements, step: SliceHidden) -> Decoder:
    """Slice as the step says; bases are measured on the texts, after a check that rotation alone changes nothing.

    Raises:
        InputError: the step was made for a model of another shape.
        ModelError: the family cannot be sliced.
    """
    decoder = measurements.decoder
    sizes = stock_stream_sizes(decoder) if step.stock else stream_sizes(folded_config(decoder))
    if sizes != step.sizes:
        raise InputError("this slicing step was made for a model of another shape; make a new plan for this one.")
    require_invariance(decoder)
    windows = measurements.need_windows()
    if step.bases is None:
        return slice_by_principal_directions(
            decoder, windows, step.widths, signals=step.signals, options=measurements.options
        )[0]
    if step.coordinates:
        bases = find_coordinates(decoder, windows, step.head_width, options=measurements.options)
    else:
        bases = find_bases(
            decoder,
            windows,
            step.head_width,
            step.bases,
            signals=step.signals,
            sensitivity=step.sensitivity,
            options=measurements.options,
        )
    return slice_with_shared_bases(
        decoder,
        windows,
        bases,
        stock=step.stock,
        reconstruct=step.reconstruct,
        options=measurements.options,
    )
