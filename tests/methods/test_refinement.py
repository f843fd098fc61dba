"""Widths exchanged between blocks: losses against models put together by hand, exchanges against all of them."""

import copy
import itertools

import pytest
import torch

from oracles import draw_windows, plain_loss
from secateur import make_plan, prune
from secateur.methods.allocation import refinement
from secateur.methods.allocation.operating_point import JUDGED, losses_around
from secateur.methods.allocation.refinement import Neighbours, Point, exchange, refined
from secateur.methods.allocation.savings import Savings
from secateur.methods.allocation.sensitivity import judging_windows
from secateur.methods.apply_widths import BrainSurgeon
from secateur.methods.budget import Budget
from secateur.methods.method import Measurements, apply_step
from secateur.plan.steps import PruneWidth
from secateur.surgery.width.pruning import Refit
from secateur.surgery.width.target import dense_widths, width_sizes

WINDOWS = draw_windows(windows=8)
REFIT = Refit(target="dense")
NEAR = Neighbours(dict.fromkeys(range(4), (24, 16, 8, 0)), (1, 2, 3))


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


def at(decoder, *channels, without=()):
    """These channels in each block, and no attention in some."""
    dense = dense_widths(decoder)
    return tuple(
        one.model_copy(update={"channels": count, "groups": 0 if block in without else one.groups})
        for block, (one, count) in enumerate(zip(dense, channels, strict=True))
    )


def applied(decoder, widths):
    """The model that a plan with these widths makes."""
    step = PruneWidth(
        method="obs-width",
        settings={},
        widths=widths,
        choose="brain-surgeon",
        stock=False,
        target="dense",
        sizes=width_sizes(decoder, stock=False),
    )
    return apply_step(Measurements(decoder, WINDOWS), step).decoder.module


