"""Attention and MLP removed separately: what is chosen, what the result computes, and what it has left."""

import itertools

import pytest
import torch

from oracles import draw_windows, forward, plain_loss
from secateur import make_plan, prune
from secateur.calibration.store import StateStore
from secateur.checkpoints.save import layout_of, save
from secateur.errors import InputError, ModelError
from secateur.methods.drop_branches import without
from secateur.methods.method import Measurements, apply_step
from secateur.models.anatomy import find
from secateur.models.opening import open_model
from secateur.models.widths import cache_numbers, unit_counts
from secateur.plan.units import UnitKind
from secateur.scores.divergence import angle, js_divergence, kl_divergence
from secateur.scores.removal import RemovalProbe
from secateur.surgery.width.target import dense_widths
from tiny_models import build

WINDOWS = draw_windows(windows=8)
GREEDY = ("blockpruner", "finercut")
BRANCHES = list(itertools.product(range(4), ("heads", "channels")))
WRITERS = {"heads": "self_attn.o_proj", "channels": "mlp.down_proj"}


def silenced(gone, blocks=4):
    """A Llama in which these branches write nothing."""
    module = build("llama", blocks=blocks)
    with torch.no_grad():
        for block, part in gone:
            find(module.model.layers[block], WRITERS[part]).weight.zero_()
    return module


def greedy(change, count):
    """Remove what changes least, one after the other; ties go to the first."""
    gone = []
    for _ in range(count):
        left = [one for one in BRANCHES if one not in gone]
        gone.append(min(left, key=lambda one: (change([*gone, one]), one)))
    return set(gone)


def lost(plan):
    """Branches that the plan removes."""
    (step,) = plan.steps
    found = {(block, "heads") for block, one in enumerate(step.widths) if not one.groups}
    return found | {(block, "channels") for block, one in enumerate(step.widths) if not one.channels}


@pytest.mark.parametrize("gone", [(), ((1, "heads"),), ((0, "channels"), (2, "heads")), tuple(BRANCHES[2:6])])
def test_the_loss_without_branches(tiny, gone):
    with StateStore() as store:
        probe = RemovalProbe(tiny("llama", blocks=4), WINDOWS, store, batch_size=3)
        expected = plain_loss(silenced(gone), WINDOWS)
        assert probe.loss(gone) == pytest.approx(expected, abs=1e-5)
        assert probe.loss(gone[::-1]) == pytest.approx(expected, abs=1e-5)


def test_both_branches_gone_are_a_block_gone(tiny):
    with StateStore() as store:
        probe = RemovalProbe(tiny("llama", blocks=4), WINDOWS, store)
        whole = probe.loss((2,))
        work = probe.evaluated
        assert probe.loss(((2, "channels"), (2, "heads"))) == whole
        assert probe.evaluated == work


def test_settled_branches_stay_usable(tiny):
    with StateStore() as store:
        probe = RemovalProbe(tiny("llama", blocks=4), WINDOWS, store)
        for settled in (
            ((1, "heads"),),
            ((1, "heads"), (1, "channels")),
            ((1, "heads"), (1, "channels"), (3, "heads")),
        ):
            probe.fix(settled)
            for one in BRANCHES:
                expected = plain_loss(silenced({*settled, one}), WINDOWS)
                assert probe.loss((*settled, one)) == pytest.approx(expected, abs=1e-5)


def test_blockpruner_is_greedy_in_the_loss(tiny):
    plan = make_plan(tiny("llama", blocks=4), method="blockpruner", texts=WINDOWS, settings={"count": 3})
    assert lost(plan) == greedy(lambda gone: plain_loss(silenced(gone), WINDOWS), 3)


@pytest.mark.parametrize("distance", ["js", "angular"])
def test_finercut_is_greedy_in_the_change_of_the_output(tiny, distance):
    dense = forward(silenced(()), WINDOWS.tokens).double()

    def change(gone):
        after = forward(silenced(gone), WINDOWS.tokens).double()
        if distance == "angular":
            cosine = (dense * after).sum(-1) / (dense.norm(dim=-1) * after.norm(dim=-1))
            return float(cosine.arccos().mean())
        p, q = dense.softmax(-1), after.softmax(-1)
        m = (p + q) / 2
        return float(((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)).mean())

    settings = {"count": 3, "distance": distance}
    plan = make_plan(tiny("llama", blocks=4), method="finercut", texts=WINDOWS, settings=settings)
    assert lost(plan) == greedy(change, 3)


