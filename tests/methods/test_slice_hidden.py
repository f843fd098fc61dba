"""How much each block is sliced, the budget in true parameters, and plans that slice."""

import json
import math
import warnings
from itertools import pairwise

import pytest
import torch

from oracles import draw_windows
from secateur import Plan, make_plan, open_model, prune, score
from secateur.calibration.walk import mean_loss
from secateur.data.windows import Windows
from secateur.errors import InputError, ModelError, SecateurWarning, TextsWarning
from secateur.evaluation.metrics.perplexity import perplexity
from secateur.methods.slice_widths import normalised, rounded_width, slice_fractions
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.hidden.own_bases import slice_by_principal_directions
from tiny_models import build

SLICING = ["slicegpt", "dynamic-slicing", "stock-slicing"]
REDUNDANCY = [0.0, 0.2, 1.0, 0.9, 0.5, 0.7, 0.95, 0.1]


def mean(values):
    return sum(values) / len(values)


def step_of(decoder, method, windows=None, **given):
    (step,) = make_plan(decoder, method=method, texts=windows or draw_windows(), **given).steps
    return step


# Fractions


@pytest.mark.parametrize(("percentage", "base"), [(0.25, 0.1), (0.3, 0.0), (0.2, 0.2), (0.0, 0.0)])
def test_fractions_of_the_paper(percentage, base):
    found = slice_fractions(REDUNDANCY, percentage, base)
    assert found == pytest.approx([base + lr * (percentage - base) / mean(REDUNDANCY) for lr in REDUNDANCY])
    assert mean(found) == pytest.approx(percentage, abs=1e-12)


@pytest.mark.parametrize("redundancy", [[0.0] * 6, [0.4] * 6, [1.0] * 6])
def test_equal_redundancy_is_constant_slicing(redundancy):
    assert slice_fractions(redundancy, 0.3, 0.1) == pytest.approx([0.3] * 6)


