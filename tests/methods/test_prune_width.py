"""Width pruning: what its methods decide, how they walk, and what they leave."""

import copy
import json
import warnings

import pytest
import torch

from oracles import draw_tokens, draw_windows, forward, plain_states
from secateur import Plan, make_plan, open_model, prune
from secateur.calibration.reading_points import visit_reading_points
from secateur.calibration.walk import mean_loss
from secateur.data.texts import windows_for
from secateur.data.windows import Windows
from secateur.errors import InputError, ModelError, SecateurError, SecateurWarning
from secateur.methods.uniform_widths import rounded
from secateur.plan.steps import PruneWidth
from secateur.surgery.hidden.shared_basis import find_coordinates
from secateur.surgery.width.target import dense_widths
from tiny_models import save_tiny

EVEN = ["wanda-sp", "minitron-width", "obs-width"]
WINDOWS = Windows.of(torch.randint(3, 2000, (8, 96), generator=torch.Generator().manual_seed(0)))


def plan_for(decoder, method, amount, windows=None, **settings):
    return make_plan(decoder, method=method, **amount, texts=windows or draw_windows(), settings=settings)


def cut(decoder, method, amount, windows=None, **settings):
    windows = windows or draw_windows()
    return prune(decoder, plan_for(decoder, method, amount, windows, **settings), texts=windows)


# Decisions


def test_the_budget_is_met_by_channels_in_multiples(bundled):
    plan = plan_for(bundled, "obs-width", {"remove": 0.2}, WINDOWS)
    (step,) = plan.steps
    assert (step.stock, step.rounding) == (True, 64)
    assert {(one.groups, one.queries, one.channels) for one in step.widths} == {(3, 2, 320)}
    assert step.unrounded == pytest.approx(0.2, abs=5e-4)
    assert "multiples of 64 (single channels would come to 20.0%)" in step.describe()[1]
    exact = plan_for(bundled, "obs-width", {"remove": 0.2}, WINDOWS, rounding=1)
    assert exact.removed_fraction == pytest.approx(0.2, abs=5e-4)
    assert exact.steps[0].unrounded is None


def test_heads_go_last_or_with_the_channels(bundled):
    last = plan_for(bundled, "wanda-sp", {"remove": 0.6}, WINDOWS).steps[0].widths[0]
    assert (last.groups, last.channels) == (1, 128)
    even = plan_for(bundled, "wanda-sp", {"remove": 0.25}, WINDOWS, heads="even").steps[0].widths[0]
    assert (even.groups, even.channels) == (2, 384)
    never = plan_for(bundled, "wanda-sp", {"remove": 0.55}, WINDOWS, heads="never").steps[0].widths[0]
    assert (never.groups, never.channels) == (3, 64)


def test_target_params_stays_below(bundled):
    plan = plan_for(bundled, "minitron-width", {"target_params": "4.9M"}, WINDOWS)
    (step,) = plan.steps
    wider = tuple(one.model_copy(update={"channels": one.channels + 64}) for one in step.widths)
    assert plan.parameters_after <= 4_900_000 < step.sizes.sizes_at(wider).total


def test_widths_by_number(tiny):
    (step,) = plan_for(tiny("llama"), "obs-width", {}, ffn=20, groups=1).steps
    assert {(one.groups, one.queries, one.channels) for one in step.widths} == {(1, 2, 20)}
    (step,) = plan_for(tiny("falcon"), "obs-width", {}, queries=3).steps
    assert {(one.groups, one.queries) for one in step.widths} == {(1, 3)}
    assert not step.stock


def test_a_ratio_below_one_unit(tiny):
    """LLM-Pruner's released code crashes where the ratio is less than one group."""
    (step,) = plan_for(tiny("llama"), "llm-pruner", {}, ratio="3%", heads="even").steps
    assert [one.channels for one in step.widths] == [48] * 4 + [47] * 2 + [48] * 2
    assert {one.groups for one in step.widths} == {2}
    assert not step.stock


@pytest.mark.parametrize(("channels", "kept"), [(37.0, 40), (1.0, 8), (47.9, 48), (36.0, 40), (35.9, 32), (60.0, 50)])
def test_channels_are_rounded_to_the_nearest_multiple(channels, kept):
    assert rounded(channels, 50, 8) == kept


