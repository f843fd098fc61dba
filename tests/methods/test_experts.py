"""Fewer experts: which stay, what merging and refitting do, what plans may ask for."""

import dataclasses
import json

import pytest
import torch

import oracles_experts as oracle
from secateur import Plan, heal, make_plan, open_model, prune, save, score
from secateur.calibration.routing import RoutingSums, measure_routing, routed_step
from secateur.calibration.walk import start
from secateur.checkpoints.check import record_expected, reopen
from secateur.data.windows import Windows
from secateur.errors import InputError, ModelError, SecateurWarning
from secateur.methods.budget import Budget
from secateur.methods.drop_experts import experts_to_keep, warn_of_idle
from secateur.methods.merge_experts import ReamSettings
from secateur.models.experts import Mixture, expert_axes, mixture_of
from secateur.models.families import FAMILIES
from secateur.models.widths import block_widths
from secateur.plan.experts import ExpertSizes
from secateur.scores.experts import SALIENCY, frequency, reap, super_experts
from secateur.surgery.experts.merging import (
    MergeRule,
    SimilaritySums,
    channel_features,
    grouped,
    merge_experts,
    merged,
)
from secateur.surgery.experts.refit import refit_experts
from secateur.surgery.experts.removal import best_experts, require_stock_count
from secateur.surgery.width.coupling import couplings_of
from tiny_models import VOCABULARY, build

WINDOWS = Windows.of(torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(1)))
MASK = torch.arange(16)[None, :] < torch.tensor([16, 9, 16, 12, 16, 16, 3, 16])[:, None]


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe-mixed"])
def exact(request):
    return open_model(build(request.param, blocks=3, dtype=torch.float64))


@pytest.mark.parametrize("padded", [False, True])
def test_scores_are_those_of_a_loop_over_tokens(exact, padded):
    windows = dataclasses.replace(WINDOWS, mask=MASK) if padded else WINDOWS
    sums = measure_routing(exact, windows, mixture_of(exact))
    if padded:
        states = {}
        for batch, hidden in start(exact, windows):
            for index, block in enumerate(exact.block_list):
                seen = []
                hook = block.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                hidden, _ = routed_step(exact, index, batch, hidden)
                hook.remove()
                states[index] = seen[0][windows.mask]
    else:
        found = oracle.entering_mixtures(exact.module, windows.tokens)
        states = {index: state.flatten(0, 1) for index, state in found.items()}
    for index, one in enumerate(sums):
        if one is None:
            assert not hasattr(exact.block_list[index].mlp, "experts")
            continue
        expected = oracle.saliency(exact.block_list[index].mlp, states[index])
        for name, values in expected.items():
            torch.testing.assert_close(
                SALIENCY[name](one), torch.tensor(values, dtype=torch.float64), rtol=1e-5, atol=0
            )
        assert float(one.tokens) == len(states[index])
        assert float(one.load.sum()) == 2 * len(states[index])
        assert torch.equal(one.together.diagonal(), one.load)


def test_similarity_is_that_of_a_loop_over_tokens(exact):
    mlp = exact.block_list[0].mlp
    states = oracle.entering_mixtures(exact.module, WINDOWS.tokens[:2])[0].flatten(0, 1)
    sums = SimilaritySums(4)
    for batch, hidden in start(exact, Windows.of(WINDOWS.tokens[:2])):
        _, routed = routed_step(exact, 0, batch, hidden)
        sums.update(routed[0], mlp.experts, 10_000)
    torch.testing.assert_close(sums.result(), oracle.similarity(mlp, states), rtol=1e-4, atol=1e-5)


@pytest.fixture
def four_experts():
    """Tensors of four experts of five channels, d = 6, and what belongs to which channel."""
    config_model = open_model(build("mixtral", blocks=1))
    block, family = config_model.block_list[0], config_model.anatomy.family
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "mlp.experts.gate_up_proj": torch.randn(4, 10, 6, generator=generator),
        "mlp.experts.down_proj": torch.randn(4, 6, 5, generator=generator),
    }
    widths = dataclasses.replace(block_widths(config_model, 0), channels=5)
    return tensors, couplings_of(block, family, widths)


