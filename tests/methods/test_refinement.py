"""Widths exchanged between blocks: losses against models put together by hand, exchanges against all of them."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from oracles import draw_windows, plain_divergence
from secateur import make_plan, prune
from secateur.errors import InputError
from secateur.methods.allocation import refinement
from secateur.methods.allocation.operating_point import Parts, Point, losses_around
from secateur.methods.allocation.refinement import Neighbours, exchange, refined
from secateur.methods.allocation.savings import Savings
from secateur.methods.apply_widths import BrainSurgeon
from secateur.methods.budget import Budget
from secateur.methods.method import Measurements, apply_step
from secateur.plan.steps import PruneWidth
from secateur.surgery.width.pruning import Refit
from secateur.surgery.width.target import dense_widths, width_sizes

WINDOWS = draw_windows(windows=8)
PARTS = Parts.of(WINDOWS)
REFIT = Refit(target="dense")
NEAR = Neighbours({"channels": dict.fromkeys(range(4), (24, 16, 8, 0)), "groups": dict.fromkeys((1, 2, 3), (2, 0))})


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


def at(decoder, *channels, without=(), single=()):
    """These channels in each block, and no attention in some, or a single group."""
    dense = dense_widths(decoder)
    return tuple(
        one.model_copy(
            update={"channels": count, "groups": 0 if block in without else 1 if block in single else one.groups}
        )
        for block, (one, count) in enumerate(zip(dense, channels, strict=True))
    )


def applied(decoder, widths, align=False):
    """The model that a plan with these widths makes."""
    step = PruneWidth(
        method="obs-width",
        settings={},
        widths=widths,
        choose="brain-surgeon",
        stock=False,
        target="dense",
        align=align,
        sizes=width_sizes(decoder, stock=False),
    )
    return apply_step(Measurements(decoder, PARTS.fitted), step).decoder.module


def test_no_window_compares_and_judges():
    source = torch.tensor([0] * 16 + [1] * 8 + [2] * 3 + [3])
    mixed = replace(draw_windows(windows=28), parts=("a", "b", "c", "d"), part_of=source)
    parts = Parts.of(mixed)
    found = [parts.fitted, parts.searched, parts.judged]
    assert [one.part_of.bincount(minlength=4).tolist() for one in found] == [[12, 6, 1, 1], [2, 1, 1, 0], [2, 1, 1, 0]]
    rows = [tuple(row) for one in found for row in one.tokens.tolist()]
    assert sorted(rows) == sorted(tuple(row) for row in mixed.tokens.tolist())
    assert len({one.fingerprint for one in found}) == 3
    with pytest.raises(InputError, match="1 window, and some must be held back"):
        Parts.of(draw_windows(windows=2))


@pytest.mark.parametrize(("skeleton", "align"), [(False, False), (True, False), (False, True), (True, True)])
def test_losses_are_those_of_the_model_a_plan_makes_with_one_block_of_another(tiny, skeleton, align):
    decoder, measured = tiny("llama", blocks=4), tiny("llama", skeleton=skeleton, blocks=4)
    widths = at(decoder, 16, 8, 24, 16, without=[2], single=[3])
    others = {
        0: at(decoder, 16, 8, 24, 16, single=[0])[:1],
        1: at(decoder, 16, 16, 24, 16)[1:2],
        2: (*at(decoder, 16, 8, 24, 16)[2:3], *at(decoder, 16, 8, 8, 16, without=[2])[2:3]),
        3: (*at(decoder, 16, 8, 24, 0, single=[3])[3:], *at(decoder, 16, 8, 24, 16)[3:]),
    }
    refit = replace(REFIT, align=align)
    point = losses_around(measured, PARTS, widths, others, BrainSurgeon.before(refit), refit=refit)
    dense, pruned, found = decoder.module, applied(decoder, widths, align), point.others
    assert point.loss == pytest.approx(plain_divergence(dense, pruned, PARTS.searched), abs=1e-5)
    assert point.judged == pytest.approx(plain_divergence(dense, pruned, PARTS.judged), abs=1e-5)
    assert set(found) == {(block, one) for block, choices in others.items() for one in choices}
    for (block, own), loss in found.items():
        changed = tuple(own if index == block else one for index, one in enumerate(widths))
        mixed, other = copy.deepcopy(pruned), applied(decoder, changed, align)
        mixed.model.layers[block].mlp = other.model.layers[block].mlp
        if own.groups != widths[block].groups:  # attention changes, the MLP stays as it was fitted
            mixed.model.layers[block] = other.model.layers[block]
            mixed.model.layers[block].mlp = copy.deepcopy(pruned.model.layers[block].mlp)
        assert plain_divergence(dense, mixed, PARTS.searched) == pytest.approx(loss, abs=1e-5), (block, own)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
def test_the_loss_is_that_of_the_model_a_plan_makes(tiny, family, align):
    """Branches in parallel, and experts."""
    decoder = tiny(family)
    half = [max(8, one.channels // 16 * 8) for one in dense_widths(decoder)]
    widths = at(decoder, *half, without=[2], single=[1])
    refit = replace(REFIT, align=align)
    found = losses_around(decoder, PARTS, widths, {}, BrainSurgeon.before(refit), refit=refit)
    pruned = applied(decoder, widths, align)
    assert found.loss == pytest.approx(plain_divergence(decoder.module, pruned, PARTS.searched), abs=1e-4)


@pytest.mark.parametrize("fading", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_exchanges(tiny, seed, fading):
    decoder = tiny("llama", blocks=4)
    savings = Savings(decoder, width_sizes(decoder, stock=False), Budget("remove", 0.2))
    widths = at(decoder, 16, 16, 8, 16, without=[3])
    generator = torch.Generator().manual_seed(seed)
    near = NEAR.of(widths)
    losses = {(block, one): 2 + float(torch.randn(1, generator=generator)) for block in near for one in near[block]}
    found = exchange(Point(widths, 2.0, 2.0, losses), savings, fading=fading)

    def expected(choice):
        total = 0.0
        for block, one in enumerate(choice):
            for name in ("channels", "groups"):
                if getattr(one, name) != getattr(widths[block], name):
                    alone = widths[block].model_copy(update={name: getattr(one, name)})
                    total += (losses[block, alone] - 2) * (1 - fading) ** (3 - block)
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
    assert exchange(Point(widths, 2.0, 2.0, losses), savings, least=100.0) == widths, "nothing promises so much"


@pytest.mark.parametrize("compared", [1.5, 0.5])
def test_widths_that_lose_more_on_other_windows_are_given_up(tiny, monkeypatch, compared):
    decoder = tiny("llama", blocks=4)
    savings = Savings(decoder, width_sizes(decoder, stock=False), Budget("remove", 0.2))
    start = at(decoder, 16, 16, 16, 16)
    tried = []

    def worse(_decoder, _parts, widths, others, *_, **__):
        tried.append(widths)
        loss, judged = (1.0, 1.0) if widths == start else (compared, 1.5)
        around = {
            (block, one): loss + 0.01 * (one.channels - widths[block].channels) * (1 if block == 1 else -1)
            for block, found in others.items()
            for one in found
        }
        return Point(widths, loss, judged, around)

    monkeypatch.setattr(refinement, "losses_around", worse)
    found = refined(Measurements(decoder, WINDOWS), start, savings, NEAR, parts=PARTS, refit=REFIT, rounds=3)
    assert found == start == tried[0]
    assert len(tried) == len(set(tried)) > 1
    assert all(savings.weight(one) <= savings.weight(start) for one in tried)


def test_the_loss_does_not_rise_and_is_measured_once(tiny, monkeypatch, tmp_path):
    decoder = tiny("llama", blocks=4)
    savings = Savings(decoder, width_sizes(decoder, stock=False), Budget("remove", 0.2))
    start, measurements = at(decoder, 8, 8, 24, 8), Measurements(decoder, WINDOWS)

    def loss(widths):
        return losses_around(decoder, PARTS, widths, {}, BrainSurgeon(), refit=REFIT).judged

    found = refined(measurements, start, savings, NEAR, parts=PARTS, refit=REFIT, rounds=2)
    assert loss(found) <= loss(start)
    assert savings.weight(found) <= savings.weight(start)
    monkeypatch.setattr(refinement, "losses_around", None)
    assert refined(measurements, start, savings, NEAR, parts=PARTS, refit=REFIT, rounds=2) == found
    monkeypatch.undo()
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text("[1, 2, null]")
    assert refined(measurements, start, savings, NEAR, parts=PARTS, refit=REFIT, rounds=2) == found


def test_a_refined_plan(tiny):
    decoder = tiny("llama", blocks=4)
    settings = {"allocation": "global", "rounding": 8}
    plans = [
        make_plan(decoder, method="obs-width", texts=WINDOWS, settings=settings | {"refine": rounds}, remove=0.3)
        for rounds in (0, 1)
    ]
    assert plans[1].parameters_after <= plans[0].parameters_after
    assert prune(decoder, plans[1], texts=WINDOWS).parameter_count == plans[1].parameters_after