def test_one_threshold_for_all_blocks(bundled):
    """Each block finds its width; a group weighs what its parameters are."""
    plan = plan_for(bundled, "flap", {"remove": 0.2}, WINDOWS, rounding=1)
    (step,) = plan.steps
    assert plan.removed_fraction == pytest.approx(0.2, abs=2e-3)
    assert len({one.channels for one in step.widths}) > 6
    assert all(one.queries == 2 and 1 <= one.groups <= 3 for one in step.widths)
    assert not step.stock
    assert step.sizes.other < bundled.config.vocab_size * 192 + 1000, "the head stays tied"


@pytest.mark.parametrize(
    ("method", "amount", "settings", "says"),
    [
        ("obs-width", {"blocks": 2}, {}, "does not count in blocks; give ratio"),
        ("obs-width", {"remove": 0.99}, {}, "unreachable"),
        ("flap", {"remove": 0.99}, {}, "unreachable"),
        ("obs-width", {"remove": 0.2}, {"ffn": 20}, "ffn and another amount contradict"),
        ("obs-width", {}, {"ffn": 20, "ratio": 0.2}, "ratio and ffn contradict"),
        ("obs-width", {}, {"ffn": 60}, "must be between 1 and 48"),
        ("obs-width", {}, {"groups": 1, "queries": 1}, "only one of them may go"),
        ("obs-width", {"remove": 0.2}, {"rounding": 64}, "unreachable, at most 15.7%"),
        ("obs-width", {}, {"ratio": "25"}, "Did you mean 25%"),
        ("wanda-sp", {"remove": 0.1}, {"protect_first": 8}, "all 8 blocks are protected"),
        ("flap", {"remove": 0.1}, {"protect_last": 8}, "all 8 blocks are protected"),
        ("minitron-width", {"remove": 0.05}, {"hidden": 0.5}, "that alone leaves"),
        ("flap", {"remove": 0.1}, {"ffn": 20}, "unknown setting"),
    ],
)
def test_amounts_that_cannot_be(method, amount, settings, says, tiny):
    with pytest.raises(SecateurError, match=says):
        plan_for(tiny("llama"), method, amount, **settings)


def test_heads_that_cannot_go(tiny):
    for name, reason in (("olmo2", "over all its heads together"), ("bloom", "slopes of its positions")):
        with pytest.raises(ModelError, match=reason):
            plan_for(tiny(name), "obs-width", {}, groups=1)
        (step,) = plan_for(tiny(name), "obs-width", {}, ratio=0.5, heads="even").steps
        assert {one.groups for one in step.widths} == {dense_widths(tiny(name))[0].groups}


def test_experts_stay_in_multiples_that_grouped_products_want(tiny):
    (step,) = plan_for(tiny("qwen3_moe"), "wanda-sp", {"remove": 0.2}, rounding=2).steps
    assert step.rounding == 8
    with pytest.raises(InputError, match="multiples of 8"):
        plan_for(tiny("qwen3_moe"), "wanda-sp", {}, ffn=12)


# The walk


def fitted(x, w, wanted, weight, stay, ridge):
    """Weighted least squares that a ridge pulls toward the plain slice, by a tall matrix."""
    root = w.sqrt()[:, None]
    strength = (ridge * (root * x).square().sum(dim=0).mean()).sqrt()
    tall = torch.cat([root * x[:, stay], strength * torch.eye(int(stay.sum()), dtype=x.dtype)])
    target = torch.cat([root * wanted, strength * weight[:, stay].T])
    repaired = torch.zeros_like(weight)
    repaired[:, stay] = torch.linalg.lstsq(tall, target).solution.T
    return repaired


def fitted_by_trial(x, w, wanted, weight, stay, held_out):
    """Try every ridge and none on the tokens held out, then fit the best on all."""
    plain = weight * stay
    tried = {None: plain} | {
        ridge: fitted(x[~held_out], w[~held_out], wanted[~held_out], weight, stay, ridge)
        for ridge in [1e-4 * 10 ** (half / 2) for half in range(11)]
    }

    def missed(ridge):
        return float((w * (wanted - x @ tried[ridge].T).square().sum(dim=1))[held_out].sum())

    best = min(tried, key=missed)
    return plain if best is None else fitted(x, w, wanted, weight, stay, best)


