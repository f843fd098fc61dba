"""Every block its own width: the dynamic program against all choices, levels and losses against models made by hand."""

import dataclasses
import itertools
import json

import pytest
import torch

from oracles import draw_windows, plain_divergence
from secateur import make_plan, prune
from secateur.calibration.folds import folds_of
from secateur.calibration.ridge import UNJUDGED
from secateur.errors import InputError, ModelError
from secateur.methods.allocation import database
from secateur.methods.allocation.database import Database, open_database
from secateur.methods.allocation.frontier import Option, best_choices
from secateur.methods.allocation.levels import Levels, levels_by_branch, levels_of, measure_levels
from secateur.methods.allocation.savings import Savings
from secateur.methods.allocation.sensitivity import Reaction, judging_windows
from secateur.methods.allocation.widths import allocations, convex_rises, expected_losses
from secateur.methods.budget import Budget
from secateur.methods.method import Measurements
from secateur.models.anatomy import find
from secateur.scores.unit_scores import cheapest_to_lose, removal_order
from secateur.surgery.width.target import width_sizes
from tiny_models import build

WINDOWS = draw_windows(windows=8)
WRITERS = {"heads": "self_attn.o_proj", "channels": "mlp.down_proj"}


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("seed", range(5))
def test_the_dynamic_program_finds_the_best_of_all_choices(seed):
    generator = torch.Generator().manual_seed(seed)
    branches = []
    for _ in range(5):
        saved = torch.randint(1, 6, (3,), generator=generator).cumsum(0).tolist()
        losses = torch.rand(3, generator=generator).cumsum(0).tolist()
        pairs = zip(saved, losses, strict=True)
        branches.append([Option(0, 0.0), *(Option(float(amount), loss) for amount, loss in pairs)])
    found = best_choices(branches)
    totals = {}
    for choice in itertools.product(range(4), repeat=5):
        saved = sum(branches[place][level].saved for place, level in enumerate(choice))
        loss = sum(branches[place][level].loss for place, level in enumerate(choice))
        totals[saved] = min(totals.get(saved, torch.inf), loss)
    assert [one.saved for one in found] == sorted(totals)
    assert [one.loss for one in found] == pytest.approx([totals[saved] for saved in sorted(totals)])
    for one in found:
        assert sum(branches[place][level].saved for place, level in enumerate(one.levels)) == one.saved
    assert found[0].levels == (0,) * 5


def test_seconds_are_counted_in_small_parts():
    generator = torch.Generator().manual_seed(0)
    branches = [
        [Option(0, 0.0), *(Option(float(pair[0]), float(pair[1])) for pair in torch.rand(3, 2, generator=generator))]
        for _ in range(4)
    ]
    found = best_choices(branches)
    every = [
        (
            sum(branches[place][level].saved for place, level in enumerate(choice)),
            sum(branches[place][level].loss for place, level in enumerate(choice)),
        )
        for choice in itertools.product(range(4), repeat=4)
    ]
    for wanted in (0.3, 1.0, 1.7):
        exact = min(loss for saved, loss in every if saved >= wanted)
        assert min(one.loss for one in found if one.saved >= wanted) == pytest.approx(exact, abs=1e-6)


def test_nothing_to_save():
    assert [one.levels for one in best_choices([[Option(0.0, 0.0)], [Option(0.0, 0.0)]])] == [(0, 0)]


def test_the_order_of_removal_begins_with_what_greedy_removal_takes():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    weight, gram = torch.randn(5, 12, generator=generator, dtype=torch.float64), inputs.T @ inputs
    units = torch.arange(12).view(1, 6, 2)
    order = removal_order(weight, gram, units, batch=1)
    assert sorted(order.tolist()) == list(range(6))
    for keep in range(1, 6):
        stay = cheapest_to_lose(weight, gram, units, keep, batch=1)[0]
        assert set(order[: 6 - keep].tolist()) == set((~stay).nonzero().flatten().tolist())


