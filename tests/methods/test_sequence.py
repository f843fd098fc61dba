"""Several methods in one plan: shares of one budget, each measured on what the one before left."""

import pytest
import torch

from oracles import draw_windows
from secateur import Plan, make_plan, prune
from secateur.data.windows import Windows
from secateur.errors import InputError, SecateurWarning
from secateur.methods.budget import Budget
from secateur.methods.sequence import part_of, read_sequence
from secateur.plan.steps import DropBlocks, SliceHidden

WINDOWS = Windows.of(torch.randint(3, 2000, (4, 32), generator=torch.Generator().manual_seed(0)))


def test_names_and_shares():
    parts = read_sequence("shortgpt:3, slicegpt:1", {"shortgpt.protect_first": "2"})
    assert [(part.method.name, part.share) for part in parts] == [("shortgpt", 0.75), ("slicegpt", 0.25)]
    assert parts[0].settings.protect_first == 2
    assert [part.share for part in read_sequence("sleb,uidl", {})] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("spec", "settings", "says"),
    [
        ("shortgpt:x,slicegpt", {}, "'x' is not a number"),
        ("shortgpt:0,slicegpt:1", {}, "positive"),
        ("shortgpt,slicegtp", {}, "unknown method 'slicegtp'"),
        ("shortgpt,slicegpt", {"rounding": 4}, "say whose setting"),
        ("shortgpt,slicegpt", {"sleb.protect_first": 4}, "unknown method in the sequence 'sleb'"),
        ("shortgpt,slicegpt", {"slicegpt.rule": 4}, "unknown setting of slicegpt 'rule'"),
    ],
)
def test_sequences_that_cannot_be(spec, settings, says):
    with pytest.raises(InputError, match=says):
        read_sequence(spec, settings)


@pytest.mark.parametrize(
    ("amount", "settings", "says"),
    [
        ({"blocks": 2}, {}, "several methods share one budget"),
        ({"remove": 0.2}, {"uidl.window": 2}, "window and another amount contradict"),
        ({}, {"uidl.window": 2}, "window and another amount contradict"),
        ({}, {}, "no amount given"),
        ({"target_params": "90M"}, {}, "has only"),
    ],
)
def test_amounts_of_a_sequence(amount, settings, says, bundled):
    with pytest.raises(InputError, match=says):
        make_plan(bundled, method="uidl,stock-slicing", texts=WINDOWS, settings=settings, **amount)


def test_depth_then_width(bundled):
    plan = make_plan(bundled, method="shortgpt:0.5,stock-slicing:0.5", remove=0.3, texts=WINDOWS)
    drop, cut = plan.steps
    assert isinstance(drop, DropBlocks)
    assert isinstance(cut, SliceHidden)
    assert len(drop.blocks) == 2
    assert len(cut.widths) == 10
    assert plan.requested == {"remove": 0.3, "methods": "shortgpt:0.5,stock-slicing:0.5"}
    assert plan.removed_fraction == pytest.approx(0.3, abs=0.06)
    assert Plan.model_validate_json(plan.to_json()) == plan
    pruned = prune(bundled, plan, texts=WINDOWS)
    assert (pruned.block_count, pruned.config.hidden_size) == (10, cut.head_width)
    assert pruned.parameter_count == plan.parameters_after


def test_the_second_method_measures_what_the_first_left(bundled):
    plan = make_plan(bundled, method="last-n:1,shortgpt:1", remove=0.29, texts=WINDOWS)
    first, second = plan.steps
    left = prune(bundled, make_plan(bundled, method="last-n", blocks=len(first.blocks)))
    alone = make_plan(left, method="shortgpt", blocks=len(second.blocks), texts=WINDOWS)
    assert second.blocks == alone.steps[0].blocks
    assert len(plan.kept_blocks()) == 8


def test_the_last_part_stays_below_a_target(bundled):
    plan = make_plan(bundled, method="shortgpt,slicegpt", target_params="4.2M", texts=WINDOWS)
    assert plan.parameters_after <= 4_200_000
    assert plan.parameters_after > 4_000_000


def test_what_one_part_misses_the_next_makes_up_for():
    parts = read_sequence("shortgpt:0.5,slicegpt:0.5", {})
    budget = Budget("remove", 0.2)
    assert part_of(budget, parts, 0, 1000, 1000) == Budget("remove", pytest.approx(0.1))
    assert part_of(budget, parts, 1, 1000, 950) == Budget("remove", pytest.approx(1 - 800 / 950), is_rest=True)
    assert part_of(budget, parts, 1, 1000, 790) is None


def test_a_rest_too_small_for_the_last_method_is_left(bundled):
    with pytest.warns(SecateurWarning, match="obs-width skipped: the remaining budget is below half its smallest cut"):
        plan = make_plan(bundled, method="shortgpt:0.9,obs-width:0.1", remove=0.15, texts=WINDOWS)
    assert [step.kind for step in plan.steps] == ["drop-blocks"]
    assert plan.removed_fraction == pytest.approx(0.15, abs=0.01)
    with pytest.raises(InputError, match="smallest cut"):
        make_plan(bundled, method="shortgpt:0.1,obs-width:0.9", remove=0.15, texts=WINDOWS)


def test_blocks_cannot_go_after_slicing(tiny):
    with pytest.raises(Exception, match="dense model"):
        make_plan(tiny("llama"), method="slicegpt:0.8,shortgpt:0.2", remove=0.4, texts=draw_windows())
