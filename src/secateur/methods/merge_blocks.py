"""Sliding-Window Merging: neighbouring blocks become one, window by window from the top of the model down.

Ding et al. 2025, "A Sliding Layer Merging Method for Efficient Depth-Wise Pruning in LLMs" (arXiv:2502.19159).

At a given threshold the window starts with the two highest blocks that may change (the last block is excluded). As long
as the model with every merge so far has a similarity above the threshold, the window grows by one block; otherwise the
window is closed and the next one starts with the rejected block. A window still open at the lowest block that may
change is merged too (the released code loses it). Windows never contain blocks of different shapes, nor, by default,
of different layer types: there the window is closed without measuring.

The paper tunes the threshold by hand. Here a budget determines it. A run is the same for all thresholds from the
largest similarity it rejected up to the smallest it accepted, so the runs at neighbouring thresholds can be enumerated
without gaps; interpolation between them proposes the next threshold, always one of the similarities seen, until a run
removes the requested number of blocks or all runs are known. Similarities are measured once for each set of windows,
whatever the threshold. If no threshold removes exactly the requested number (it jumps where a new window then grows
by several blocks), the result is an intermediate stage of a run: of all models measured on the way that lack this many
blocks, the one most similar to the original.

The search compares hundreds of candidates, and a window of text says nearly the same of each of them as all windows do:
similarities of one candidate differ by less than those of neighbouring candidates. With `screen` it is made on a share
of the windows, and the few best results of it are compared on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

from pydantic import Field

from secateur.calibration.store import StateStore
from secateur.calibration.walk import open_store
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.methods.asked import Asked
from secateur.methods.budget import Budget, choose_blocks
from secateur.methods.method import Measurements, Settings, applies, method
from secateur.models.decoder import Decoder
from secateur.plan.steps import MergeBlocks, Rule
from secateur.scores.merge_similarity import Merged, MergeProbe
from secateur.surgery.depth.blocks import can_go, require_one_basis
from secateur.surgery.depth.merging import alike, merge_windows, shares_for

_ALL, _NONE = -1.0, 1.0
"""A threshold that every similarity exceeds, and one that none does."""
_PASSES, _PASSES_PER_BLOCK = 1.5, 1.6
"""Passes of the window until a threshold is found that removes so many blocks: about those made on SmolLM2-135M for 2,
3, 5 and 8 of its 30 blocks. How soon one is found is luck in part: for 3 blocks 6 to 9 passes on different texts."""
_FEWEST = 16
"""With fewer windows the search is made on all of them."""
_FINALISTS = 4
"""Results of a search on few windows that are compared on all."""


class MergeSettings(Settings):
    """Settings of `swm`; the paper keeps the last block."""

    threshold: float | None = Field(
        None, gt=0, le=1, description="similarity above which a window grows (the paper's T); sets the amount"
    )
    rule: Rule = Field("highest", description="how the weights of a window are merged")
    across_types: bool = Field(
        False, description="merge blocks of different layer types too, into the lowest block's type"
    )
    protect_last: int = Field(1, ge=1, description="number of blocks at the end that never change")
    screen: float = Field(
        0.125,
        gt=0,
        le=1,
        description="share of the windows on which the threshold is searched, its best results then on all; 1: exact",
    )

    def own_amount(self) -> Budget | None:
        """Return the paper's threshold."""
        return None if self.threshold is None else Budget("own", self.threshold, knob="threshold")


@dataclass(frozen=True)
class Slide:
    """One pass of the window from the top of the model down.

    Attributes:
        merged: the windows that were merged.
        floor: the largest similarity that was rejected.
        ceiling: the smallest that was accepted; every threshold from `floor` to below `ceiling` gives this run.
    """

    merged: Merged
    floor: float
    ceiling: float

    @property
    def gone(self) -> int:
        """Number of blocks removed."""
        return _gone(self.merged)


def slide(
    similarity: Callable[[Merged], float], fits: Callable[[int], bool], lows: Iterable[int], threshold: float
) -> Slide:
    """Move the window through the model once.

    Args:
        similarity: similarity to the original model with these windows merged, from the top down.
        fits: whether a block and the one above it may be in one window.
        lows: blocks that a window may take in, from the highest down; the window starts at the block above the first.
        threshold: a window grows as long as the similarity exceeds this.
    """
    merged: Merged = ()
    floor, ceiling = -math.inf, math.inf
    high = low = None
    for low in lows:
        high = low + 1 if high is None else high
        if fits(low):
            found = similarity((*merged, (low, high)))
            if found > threshold:
                ceiling = min(ceiling, found)
                continue
            floor = max(floor, found)
        merged, high = _closed(merged, low + 1, high), low
    if high is not None and low is not None:
        merged = _closed(merged, low, high)
    return Slide(merged, floor, ceiling)


