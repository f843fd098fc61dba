"""Greedy removal: what is measured again, what is compared on how many tokens, and what is found."""

import pytest

from oracles import draw_windows
from secateur.calibration.store import StateStore
from secateur.calibration.walk import mean_loss
from secateur.methods import greedy
from secateur.methods.greedy import GreedySettings, greedily, greedy_work
from secateur.methods.method import Measurements
from secateur.scores.removal import RemovalProbe
from secateur.surgery.depth.blocks import keep_blocks

BLOCKS = range(8)


@pytest.fixture
def asked(monkeypatch):
    """What the probe was asked for."""
    seen = []

    class Recording(RemovalProbe):
        def loss(self, gone):
            seen.append(tuple(gone))
            return super().loss(gone)

    monkeypatch.setattr(greedy, "RemovalProbe", Recording)
    return seen


def found(decoder, windows, count, **more):
    series = greedily(Measurements(decoder, windows), BLOCKS, **more)
    return [next(series) for _ in range(count)][-1]


def test_all_of_them_each_time_on_request(tiny, asked):
    """Straight line: the models without each block, in full."""
    decoder, windows = tiny("llama"), draw_windows(windows=4)
    gone, loss = found(decoder, windows, 3, again=1.0)
    assert len(asked) == 1 + (8 + 1) + (7 + 1) + (6 + 1), "the dense model, and of each round all and the best"

    expected = ()
    for _ in range(3):
        losses = {
            block: mean_loss(keep_blocks(decoder, [one for one in BLOCKS if one not in (*expected, block)]), windows)
            for block in BLOCKS
            if block not in expected
        }
        expected = (*expected, min(losses, key=lambda one: (losses[one], one)))
    assert gone == expected
    assert loss == pytest.approx(losses[expected[-1]] - mean_loss(decoder, windows), abs=1e-5)


def test_lazy_removal_takes_the_cheapest_for_its_size(tiny, asked):
    """Straight line: all candidates measured anew each time, where what is gone only makes the others dearer."""
    windows, sizes = draw_windows(windows=4), {block: 1.0 + block % 3 for block in BLOCKS}
    series = greedily(Measurements(tiny("llama"), windows), BLOCKS, size=sizes.__getitem__)
    lazy = [next(series) for _ in range(4)]
    assert len(asked) < 1 + (8 + 1) + (7 + 1) + (6 + 1) + (5 + 1)
    with StateStore() as store:
        probe = RemovalProbe(tiny("llama"), windows, store)
        dense = probe.loss(())
        prices, before = {}, ()
        for gone, loss in lazy:
            assert probe.loss(gone) - dense == pytest.approx(loss, abs=1e-6)
            now = probe.loss(before)
            price = {one: (probe.loss((*before, one)) - now) / sizes[one] for one in BLOCKS if one not in before}
            grew = all(value >= prices.get(one, value) - 1e-9 for one, value in price.items())
            if grew:
                assert gone[-1] == min(price, key=lambda one: (price[one], one))
            prices, before = price, gone


def test_the_cheapest_quarter_is_measured_again(tiny, asked):
    found(tiny("llama"), draw_windows(windows=4), 2, again=0.5)
    first, again = asked[1:9], asked[10:]
    assert sorted(first) == [(block,) for block in BLOCKS]
    assert 4 + 1 <= len(again) <= 7 + 1, "half of the seven that are left, those that may be best, and the best itself"


def test_what_may_not_go_stays(tiny):
    gone, _ = found(tiny("llama"), draw_windows(windows=2), 3, allowed=lambda gone: all(one % 2 for one in gone))
    assert set(gone) <= {1, 3, 5, 7}


def test_nothing_is_measured_twice_for_another_amount(tiny, monkeypatch):
    measurements = Measurements(tiny("llama"), draw_windows(windows=2))
    list(zip(range(2), greedily(measurements, BLOCKS), strict=False))

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(RemovalProbe, "_measure", refuse)
    assert len(list(zip(range(2), greedily(measurements, BLOCKS), strict=False))) == 2


@pytest.mark.parametrize(
    ("windows", "length", "tokens", "read"),
    [(32, 512, 4096, (32, 128)), (8, 512, 4096, (8, 512)), (64, 512, 4096, (32, 128)), (4, 64, 4096, (4, 64))],
)
def test_beginnings_of_windows_and_of_many_windows_some(windows, length, tokens, read):
    given = draw_windows(windows=windows, positions=length)
    compared = GreedySettings(tokens=tokens).compared_on(given)
    assert (len(compared), compared.seq_len) == read
    assert (compared.fingerprint == given.fingerprint) == (read == (windows, length))
    assert all(any(bool((row == whole[: read[1]]).all()) for whole in given.tokens) for row in compared.tokens)


def test_what_it_costs():
    windows = draw_windows(windows=32, positions=512)
    exact, quarter = (greedy_work(30, 6, again) for again in (1.0, 0.25))
    assert exact.losses == pytest.approx(1 + 30 + 5 * 27)
    assert quarter.losses == pytest.approx(1 + 30 + 5 * 27 / 4)
    assert GreedySettings().work(30, 6, windows).losses == pytest.approx(quarter.losses / 4)
