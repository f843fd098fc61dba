"""Greedy removal with a first comparison on few windows: what is compared on all, and what is found."""

import pytest

from oracles import draw_windows
from secateur.calibration.store import StateStore
from secateur.methods import greedy
from secateur.methods.greedy import FEWEST, greedily, lazily, screened_share
from secateur.methods.method import Measurements
from secateur.scores.removal import RemovalProbe


@pytest.fixture
def asked(monkeypatch):
    """What each probe was asked for, by its number of windows."""
    seen = {}

    class Recording(RemovalProbe):
        def __init__(self, decoder, windows, *given):
            self.seen = seen.setdefault(len(windows), [])
            super().__init__(decoder, windows, *given)

        def loss(self, gone):
            self.seen.append(tuple(gone))
            return super().loss(gone)

    monkeypatch.setattr(greedy, "RemovalProbe", Recording)
    return seen


def found(decoder, windows, count, **more):
    series = greedily(Measurements(decoder, windows), range(8), **more)
    return [next(series) for _ in range(count)][-1]


def test_the_best_quarter_on_few_windows_is_compared_on_all(tiny, asked):
    windows = draw_windows(windows=16)
    chosen = found(tiny("llama"), windows, 1, screen=0.25)
    coarse, fine = asked[4][1:], asked[16][1:]
    assert sorted(coarse) == [(block,) for block in range(8)]
    assert len(fine) == 2
    share = windows.split_off(0.25)[1]
    probe = greedily(Measurements(tiny("llama"), share), range(8))
    best_on_few = next(probe)
    assert best_on_few in fine
    assert chosen in fine


def test_it_is_exact_where_few_windows_agree_with_all(tiny):
    windows = draw_windows(windows=16)
    repeated = type(windows).of(windows.tokens[:4].repeat(4, 1))  # every fourth window shows what all show
    exact, screened = (found(tiny("llama"), repeated, 3, screen=share) for share in (1.0, 0.25))
    assert exact == screened


def test_few_windows_are_not_divided(tiny, asked):
    found(tiny("llama"), draw_windows(windows=FEWEST - 1), 1, screen=0.25)
    assert list(asked) == [FEWEST - 1]


def test_exactly_on_request(tiny, asked):
    found(tiny("llama"), draw_windows(windows=16), 2, screen=1.0)
    assert list(asked) == [16]
    assert len(asked[16]) == 1 + 8 + 7


def test_what_it_costs():
    assert screened_share(1.0) == 1.0
    assert screened_share(0.25) == 0.5


def test_lazy_removal_takes_the_cheapest_for_its_size(tiny):
    """Straight line: all candidates measured anew each time, where what is gone only makes the others dearer."""
    windows, sizes = draw_windows(windows=4), {block: 1.0 + block % 3 for block in range(8)}
    measurements = Measurements(tiny("llama"), windows)
    series = lazily(measurements, range(8), lambda one: sizes[one])
    lazy = [next(series) for _ in range(4)]
    with StateStore() as store:
        probe = RemovalProbe(tiny("llama"), windows, store)
        dense = probe.loss(())
        prices, before = {}, ()
        for gone, loss in lazy:
            assert probe.loss(gone) - dense == pytest.approx(loss, abs=1e-6)
            now = probe.loss(before)
            price = {one: (probe.loss((*before, one)) - now) / sizes[one] for one in range(8) if one not in before}
            grew = all(value >= prices.get(one, value) - 1e-9 for one, value in price.items())
            if grew:
                assert gone[-1] == min(price, key=lambda one: (price[one], one))
            prices, before = price, gone
