"""Greedy removal of blocks or branches: each time the one whose absence costs least, on the model without the others.

What a candidate costs grows with what else is gone, mostly, so that one which was too expensive before need not be
measured again: Minoux 1978, "Accelerated greedy algorithms for maximizing submodular set functions". As it falls now
and then, the cheapest so far are measured again all the same. And a few thousand tokens tell candidates apart, so that
of long windows only the beginnings are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import Field

from secateur.calibration.walk import mean_loss_of, open_store
from secateur.data.windows import Windows
from secateur.methods.method import Measurements, Settings
from secateur.plan.work import Work
from secateur.scores.removal import Measure, RemovalProbe

_SHORTEST = 128
"""Windows are not shortened below this many tokens; fewer of them are read instead."""
_MORE = 1 / 14
"""Share of the candidates that may have become the best after a removal, about."""


class ComparingSettings(Settings):
    """Settings of methods that compare the model without each of many candidates."""

    tokens: int = Field(
        4096, ge=1, description="tokens on which candidates are compared, about: beginnings of the windows"
    )

    def compared_on(self, windows: Windows) -> Windows:
        """Return the beginnings of windows, evenly of all sources, that have about as many tokens in all."""
        length = min(windows.seq_len, max(_SHORTEST, self.tokens // len(windows)))
        return windows.at_most(max(1, self.tokens // length)).shortened(length)

    def share(self, windows: Windows) -> float:
        """Return the share of the tokens on which candidates are compared."""
        return self.compared_on(windows).token_count / windows.token_count


class GreedySettings(ComparingSettings):
    """Settings of methods that do so again and again."""

    again: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of the candidates that are measured again after each removal: the cheapest so far, and any "
        "that may have become the best; 1: all, exact",
    )

    def work(self, candidates: int, rounds: float, windows: Windows) -> Work:
        """Return the work of removing some of the candidates."""
        return greedy_work(candidates, rounds, self.again).on_share(self.share(windows))


def greedy_work(candidates: int, rounds: float, again: float = 0.0) -> Work:
    """Return the work of a greedy search: each candidate runs the blocks above it, half of them, and the head.

    Args:
        candidates: number of candidates at first.
        rounds: how many of them are removed, one after the other.
        again: share of those left that are measured again after each removal, whatever they cost.
    """
    compared = candidates + max(0, rounds - 1) * (candidates - rounds / 2) * max(again, _MORE)
    return Work(1 + compared / 2, losses=1 + compared)


def greedily(
    measurements: Measurements,
    candidates: Sequence[Any],
    *,
    windows: Windows | None = None,
    size: Callable[[Any], float] = lambda _: 1.0,
    again: float = 0.0,
    measure: Measure = mean_loss_of,
    name: str = "branch",
    allowed: Callable[[tuple[Any, ...]], bool] = lambda _: True,
) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Yield 1, 2, 3, … of the candidates, in order of removal, and by how much the loss has risen without them.

    Each time the one goes whose absence costs least for its size; ties go to the first.

    Args:
        measurements: of the model; losses measured before are not measured again.
        candidates: blocks or branches.
        windows: on which they are compared; None: on all.
        size: what a candidate saves.
        again: share of those left, the cheapest so far, that are measured again after each removal; another one is only
            if it would be the best at what it cost before.
        measure: what counts as the loss.
        name: what a candidate is called, for progress.
        allowed: whether these candidates may all be removed.

    Raises:
        InputError: there are no windows.
        NumericsError: NaN or infinity while measuring.
    """
    decoder, options = measurements.decoder, measurements.options
    read = measurements.need_windows() if windows is None else windows
    known = measurements.cache.setdefault(("losses without", measure, read.fingerprint, tuple(read.tokens.shape)), {})
    with open_store(decoder) as store:
        probe = RemovalProbe(decoder, read, store, options.batch_size, known, measure)
        dense = now = probe.loss(())
        price = dict.fromkeys(candidates, 0.0)
        gone: tuple[Any, ...] = ()
        while price := {one: cost for one, cost in price.items() if allowed((*gone, one))}:
            said = f"leaving out {name} {len(gone) + 1}"
            least = math.ceil(again * len(price)) if gone else len(price)
            for one in options.progress(_stale(price, least), said, len(price)):
                price[one] = (probe.loss((*gone, one)) - now) / size(one)
            best = min(price, key=lambda one: (price[one], one))
            gone = (*gone, best)
            now = probe.loss(gone)
            del price[best]
            probe.fix(gone)
            yield gone, now - dense


def _stale(price: dict[Any, float], least: int) -> Iterator[Any]:
    """Yield the candidates to be measured: at least so many, until the cheapest is one of them; prices change."""
    fresh = sorted(price, key=lambda one: (price[one], one))[:least]
    yield from list(fresh)
    while (best := min(price, key=lambda one: (price[one], one))) not in fresh:
        fresh.append(best)
        yield best