def test_merging_is_the_average_in_the_best_of_all_orders(four_experts):
    tensors, couplings = four_experts
    saliency = torch.tensor([3.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    found = merged(tensors, couplings, {0: (3, 1), 2: ()}, saliency)
    for place, (members, weights) in enumerate((([0, 3, 1], [3.0, 0.5, 1.0]), ([2], [2.0]))):
        gate_up, down = oracle.merged_expert(*(one.double() for one in tensors.values()), members, weights)
        torch.testing.assert_close(found["mlp.experts.gate_up_proj"][place].double(), gate_up, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["mlp.experts.down_proj"][place].double(), down, rtol=1e-5, atol=1e-6)


def test_an_expert_merged_with_itself_in_another_order_stays_what_it_was(four_experts):
    tensors, couplings = four_experts
    order = torch.tensor([3, 0, 4, 1, 2])
    tensors["mlp.experts.gate_up_proj"][1] = tensors["mlp.experts.gate_up_proj"][0][torch.cat([order, 5 + order])]
    tensors["mlp.experts.down_proj"][1] = tensors["mlp.experts.down_proj"][0][:, order]
    saliency = torch.ones(4, dtype=torch.float64)
    found = merged(tensors, couplings, {0: (1,)}, saliency)
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name][0], tensor[0])
        assert not torch.allclose(merged(tensors, couplings, {0: (1,)}, saliency, align=False)[name][0], tensor[0])
    assert channel_features(tensors, couplings, 0).shape == (5, 18)


def test_groups_of_merged_experts():
    saliency = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    similarity = torch.zeros(5, 5)
    similarity[[0, 1], [2, 2]] = torch.tensor([0.1, 0.9])
    similarity[[0, 1], [3, 3]] = torch.tensor([0.2, 0.8])
    similarity[[0, 1], [4, 4]] = torch.tensor([0.3, 0.7])
    nearest = grouped(saliency, similarity, (0, 1), MergeRule(reap, reap, "nearest", 3))
    assert nearest == {0: (4,), 1: (2, 3)}, "the group of 1 is full when it is 4's turn"
    assert grouped(saliency, similarity, (0, 1), MergeRule(reap, reap, "nearest", 4)) == {0: (), 1: (2, 3, 4)}
    assert grouped(saliency, similarity, (0, 1), MergeRule(reap, reap, "salient", 3)) == {0: (4, 3), 1: (2,)}
    with pytest.raises(InputError, match="no room for 5 experts"):
        grouped(saliency, similarity, (0, 1), MergeRule(reap, reap, "salient", 2))


def test_refitting_brings_the_output_closer_to_the_dense_models(exact):
    """A closed-form fit of one block, with a ridge given, against the definition in the module's docstring."""
    kept = [(0, 2) if hasattr(block.mlp, "experts") else () for block in exact.block_list]
    windows = Windows.of(torch.randint(0, VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(2)))
    found = refit_experts(exact, windows, kept, ridge=0.1)
    mlp, new = exact.block_list[0].mlp, found.decoder.block_list[0].mlp
    with torch.no_grad():
        states = oracle.entering_mixtures(exact.module, windows.tokens)[0].flatten(0, 1)
        written = new(states[None])[0]
        plain = torch.stack(
            [sum(s * oracle.expert(mlp, kept[0][j], x) for j, s in _two(mlp, kept[0], x)) for x in states]
        )
        dense = mlp(states[None])[0]
    assert float((written - dense).square().sum()) < 0.9 * float((plain - dense).square().sum())
    assert torch.equal(new.experts.gate_up_proj, mlp.experts.gate_up_proj[list(kept[0])])
    assert [fit["ridge"] for fit in found.fits] == [[0.1, 0.1]] * len(found.fits)