def inputs_of(block, part):
    """What enters an output projection, window after window, and the residual stream that leaves the block."""
    module, seen = build("llama", blocks=4), {}
    layer = module.model.layers[block]
    find(layer, WRITERS[part]).register_forward_pre_hook(lambda _, args: seen.update(inputs=args[0]))
    layer.register_forward_hook(lambda _m, _a, out: seen.update(leaves=out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        module(WINDOWS.tokens)
    return seen["inputs"].double(), seen["leaves"].double(), find(layer, WRITERS[part]).weight.detach().double()


def levels(decoder, groups=()):
    found = measure_levels(decoder, WINDOWS, levels_by_branch(decoder, range(4), 8, groups))
    return [one for measured in found for one in measured]


def opened(decoder, free=range(4), windows=WINDOWS, attention=(0, 1, 2, 3), **more):
    return open_database(Measurements(decoder, windows), free, 8, attention, **more)


@pytest.mark.parametrize("part", WRITERS)
def test_errors_are_those_of_a_ridge_regression_on_held_out_windows(tiny, part):
    """Straight line: fit on three windows of four, judge on the fourth, every token relative to the stream."""
    found = levels(tiny("llama", blocks=4), groups=[1])
    mlp, (writer,) = next(one for one in found if (one[0].block, one[0].part) == (1, part))
    inputs, leaves, weight = inputs_of(1, part)
    held_out = folds_of(WINDOWS).held_out
    assert held_out.any()
    heavy = 1 / leaves.square().mean(-1)
    stay = (writer != 0).any(dim=0)
    assert int(stay.sum()) == mlp.keep[mlp.probe] * {"heads": 16, "channels": 1}[part]
    x, w = inputs[~held_out].flatten(0, 1), heavy[~held_out].flatten()
    gram = (x * w[:, None]).T @ x
    ridge = UNJUDGED * gram.diagonal().mean() * torch.eye(int(stay.sum()), dtype=torch.float64)
    right = gram[stay][:, ~stay] @ weight[:, ~stay].T
    expected = weight[:, stay] + torch.linalg.solve(gram[stay][:, stay] + ridge, right).T
    torch.testing.assert_close(writer[:, stay].double(), expected, rtol=1e-4, atol=1e-5)
    x, w = inputs[held_out].flatten(0, 1), heavy[held_out].flatten()
    wrong = x @ weight.T - x[:, stay] @ expected.T
    error = (w * wrong.square().mean(-1)).mean()
    assert mlp.errors[mlp.probe] == pytest.approx(float(error), rel=1e-4)
    assert mlp.errors[0] == 0
    assert list(mlp.errors) == sorted(mlp.errors)


def test_levels_go_from_all_to_none():
    found = levels_of(1536, 64)
    assert (found[0], found[-1], len(found)) == (1536, 0, 13)
    assert all(one % 64 == 0 for one in found)
    assert levels_of(10, 16) == (10, 0)


def test_reactions_are_the_divergence_of_models_changed_in_one_branch(tiny):
    decoder = tiny("llama", blocks=4)
    found = opened(decoder, attention=(1, 3), single=True)
    judged = judging_windows(WINDOWS)
    assert judged.tokens.tolist() == WINDOWS.tokens[folds_of(WINDOWS).held_out].tolist()
    dense = build("llama", blocks=4)
    for (one, (writer,)), reaction in zip(levels(decoder, groups=(1, 3)), found.reactions, strict=True):
        for weight, measured in ((writer, reaction.probe), (torch.zeros_like(writer), reaction.removed)):
            if measured is None:
                assert one.part == "heads", "what attention costs depends on what is gone"
                continue
            module = build("llama", blocks=4)
            with torch.no_grad():
                find(module.model.layers[one.block], WRITERS[one.part]).weight.copy_(weight)
            assert plain_divergence(dense, module, judged) == pytest.approx(measured, abs=1e-6)


def test_attention_goes_in_the_order_of_what_it_costs_given_what_is_gone(tiny):
    found = opened(tiny("llama", blocks=4))
    judged, dense = judging_windows(WINDOWS), build("llama", blocks=4)

    def lost(gone):
        module = build("llama", blocks=4)
        with torch.no_grad():
            for block in gone:
                module.model.layers[block].self_attn.o_proj.weight.zero_()
        return plain_divergence(dense, module, judged)

    assert 0 < len(found.attention) < 4, "one stays"
    highest = 0.0
    for count in range(1, len(found.attention) + 1):
        highest = max(highest, lost(found.attention[:count]))
        assert found.lost[count - 1] == pytest.approx(highest, abs=1e-5)
    alone = {block: lost((block,)) for block in range(4)}
    assert found.attention[0] == min(alone, key=alone.get)


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        (2.0, (0, 0.25, 0.5, 1.0, 2.0)),
        (8.0, (0, 0.125, 0.5, 2.0, 8.0)),
        (1.0, (0, 0.25, 0.5, 0.5**0.5, 1.0)),
        (0.4, (0, 0.25, 0.5, 0.5, 0.5)),
    ],
    ids=["linear", "quadratic", "slow", "noise"],
)
def test_expected_losses_go_through_what_was_measured(removed, expected):
    mlp = Levels(0, "channels", (8, 6, 4, 2, 0), (0.0, 0.1, 0.2, 0.4, 0.8), 2)
    found = expected_losses(mlp, 0.5, removed)
    assert (found[2], found[4]) == pytest.approx((expected[2], expected[4]))
    if removed > 0.5:
        assert found == pytest.approx(expected)
    assert list(found) == sorted(found)
    assert expected_losses(mlp, -0.1, -0.2)[-1] < 1e-3, "noise below nothing counts as nothing"


