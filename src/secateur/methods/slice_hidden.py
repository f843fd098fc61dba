"""Methods that slice hidden states with a basis at every reading point; they differ in what each block keeps.

* SliceGPT: Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns".
* DynamicSlicing: Dumitru et al. 2024, "Change Is the Only Constant: Dynamic LLM Slicing based on Layer
  Redundancy":
  block l loses the fraction `FS(l) = SB + LR(l) · (SP − SB) / mean(LR)`.

Legend: SP = mean fraction sliced away, SB = the fraction every block loses, LR = layer redundancy in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field

from secateur.data.texts import windows_for
from secateur.errors import InputError
from secateur.methods.asked import Asked
from secateur.methods.budget import Budget, choose_size
from secateur.methods.method import Measurements, MethodSettings, method
from secateur.methods.slice_widths import Head, Normalise, OwnBases, Widths, normalised, slice_fractions
from secateur.methods.sliced_speed import speed_with_own_bases
from secateur.plan.hidden import Signals, SliceHidden, slicing_work
from secateur.plan.work import Work
from secateur.surgery.hidden.invariance import require_invariance
from secateur.surgery.hidden.own_bases import slice_by_principal_directions

_STEPS = 1000
"""Slice percentages tried when a number of parameters is requested."""
_BASES_TRIED = (1.0, 0.75, 0.5, 0.25, 0.0)
"""`slice_base="auto"`: shares of SP that are tried as SB; 1 is constant slicing."""
_SWEEP = 0.02
"""`slice_base="sweep"`: distance of the bases that are tried, as in the released code."""


class ConstantSettings(MethodSettings):
    """Settings of `slicegpt`."""

    rounding: int = Field(8, ge=1, description="kept widths are rounded down to a multiple of this")
    signals: Signals = Field("raw", description="principal directions of the states as they are, or as normed")
    head: Head = Field(
        "auto",
        description="directions that the head reads: as many as the blocks keep on average (sliced), or all (whole), "
        "as in the paper; what loses less on the texts at the same number of parameters (auto)",
    )


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


_TRIAL = slicing_work(shared=False)
"""What it takes to slice once; the states that come out give the loss."""


def _compares_heads(asked: Asked, settings: ConstantSettings) -> bool:
    """Return whether the model is sliced with a whole head and with a sliced one."""
    return settings.head == "auto" and not asked.in_directions


def _own_bases_work(_asked: Asked, _settings: Any, _tokens: int) -> Work:
    return slicing_work(shared=False)


@method(
    order=60,
    name="slicegpt",
    summary="keep the principal directions of the hidden states, the same number in every block",
    paper="Ashkboos et al. 2024, SliceGPT",
    settings=ConstantSettings,
    native="slice",
    forwards=lambda asked, settings, _windows: 2 * _compares_heads(asked, settings) * _TRIAL,
    apply_forwards=_own_bases_work,
    speed_model=speed_with_own_bases,
)
def decide_constant(measurements: Measurements, settings: ConstantSettings, budget: Budget) -> Sequence[SliceHidden]:
    """Keep the same number of directions in every block."""
    if budget.is_zero:
        return ()
    bases, widths, found = _with_best_head(settings, budget, _Losses(measurements, settings.signals))
    return (_step("slicegpt", settings, bases, widths, found),)


class _Losses:
    """Losses of a model that is sliced in several ways, each measured once."""

    def __init__(self, measurements: Measurements, signals: Signals) -> None:
        self.measurements = measurements
        self._signals = signals
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, bases: OwnBases, widths: Widths) -> float:
        """Return the mean loss on the windows, in nats, with these widths of the blocks."""
        points = (*widths, bases.head(widths))
        if not self._known:
            require_invariance(self.measurements.decoder)
        if points not in self._known:
            windows, options = self.measurements.need_windows(), self.measurements.options
            _, self._known[points] = slice_by_principal_directions(
                self.measurements.decoder, windows, widths, points[-1], signals=self._signals, options=options
            )
        return self._known[points]


def _with_best_head(
    settings: ConstantSettings, budget: Budget, losses: _Losses
) -> tuple[OwnBases, Widths, dict[str, Any]]:
    """Return constant widths, the head as the setting says, and the losses that it was decided by.

    An amount of directions is the paper's, which leaves the head whole. A sliced head is taken only if that loses less
    with no more parameters.
    """
    decoder, rounding = losses.measurements.decoder, settings.rounding
    whole, sliced = (OwnBases(decoder, rounding=rounding, slices_head=one) for one in (False, True))
    if settings.head != "auto" or budget.aim == "slice":
        bases = sliced if settings.head == "sliced" else whole
        return bases, bases.constant(budget), {}
    try:
        widths = whole.constant(budget)
    except InputError:  # so much cannot go without the head
        return sliced, sliced.constant(budget), {}
    narrower = sliced.constant_within(whole.left(widths))
    if narrower is None:
        return whole, widths, {}
    kept, cut = losses(whole, widths), losses(sliced, narrower)
    found = {"loss_by_head": {"whole": round(kept, 4), "sliced": round(cut, 4)}}
    return (whole, widths, found) if kept <= cut else (sliced, narrower, found)


def _step(
    name: str,
    settings: ConstantSettings,
    bases: OwnBases,
    widths: Widths,
    found: Mapping[str, Any] = MappingProxyType({}),
) -> SliceHidden:
    """Return the step that slices to these widths, with what was found on the way among its settings."""
    sliced = {"slice": round(bases.sliced_away(widths), 6)}
    return SliceHidden(
        method=name,
        settings=sliced | settings.model_dump(exclude_none=True) | dict(found),
        widths=widths,
        head_width=bases.head(widths),
        signals=settings.signals,
        sizes=bases.sizes,
    )


def _trials_expected(asked: Asked, settings: DynamicSettings) -> int:
    """Return about how many bases are tried; a sweep as many as there are below the mean, 0.3 if that is not known."""
    mean = asked.budget.value if asked.in_directions else 0.3
    return len(_bases_tried(settings, mean)) * isinstance(settings.slice_base, str)


@method(
    order=60,
    name="dynamic-slicing",
    summary="as slicegpt, but redundant blocks keep fewer directions",
    paper="Dumitru et al. 2024, DynamicSlicing",
    settings=DynamicSettings,
    native="slice",
    forwards=lambda asked, settings, _windows: (
        1.0 + (_trials_expected(asked, settings) + _compares_heads(asked, settings)) * _TRIAL
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
    cosines = _scored(measurements, settings).scores("cosine").cosine
    assert cosines is not None
    redundancy = normalised([cosines[block][block + 1] for block in range(decoder.block_count)], settings.normalise)
    losses = _Losses(measurements, settings.signals)
    bases, constant, found = _with_best_head(settings, budget, losses)
    search = _Search(redundancy, bases, settings)
    if not isinstance(settings.slice_base, str):
        mean, widths = search.meet(budget, settings.slice_base)
        used: dict[str, Any] = {"slice": round(mean, 6), "slice_base": settings.slice_base}
        return (_step("dynamic-slicing", settings, bases, widths, found | used),)
    trials = list(search.trials(budget, constant))
    tried = {
        base: (losses(bases, widths), mean, widths)
        for mean, base, widths in measurements.options.progress(trials, "trying slice bases", len(trials))
    }
    best = min(tried, key=lambda base: tried[base][0])
    _, mean, widths = tried[best]
    by_base = {f"{base:.3f}": round(loss, 4) for base, (loss, _, _) in tried.items()}
    used = {"slice": round(mean, 6), "slice_base": round(best, 6), "loss_by_slice_base": by_base}
    return (_step("dynamic-slicing", settings, bases, widths, found | used),)


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

    def __init__(self, redundancy: Sequence[float], bases: OwnBases, settings: DynamicSettings) -> None:
        self._redundancy, self._bases, self._settings = redundancy, bases, settings

    def meet(self, budget: Budget, base: float) -> tuple[float, Widths]:
        """Return SP, and the widths, for a fixed SB."""
        if budget.aim == "slice":
            return budget.value, self._widths(budget.value, base)
        if base > self._settings.cap:
            raise InputError(f"slice_base={base:g}: above the cap, {self._settings.cap:.0%}.")
        span = self._settings.cap - base
        means = [base + span * number / _STEPS for number in range(_STEPS + 1)]
        found = [self._widths(mean, base) for mean in means]
        place = choose_size(budget, [self._bases.left(one) for one in found], self._bases.total)
        return means[place], found[place]

    def trials(self, budget: Budget, constant: Widths) -> Iterator[tuple[float, float, Widths]]:
        """Yield SP, SB and widths of the given constant slicing, and of smaller bases that remove at least as much.

        A sweep at a given SP stays at that SP, as in the paper, whatever it removes.
        """
        allowed = self._bases.left(constant)
        mean = budget.value if budget.aim == "slice" else self._bases.sliced_away(constant)
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
            if self._bases.left(widths) <= allowed:
                return mean, widths
        return None

    def _widths(self, mean: float, base: float) -> Widths:
        fractions = slice_fractions(self._redundancy, mean, base, self._settings.cap)
        return tuple(self._bases.rounded(one) for one in fractions)