@pytest.mark.parametrize("skeleton", [False, True])
def test_losses_are_those_of_the_model_a_plan_makes_with_one_block_of_another(tiny, skeleton):
    decoder, measured = tiny("llama", blocks=4), tiny("llama", skeleton=skeleton, blocks=4)
    widths = at(decoder, 16, 8, 24, 16, without=[2])
    others = {
        1: at(decoder, 16, 16, 24, 16)[1:2],
        2: (*at(decoder, 16, 8, 24, 16)[2:3], *at(decoder, 16, 8, 8, 16, without=[2])[2:3]),
        3: at(decoder, 16, 8, 24, 0)[3:],
    }
    base, found = losses_around(measured, WINDOWS, widths, others, BrainSurgeon(), refit=REFIT)
    judged = judging_windows(WINDOWS, JUDGED)
    pruned = applied(decoder, widths)
    assert base == pytest.approx(plain_loss(pruned, judged), abs=1e-5)
    assert set(found) == {(block, one) for block, choices in others.items() for one in choices}
    for (block, own), loss in found.items():
        changed = tuple(own if index == block else one for index, one in enumerate(widths))
        mixed, other = copy.deepcopy(pruned), applied(decoder, changed)
        mixed.model.layers[block].mlp = other.model.layers[block].mlp
        if own.groups != widths[block].groups:  # attention comes back, the MLP stays as it was fitted without
            mixed.model.layers[block] = other.model.layers[block]
            mixed.model.layers[block].mlp = copy.deepcopy(pruned.model.layers[block].mlp)
        assert plain_loss(mixed, judged) == pytest.approx(loss, abs=1e-5), (block, own)


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
def test_the_loss_is_that_of_the_model_a_plan_makes(tiny, family):
    """Branches in parallel, and experts."""
    decoder = tiny(family)
    half = [max(8, one.channels // 16 * 8) for one in dense_widths(decoder)]
    widths = at(decoder, *half, without=[2])
    base, _ = losses_around(decoder, WINDOWS, widths, {}, BrainSurgeon(), refit=REFIT)
    assert base == pytest.approx(plain_loss(applied(decoder, widths), judging_windows(WINDOWS, JUDGED)), abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_exchanges(tiny, seed):
    decoder = tiny("llama", blocks=4)
    savings = Savings(decoder, width_sizes(decoder, stock=False), Budget("remove", 0.2))
    widths = at(decoder, 16, 16, 8, 16, without=[3])
    generator = torch.Generator().manual_seed(seed)
    near = NEAR.of(widths, savings.dense)
    losses = {(block, one): 2 + float(torch.randn(1, generator=generator)) for block in near for one in near[block]}
    found = exchange(Point(widths, 2.0, losses), savings)

    def expected(choice):
        total = 0.0
        for block, one in enumerate(choice):
            for name in ("channels", "groups"):
                if getattr(one, name) != getattr(widths[block], name):
                    alone = widths[block].model_copy(update={name: getattr(one, name)})
                    total += losses[block, alone] - 2
        return total

    values = [
        [
            widths[block].model_copy(update={"channels": channels, "groups": groups})
            for channels in {widths[block].channels, *(one.channels for one in near[block])}
            for groups in {widths[block].groups, *(one.groups for one in near[block])}
        ]
        for block in range(4)
    ]
    limit = savings.weight(widths)
    least = min(expected(choice) for choice in itertools.product(*values) if savings.weight(choice) <= limit)
    assert savings.weight(found) <= limit
    assert expected(found) == pytest.approx(least, abs=1e-9)
    assert exchange(Point(widths, 2.0, losses), savings, least=100.0) == widths, "nothing promises so much"


def test_widths_that_lose_more_are_given_up(tiny, monkeypatch):
    decoder = tiny("llama", blocks=4)
    savings = Savings(decoder, width_sizes(decoder, stock=False), Budget("remove", 0.2))
    start = at(decoder, 16, 16, 16, 16)
    tried = []

    def worse(_decoder, _windows, widths, others, *_, **__):
        tried.append(widths)
        loss = 1.0 if widths == start else 1.5
        return loss, {
            (block, one): loss + 0.01 * (one.channels - widths[block].channels) * (1 if block == 1 else -1)
            for block, found in others.items()
            for one in found
        }

    monkeypatch.setattr(refinement, "losses_around", worse)
    found = refined(Measurements(decoder, WINDOWS), start, savings, NEAR, refit=REFIT, rounds=3)
    assert found == start == tried[0]
    assert len(tried) == len(set(tried)) > 1
    assert all(savings.weight(one) <= savings.weight(start) for one in tried)


def test_the_loss_does_not_rise_and_is_measured_once(tiny, monkeypatch, tmp_path):
    decoder = tiny("llama", blocks=4)
    savings = Savings(decoder, width_sizes(decoder, stock=False), Budget("remove", 0.2))
    start, measurements = at(decoder, 8, 8, 24, 8), Measurements(decoder, WINDOWS)

    def loss(widths):
        return losses_around(decoder, WINDOWS, widths, {}, BrainSurgeon(), refit=REFIT)[0]

    found = refined(measurements, start, savings, NEAR, refit=REFIT, rounds=2)
    assert loss(found) <= loss(start)
    assert savings.weight(found) <= savings.weight(start)
    monkeypatch.setattr(refinement, "losses_around", None)
    assert refined(measurements, start, savings, NEAR, refit=REFIT, rounds=2) == found
    monkeypatch.undo()
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text("[1, null]")
    assert refined(measurements, start, savings, NEAR, refit=REFIT, rounds=2) == found


def test_a_refined_plan(tiny):
    decoder = tiny("llama", blocks=4)
    settings = {"allocation": "global", "rounding": 8}
    plans = [
        make_plan(decoder, method="obs-width", texts=WINDOWS, settings=settings | {"refine": rounds}, remove=0.3)
        for rounds in (0, 1)
    ]
    assert plans[1].parameters_after <= plans[0].parameters_after
    assert prune(decoder, plans[1], texts=WINDOWS).parameter_count == plans[1].parameters_after