def test_all_or_none():
    mlp = Levels(0, "channels", (8, 0), (0.0, 3.0), 1)
    assert expected_losses(mlp, 0.7, 0.7) == (0.0, 0.7)
    assert expected_losses(mlp, -0.1, -0.1) == (0.0, 0.0)


def test_rises_that_never_fall():
    assert convex_rises((1.0, 3.0, 6.0)) == (1.0, 2.0, 3.0)
    assert convex_rises((0.5, 0.6, 3.0, 3.1, 9.0)) == pytest.approx((0.3, 0.3, 1.25, 1.25, 5.9))
    assert convex_rises(()) == ()


@pytest.mark.parametrize("fading", [0.0, 0.3])
def test_single_groups_against_all_choices(tiny, fading):
    """Attention without a place in the order keeps a group; the other may go, at what that cost in the order."""
    decoder = tiny("llama", blocks=4)
    groups = [Levels(block, "heads", (2, 1, 0), (0.0, 0.2, 0.8), 1) for block in (1, 2)]
    mlps = [Levels(block, "channels", (24, 8, 0), (0.0, 0.3, 0.9), 1) for block in range(4)]
    worth = [Reaction(0.04, None), Reaction(0.01, None), *(Reaction(0.1 + block, 2.0 + block) for block in range(4))]
    measured = Database((*groups, *mlps), tuple(worth), attention=(2,), lost=(0.16,))
    savings = Savings(decoder, width_sizes(decoder, stock=False), Budget("remove", 0.2))
    lasts = [(1 - fading) ** (3 - block) for block in range(4)]
    cost = {
        (1, 1): 0.04 * lasts[1],
        (2, 1): 0.01 * lasts[2],
        (2, 0): 0.16 * lasts[2],
        **{
            (block, "mlp", keep): lasts[block] * loss
            for block in range(4)
            for keep, loss in ((8, 0.1 + block), (0, 2.0 + block))
        },
    }

    def price(widths):
        attention = sum(cost[block, own.groups] for block, own in enumerate(widths) if own.groups < 2)
        return attention + sum(
            cost[block, "mlp", own.channels] for block, own in enumerate(widths) if own.channels < 24
        )

    dense = savings.dense
    every = [
        tuple(
            own.model_copy(update={"channels": channels, "groups": {1: one, 2: two}.get(block, own.groups)})
            for block, (own, channels) in enumerate(zip(dense, narrow, strict=True))
        )
        for one in (2, 1)
        for two in (2, 1, 0)
        for narrow in itertools.product((24, 8, 0), repeat=4)
    ]
    found = allocations(measured, savings, fading)
    assert any(own.groups == 1 for widths in found for own in widths)
    saved = {
        widths: sum(savings.of(b, groups=w.groups, channels=w.channels) for b, w in enumerate(widths))
        for widths in every
    }
    for widths in found[::7]:
        best = min(price(one) for one in every if saved[one] >= saved[widths])
        assert price(widths) == pytest.approx(best)


def test_single_groups_go(tiny):
    decoder = tiny("llama", blocks=4)
    settings = {"allocation": "global", "attention": "groups", "rounding": 8}
    plan = make_plan(decoder, method="obs-width", texts=WINDOWS, settings=settings, remove=0.3)
    assert 1 in {one.groups for one in plan.steps[0].widths}
    pruned = prune(decoder, plan, texts=WINDOWS)
    assert pruned.parameter_count == plan.parameters_after
    with pytest.raises(InputError, match="attention=groups is of allocation=global"):
        make_plan(decoder, method="obs-width", texts=WINDOWS, remove=0.2, settings={"attention": "groups"})


