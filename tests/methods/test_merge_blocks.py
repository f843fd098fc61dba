"""Sliding-window merging against the procedure done the slow way: a whole copied model for every candidate."""

import copy
import itertools
import random

import pytest
import torch
from torch import nn

from oracles import draw_tokens, draw_windows, forward, no_real_parameters, walk
from secateur import Plan, make_plan, open_model, prune
from secateur.calibration.store import StateStore
from secateur.errors import InputError, NumericsError
from secateur.methods.budget import Budget
from secateur.methods.merge_blocks import Slide, find_threshold, slide
from secateur.methods.method import Measurements, find_method
from secateur.plan.steps import MergeBlocks, Sizes
from secateur.scores.merge_similarity import MergeProbe, window_cosines
from secateur.surgery.depth.merging import shares_for
from tiny_models import build

BLOCKS = 8

# The slow way


def copy_with(module, spans, rule):
    """A copy in which each span is one block, made and taken apart by hand; the family keeps its blocks like Llama."""
    model = copy.deepcopy(module)
    layers = model.model.layers
    gone = set()
    with torch.no_grad():
        for low, high in spans:
            for name, parameter in layers[low].named_parameters():
                values = [module.model.layers[k].get_parameter(name).double() for k in range(low, high + 1)]
                if rule in ("highest", "top"):
                    parameter.copy_(values[0] if rule == "top" and "norm" in name else values[-1])
                else:
                    parameter.copy_(values[0] + sum(value - values[0] for value in values[1:]))
            gone |= set(range(low + 1, high + 1))
    kept = [index for index in range(len(layers)) if index not in gone]
    model.model.layers = nn.ModuleList(layers[index] for index in kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    model.config.num_hidden_layers = len(kept)
    return model


@torch.no_grad()
def final_states(model, windows):
    given = {} if windows.mask is None else {"attention_mask": windows.mask.long()}
    return model.model(input_ids=windows.tokens, use_cache=False, **given).last_hidden_state.double()


def plain_similarity(module, spans, rule, windows):
    found = []
    mask = torch.ones_like(windows.tokens, dtype=torch.bool) if windows.mask is None else windows.mask
    for a, b, real in zip(
        final_states(module, windows), final_states(copy_with(module, spans, rule), windows), mask, strict=True
    ):
        a, b = a[real].flatten(), b[real].flatten()
        found.append(float(a @ b / (a.norm() * b.norm())))
    return sum(found) / len(found)


def slowly(module, windows, threshold, rule, first=0, last=1, apart=()):
    """The procedure, word for word; `apart` holds blocks that cannot be in one window with the next."""
    merged, accepted = [], None
    high = len(module.model.layers) - 1 - last
    low = high - 1
    while low >= first:
        grown = low not in apart and plain_similarity(module, [*merged, (low, high)], rule, windows) > threshold
        if grown:
            accepted = (low, high)
            low -= 1
        else:
            if accepted is not None:
                merged.append(accepted)
            accepted, high = None, low
            low = high - 1
    if accepted is not None:
        merged.append(accepted)
    return tuple(sorted(merged))


def merged_by(decoder, windows, **settings):
    (step,) = make_plan(decoder, method="swm", texts=windows, settings=settings).steps
    return step


THRESHOLDS = (0.05, 0.3, 0.5, 0.7, 0.85)


@pytest.mark.parametrize("rule", ["highest", "top", "delta-sum"])
@pytest.mark.parametrize(
    ("name", "side", "apart"),
    [
        ("llama", None, ()),
        ("llama", "left", ()),
        ("llama", "right", ()),
        ("qwen3_moe-mixed", None, (0, 1, 4, 5)),
        ("gemma3_text", None, (1, 2, 4, 5)),
        ("smollm3", "right", (0, 1, 3, 4, 6)),
    ],
)
def test_against_the_slow_way(name, side, apart, rule, tiny):
    decoder, windows = tiny(name), draw_windows(side=side)
    for threshold in THRESHOLDS if name == "llama" else (0.3, 0.7):
        step = merged_by(decoder, windows, threshold=threshold, rule=rule)
        assert step.windows == slowly(decoder.module, windows, threshold, rule, apart=apart)
        assert step.threshold == threshold
        if step.windows:
            assert step.similarity == pytest.approx(
                plain_similarity(decoder.module, step.windows, rule, windows), abs=1e-4
            )
            assert step.similarity > threshold


@pytest.mark.parametrize("threshold", [0.2, 0.6])
def test_protected_blocks(threshold, tiny):
    decoder, windows = tiny("llama"), draw_windows()
    step = merged_by(decoder, windows, threshold=threshold, protect_first=2, protect_last=3)
    assert step.windows == slowly(decoder.module, windows, threshold, "highest", first=2, last=3)


def test_layer_types_on_request(tiny):
    decoder, windows = tiny("gemma2"), draw_windows()
    step = merged_by(decoder, windows, threshold=0.3, across_types=True)
    assert step.windows == slowly(decoder.module, windows, 0.3, "highest")
    with pytest.raises(InputError, match="differ in layer type everywhere; across_types=true"):
        merged_by(decoder, windows, threshold=0.3)


@pytest.mark.parametrize("skeleton", [False, True], ids=["memory", "skeleton"])
@pytest.mark.parametrize(("name", "rule"), [("llama", "highest"), ("llama", "delta-sum"), ("qwen3_moe-mixed", "top")])
def test_similarities_of_any_windows(name, rule, skeleton, tiny):
    decoder, windows = tiny(name, skeleton=skeleton), draw_windows(side="left")
    asked = [((6, 7),), ((2, 4),), ((6, 7), (2, 3)), ((3, 4),)] + [((0, 7),), ((5, 7), (1, 3))] * (name == "llama")
    with StateStore(0) as store:
        probe = MergeProbe(decoder, windows, store, lambda span: shares_for(rule, span), range(7), batch_size=3)
        for spans in asked:
            expected = plain_similarity(tiny(name).module, spans, rule, windows)
            assert probe.similarity(spans) == pytest.approx(expected, abs=1e-4), spans
        before = probe.evaluated
        assert all(probe.similarity(spans) == probe.known[spans] for spans in asked)
        assert probe.evaluated == before, "nothing is measured twice"
    assert not skeleton or no_real_parameters(decoder.module)


def test_only_what_is_needed_is_run(tiny):
    with StateStore() as store:
        probe = MergeProbe(tiny("llama"), draw_windows(), store, lambda span: shares_for("top", span), range(6))
        assert probe.evaluated == BLOCKS
        probe.similarity(((4, 6),))
        assert probe.evaluated == BLOCKS + 2  # the merged block and block 7
        probe.similarity(((4, 6), (1, 2)))
        assert probe.evaluated == BLOCKS + 2 + 4  # 1 and 2 in one, 3, 4 to 6 in one, 7


def test_cosines_by_hand():
    left = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [float("nan"), 0.0]]])
    right = torch.tensor([[[1.0, 0.0], [0.0, -2.0]], [[6.0, 8.0], [1.0, 1.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    assert window_cosines(left, right, mask).tolist() == pytest.approx([(1 - 4) / 5, 1.0])


# One run of the window, on made-up similarities


def no_barrier(_):
    return True


def test_everything_is_accepted_and_the_bottom_window_is_not_lost():
    run = slide(lambda merged: 0.9, no_barrier, range(5, -1, -1), 0.5)
    assert run.merged == ((0, 6),)
    assert run == Slide(((0, 6),), -float("inf"), 0.9)


def test_nothing_is_accepted():
    run = slide(lambda merged: 0.4, no_barrier, range(5, -1, -1), 0.5)
    assert run == Slide((), 0.4, float("inf"))


def test_the_threshold_itself_is_not_enough():
    assert slide(lambda merged: 0.5, no_barrier, range(5, -1, -1), 0.5).merged == ()


def test_a_refused_block_begins_the_next_window():
    refused = {((3, 6),), ((4, 6), (1, 3))}
    asked = []

    def similarity(merged):
        asked.append(merged)
        return 0.1 if merged in refused else 0.9

    run = slide(similarity, no_barrier, range(5, -1, -1), 0.5)
    assert run.merged == ((4, 6), (2, 3), (0, 1))
    assert asked == [((5, 6),), ((4, 6),), ((3, 6),), ((4, 6), (2, 3)), ((4, 6), (1, 3)), ((4, 6), (2, 3), (0, 1))]


def test_barriers_are_not_measured():
    def similarity(merged):
        assert not any(low <= 3 < high for low, high in merged)
        return 0.9

    assert slide(similarity, lambda low: low != 3, range(5, -1, -1), 0.5).merged == ((4, 6), (0, 3))


def test_a_window_needs_room():
    assert slide(lambda merged: 1.0, no_barrier, [], 0.5).merged == ()
    assert slide(lambda merged: 1.0, no_barrier, [4], 0.5).merged == ((4, 5),)


def made_up(seed):
    """Similarities that differ from candidate to candidate, and those asked for so far."""
    known = {}

    def similarity(merged):
        noise = random.Random(f"{seed}{merged}").random()
        gone = sum(high - low for low, high in merged)
        return known.setdefault(merged, 0.97**gone * (0.7 + 0.3 * noise))

    return similarity, known


@pytest.mark.parametrize("seed", range(8))
def test_no_run_is_left_out(seed):
    """Without a number that can be reached, all thresholds between all similarities have been tried in the end."""
    similarity, known = made_up(seed)
    lows = range(6, -1, -1)
    runs = find_threshold(lambda t: slide(similarity, no_barrier, lows, t), known.values, wanted=99)
    asked = len(known)
    by_force = [slide(similarity, no_barrier, lows, step / 2000) for step in range(-1, 2001)]
    assert {run.merged for run in by_force} <= {run.merged for run in runs}
    assert len(known) == asked, "trying all thresholds asks for nothing new"
    assert len({run.merged for run in runs}) == len(runs)
    for left, right in itertools.pairwise(runs):
        assert left.ceiling == right.floor


@pytest.mark.parametrize("seed", range(4))
def test_bisection_stops_at_the_first_run_that_fits(seed):
    similarity, known = made_up(seed)
    runs = find_threshold(lambda t: slide(similarity, no_barrier, range(6, -1, -1), t), known.values, wanted=99)
    for wanted in {run.gone for run in runs}:
        again, few = made_up(seed)
        found = find_threshold(lambda t, f=again: slide(f, no_barrier, range(6, -1, -1), t), few.values, wanted)
        assert any(run.gone == wanted for run in found)
        assert len(few) <= len(known)


def test_one_run_where_nothing_is_measured():
    assert len(find_threshold(lambda t: slide(None, lambda _: False, range(3, -1, -1), t), list, wanted=2)) == 1


# Budgets


@pytest.mark.parametrize("rule", ["highest", "top", "delta-sum", "weighted"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_any_number_of_blocks(count, rule, tiny):
    decoder, windows = tiny("llama"), draw_windows()
    plan = make_plan(decoder, method="swm", blocks=count, texts=windows, settings={"rule": rule})
    (step,) = plan.steps
    assert len(plan.kept_blocks()) == BLOCKS - count
    assert BLOCKS - 1 not in {block for window in step.windows for block in window}
    if step.threshold is not None and step.threshold > 0:
        again = merged_by(decoder, windows, threshold=step.threshold, rule=rule)
        assert (again.windows, again.similarity) == (step.windows, step.similarity)


def test_the_windows_do_not_depend_on_what_was_measured_before(tiny):
    """A search measures one model for several numbers of blocks; started again after a kill it has lost that."""
    swm, windows = find_method("swm"), draw_windows(windows=8)
    settings = swm.read_settings({})
    found = 0
    for seed in range(3):
        decoder = tiny("llama", seed=seed, blocks=BLOCKS)
        shared = Measurements(decoder, windows)
        for blocks in (6, 5, 4, 3, 2, 1, 2, 3):
            alone = Measurements(decoder, windows)
            steps = [swm.decision(one, settings, Budget("blocks", blocks)).steps for one in (shared, alone)]
            assert steps[0] == steps[1]
            measured = [next(iter(one.cache.values())) for one in (shared, alone)]
            found += len(measured[0]) > len(measured[1])
    assert found, "earlier decisions measured more"


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_threshold_is_searched_on_few_windows_and_its_best_results_are_compared_on_all(count, tiny, monkeypatch):
    asked = {}

    class Recording(MergeProbe):
        def __init__(self, decoder, windows, *given):
            super().__init__(decoder, windows, *given)
            self.seen = asked.setdefault(len(windows), set())

        def similarity(self, merged):
            self.seen.add(merged)
            return super().similarity(merged)

    monkeypatch.setattr("secateur.methods.merge_blocks.MergeProbe", Recording)
    decoder, few = tiny("llama"), draw_windows(windows=2)
    repeated = type(few).of(few.tokens.repeat_interleave(8, 0))  # every eighth window shows what all show

    def found(**settings):
        asked.clear()
        (step,) = make_plan(decoder, method="swm", blocks=count, texts=repeated, settings=settings).steps
        return step

    screened = found()
    assert set(asked) == {2, 16}
    assert asked[16] < asked[2]
    assert len(asked[16]) <= 4
    exact = found(screen=1.0)
    assert set(asked) == {16}
    assert screened.windows == exact.windows
    assert screened.similarity == pytest.approx(exact.similarity, abs=1e-5)


def test_shares_of_all_parameters(tiny):
    decoder, windows = tiny("llama"), draw_windows()
    share = decoder.block_parameter_counts()[0] / decoder.parameter_count
    for count in (1, 3):
        plan = make_plan(decoder, method="swm", remove=(count + 0.3) * share, texts=windows)
        assert plan.removed_fraction == pytest.approx(count * share)
        below = int(decoder.parameter_count * (1 - (count - 0.3) * share))
        plan = make_plan(decoder, method="swm", target_params=below, texts=windows)
        assert plan.removed_fraction == pytest.approx(count * share)


@pytest.mark.parametrize("share", [0.92, 0.8])
def test_blocks_of_two_sizes(share, tiny):
    decoder = tiny("qwen3_moe-mixed")
    assert len(set(decoder.block_parameter_counts())) == 2
    target = int(share * decoder.parameter_count)
    plan = make_plan(decoder, method="swm", target_params=target, texts=draw_windows())
    assert plan.parameters_after <= target
    assert prune(decoder, plan).parameter_count == plan.parameters_after


@pytest.mark.parametrize("amount", [{"blocks": 7}, {"remove": 0.9}, {"remove": 0.01}, {"target_params": 100}])
def test_out_of_reach(amount, tiny):
    with pytest.raises(InputError, match=r"at most 6 blocks|unreachable"):
        make_plan(tiny("llama"), method="swm", texts=draw_windows(windows=2, positions=8), **amount)


def test_nothing_for_nothing(tiny, monkeypatch):
    monkeypatch.setattr("secateur.methods.merge_blocks.MergeProbe", None)
    for rule in ("highest", "weighted"):
        plan = make_plan(tiny("llama"), method="swm", blocks=0, settings={"rule": rule})
        assert plan.steps[0].windows == ()
        assert plan.texts is None
        assert prune(tiny("llama"), plan).fingerprint == tiny("llama").fingerprint


@pytest.mark.parametrize("settings", [{"protect_first": 6}, {"protect_last": 7}, {"protect_first": 9}])
def test_everything_protected(settings, tiny):
    with pytest.raises(InputError, match="swm: fewer than two of 8 blocks may change; lower protect_first"):
        make_plan(tiny("llama"), method="swm", blocks=1, texts=draw_windows(), settings=settings)


def test_blocks_that_all_differ_in_shape(tiny):
    with pytest.raises(InputError, match="differ in shape everywhere"):
        make_plan(tiny("qwen3_moe-step"), method="swm", blocks=1, texts=draw_windows())


# Settings


@pytest.mark.parametrize("value", [0, -0.5, 1.01, "high", float("nan")])
def test_thresholds_that_are_none(value, tiny):
    with pytest.raises(InputError, match="swm: threshold="):
        merged_by(tiny("llama"), draw_windows(), threshold=value)


@pytest.mark.parametrize("settings", [{"rule": "sum"}, {"protect_last": 0}, {"protect_first": -1}, {"window": 3}])
def test_values_a_setting_cannot_take(settings, tiny):
    with pytest.raises(InputError, match="swm"):
        merged_by(tiny("llama"), draw_windows(), threshold=0.5, **settings)


@pytest.mark.parametrize("amount", [{"remove": 0.3}, {"blocks": 2}, {"target_params": 60_000}])
def test_a_threshold_and_another_amount_contradict_each_other(amount, tiny):
    with pytest.raises(InputError, match="threshold and another amount contradict"):
        make_plan(tiny("llama"), method="swm", texts=draw_windows(), settings={"threshold": 0.5}, **amount)


def test_thresholds_at_the_ends(tiny):
    decoder, windows = tiny("llama"), draw_windows()
    plan = make_plan(decoder, method="swm", texts=windows, settings={"threshold": "1"})
    assert plan.steps[0].windows == ()
    assert plan.steps[0].similarity is None
    assert plan.requested == {"threshold": 1.0}
    assert torch.equal(forward(prune(decoder, plan).module, windows.tokens), forward(decoder.module, windows.tokens))
    lowest = merged_by(decoder, windows, threshold=1e-9)
    assert lowest.windows == slowly(decoder.module, windows, 1e-9, "highest")


# Damage


@pytest.mark.parametrize("place", ["model.layers.3.mlp.down_proj.weight", "model.layers.5.input_layernorm.weight"])
@pytest.mark.parametrize("rule", ["highest", "top", "delta-sum", "weighted"])
def test_damage_never_becomes_a_similarity(place, rule):
    module = build("llama")
    with torch.no_grad():
        module.get_parameter(place).view(-1)[5] = float("nan")
    with pytest.raises(NumericsError, match="block"):
        make_plan(open_model(module), method="swm", blocks=2, texts=draw_windows(), settings={"rule": rule})


def test_a_similarity_that_is_not_a_number(tiny, monkeypatch):
    monkeypatch.setattr(
        "secateur.scores.merge_similarity.window_cosines", lambda left, *_: torch.full((len(left),), float("nan"))
    )
    with pytest.raises(NumericsError, match="similarity with blocks 5 to 6 merged is not a number"):
        merged_by(tiny("llama"), draw_windows(), threshold=0.5)


# The step


SIZES = Sizes((10, 10, 20, 20, 30), 7)


def merging(*windows, rule="highest", **fields):
    return MergeBlocks(method="by hand", windows=windows, rule=rule, **fields)


def test_what_a_step_leaves():
    step = merging((2, 3), (0, 1))
    assert step.kept_blocks(5) == (0, 2, 4)
    assert step.sizes_after(SIZES) == Sizes((10, 20, 30), 7)
    assert step.describe() == ("merges", "0 to 1, 2 to 3 (highest)")
    assert merging().describe() == ("merges", "nothing")
    assert merging().kept_blocks(3) == (0, 1, 2)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (((3, 5),), "merges blocks 3 to 5, but this model has blocks 0 to 4"),
        (((-1, 2),), "merges blocks -1 to 2"),
        (((3, 2),), "merges blocks 3 to 2"),
        (((3, 3),), "merges block 3 alone"),
        (((0, 2), (2, 3)), "merges a block twice"),
        (((0, 3), (1, 2)), "merges a block twice"),
    ],
)
def test_steps_that_cannot_be_applied(windows, message):
    with pytest.raises(InputError, match=message):
        merging(*windows).sizes_after(SIZES)


@pytest.mark.parametrize("influence", [(), (1.0,) * 4, (0.1, 0.2, float("nan"), 0.1, 0.1), (0.1, -1.0, 0.1, 0.1, 0.1)])
def test_influences_that_cannot_be_used(influence):
    with pytest.raises(InputError, match="by block influence"):
        merging((0, 1), rule="weighted", influence=influence).kept_blocks(5)


@pytest.mark.parametrize("rule", ["highest", "top", "delta-sum", "mean", "weighted"])
def test_a_plan_needs_no_texts_to_be_applied(rule, tiny, tmp_path):
    decoder, skeleton = tiny("llama"), tiny("llama", skeleton=True)
    plan = make_plan(decoder, method="swm", blocks=3, texts=draw_windows(), settings={"rule": rule})
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    assert again == plan
    tokens = draw_tokens()
    found = [walk(prune(one, again), tokens) for one in (decoder, skeleton)]
    assert torch.equal(found[0], found[1])
    if rule in ("highest", "top", "delta-sum"):
        expected = forward(copy_with(decoder.module, plan.steps[0].windows, rule), tokens)
        assert torch.allclose(found[0], expected, atol=1e-4)


def test_a_plan_edited_by_hand(tiny):
    decoder = tiny("gemma3_text")
    plan = make_plan(decoder, method="swm", blocks=1, texts=draw_windows())
    edited = plan.model_copy(update={"steps": (plan.steps[0].model_copy(update={"windows": ((1, 2),)}),)})
    with pytest.raises(InputError, match="differ in layer type"):
        prune(decoder, edited)
