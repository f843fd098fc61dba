"""Greedy removal of blocks or branches: each time the one whose absence costs least, on the model without the others.

Most candidates are hopeless, and few windows show it: with `screen`, all of them are compared on a share of the
windows, and only the best quarter on all. Jamieson & Talwalkar 2016, "Non-stochastic Best Arm Identification and
Hyperparameter Optimization" (AISTATS), halve the field in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

from pydantic import Field

from secateur.calibration.walk import mean_loss_of, open_store
from secateur.methods.method import Measurements
from secateur.plan.work import Work
from secateur.scores.removal import Measure, RemovalProbe

Screen = Annotated[float, Field(gt=0, le=1)]
SCREEN: float = Field(
    0.25,
    description="share of the windows on which all candidates are compared, the best quarter then on all; 1: exact",
)
LOSSES: Sequence[Measure] = (mean_loss_of, mean_loss_of)
"""What counts as the loss, on all windows and on a share of them."""
FEWEST = 16
"""With fewer windows all candidates are compared on all of them."""
_KEPT = 4
"""One candidate in this many is compared on all windows."""


def screened_share(screen: float) -> float:
    """Return the share of the work that is left."""
    return 1.0 if screen == 1 else min(1.0, screen + 1 / _KEPT)


def greedy_work(blocks: int, candidates: int, rounds: float, screen: float) -> Work:
    """Return the work of a greedy search: each candidate runs the blocks above it, half of them, and the head.

    Args:
        blocks: number of blocks.
        candidates: number of candidates at first.
        rounds: how many of them are removed, one after the other.
        screen: share of the windows on which all candidates are compared.
    """
    compared = rounds * (candidates - (rounds - 1) / 2) * screened_share(screen)
    return Work(1 + compared / 2, losses=1 + compared) + Work(screen) * (screen < 1)


def lazily(
    measurements: Measurements,
    candidates: Sequence[Any],
    size: Callable[[Any], float],
    *,
    measure: Measure = mean_loss_of,
    name: str = "branch",
) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Yield 1, 2, 3, … of the candidates, in order of removal, and the loss in nats without them.

    Each time the one goes whose absence costs least for its size. What a candidate costs grows with what else is gone,
    so that one which was too expensive before need not be measured again (Minoux 1978, "Accelerated greedy algorithms
    for maximizing submodular set functions"). Ties go to the first.

    Args:
        measurements: of the model.
        candidates: blocks or branches.
        size: what a candidate saves.
        measure: what counts as the loss.
        name: what a candidate is called, for progress.

    Raises:
        InputError: there are no windows.
        NumericsError: NaN or infinity while measuring.
    """
    decoder, options = measurements.decoder, measurements.options
    with open_store(decoder) as store:
        probe = RemovalProbe(decoder, measurements.need_windows(), store, options.batch_size, measure=measure)
        dense = now = probe.loss(())
        trials = options.progress(list(candidates), f"leaving out each {name}", len(candidates))
        price = {one: (probe.loss((one,)) - dense) / size(one) for one in trials}
        gone: tuple[Any, ...] = ()
        while price:
            fresh: set[Any] = set(price) if not gone else set()
            while (best := min(price, key=lambda one: (price[one], one))) not in fresh:
                price[best] = (probe.loss((*gone, best)) - now) / size(best)
                fresh.add(best)
            gone = (*gone, best)
            now = probe.loss(gone)
            del price[best]
            probe.fix(gone)
            yield gone, now - dense


def greedily(
    measurements: Measurements,
    candidates: Sequence[Any],
    *,
    screen: float = 1.0,
    measures: Sequence[Measure] = LOSSES,
    name: str = "block",
    allowed: Callable[[tuple[Any, ...]], bool] = lambda _: True,
) -> Iterator[tuple[Any, ...]]:
    """Yield 1, 2, 3, … of the candidates: those removed so far, in the order of removal. Ties go to the first.

    Args:
        measurements: of the model; losses measured before are not measured again.
        candidates: blocks or branches.
        screen: share of the windows on which all candidates are compared; 1 compares all on all windows.
        measures: what counts as the loss, on all windows and on the share.
        name: what a candidate is called, for progress.
        allowed: whether these candidates may all be removed.

    Raises:
        InputError: there are no windows.
        NumericsError: NaN or infinity while measuring.
    """
    decoder, options, windows = measurements.decoder, measurements.options, measurements.need_windows()
    screened = screen < 1 and len(windows) >= FEWEST
    with ExitStack() as stores:

        def probe_of(which: str, some: Any, measure: Measure) -> RemovalProbe:
            known = measurements.cache.setdefault(("losses without", which, measure), {})
            store = stores.enter_context(open_store(decoder))
            found = RemovalProbe(decoder, some, store, options.batch_size, known, measure)
            found.loss(())
            return found

        fine = probe_of("all", windows, measures[0])
        coarse = probe_of("share", windows.split_off(screen)[1], measures[1]) if screened else None
        left = list(candidates)
        gone: tuple[Any, ...] = ()
        while left := [one for one in left if allowed((*gone, one))]:
            hopeful = left
            said = f"leaving out {name} {len(gone) + 1}"
            if coarse is not None and len(left) > _KEPT:
                trials = options.progress(list(left), f"{said} (few windows)", len(left))
                losses = {one: coarse.loss((*gone, one)) for one in trials}
                order = sorted(left, key=lambda one: (losses[one], one))
                hopeful = sorted(order[: math.ceil(len(left) / _KEPT)])
            trials = options.progress(list(hopeful), said, len(hopeful))
            losses = {one: fine.loss((*gone, one)) for one in trials}
            best = min(losses, key=lambda one: (losses[one], one))
            gone = (*gone, best)
            left.remove(best)
            for probe in filter(None, (fine, coarse)):
                probe.fix(gone)
            yield gone