def test_distances_of_distributions():
    left, right, even = torch.tensor([[0.0, -40.0]]), torch.tensor([[-40.0, 0.0]]), torch.zeros(1, 2)
    half = torch.log(torch.tensor(2.0)).item()
    assert js_divergence(left)(left).item() == pytest.approx(0)
    assert js_divergence(left)(right).item() == pytest.approx(half)
    assert kl_divergence(even)(even + 3).item() == pytest.approx(0, abs=1e-6)
    assert kl_divergence(left)(even).item() == pytest.approx(half)
    assert kl_divergence(even)(left).item() == pytest.approx(20 - half)
    assert angle(torch.tensor([[1.0, 0.0]]))(torch.tensor([[0.0, 2.0]])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", [*GREEDY, "branches", "2ssp"])
def test_an_amount_is_met_as_closely_as_branches_allow(tiny, name):
    decoder = tiny("llama", blocks=4)
    plan = make_plan(decoder, method=name, texts=WINDOWS, remove=0.3)
    largest = max(decoder.block_parameter_counts()) / decoder.parameter_count
    assert abs(plan.removed_fraction - 0.3) < largest
    pruned = prune(decoder, plan, texts=WINDOWS)
    assert pruned.parameter_count == plan.parameters_after


@pytest.mark.parametrize("name", GREEDY)
def test_the_result_computes_what_the_silenced_model_does(tiny, name):
    decoder = tiny("llama", blocks=4)
    plan = make_plan(decoder, method=name, texts=WINDOWS, settings={"count": 3})
    pruned = prune(decoder, plan, texts=WINDOWS)
    expected = forward(silenced(lost(plan)), WINDOWS.tokens)
    torch.testing.assert_close(forward(pruned.module, WINDOWS.tokens), expected, atol=1e-4, rtol=1e-4)


def test_a_block_without_anything_is_taken_out(tiny):
    decoder = tiny("llama", blocks=4)
    plan = make_plan(decoder, method="blockpruner", texts=WINDOWS, settings={"count": 7})
    empty = [block for block in range(4) if {(block, "heads"), (block, "channels")} <= lost(plan)]
    pruned = prune(decoder, plan, texts=WINDOWS)
    assert empty
    assert pruned.block_count == 4 - len(empty) == len(plan.kept_blocks())
    assert pruned.parameter_count == plan.parameters_after


def test_removed_attention_takes_its_cache_along(tiny):
    decoder = tiny("llama", blocks=4)
    plan = make_plan(decoder, method="blockpruner", texts=WINDOWS, settings={"count": 1})
    (step,) = plan.steps
    widths = without(dense_widths(decoder), [(1, "heads"), (3, "heads")])
    pruned = apply_step(Measurements(decoder, WINDOWS), step.model_copy(update={"widths": widths})).decoder
    assert unit_counts(pruned)[UnitKind.ATTENTION] == (1, 0, 1, 0)
    assert [bool(one) for one in cache_numbers(pruned)] == [True, False, True, False]


def test_a_target_in_bytes_counts_the_cache(tiny):
    decoder = tiny("llama", blocks=4)
    each = decoder.saved_dtype.itemsize
    context = 64
    cache = sum(cache_numbers(decoder)) * context * each
    whole = decoder.parameter_count * each + cache
    plan = make_plan(decoder, method="blockpruner", texts=WINDOWS, target_memory=int(whole * 0.8), context=context)
    pruned = prune(decoder, plan, texts=WINDOWS)
    assert pruned.parameter_count * each + sum(cache_numbers(pruned)) * context * each <= whole * 0.8


def test_saved_and_opened_again(tiny, tmp_path):
    decoder = tiny("llama", blocks=4)
    plan = make_plan(decoder, method="branches", texts=WINDOWS, settings={"count": 3})
    pruned = prune(decoder, plan, texts=WINDOWS)
    assert layout_of(pruned) in ("decilm", "secateur")
    assert save(pruned, tmp_path / "cut")["check"]["passed"]
    again = open_model(tmp_path / "cut")
    torch.testing.assert_close(forward(again.module, WINDOWS.tokens), forward(pruned.module, WINDOWS.tokens))


def test_stand_ins_bring_the_output_nearer(tiny):
    """MLPs that are left are refitted to the dense states: on the texts of the fit that can only help."""
    decoder, windows = tiny("llama", blocks=4), draw_windows(windows=16, positions=32)
    dense = forward(decoder.module, windows.tokens)
    settings = {"count": 1, "ridge": 0.01}
    plan = make_plan(decoder, method="branches", texts=windows, settings=settings)
    errors = {}
    for repair in (False, True):
        (step,) = (one.model_copy(update={"repair": repair}) for one in plan.steps)
        found = forward(apply_step(Measurements(decoder, windows), step).decoder.module, windows.tokens)
        errors[repair] = float((found - dense).square().mean())
    assert errors[True] < errors[False]


def test_the_mlp_of_the_first_block_without_attention_stands_in_for_it(tiny):
    """Those below it stay as they are."""
    decoder, windows = tiny("llama", blocks=4), draw_windows(windows=16, positions=32)
    plan = make_plan(decoder, method="branches", texts=windows, settings={"count": 1, "ridge": 0.01})
    (step,) = plan.steps
    widths = [one.dense for one in step.sizes.blocks]
    widths[1] = widths[1].model_copy(update={"groups": 0})
    step = step.model_copy(update={"widths": tuple(widths), "refitted": tuple(range(4))})
    found = apply_step(Measurements(decoder, windows), step).decoder
    same = [
        torch.equal(after.mlp.down_proj.weight, before.mlp.down_proj.weight)
        for after, before in zip(found.block_list, decoder.block_list, strict=True)
    ]
    assert same == [True, False, False, False]


def test_2ssp_follows_equation_5(tiny):
    decoder = tiny("llama", blocks=8)
    sizes = decoder.block_parameter_counts()
    plan = make_plan(decoder, method="2ssp", texts=WINDOWS, remove=0.45, settings={"alpha": 1.5})
    mlp = sum(one.numel() for name, one in decoder.block_list[0].named_parameters() if name.startswith("mlp"))
    attention = sum(one.numel() for name, one in decoder.block_list[0].named_parameters() if "self_attn" in name)
    removed = plan.parameters_before - plan.parameters_after
    share = removed / sum(sizes)
    wanted = 8 * share ** (mlp / attention / 1.5)
    gone = sum(not one.groups for step in plan.steps for one in step.widths)
    assert abs(gone - wanted) <= 1
    assert len({one.channels for one in plan.steps[0].widths}) == 1


@pytest.mark.parametrize("name", [*GREEDY, "branches"])
def test_more_branches_than_there_are(tiny, name):
    with pytest.raises(InputError, match="count=99: at most"):
        make_plan(tiny("llama", blocks=4), method=name, texts=WINDOWS, settings={"count": 99})


def test_all_blocks_protected(tiny):
    with pytest.raises(InputError, match="all 4 blocks are protected"):
        make_plan(
            tiny("llama", blocks=4), method="blockpruner", texts=WINDOWS, remove=0.2, settings={"protect_first": 4}
        )


def test_families_that_the_modelling_file_cannot_hold(tiny):
    with pytest.raises(ModelError, match="modelling file"):
        make_plan(tiny("gemma2"), method="blockpruner", texts=WINDOWS, remove=0.2)


@pytest.mark.parametrize("name", [*GREEDY, "branches", "2ssp"])
def test_a_skeleton_gives_the_same_plan(tiny, name, monkeypatch, tmp_path):
    plans = []
    for skeleton in (False, True):
        monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / str(skeleton)))
        decoder = tiny("llama", skeleton=skeleton, blocks=4)
        plans.append(make_plan(decoder, method=name, texts=WINDOWS, remove=0.3).steps)
    assert plans[0] == plans[1]