def test_measured_once(tiny, monkeypatch):
    decoder = tiny("llama", blocks=4)
    first = opened(decoder)
    monkeypatch.setattr(database, "measure_levels", None)
    monkeypatch.setattr(database, "reactions", None)
    assert opened(decoder) == first
    for other in (
        {"windows": draw_windows(windows=8, seed=1)},
        {"free": range(3)},
        {"attention": ()},
        {"single": True},
    ):
        with pytest.raises(TypeError):
            opened(decoder, **other)


def test_an_interrupted_measurement_goes_on(tiny, monkeypatch, tmp_path):
    decoder = tiny("llama", blocks=4)
    true_levels, blocks = measure_levels, []

    def killed(*given, **more):
        for one in true_levels(*given, **more):
            if one[0][0].block == 2:
                raise KeyboardInterrupt
            yield one

    def counted(*given, **more):
        for one in true_levels(*given, **more):
            blocks.append(one[0][0].block)
            yield one

    monkeypatch.setattr(database, "measure_levels", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(decoder, single=True)
    monkeypatch.setattr(database, "measure_levels", counted)
    found = opened(decoder, single=True)
    assert blocks == [2, 3]
    assert list(found.branches) == [one for one, _ in levels(decoder, groups=range(4))]
    assert not list(tmp_path.rglob("block-*")), "what is measured needs them no more"


def test_damaged_measurements_are_made_again(tiny, tmp_path):
    decoder = tiny("llama", blocks=4)
    first = opened(decoder)
    (file,) = tmp_path.rglob("levels.json")
    file.write_text('{"branches": [{}], "reactions": []}')
    assert opened(decoder) == first
    assert json.loads(file.read_text())["branches"]


@pytest.mark.parametrize("heads", ["last", "never"])
@pytest.mark.parametrize("amount", [{"remove": 0.2}, {"target_params": 40_000}])
def test_amounts_are_met(tiny, heads, amount):
    decoder = tiny("llama", blocks=4)
    settings = {"allocation": "global", "heads": heads, "rounding": 8}
    plan = make_plan(decoder, method="obs-width", texts=WINDOWS, settings=settings, **amount)
    if "remove" in amount:
        assert abs(plan.removed_fraction - 0.2) < 0.03
    else:
        assert 0.9 * 40_000 < plan.parameters_after <= 40_000
    (step,) = plan.steps
    groups = {one.groups for one in step.widths}
    assert groups <= {"last": {0, 2}, "never": {2}}[heads]
    assert step.widths[0].groups, "the first attention stays: the layout of Nemotron-NAS needs it"
    pruned = prune(decoder, plan, texts=WINDOWS)
    assert pruned.parameter_count == plan.parameters_after


def test_cheaper_mlps_give_more(tiny):
    decoder = tiny("llama", blocks=4)
    measured = opened(decoder)
    worth = [Reaction(0.001, 0.002) if one.block == 2 else Reaction(1.0, 2.0) for one in measured.branches]
    sizes = width_sizes(decoder, stock=False)
    savings = Savings(decoder, sizes, Budget("remove", 0.07))
    dear = dataclasses.replace(measured, reactions=tuple(worth), lost=tuple(5.0 for _ in measured.lost))
    found = savings.meet(allocations(dear, savings))
    assert found[2].channels < 24
    assert all(one == sizes.blocks[0].dense for block, one in enumerate(found) if block != 2)


def test_uniform_amounts_contradict_it(tiny):
    with pytest.raises(InputError, match="ffn: sets uniform widths; with allocation=global ask for an amount"):
        make_plan(
            tiny("llama", blocks=4), method="obs-width", texts=WINDOWS, settings={"allocation": "global", "ffn": 8}
        )


def test_single_groups_are_of_uniform_widths(tiny):
    with pytest.raises(InputError, match="heads=even is of uniform widths"):
        make_plan(
            tiny("llama", blocks=4),
            method="obs-width",
            texts=WINDOWS,
            remove=0.2,
            settings={"allocation": "global", "heads": "even"},
        )


def test_families_that_the_modelling_file_cannot_hold(tiny):
    with pytest.raises(ModelError, match="modelling file"):
        make_plan(tiny("gemma2"), method="obs-width", texts=WINDOWS, remove=0.2, settings={"allocation": "global"})


def test_a_little_more_at_less_loss_is_taken_instead():
    branches = [[Option(0, 0.0), Option(1000, 0.5), Option(1001, 0.4)], [Option(0, 0.0), Option(1000, 1.0)]]
    assert [(one.levels, one.saved) for one in best_choices(branches)] == [
        ((0, 0), 0),
        ((2, 0), 1001),
        ((2, 1), 2001),
    ]