def straight_line(decoder, windows, keep_groups, keep_channels, ridge, target):
    """Wanda-sp with repair on a Llama: hooks on the whole module, least squares, one projection after the other."""
    module, tokens = copy.deepcopy(decoder.module).double(), windows.tokens
    held_out = (torch.arange(len(tokens)) % 4 == 3).repeat_interleave(tokens.shape[1])
    leaves = plain_states(decoder, tokens)[1:]
    for block, of_dense in zip(module.model.layers, leaves, strict=True):
        for writer, units, keep in ((block.self_attn.o_proj, 2, keep_groups), (block.mlp.down_proj, 48, keep_channels)):
            seen = []
            hooks = [
                writer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1))),
                block.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out.flatten(0, 1))),
            ]
            forward(module, tokens)
            for hook in hooks:
                hook.remove()
            (x, states), weight = seen, writer.weight.data
            size = x.shape[1] // units
            scores = [
                sum(float(weight[:, j].abs().sum() * x[:, j].norm()) for j in range(u * size, (u + 1) * size))
                for u in range(units)
            ]
            kept = sorted(range(units), key=lambda u: -scores[u])[:keep]
            stay = torch.tensor([column // size in kept for column in range(x.shape[1])])
            w, wanted = 1 / states.square().sum(dim=1), x @ weight.T
            if target == "dense" and writer is block.mlp.down_proj:
                wanted = wanted + of_dense.flatten(0, 1).double() - states
            fit, how = (fitted_by_trial, held_out) if ridge == "auto" else (fitted, ridge)
            writer.weight.data = fit(x, w, wanted, weight, stay, how)
    return module


@pytest.mark.parametrize(("ridge", "target"), [(1e-3, "block"), (1e-3, "dense"), ("auto", "dense")])
def test_the_walk_is_block_by_block_on_what_is_cut_already(ridge, target, tiny):
    windows, tokens = draw_windows(8, 16), draw_tokens(2, 16, seed=5)
    found = cut(tiny("llama"), "wanda-sp", {}, windows, ffn=30, groups=1, ridge=ridge, target=target)
    expected = straight_line(tiny("llama"), windows, 1, 30, ridge, target)
    torch.testing.assert_close(forward(found.module, tokens).double(), forward(expected, tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["granite", "gpt2", "gpt_neox", "llama"])
def test_states_come_nearer_to_those_of_the_dense_model(name, tiny):
    """Also where what an MLP writes is scaled, and where it runs in parallel with attention."""
    decoder, windows = tiny(name), draw_windows(32, 16)
    expected, gaps = plain_states(decoder, windows.tokens)[-2], {}
    for target in ("block", "dense"):
        found = cut(decoder, "wanda-sp", {}, windows, ratio=0.5, ridge=1e-3, target=target, heads="never")
        gaps[target] = float((plain_states(found, windows.tokens)[-2] - expected).square().mean())
    assert gaps["dense"] < 0.9 * gaps["block"]


def test_a_norm_after_the_mlp_leaves_the_target_of_a_block(tiny):
    """What brings the states back passes that norm, so it is no target."""
    found = [cut(tiny("gemma2"), "wanda-sp", {}, ratio=0.5, target=target).fingerprint for target in ("block", "dense")]
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["wanda-sp", "llm-pruner", "minitron-width"])
def test_a_skeleton_gives_the_same(method, tmp_path):
    folder = save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    settings = {"ratio": 0.3, "heads": "even"} | ({"hidden": 0.25} if method == "minitron-width" else {})
    memory, light = (cut(open_model(folder, skeleton=one), method, {}, **settings) for one in (False, True))
    assert memory.fingerprint == light.fingerprint
    for index in range(8):
        with light.block(index) as block:
            for (name, own), (_, other) in zip(
                memory.block_list[index].named_parameters(), block.named_parameters(), strict=True
            ):
                assert torch.equal(own, other), name


def test_taylor_decides_what_goes(tiny):
    """The units that go are those of least score, all else alike; the first four and last two blocks stay."""
    from secateur.scores.taylor import taylor_by_unit

    decoder, windows = tiny("llama"), draw_windows()
    found = cut(decoder, "llm-pruner", {}, windows, ffn=30, repair=False)
    assert found.config.intermediate_sizes == [48] * 4 + [30] * 2 + [48] * 2
    scores = taylor_by_unit(decoder, windows)[4][1][0]
    stay = scores.argsort(descending=True)[:30].sort().values
    down = decoder.block_list[4].mlp.down_proj.weight
    torch.testing.assert_close(found.block_list[4].mlp.down_proj.weight, down[:, stay])


def test_the_bias_of_flap_keeps_the_mean(tiny):
    """In block 0, whose inputs are the dense ones, the mean of what the MLP writes is as before."""
    windows = draw_windows()
    found = cut(tiny("llama"), "flap", {}, windows, ratio=0.4, heads="never", repair=False)
    without = cut(tiny("llama"), "flap", {}, windows, ratio=0.4, heads="never", repair=False, bias="off")
    means = []
    for decoder in (tiny("llama"), found, without):
        seen = []
        hook = decoder.block_list[0].mlp.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
        forward(decoder.module, windows.tokens)
        hook.remove()
        means.append(seen[0].flatten(0, 1).mean(dim=0))
    torch.testing.assert_close(means[1], means[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(means[2], means[0], atol=1e-2)
    (step,) = plan_for(tiny("qwen3_moe-mixed"), "flap", {}, ratio=0.4).steps
    assert "no compensating bias in 6 blocks" in step.describe()[1]


def test_repair_pays(bundled):
    windows = windows_for(bundled, None, windows=6, seq_len=96)
    plain, repaired = (
        mean_loss(cut(bundled, "wanda-sp", {}, windows, ffn=256, repair=repair), windows) for repair in (False, True)
    )
    assert repaired < plain - 0.1


def test_a_result_tells_how_each_part_was_fitted(tiny):
    windows = draw_windows(8, 16)
    found = cut(tiny("llama"), "obs-width", {}, windows, ffn=30, groups=1, align=True)
    told = found.history[-1]["repair"]
    parts, below = ("heads", "channels"), ("attention inputs", "MLP inputs")
    assert [(one["block"], one["part"]) for one in told] == [
        (b, part) for b in range(8) for part in (parts + below if b else parts)
    ]
    assert all(one["error"] <= one["error_without_repair"] for one in told)
    assert "repair" not in cut(tiny("llama"), "obs-width", {}, windows, ffn=30, repair=False).history[-1]
    experts = cut(tiny("mixtral"), "obs-width", {}, windows, ffn=24).history[-1]["repair"]
    assert {len(one["ridge"]) for one in experts if one["part"] == "channels"} == {4}


def test_too_few_tokens_for_a_fit_are_told(tiny):
    plan = plan_for(tiny("llama"), "wanda-sp", {}, ffn=30)
    with pytest.warns(SecateurWarning, match="64 calibration tokens .* of 48 inputs; 48 windows of 16 tokens"):
        prune(tiny("llama"), plan, texts=draw_windows(4, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SecateurWarning)
        prune(tiny("llama"), plan_for(tiny("llama"), "wanda-sp", {}, ffn=30, repair=False), texts=draw_windows())


@pytest.mark.parametrize("method", ["wanda-sp", "obs-width"])
def test_without_repair_columns_stay_as_they_are(method, tiny):
    found = cut(tiny("llama"), method, {}, ffn=30, repair=False).block_list[2].mlp.down_proj.weight
    dense = tiny("llama").block_list[2].mlp.down_proj.weight
    assert all(any(torch.equal(column, one) for one in dense.T) for column in found.T)


def test_damaged_weights_are_named(tiny_folder):
    decoder = open_model(tiny_folder("llama"))
    decoder.module.get_parameter("model.layers.3.mlp.down_proj.weight").data[0, 0] = float("nan")
    with pytest.raises(SecateurError, match="block 3"):
        cut(decoder, "obs-width", {}, ratio=0.3)


# Hidden directions


def test_coordinates_of_the_largest_activations(tiny):
    decoder, windows = tiny("llama"), draw_windows()
    sizes = torch.zeros(32, dtype=torch.float64)

    def visit(point, states, _):
        if point < 16:
            block = decoder.block_list[point // 2]
            norm = block.input_layernorm if point % 2 == 0 else block.post_attention_layernorm
            sizes.add_(norm(states).detach().double().abs().sum(dim=0))

    visit_reading_points(decoder, windows, visit)
    directions = find_coordinates(decoder, windows, 20).directions[0]
    assert directions.argmax(dim=0).tolist() == sorted(sizes.argsort(descending=True)[:20].tolist())
    assert torch.equal(directions.sum(dim=0), torch.ones(20, dtype=torch.float64))


def test_hidden_directions_go_first_then_channels(tiny):
    plan = plan_for(tiny("llama"), "minitron-width", {"remove": 0.5}, hidden=0.25)
    assert [step.kind for step in plan.steps] == ["slice-hidden", "prune-width"]
    assert plan.removed_fraction == pytest.approx(0.5, abs=0.02)
    found = prune(tiny("llama"), plan, texts=draw_windows())
    assert type(found.module).__name__ == "LlamaForCausalLM"
    assert (found.config.hidden_size, found.config.head_dim) == (24, 8)
    alone = plan_for(tiny("llama"), "minitron-width", {}, hidden="25%", ratio=0)
    assert [step.kind for step in alone.steps] == ["slice-hidden"]
    with pytest.raises(ModelError, match="no stock opt can have a smaller hidden state"):
        plan_for(tiny("opt"), "minitron-width", {}, hidden=0.25, ratio=0.2)


# Plans, and several cuts


def test_edited_plans(tiny, tmp_path):
    plan = plan_for(tiny("llama"), "obs-width", {}, ratio=0.25)
    path = tmp_path / "plan.json"

    def edited(block, **change):
        data = json.loads(plan.to_json())
        data["steps"][0]["widths"][block] |= change
        path.write_text(json.dumps(data))
        return Plan.read(path)

    for change, says in (
        ({"channels": 49}, "keeps 49 channels in block 2; there are 48"),
        ({"channels": -1}, "greater than or equal to 0"),
        ({"groups": 1, "queries": 1}, "only one of them may go"),
    ):
        with pytest.raises(InputError, match=says):
            edited(2, **change)
    with pytest.raises(ModelError, match="no llama can have these widths"):
        prune(tiny("llama"), edited(2, channels=20), texts=draw_windows())
    data = json.loads(plan.to_json())
    for one in data["steps"][0]["widths"]:
        one["channels"] = 21
    path.write_text(json.dumps(data))
    assert prune(tiny("llama"), path, texts=draw_windows()).config.intermediate_size == 21
    other = plan_for(tiny("qwen3"), "obs-width", {}, ratio=0.25)
    with pytest.raises(InputError, match="another shape"):
        prune(tiny("qwen3"), other.model_copy(update={"steps": plan.steps}), texts=draw_windows())


def test_a_width_pruned_model_is_pruned_again(tiny):
    uneven = cut(tiny("llama"), "flap", {}, ratio=0.4)
    shorter = cut(uneven, "last-n", {"blocks": 2})
    assert shorter.config.heads == [*uneven.config.heads[:5], uneven.config.heads[7]]
    again = cut(shorter, "obs-width", {}, ratio=0.3)
    assert type(again.module).__name__ == "SecateurForCausalLM"
    assert max(again.config.intermediate_sizes) < max(shorter.config.intermediate_sizes)
    assert again.parameter_count < shorter.parameter_count
    assert cut(shorter, "flap", {}, ratio=0.3).parameter_count < shorter.parameter_count


def test_slicing_and_width_pruning_one_after_the_other(tiny):
    windows = draw_windows()
    both = "stock-slicing:0.5,obs-width:0.5"
    plan = make_plan(tiny("llama"), method=both, remove=0.5, texts=windows)
    found = prune(tiny("llama"), plan, texts=windows)
    assert plan.removed_fraction == pytest.approx(0.5, abs=0.03)
    assert found.config.hidden_size < 32
    assert found.config.intermediate_size < 48
    sliced = cut(tiny("llama"), "slicegpt", {"slice": 0.25}, windows)
    smaller = cut(sliced, "obs-width", {}, windows, ratio=0.25)
    assert smaller.config.widths == sliced.config.widths
    assert smaller.config.intermediate_sizes == [36] * 8


def test_every_plan_says_what_stays(tiny):
    for method in EVEN:
        (step,) = plan_for(tiny("llama"), method, {}, ratio=0.5).steps
        assert isinstance(step, PruneWidth)
        assert step.describe()[1].startswith("4 of 4 query heads, 2 of 2 key/value groups, 24 of 48 channels")


@pytest.mark.parametrize(("ffn", "align", "expected"), [(40, "auto", False), (8, "auto", True), (8, False, False)])
def test_alignment_where_much_goes(ffn, align, expected, tiny):
    (step,) = plan_for(tiny("llama"), "obs-width", {}, ffn=ffn, align=align).steps
    assert step.align is expected