def test_merged_experts_can_be_refitted_too(exact):
    windows = Windows.of(torch.randint(0, VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(2)))
    merging = MergeRule(reap, frequency, "nearest", 4)
    plain, refitted = (merge_experts(exact, windows, 2, merging, ridge=ridge) for ridge in (None, 0.1))
    assert plain.groups[0] == refitted.groups[0]
    assert plain.fits == []
    assert [fit["ridge"] for fit in refitted.fits] == [[0.1, 0.1]] * len(refitted.groups)
    dense, merged, closer = (
        oracle.outputs(one.module, windows.tokens)[0] for one in (exact, plain.decoder, refitted.decoder)
    )
    assert float((closer - dense).square().sum()) < 0.9 * float((merged - dense).square().sum())


def _two(mlp, kept, x):
    shares = torch.softmax(mlp.gate.weight[list(kept)] @ x, dim=0)
    return list(enumerate(shares.tolist()))


def test_an_edited_plan_keeps_exactly_the_named_experts(tiny, tmp_path):
    model = tiny("qwen3_moe-mixed", blocks=3)
    settings = {"experts": 3, "repair": False}
    plan = make_plan(model, method="expert-frequency", texts=WINDOWS, settings=settings)
    data = json.loads(plan.to_json())
    data["steps"][0]["kept"] = [[0, 1, 3], [], [1, 2, 3]]
    pruned = prune(model, Plan.model_validate(data))
    for index, kept in ((0, [0, 1, 3]), (2, [1, 2, 3])):
        old, new = model.block_list[index].mlp, pruned.block_list[index].mlp
        assert torch.equal(new.experts.down_proj, old.experts.down_proj[kept])
        assert torch.equal(new.experts.gate_up_proj, old.experts.gate_up_proj[kept])
        assert torch.equal(new.gate.weight, old.gate.weight[kept])
    assert pruned.config.num_experts == 3
    assert [str(one) for one in plan.removes()] == ["3 of 4 experts"] * 2
    for wrong, words in (
        ([[0, 1, 3], [], [1, 2]], "more experts in one block than in another"),
        ([[0, 1, 4], [], [1, 2, 3]], "keeps expert 4 of block 0"),
        ([[0, 3, 1], [], [1, 2, 3]], "out of order"),
        ([[0, 1, 3], [0], [1, 2, 3]], "keeps expert 0 of block 1, which has 0"),
        ([[0, 1, 3], []], "experts for 2 blocks"),
        ([[], [], []], "keeps 0 experts in block 0"),
    ):
        data["steps"][0]["kept"] = wrong
        with pytest.raises((InputError, ValueError), match=words):
            Plan.model_validate(data)


def test_experts_are_refitted_unless_a_norm_is_behind_them(tiny):
    model = tiny("qwen3_moe", blocks=3)
    behind_norm = dataclasses.replace(
        model,
        anatomy=dataclasses.replace(model.anatomy, family=dataclasses.replace(model.anatomy.family, order="sandwich")),
    )
    for method, kinds in (("reap", ("refit-experts", "drop-experts")), ("ream", ("merge-experts",) * 2)):
        plans = [make_plan(one, method=method, texts=WINDOWS, settings={"experts": 3}) for one in (model, behind_norm)]
        assert tuple(plan.steps[0].kind for plan in plans) == kinds
        assert [plan.steps[0].settings["repair"] for plan in plans] == [True, False]
        assert [getattr(plan.steps[0], "repair", None) for plan in plans] in ([True, False], [None, None])
        with pytest.raises(ModelError, match="write into a norm"):
            make_plan(behind_norm, method=method, texts=WINDOWS, settings={"experts": 3, "repair": True})


def test_what_needs_experts_is_refused_before_texts_are_read(tiny):
    dense, mixture, texts = tiny("llama", blocks=3), tiny("qwen3_moe", blocks=3), "no/such/file.txt"
    for method in ("reap", "ream", "expert-frequency", "expert-activation", "shortgpt:0.5,reap:0.5"):
        with pytest.raises(ModelError, match="a llama has no experts"):
            make_plan(dense, method=method, texts=texts, remove=0.1)
    with pytest.raises(ModelError, match="a llama has no experts"):
        score(dense, texts=texts, kinds=("experts",))
    for given in ({"by": "router"}, {"by": "distill", "settings": {"trains": "router"}}):
        with pytest.raises(ModelError, match="no router to train"):
            heal(dense, texts=texts, **given)
    with pytest.raises(InputError, match="only 4 in a block"):
        make_plan(mixture, method="ream", texts=texts, settings={"experts": 5})
    with pytest.raises(InputError, match="no/such/file"):
        make_plan(mixture, method="ream", texts=texts, settings={"experts": 3})