@pytest.mark.parametrize("percentage", [0.5, 0.7, 0.85, 0.9])
@pytest.mark.parametrize("redundancy", [REDUNDANCY, [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [1.0, 0.01, 0.01, 0.0]])
def test_no_block_loses_more_than_the_cap_and_the_mean_holds(redundancy, percentage):
    found = slice_fractions(redundancy, percentage, 0.1, cap=0.9)
    assert max(found) <= 0.9 + 1e-12
    assert min(found) >= 0.1 - 1e-12
    assert mean(found) == pytest.approx(percentage, abs=1e-12)
    by_redundancy = sorted(range(len(redundancy)), key=lambda block: redundancy[block])
    assert all(found[a] <= found[b] + 1e-12 for a, b in pairwise(by_redundancy))


def test_what_capped_blocks_cannot_lose_the_others_lose_in_proportion():
    found = slice_fractions([1.0, 0.2, 0.1, 0.1], 0.5, 0.0, cap=0.8)
    assert found == pytest.approx([0.8, 0.6, 0.3, 0.3])


@pytest.mark.parametrize(
    ("percentage", "base", "says"), [(0.95, 0.1, "cap"), (0.2, 0.3, "slice_base=0.3"), (0.2, -0.1, "slice_base")]
)
def test_impossible_fractions(percentage, base, says):
    with pytest.raises(InputError, match=says):
        slice_fractions(REDUNDANCY, percentage, base)


def test_normalised():
    cosines = [0.1, 0.95, 0.97, 0.99, 0.96, 0.7]
    assert normalised(cosines, "minmax") == pytest.approx([(one - 0.1) / 0.89 for one in cosines])
    assert normalised(cosines, "interior") == pytest.approx([0.0, 0.0, 0.5, 1.0, 0.25, 0.0])
    assert normalised(cosines, "rank") == pytest.approx([0.0, 0.4, 0.8, 1.0, 0.6, 0.2])
    assert normalised([0.9] * 4, "minmax") == [1.0] * 4


@pytest.mark.parametrize(
    ("fraction", "rounding", "kept"),
    [(0.0, 8, 100), (0.1, 8, 88), (0.2, 8, 80), (0.2, 1, 80), (0.99, 8, 8), (0.25, 7, 70), (0.12, 1, 88)],
)
def test_kept_widths_are_rounded_down(fraction, rounding, kept):
    assert rounded_width(fraction, 100, rounding) == kept


# Decisions


def test_constant_slicing(tiny):
    step = step_of(tiny("llama"), "slicegpt", slice="25%")
    assert step.widths == (24,) * 8
    assert step.bases is None
    assert step.settings["slice"] == 0.25


@pytest.mark.parametrize(("head", "reads"), [("sliced", 24), ("whole", 32)])
def test_the_head_reads_what_the_blocks_keep_or_all(head, reads, tiny):
    model, windows = tiny("llama"), draw_windows()
    plan = make_plan(model, method="slicegpt", texts=windows, slicing=0.25, settings={"head": head})
    sliced = prune(model, plan, texts=windows)
    assert plan.steps[0].head_width == reads
    assert sliced.module.lm_head.weight.shape[1] == sliced.config.widths[-1] == reads
    assert sliced.parameter_count == plan.parameters_after
    loss = slice_by_principal_directions(model, windows, plan.steps[0].widths, reads)[1]
    assert math.log(perplexity(sliced, windows, DEFAULTS)) == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("method", ["slicegpt", "dynamic-slicing"])
def test_the_head_is_sliced_where_that_loses_less(method):
    """Most of this model's parameters are embeddings and head: whole, it makes the blocks lose nearly everything."""
    module, windows = build("llama", blocks=4), draw_windows()
    module.resize_token_embeddings(1024)
    model = open_model(module)
    plans = {
        head: make_plan(model, method="slicegpt", texts=windows, remove=0.4, settings={"head": head, "rounding": 1})
        for head in ("whole", "sliced")
    }
    losses = {head: mean_loss(prune(model, plan, texts=windows), windows) for head, plan in plans.items()}
    step = make_plan(model, method=method, texts=windows, remove=0.4, settings={"rounding": 1}).steps[0]
    tried = step.settings["loss_by_head"]
    most = make_plan(model, method="slicegpt", texts=windows, remove=0.8, settings={"rounding": 1}).steps[0]
    assert most.head_width < 32, "so much cannot go without the head"
    assert tried["whole"] == pytest.approx(losses["whole"], abs=1e-3)
    assert (step.head_width < 32) == (tried["sliced"] < tried["whole"])


def test_redundant_blocks_keep_less(bundled):
    windows = Windows.of(torch.randint(3, 2000, (4, 64), generator=torch.Generator().manual_seed(0)))
    scores = score(bundled, texts=windows, kinds=("cosine",))
    step = make_plan(
        bundled,
        method="dynamic-slicing",
        texts=windows,
        scores=scores,
        settings={"slice_base": "0.1", "rounding": 1, "normalise": "rank"},
        slicing=0.3,
    ).steps[0]
    expected = slice_fractions(normalised(scores.layer_redundancy, "rank"), 0.3, 0.1)
    assert list(step.widths) == [rounded_width(one, 192, 1) for one in expected]
    assert len(set(step.widths)) > 6


@pytest.mark.parametrize("method", SLICING)
@pytest.mark.parametrize("remove", [0.1, 0.2, 0.3])
def test_remove_is_the_closest_true_fraction(method, remove, bundled):
    whole = {"head": "whole"}
    settings = {"slicegpt": whole, "dynamic-slicing": whole | {"slice_base": 0.05, "rounding": 1}}.get(method)
    plan = make_plan(
        bundled,
        method=method,
        remove=remove,
        texts=Windows.of(torch.arange(3, 131).view(4, 32)),
        settings=settings,
    )
    step = plan.steps[0]
    unit = 24 if step.stock else 8
    if method != "dynamic-slicing":
        for other in (step.widths[0] - unit, step.widths[0] + unit):
            near = step.model_copy(
                update={"widths": (other,) * 12, "head_width": other if step.stock else step.head_width}
            )
            sizes = plan.sizes_after()
            gone = 1 - near.sizes_after(sizes).total / plan.parameters_before
            assert abs(gone - remove) >= abs(plan.removed_fraction - remove)
    assert plan.removed_fraction == pytest.approx(
        remove, abs={"slicegpt": 0.03, "dynamic-slicing": 0.005, "stock-slicing": 0.08}[method]
    )


def test_target_params_stays_below(bundled):
    plan = make_plan(bundled, method="slicegpt", target_params="4.9M", texts=Windows.of([[3, 4, 5, 6]]))
    (step,) = plan.steps
    larger = step.model_copy(update={"widths": tuple(width + 8 for width in step.widths)})
    assert plan.parameters_after <= 4_900_000 < larger.sizes_after(plan.sizes_after()).total


@pytest.mark.parametrize(
    ("amount", "says"),
    [
        ({"remove": 0.99}, "unreachable"),
        ({"target_params": 100}, "unreachable"),
        ({"target_params": "90M"}, "has only"),
        ({"blocks": 2}, "does not count in blocks"),
        ({"slice": 1.2}, "between 0 and 1"),
        ({"slice": 25}, r"Did you mean 25%\?"),
        ({"slice": 0.2, "remove": 0.2}, "several amounts"),
    ],
)
def test_amounts_that_cannot_be(amount, says, bundled):
    with pytest.raises(InputError, match=says):
        make_plan(bundled, method="slicegpt", texts=Windows.of([[3, 4, 5, 6]]), **amount)


def test_the_papers_slice_percentage(bundled):
    windows = Windows.of(torch.arange(3, 67).view(2, 32))
    settings = {"slice_base": 0.1, "slice_percentage": 0.25}
    plan = make_plan(bundled, method="dynamic-slicing", texts=windows, settings=settings)
    same = make_plan(bundled, method="dynamic-slicing", texts=windows, settings={"slice_base": 0.1}, slicing=0.25)
    assert plan.steps[0].widths == same.steps[0].widths
    assert plan.requested == {"slice": 0.25}
    with pytest.raises(InputError, match="slice_percentage and another amount contradict"):
        make_plan(bundled, method="dynamic-slicing", remove=0.2, texts=windows, settings=settings)


def test_depth_methods_do_not_slice(tiny):
    with pytest.raises(InputError, match="shortgpt does not count in slice; give blocks"):
        make_plan(tiny("llama"), method="shortgpt", texts=draw_windows(), slicing=0.2)


def test_the_automatic_base_is_never_worse_than_constant_slicing(bundled):
    windows = Windows.of(torch.randint(3, 2000, (4, 48), generator=torch.Generator().manual_seed(0)))
    plan = make_plan(bundled, method="dynamic-slicing", remove=0.2, texts=windows)
    constant = make_plan(bundled, method="slicegpt", remove=0.2, texts=windows)
    assert plan.parameters_after <= constant.parameters_after
    tried = plan.steps[0].settings["loss_by_slice_base"]
    assert len(tried) >= 3
    loss, other = (
        slice_by_principal_directions(bundled, windows, step.widths, step.head_width)[1]
        for step in (*plan.steps, *constant.steps)
    )
    assert loss <= other
    assert round(loss, 4) == min(tried.values())


def test_a_sweep_tries_every_multiple_of_two_percent_at_the_same_mean(bundled):
    windows = Windows.of(torch.randint(3, 2000, (2, 24), generator=torch.Generator().manual_seed(0)))
    sweep = {"slice_base": "sweep", "rounding": 1}
    plan = make_plan(bundled, method="dynamic-slicing", slicing=0.08, texts=windows, settings=sweep)
    settings = plan.steps[0].settings
    tried = settings["loss_by_slice_base"]
    assert list(tried) == ["0.080", "0.060", "0.040", "0.020", "0.000"]
    assert settings["slice"] == 0.08
    by_hand = {}
    for base in tried:
        given = {"slice_base": float(base), "rounding": 1}
        one = make_plan(bundled, method="dynamic-slicing", slicing=0.08, texts=windows, settings=given).steps[0]
        by_hand[base] = slice_by_principal_directions(bundled, windows, one.widths, 192)[1]
    assert tried == pytest.approx(by_hand, abs=1e-4)


def test_redundancy_is_scored_on_texts_of_its_own(bundled, tmp_path):
    (tmp_path / "other.txt").write_text("def one():\n    return 1\n" * 200)
    windows = Windows.of(torch.randint(3, 2000, (4, 48), generator=torch.Generator().manual_seed(0)))
    other = {"score_texts": str(tmp_path / "other.txt"), "score_windows": 2, "score_seq_len": 20}
    settings = {"slice_base": 0.05, "rounding": 1}
    plan = make_plan(bundled, method="dynamic-slicing", slicing=0.2, texts=windows, settings=settings | other)
    scored = score(bundled, texts=str(tmp_path / "other.txt"), windows=2, seq_len=20, kinds=("cosine",)).cosine
    fractions = slice_fractions(normalised([scored[b][b + 1] for b in range(12)], "minmax"), 0.2, 0.05)
    assert plan.steps[0].widths == tuple(rounded_width(one, 192, 1) for one in fractions)
    same = make_plan(bundled, method="dynamic-slicing", slicing=0.2, texts=windows, settings=settings)
    assert same.steps[0].widths != plan.steps[0].widths


def test_stock_slicing_says_why_it_misses_an_amount(tiny):
    with pytest.warns(
        SecateurWarning, match=r"where 30.0% was asked: hidden sizes of this architecture are multiples of"
    ) as said:
        step = make_plan(
            tiny("llama"), method="stock-slicing", remove=0.3, texts=draw_windows(), settings={"rounding": 8}
        )
    assert f"stock-slicing removes {step.removed_fraction:.1%}" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SecateurWarning)
        make_plan(tiny("llama"), method="stock-slicing", remove=step.removed_fraction, texts=draw_windows())