def find_threshold(run: Callable[[float], Slide], seen: Callable[[], Iterable[float]], wanted: int) -> list[Slide]:
    """Try thresholds until a run removes `wanted` blocks, or every possible run is known.

    Args:
        run: performs a run at a threshold.
        seen: all similarities measured so far, by any run.
        wanted: number of blocks to remove.

    Returns:
        All runs, in the order of their thresholds.
    """
    runs = [run(_ALL)]
    if runs[0].ceiling <= _NONE:
        runs.append(run(_NONE))
    while all(one.gone != wanted for one in runs):
        unknown = [(left, right) for left, right in pairwise(runs) if left.ceiling < right.floor]
        if not unknown:
            break
        left, right = min(unknown, key=lambda gap: _promise(gap[0].gone - wanted, gap[1].gone - wanted))
        inside = sorted(value for value in seen() if left.ceiling <= value < right.floor)
        runs.append(run(inside[int(len(inside) * _share(left.gone, right.gone, wanted))]))
        runs.sort(key=lambda one: one.floor)
    return runs


def _share(left: int, right: int, wanted: int) -> float:
    """Return where a wanted number lies between those of two neighbouring runs, in [0, 1); the middle if outside."""
    return (left - wanted) / (left - right) if right < wanted < left else 0.5


def _promise(left: int, right: int) -> tuple[bool, int]:
    """Rank two neighbouring runs by how far they overshoot: first those that bracket the wanted number."""
    return (left > 0) == (right > 0), min(abs(left), abs(right))


def _forwards(asked: Asked, settings: MergeSettings, windows: Windows) -> float:
    """Return the cost of all passes of the window; a candidate runs the blocks above its lowest one, half of them."""
    if settings.threshold is not None:
        return 1 + asked.blocks / 2
    screened = settings.screen < 1 and len(windows) >= _FEWEST
    share, finalists = (settings.screen, 1 + _FINALISTS / 2) if screened else (1.0, 0.0)
    return (1 + asked.blocks / 2 * (_PASSES + _PASSES_PER_BLOCK * asked.gone)) * share + finalists


@method(
    order=30,
    name="swm",
    summary="merge windows of neighbouring blocks into one each, as long as the final states stay similar",
    paper="Ding et al. 2025, Sliding-Window Merging",
    settings=MergeSettings,
    forwards=_forwards,
)
def decide(measurements: Measurements, settings: MergeSettings, budget: Budget) -> Sequence[MergeBlocks]:
    """Find the windows.

    Raises:
        InputError: no two neighbouring blocks may be merged, or the budget is out of reach.
        ModelError: the model is sliced.
        NumericsError: NaN or infinity while measuring.
    """
    require_one_basis(measurements.decoder)
    influence = _influence(measurements, settings) if not budget.is_zero else ()
    step = MergeBlocks(
        method="swm",
        settings=settings.model_dump(exclude_none=True),
        windows=(),
        rule=settings.rule,
        influence=influence,
        across_types=settings.across_types,
    )
    if budget.is_zero:
        return (step,)
    decoder = measurements.decoder
    free = settings.free_blocks(decoder.block_count)
    lows = range(free.start, max(free.start, free.stop - 1))
    fitting = {low for low in lows if alike(decoder, low, across_types=settings.across_types)}
    fitting &= {low for low in lows if can_go(decoder, (low + 1,))}
    if not fitting:
        raise InputError(_nothing_to_merge(decoder, lows))
    windows = measurements.need_windows()
    screened = budget.aim != "own" and settings.screen < 1 and len(windows) >= _FEWEST
    with ExitStack() as stores:

        def probe_of(share: float) -> MergeProbe:
            return MergeProbe(
                decoder,
                windows if share == 1 else windows.split_off(share)[1],
                stores.enter_context(_open_store(decoder)),
                lambda window: shares_for(settings.rule, window, influence),
                lows,
                measurements.options.batch_size,
                measurements.cache.setdefault(("similarity of merged", settings.rule, share), {}),
            )

        probe = probe_of(settings.screen if screened else 1)

        def run(threshold: float) -> Slide:
            order = measurements.options.progress(reversed(lows), f"threshold {threshold:.4f}", len(lows))
            return slide(probe.similarity, fitting.__contains__, order, threshold)

        if budget.aim == "own":
            found = run(budget.value)
            return (_filled(step, found.merged, probe.known, budget.value),)
        thresholds = {one.merged: _between(one) for one in _runs_for(budget, run, probe, decoder)}
        candidates = _best_first(probe.known, thresholds)
        chosen = _choose(budget, candidates, decoder)
        if screened:
            finalists = [one for one in candidates if _choose(budget, (one, *candidates), decoder) == one][:_FINALISTS]
            probe = probe_of(1)
            for merged in measurements.options.progress(finalists, "comparing the best", len(finalists)):
                probe.similarity(merged)
            chosen = _best_first(probe.known, thresholds)[0]
    return (_filled(step, chosen, probe.known, thresholds.get(chosen)),)