def test_a_plan_for_other_experts_is_refused(tiny):
    model = tiny("qwen3_moe", blocks=3)
    plan = make_plan(model, method="reap", texts=WINDOWS, settings={"experts": 3})
    other = plan.model_copy(update={"steps": (plan.steps[0].model_copy(update={"kept": ((0,),) * 3}),)})
    with pytest.raises(InputError, match="each token is sent to 2"):
        prune(model, other, texts=WINDOWS)
    sizes = tuple(ExpertSizes(count=5, parameters=one.parameters) for one in plan.steps[0].sizes)
    with pytest.raises(InputError, match="mixture of other experts"):
        prune(
            model,
            plan.model_copy(update={"steps": (plan.steps[0].model_copy(update={"sizes": sizes}),)}),
            texts=WINDOWS,
        )


def test_amounts(tiny):
    model = tiny("qwen3_moe", blocks=3)
    each = mixture_of(model).sizes[0].parameters
    total = model.parameter_count
    two, three = total - 3 * 2 * each, total - 3 * each

    def after(**amount):
        settings = {name: amount.pop(name) for name in ("experts", "divisor") if name in amount}
        return make_plan(model, method="reap", texts=WINDOWS, settings=settings, **amount).parameters_after

    assert after(experts=3) == after(target_params=three) == after(remove=1 - three / total) == three
    assert after(target_params=three - 1) == after(experts=2) == after(remove=0.14, divisor=2) == two
    assert after(experts=4) == total
    weights_and_cache = make_plan(model, method="reap", texts=WINDOWS, target_memory="205KB", context=8).counts_on
    assert weights_and_cache["bytes"] <= 205_000
    for wrong, words in (
        ({"experts": 5}, "only 4 in a block"),
        ({"experts": 1}, "each token is sent to 2"),
        ({"experts": 3, "divisor": 2}, "not a multiple of divisor=2"),
        ({"remove": 0.9}, "unreachable"),
        ({"remove": 0.1, "divisor": 4}, "none of its 4 experts in a block can go"),
        ({"experts": 3, "remove": 0.1}, "contradict"),
    ):
        with pytest.raises(InputError, match=words):
            after(**wrong)
    with pytest.raises(ModelError, match="a llama has no experts"):
        make_plan(tiny("llama", blocks=3), method="ream", texts=WINDOWS, remove=0.1)


def test_groups_of_experts_stay_equal():
    mixture = Mixture((ExpertSizes(count=16, parameters=1),), chosen=4, groups=4, chosen_groups=2)
    assert mixture.fewest() == 8
    assert mixture.fewest(3) == 12
    assert best_experts(torch.arange(16.0), 8, 4) == (2, 3, 6, 7, 10, 11, 14, 15)
    assert best_experts(torch.zeros(4), 2) == (0, 1)
    for keep, words in ((10, "4 groups must keep as many"), (4, "at least 8 must stay"), (2, "at least that many")):
        with pytest.raises(InputError, match=words):
            require_stock_count(mixture, keep)
    require_stock_count(mixture, 12)


def test_every_row_of_a_router_goes_with_its_expert():
    """Biases of the router, as parameters or buffers, with a dimension in front or not."""
    block = torch.nn.Module()
    block.mlp = torch.nn.Module()
    block.mlp.gate, block.mlp.experts = torch.nn.Linear(6, 4), torch.nn.Module()
    block.mlp.gate.register_buffer("e_score_correction_bias", torch.zeros(4))
    block.mlp.gate.statics = torch.nn.Parameter(torch.zeros(1, 4))
    block.mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(4, 6, 4))
    block.mlp.experts.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(4, 8))
    block.mlp.shared = torch.nn.Linear(4, 4)
    assert expert_axes(block, FAMILIES["mixtral"], 4) == {
        "mlp.gate.weight": 0,
        "mlp.gate.bias": 0,
        "mlp.gate.e_score_correction_bias": 0,
        "mlp.gate.statics": 1,
        "mlp.experts.down_proj": 0,
        "mlp.experts.gate_up_proj_bias": 0,
    }