def test_bases_beyond_the_blocks(tiny):
    with pytest.raises(InputError, match="bases=9: the model has only 8 blocks"):
        step_of(tiny("llama"), "stock-slicing", slice=0.2, settings={"bases": 9})


def test_layernorm_models_get_one_basis_and_the_modelling_file(tiny):
    step = step_of(tiny("opt"), "stock-slicing", slice=0.25)
    assert not step.stock
    assert step.bases == (0,)
    assert "modelling file" in step.describe()[1]


# Plans


@pytest.fixture
def plan(tiny):
    return make_plan(tiny("llama"), method="slicegpt", texts=draw_windows(), slicing=0.25)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"widths": [24] * 7}, "7 blocks, but this model has 8"),
        ({"widths": [40] * 8}, "keeps 40 directions"),
        ({"widths": [0] * 8}, "keeps 0 directions"),
        ({"head_width": 40}, "keeps 40 directions"),
        ({"stock": True}, "a stock result has one basis"),
        ({"bases": [0, 3], "head_width": 24, "widths": [24] * 7 + [16]}, "one width"),
        ({"bases": [1, 3]}, "must start at 0"),
        ({"bases": [0, 8]}, "must start at 0"),
    ],
)
def test_edited_plans_that_make_no_sense(change, says, plan, tmp_path):
    data = json.loads(plan.to_json())
    data["steps"][0] |= change
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=says):
        Plan.read(tmp_path / "plan.json")