def _runs_for(budget: Budget, run: Callable[[float], Slide], probe: MergeProbe, decoder: Decoder) -> list[Slide]:
    """Make the runs for a budget; the stages of the run that merges everything tell how many blocks it takes."""
    run(_ALL)
    wanted = _gone(_choose(budget, probe.known, decoder))
    return find_threshold(run, probe.known.values, wanted)


def _choose(budget: Budget, candidates: Iterable[Merged], decoder: Decoder) -> Merged:
    """Return the first of the candidates that meet the budget; they remove 1, 2, 3, … blocks."""
    by_count: dict[int, Merged] = {}
    for merged in candidates:
        by_count.setdefault(_gone(merged), merged)
    by_blocks = {_absorbed(by_count[count]): by_count[count] for count in sorted(by_count)}
    chosen = choose_blocks(
        budget, by_blocks, decoder.block_parameter_counts(), decoder.parameter_count, max(map(len, by_blocks))
    )
    return by_blocks[chosen]


def _best_first(known: Mapping[Merged, float], thresholds: Mapping[Merged, float]) -> list[Merged]:
    """Return first what a threshold gives, then the rest, each by similarity to the original model."""
    return sorted(known, key=lambda one: (one not in thresholds, -known[one]))


def _filled(step: MergeBlocks, merged: Merged, known: Mapping[Merged, float], threshold: float | None) -> MergeBlocks:
    found = {"windows": tuple(sorted(merged)), "similarity": known.get(merged), "threshold": threshold}
    return step.model_copy(update=found)


def _closed(merged: Merged, low: int, high: int) -> Merged:
    return (*merged, (low, high)) if high > low else merged


def _gone(merged: Merged) -> int:
    return sum(high - low for low, high in merged)


def _absorbed(merged: Merged) -> tuple[int, ...]:
    return tuple(sorted(block for low, high in merged for block in range(low + 1, high + 1)))


def _between(one: Slide) -> float:
    """Return a threshold that makes this run, in the middle of those that do."""
    return (max(one.floor, _ALL) + min(one.ceiling, _NONE)) / 2


def _influence(measurements: Measurements, settings: MergeSettings) -> tuple[float, ...]:
    return measurements.block_influence() if settings.rule == "weighted" else ()


def _open_store(decoder: Decoder) -> StateStore:
    """Keep few states in memory: they are read once per candidate, which costs little next to running its blocks."""
    if decoder.is_skeleton:
        return open_store(decoder)
    return StateStore(max(decoder.block_parameter_counts()) * decoder.module.dtype.itemsize)


def _nothing_to_merge(decoder: Decoder, lows: range) -> str:
    if len(lows) == 0:
        return f"swm: fewer than two of {decoder.block_count} blocks may change; lower protect_first or protect_last."
    if any(alike(decoder, low, across_types=True) for low in lows):
        return "swm: neighbouring blocks differ in layer type everywhere; across_types=true merges them anyway."
    return "swm: neighbouring blocks differ in shape everywhere, so no two of them can be merged."


@applies(MergeBlocks)
def apply(measurements: Measurements, step: MergeBlocks) -> Decoder:
    """Merge the step's windows."""
    step.kept_blocks(measurements.decoder.block_count)
    return merge_windows(measurements.decoder, step.windows, step.rule, step.influence, across_types=step.across_types)