def test_super_experts_stay_on_request():
    """Of 400 experts those above the 99.5th percentile that are not far below the largest."""
    sums = [RoutingSums(200), None, RoutingSums(200)]
    for one in (sums[0], sums[2]):
        one.peaks += torch.linspace(0.1, 1, 200)
    sums[2].peaks[[7, 8, 9]] = torch.tensor([50.0, 30.0, 4.9], dtype=torch.float64)
    found = super_experts(sums)
    assert found[1] is None
    assert not bool(found[0].any())
    assert found[2].nonzero().flatten().tolist() == [7, 8]


def test_protected_experts_are_kept_whatever_their_score(tiny, monkeypatch):
    model = tiny("qwen3_moe", blocks=3)

    def kept(**settings):
        given = {"experts": 2} | settings
        return make_plan(model, method="expert-frequency", texts=WINDOWS, settings=given).steps[0].kept[1]

    (first, *_) = (expert for expert in range(4) if expert not in kept())
    marked = torch.arange(4) == first
    monkeypatch.setattr(
        "secateur.methods.drop_experts.super_experts", lambda sums: (~marked & marked, marked, ~marked & marked)
    )
    assert first in kept(protect_super=True)
    assert first not in kept()


def test_experts_that_never_fire_are_told():
    idle, busy = RoutingSums(4), RoutingSums(4)
    idle.load += torch.tensor([0, 3, 0, 1])
    busy.load += 1
    with pytest.warns(SecateurWarning, match=r"2 experts in 1 blocks never fire on these texts \(most in block 1\)"):
        warn_of_idle((None, idle, busy))


@pytest.mark.filterwarnings("error::secateur.errors.SecateurWarning")
def test_nothing_is_told_where_all_fire():
    busy = RoutingSums(4)
    busy.load += 1
    warn_of_idle((busy, None))


def test_experts_channels_and_blocks_in_one_plan(tiny, tmp_path):
    jobs = []
    for number, method in enumerate(("reap:0.5,obs-width:0.5", "ream:0.5,obs-width:0.5", "shortgpt:0.65,reap:0.35")):
        outcomes = []
        for skeleton in (False, True):
            model = tiny("qwen3_moe", blocks=4, skeleton=skeleton)
            plan = make_plan(model, method=method, texts=WINDOWS, remove=0.35)
            assert len(plan.steps) == 2
            pruned = prune(model, plan, texts=WINDOWS)
            assert pruned.parameter_count == plan.parameters_after
            assert abs(plan.removed_fraction - 0.35) < 0.06
            outcomes.append(pruned.fingerprint)
        assert outcomes[0] == outcomes[1]
        folder = tmp_path / str(number)
        save(pruned, folder, check=False)
        jobs.append(record_expected(pruned, tmp_path / f"{number}.npz").job(folder))
    assert all(result["passed"] for result in reopen(jobs))


def test_ream_decides_how_many_stay_and_nothing_else(tiny):
    model = tiny("mixtral", blocks=3)
    settings = ReamSettings(experts=2)
    assert experts_to_keep(model, mixture_of(model), settings, Budget("own", 2, knob="experts")) == 2
    plan = make_plan(
        model, method="ream", texts=WINDOWS, settings={"experts": 2, "grouping": "salient", "align": False}
    )
    step = plan.steps[0]
    assert (step.keep, step.grouping, step.align, step.counts()) == (2, "salient", False, (2, 2, 2))
    pruned = prune(model, plan, texts=WINDOWS)
    noted = pruned.history[-1]["merged_experts"]
    assert {one["block"] for one in noted} == {0, 1, 2}
    assert sum(len(one["experts"]) for one in noted) == 6