def test_an_edited_width_is_applied(plan, tiny, tmp_path):
    data = json.loads(plan.to_json())
    data["steps"][0]["widths"] = [16, *[24] * 7]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    edited = Plan.read(tmp_path / "plan.json")
    pruned = prune(tiny("llama"), edited, texts=draw_windows())
    assert pruned.config.widths == [16, 16, *[24] * 14, 32]
    assert pruned.parameter_count == edited.parameters_after < plan.parameters_after


def test_a_slicing_step_of_another_shape_is_refused(plan, tiny):
    other = make_plan(tiny("qwen3"), method="slicegpt", texts=draw_windows(), slicing=0.25)
    mixed = other.model_copy(update={"steps": plan.steps})
    with pytest.raises(InputError, match="another shape"):
        prune(tiny("qwen3"), mixed, texts=draw_windows())


def test_other_texts_than_planned_give_a_warning(plan, tiny):
    with pytest.warns(TextsWarning, match="differ from those the plan was made on"):
        prune(tiny("llama"), plan, texts=draw_windows(seed=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(tiny("llama"), plan, texts=draw_windows())


def test_texts_that_cannot_be_found_again(plan, tiny):
    with pytest.raises(InputError, match=r"cannot be opened again; give them \(--texts\)"):
        prune(tiny("llama"), plan)
    nameless = plan.model_copy(update={"texts": None})
    with pytest.raises(InputError, match="names none"):
        prune(tiny("llama"), nameless)


def test_texts_are_found_again_by_name(bundled):
    plan = make_plan(
        bundled,
        method="slicegpt",
        texts="python-stdlib",
        windows=2,
        seq_len=32,
        options=RunOptions(seed=4),
        slicing=0.3,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = prune(bundled, plan)
    again = prune(bundled, plan)
    windows = Windows.of(torch.arange(3, 67).view(2, 32))
    assert mean_loss(pruned, windows) == mean_loss(again, windows)


def test_a_sliced_model_is_not_cut_again(plan, tiny):
    sliced = prune(tiny("llama"), plan, texts=draw_windows())
    for method in ("last-n", "shortgpt", "swm", "replaceme"):
        with pytest.raises(ModelError, match="take blocks out of the dense model first"):
            make_plan(sliced, method=method, blocks=1, texts=draw_windows())
    with pytest.raises(ModelError, match="different bases"):
        score(sliced, texts=draw_windows())
    with pytest.raises(ModelError, match=r"already in secateur.s own form"):
        make_plan(sliced, method="slicegpt", texts=draw_windows(), slicing=0.2)


def test_a_stock_result_can_be_cut_again(tiny):
    windows = draw_windows()
    sliced = prune(
        tiny("llama"), make_plan(tiny("llama"), method="stock-slicing", texts=windows, slicing=0.25), texts=windows
    )
    shorter = prune(sliced, make_plan(sliced, method="shortgpt", blocks=2, texts=windows))
    assert (shorter.block_count, shorter.config.hidden_size) == (6, 24)
    assert [step["method"] for entry in shorter.history for step in entry["plan"]["steps"]] == [
        "stock-slicing",
        "shortgpt",
    ]


def test_damaged_weights_stop_the_slicing(tiny_folder):
    decoder = open_model(tiny_folder("llama"))
    decoder.module.get_parameter("model.layers.3.mlp.down_proj.weight").data[0, 0] = float("nan")
    plan = make_plan(decoder, method="slicegpt", texts=draw_windows(), slicing=0.25)
    with pytest.raises(ModelError, match="rotating the hidden states changes the logits by nan"):
        prune(decoder, plan, texts=draw_windows())
