"""Windows replaced by matrices, against numpy's least squares on the states of plain forward passes."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, BitNetConfig

from oracles import draw_tokens, draw_windows, forward, no_real_parameters, plain_states, walk
from secateur import Plan, make_plan, open_model, prune, save, score
from secateur.calibration.ridge import GRID
from secateur.calibration.statistics import LinearSums
from secateur.errors import InputError, ModelError, NumericsError
from secateur.methods.linear_replacement import best_windows, least_influence, most_blocks, window_sizes
from secateur.models.anatomy import find
from secateur.plan.steps import LinearReplacement, Sizes
from secateur.run_options import RunOptions
from secateur.scores.linearity import linear_sums
from tiny_models import build

BLOCKS = 8

MLPS = {"llama": "mlp", "llama-bias": "mlp", "gpt2": "mlp", "gpt_neox": "mlp", "granite": "mlp", "mixtral": "mlp"}
"""Where the MLP stands in a block, for the oracle, which looks at what that module gives."""

# The oracle: states by hooks, the MLP's part by a hook on the MLP, numpy's least squares


@torch.no_grad()
def mlp_part(decoder, index, windows):
    seen = []
    mlp = find(decoder.block_list[index], "mlp")
    handle = mlp.register_forward_hook(
        lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        forward(decoder.module, windows.tokens, windows.mask)
    finally:
        handle.remove()
    part = seen[0].view(*windows.tokens.shape, -1)
    return part * getattr(decoder.config, "residual_multiplier", 1.0)


def plain_fit(decoder, windows, low, high, ridge):
    """T by numpy with tokens weighed by 1 / ‖Y‖², and the share of the state that it leaves unexplained."""
    states = plain_states(decoder, windows.tokens, windows.mask)
    real = torch.ones_like(windows.tokens, dtype=torch.bool) if windows.mask is None else windows.mask
    part, before, after = (
        one[real].double().numpy() for one in (mlp_part(decoder, low - 1, windows), states[low], states[high + 1])
    )
    width = part.shape[1]
    root = 1 / np.linalg.norm(after, axis=1, keepdims=True)
    part, before, after = root * part, root * before, root * after
    strength = np.sqrt(ridge * np.mean(np.sum(part**2, axis=0)))
    rows = np.vstack([part, strength * np.eye(width)])
    wanted = np.vstack([after - (before - part), strength * np.eye(width)])
    turn = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    missed = (before - part) + part @ turn - after
    return turn, (missed**2).sum() / (after**2).sum()


def held_out_error(decoder, windows, low, high, ridge):
    """The share that the T of the other windows leaves unexplained on every fourth."""
    held_out = torch.arange(len(windows)) % 4 == 3
    turn, _ = plain_fit(decoder, windows.some((~held_out).nonzero().flatten().tolist()), low, high, ridge)
    apart = windows.some(held_out.nonzero().flatten().tolist())
    states = plain_states(decoder, apart.tokens)
    part, before, after = (
        one.double().flatten(0, 1).numpy() for one in (mlp_part(decoder, low - 1, apart), states[low], states[high + 1])
    )
    root = 1 / np.linalg.norm(after, axis=1, keepdims=True)
    return float(((root * (before - part + part @ turn - after)) ** 2).sum() / len(root))


def cosine_missing(decoder, windows, low, high, matrix):
    """Mean of 1 − cos² between R + P T and the state that leaves the window."""
    states = plain_states(decoder, windows.tokens, windows.mask)
    part, before, after = (
        one.double().flatten(0, 1) for one in (mlp_part(decoder, low - 1, windows), states[low], states[high + 1])
    )
    return float((1 - torch.cosine_similarity(before - part + part @ matrix, after).square()).mean())


def windows_of_text(side=None):
    return draw_windows(windows=6, positions=24, side=side)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", MLPS)
def test_matrices_are_numpys(name, side, tiny):
    decoder, windows = tiny(name), windows_of_text(side)
    spans = [(1, 1), (3, 5), (2, 6), (7, 7)]
    found = dict(linear_sums(decoder, windows, spans, options=RunOptions(batch_size=4)))
    assert set(found) == set(spans)
    for span, ridge in itertools.product(spans, (1e-3, 0.1)):
        turn, error = plain_fit(decoder, windows, *span, ridge)
        matrix = found[span].result(ridge)
        assert np.allclose(matrix.numpy(), turn, atol=2e-3), span
        assert found[span].error(matrix) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_skeleton_finds_the_same(name, tiny):
    windows, spans = windows_of_text("left"), [(1, 2), (2, 2), (4, 6)]
    memory, skeleton = (
        dict(linear_sums(tiny(name, skeleton=light), windows, spans, options=RunOptions(batch_size=2)))
        for light in (False, True)
    )
    assert all(torch.equal(memory[span].result(0.01), skeleton[span].result(0.01)) for span in spans)
    assert no_real_parameters(tiny(name, skeleton=True).module)


@pytest.mark.parametrize(
    "name",
    [
        *("llama-bias", "gpt2", "gpt_neox", "falcon", "falcon-rw", "bloom", "phi", "opt", "granite", "cohere"),
        *("mixtral", "qwen3_moe-mixed", "stablelm-parallel", "phi3", "gemma"),
    ],
)
def test_the_folded_model_gives_what_the_matrix_says(name, tiny):
    """What leaves the edited block is R + P T, to the last bit of arithmetic that matters."""
    decoder, windows = tiny(name), windows_of_text()
    low, high = 3, 4
    step = LinearReplacement(method="by hand", windows=((low, high),), ridge=0.05)
    cut = prune(decoder, plan_of(decoder, step), texts=windows)
    matrix = dict(linear_sums(decoder, windows, [(low, high)]))[low, high].result(0.05)
    before = plain_states(decoder, windows.tokens)
    rest = rest_of(name, low - 1, windows)
    expected = rest.double() + (before[low] - rest).double() @ matrix
    found = plain_states(cut, windows.tokens)[low]
    assert torch.allclose(found.double(), expected, atol=1e-3 * float(expected.abs().max()))
    assert not torch.allclose(found, before[low], atol=1e-2)
    assert cut.block_count == BLOCKS - 2


def rest_of(name, index, windows):
    """What leaves a block of a freshly built copy whose MLP was silenced by hand."""
    copy = open_model(build(name))
    with torch.no_grad():
        for path in copy.anatomy.family.mlp_out:
            part = find(copy.block_list[index], path)
            if part is not None:
                for parameter in [part] if isinstance(part, torch.nn.Parameter) else part.parameters():
                    parameter.zero_()
    return plain_states(copy, windows.tokens)[index + 1]


def plan_of(decoder, *steps):
    empty = make_plan(decoder, method="last-n", blocks=0)
    return empty.model_copy(update={"steps": steps})


def test_identity_and_ridge(tiny):
    """A strong ridge only drops the blocks; none reproduces best what was measured."""
    decoder, windows = tiny("llama"), windows_of_text()
    sums = dict(linear_sums(decoder, windows, [(3, 4)]))[3, 4]
    assert torch.allclose(sums.result(1e9), torch.eye(32, dtype=torch.float64), atol=1e-6)
    errors = [sums.error(sums.result(ridge)) for ridge in (0, 1e-3, 1e-1, 10, 1e9)]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[-1]


def test_the_cosine_gets_larger(tiny):
    decoder, windows = tiny("llama"), windows_of_text()
    span = (3, 5)
    missing = [
        cosine_missing(
            decoder, windows, *span, dict(linear_sums(decoder, windows, [span], cosine=goal))[span].result(0.01)
        )
        for goal in (None, 0.01)
    ]
    assert missing[1] < 0.99 * missing[0]


def test_the_ridge_is_the_largest_that_is_nearly_best_on_held_out_tokens():
    """Against every ridge of the grid tried by hand; where none helps on the held-out tokens, T is I."""
    generator = torch.Generator().manual_seed(0)
    part, before, noise = (torch.randn(60, 12, generator=generator).double() for _ in range(3))
    turn, held_out = torch.randn(12, 12, generator=generator).double(), torch.arange(60) % 3 == 0
    weight = torch.rand(60, generator=generator) + 0.1
    for after in (before + part @ turn + 3 * noise, before + noise):
        sums, fitted = LinearSums(12), LinearSums(12)
        sums.update(part, before, after, weight, held_out)
        fitted.update(*(one[~held_out] for one in (part, before, after, weight)))
        errors = {}
        for ridge in (None, *GRID):
            reached = before + part @ (fitted.result(ridge) - torch.eye(12, dtype=torch.float64))
            missed = ((reached - after).square().sum(dim=1) * weight)[held_out].sum()
            errors[ridge] = float(missed / (after.square().sum(dim=1) * weight)[held_out].sum())
            assert sums.held_out_error(ridge) == pytest.approx(errors[ridge], rel=1e-9)
        nearly = [r for r in GRID if errors[None] - errors[r] >= 0.95 * (errors[None] - min(errors.values()))]
        assert sums.best_ridge() == (None if min(errors, key=errors.get) is None else max(nearly))
    assert torch.equal(sums.result(None), torch.eye(12, dtype=torch.float64))


def test_too_few_tokens_take_the_smallest_matrix():
    """With fewer tokens than dimensions there are many solutions; the one nearest to the identity is taken."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(5, 12, generator=generator) for _ in range(3)]
    part, before, after = (one.double().numpy() for one in rows)
    expected = np.linalg.lstsq(part, after - before, rcond=None)[0] + np.eye(12)
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        sums = LinearSums(12)
        sums.update(*(one.to(dtype) for one in rows))
        assert np.allclose(sums.result(0.0).numpy(), expected, atol=near)
        assert sums.error(sums.result(0.0)) < near


def test_pieces_add_up():
    generator = torch.Generator().manual_seed(0)
    whole, pieces = LinearSums(6), LinearSums(6)
    rows = [torch.randn(40, 6, generator=generator) for _ in range(3)]
    whole.update(*rows)
    for first in (0, 7, 31):
        last = {0: 7, 7: 31, 31: 40}[first]
        pieces.update(*(one[first:last] for one in rows))
    assert torch.allclose(whole.result(0.1), pieces.result(0.1), atol=1e-12)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_part_that_says_nothing(value):
    sums = LinearSums(4)
    sums.update(torch.full((9, 4), value), torch.ones(9, 4), torch.ones(9, 4))
    with pytest.raises(NumericsError, match="undefined"):
        sums.result(0.1)


# Which windows


def found_by(decoder, windows, blocks, **settings):
    (step,) = make_plan(decoder, method="replaceme", blocks=blocks, texts=windows, settings=settings).steps
    return step


@pytest.mark.parametrize("name", ["llama", "granite"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_window_of_least_error(name, count, tiny):
    decoder, windows = tiny(name), windows_of_text()
    errors = {low: held_out_error(decoder, windows, low, low + count - 1, 0.1) for low in range(1, BLOCKS - count + 1)}
    best = min(errors, key=errors.get)
    step = found_by(decoder, windows, count, choose="error", max_window=count)
    assert step.windows == ((best, best + count - 1),)
    assert step.error == pytest.approx((errors[best],), rel=1e-3)


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_the_blocks_of_least_influence_in_windows(count, tiny):
    decoder, windows = tiny("llama"), windows_of_text()
    settings = {"protect_first": 1}
    dropped = make_plan(decoder, method="shortgpt", blocks=count, texts=windows, settings=settings).steps[0].blocks
    step = found_by(decoder, windows, count)
    assert [block for low, high in step.windows for block in range(low, high + 1)] == list(dropped)
    assert all(second[0] > first[1] + 1 for first, second in itertools.pairwise(step.windows)), "neighbours are one"
    assert step.error == ()


def test_windows_of_least_influence_by_length(tiny):
    decoder, windows = tiny("llama"), windows_of_text()
    influence = score(decoder, texts=windows).block_influence
    best = min(range(1, BLOCKS - 2), key=lambda low: sum(influence[low : low + 3]))
    assert found_by(decoder, windows, 3, max_window=3).windows == ((best, best + 2),)
    assert make_plan(decoder, method="replaceme", texts=windows, settings={"window": 3}).steps[0].windows == (
        (best, best + 2),
    )


def test_blocks_that_nothing_stands_before(tiny):
    """In a mixed model, a block whose predecessor has no MLP to fold into stays, whatever its influence."""
    decoder = tiny("llama")
    influence = [float(block) for block in range(BLOCKS)]
    assert least_influence(decoder, influence, range(BLOCKS), 2) == ((1, 2),)
    assert least_influence(decoder, [3, 2, 9, 1, 9, 2, 4, 9], range(BLOCKS), 4) == ((1, 1), (3, 3), (5, 6))
    assert least_influence(decoder, influence, range(3, 6), 2) == ((4, 5),)
    with pytest.raises(InputError, match="replaceme: no 3 blocks"):
        least_influence(decoder, influence, range(3, 6), 3)


@pytest.mark.parametrize("choose", ["cosine", "angular"])
def test_the_window_of_least_distance(choose, tiny):
    decoder, windows = tiny("llama"), windows_of_text()
    other = {"cosine": "streamline", "angular": "uidl"}[choose]
    settings = {"protect_first": 1} | ({"network": "none"} if other == "streamline" else {})
    dropped = make_plan(decoder, method=other, blocks=3, texts=windows, settings=settings).steps[0].blocks
    step = found_by(decoder, windows, 3, choose=choose, max_window=3)
    assert step.windows == ((dropped[0], dropped[-1]),)
    assert step.error == ()


def test_protected_blocks(tiny):
    """The block before a window is changed, so it must be free as well."""
    decoder, windows = tiny("llama"), windows_of_text()
    step = found_by(decoder, windows, 2, protect_first=3, protect_last=2)
    assert step.windows == ((4, 5),)  # windows of one block have no room for two here
    with pytest.raises(InputError, match="at most 2 blocks"):
        found_by(decoder, windows, 3, protect_first=3, protect_last=2)
    with pytest.raises(InputError, match="replaceme: fewer than two of 8 blocks may change"):
        found_by(decoder, windows, 1, protect_first=5, protect_last=2)


@pytest.mark.parametrize(("count", "sizes"), [(3, [1, 1, 1]), (4, [1, 1, 1, 1]), (5, [1, 2, 2]), (6, [3, 3]), (7, [7])])
def test_windows_are_as_short_as_the_amount_allows(count, sizes, tiny):
    step = found_by(tiny("llama"), windows_of_text(), count, choose="error")
    assert sorted(high - low + 1 for low, high in step.windows) == sizes


def test_several_windows(tiny):
    decoder, windows = tiny("llama"), windows_of_text()
    step = found_by(decoder, windows, 3, choose="error", max_window=2)
    assert sorted(high - low + 1 for low, high in step.windows) == [1, 2]
    assert len(step.kept_blocks(BLOCKS)) == 5
    errors = dict(linear_sums(decoder, windows, step.windows))
    assert step.error == pytest.approx([errors[span].held_out_error(0.1) for span in step.windows])


@pytest.mark.parametrize(
    ("count", "longest", "sizes"),
    [(5, 5, (5,)), (5, 2, (2, 2, 1)), (6, 3, (3, 3)), (4, 3, (2, 2)), (3, 1, (1,) * 3)],
)
def test_sizes(count, longest, sizes):
    assert window_sizes(count, longest) == sizes


@pytest.mark.parametrize(("free", "longest"), itertools.product(range(10), (None, 1, 2, 3, 4)))
def test_as_many_as_there_is_room_for(free, longest):
    most = most_blocks(free, longest)
    for count in range(1, most + 1):
        sizes = window_sizes(count, longest or count)
        assert sum(sizes) + len(sizes) <= free
    larger = window_sizes(most + 1, longest or most + 1)
    assert sum(larger) + len(larger) > free


@pytest.mark.parametrize("seed", range(4))
def test_the_best_places_by_force(seed):
    generator = np.random.default_rng(seed)
    free = range(1, 10)
    costs = {(low, high): generator.random() for low in range(2, 10) for high in range(low, 10)}
    for sizes in ((3,), (2, 1), (2, 2), (1, 1, 1), (2, 2, 1)):
        ways = []
        for lows in itertools.combinations(range(2, 10), len(sizes)):
            for order in set(itertools.permutations(sizes)):
                spans = [(low, low + size - 1) for low, size in zip(lows, order, strict=True)]
                fits = all(right[0] - 1 > left[1] for left, right in itertools.pairwise(spans))
                if fits and spans[-1][1] < 10:
                    ways.append((sum(costs[span] for span in spans), tuple(spans)))
        assert best_windows(free, sizes, costs) == min(ways)[1]


# Budgets and settings


def test_shares_of_all_parameters(tiny):
    decoder, windows = tiny("llama"), windows_of_text()
    share = decoder.block_parameter_counts()[0] / decoder.parameter_count
    plan = make_plan(decoder, method="replaceme", remove=3.3 * share, texts=windows)
    assert plan.removed_fraction == pytest.approx(3 * share)
    below = int(decoder.parameter_count * (1 - 2.7 * share))
    assert make_plan(decoder, method="replaceme", target_params=below, texts=windows).removed_fraction == (
        pytest.approx(3 * share)
    )


def test_blocks_of_two_sizes(tiny):
    decoder, windows = tiny("qwen3_moe-mixed"), windows_of_text()
    for target in (0.85, 0.7):
        plan = make_plan(
            decoder, method="replaceme", target_params=int(target * decoder.parameter_count), texts=windows
        )
        assert plan.parameters_after <= target * decoder.parameter_count
        assert prune(decoder, plan, texts=windows).parameter_count == plan.parameters_after


@pytest.mark.parametrize("amount", [{"blocks": 8}, {"remove": 0.9}, {"remove": 0.01}])
def test_out_of_reach(amount, tiny):
    with pytest.raises(InputError, match=r"at most 7 blocks|unreachable"):
        make_plan(tiny("llama"), method="replaceme", texts=windows_of_text(), **amount)


def test_the_papers_n(tiny):
    decoder, windows = tiny("llama"), windows_of_text()
    plan = make_plan(decoder, method="replaceme", texts=windows, settings={"window": 2})
    assert plan.requested == {"blocks": 2}
    assert plan.steps[0].windows == found_by(decoder, windows, 2, max_window=2).windows
    with pytest.raises(InputError, match="window and another amount contradict"):
        found_by(decoder, windows, 2, window=2)


def test_nothing_for_nothing(tiny):
    plan = make_plan(tiny("llama"), method="replaceme", blocks=0)
    assert plan.steps == ()
    assert prune(tiny("llama"), plan).fingerprint == tiny("llama").fingerprint


@pytest.mark.parametrize(
    "settings", [{"choose": "loss"}, {"ridge": -1}, {"ridge": "inf"}, {"max_window": 0}, {"starts": 2}]
)
def test_values_a_setting_cannot_take(settings, tiny):
    with pytest.raises(InputError, match="replaceme"):
        found_by(tiny("llama"), windows_of_text(), 2, **settings)


# Refusals and damage


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo2", "opt-post-norm"])
def test_a_norm_after_the_mlp(name, tiny):
    decoder = tiny(name)
    with pytest.raises(ModelError, match="norm between the MLP's output and the residual stream"):
        make_plan(decoder, method="replaceme", blocks=1, texts=windows_of_text())
    step = LinearReplacement(method="by hand", windows=((3, 4),), ridge=0.1)
    with pytest.raises(ModelError, match="norm between"):
        prune(decoder, plan_of(decoder, step), texts=windows_of_text())


def test_a_family_whose_mlps_were_not_found():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    module = AutoModelForCausalLM.from_config(BitNetConfig(vocab_size=256, num_key_value_heads=2, **sizes))
    with pytest.raises(ModelError, match=r"not in the table of families.*docs/add-a-family.md"):
        make_plan(open_model(module), method="replaceme", blocks=1, texts=windows_of_text())


@pytest.mark.parametrize("place", ["mlp.down_proj.weight", "self_attn.q_proj.weight"])
def test_damage_never_becomes_a_matrix(place):
    module = build("llama")
    with torch.no_grad():
        module.get_parameter(f"model.layers.3.{place}").view(-1)[5] = float("nan")
    with pytest.raises(NumericsError, match="block 3"):
        make_plan(open_model(module), method="replaceme", blocks=2, texts=windows_of_text())


# The step


SIZES = Sizes((10, 10, 20, 20, 30), 7)


def replacing(*windows, **fields):
    return LinearReplacement(method="by hand", windows=windows, **{"ridge": 0.1, **fields})


def test_what_a_step_leaves():
    step = replacing((3, 4), (1, 1))
    assert step.kept_blocks(5) == (0, 2)
    assert step.sizes_after(SIZES) == Sizes((10, 20), 7)
    assert step.describe() == ("replaces", "1 to 1, 3 to 4 (a matrix each)")
    assert step.measures


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (((3, 5),), "replaces blocks 3 to 5, but this model has blocks 0 to 4"),
        (((3, 2),), "replaces blocks 3 to 2"),
        (((0, 2),), "blocks 0 to 2, but the block before them does not stay"),
        (((1, 2), (3, 3)), "blocks 3 to 3, but the block before them does not stay"),
        (((1, 2), (2, 3)), "replaces a block twice"),
    ],
)
def test_steps_that_cannot_be_applied(windows, message):
    with pytest.raises(InputError, match=message):
        replacing(*windows).sizes_after(SIZES)


@pytest.mark.parametrize("fields", [{"ridge": -0.1}, {"ridge": float("nan")}, {"windows": ()}])
def test_steps_that_say_nothing(fields):
    with pytest.raises(ValidationError):
        LinearReplacement(**{"method": "by hand", "windows": ((1, 1),), "ridge": 0.1, **fields})


def test_from_a_plan_file_to_a_folder(tiny, tmp_path):
    """Texts are needed again, memory and skeleton make the same folder, and it is a stock model."""
    memory, skeleton = tiny("llama"), tiny("llama", skeleton=True)
    windows = windows_of_text()
    make_plan(memory, method="replaceme", blocks=3, texts=windows, settings={"max_window": 2}).write(
        tmp_path / "p.json"
    )
    plan = Plan.read(tmp_path / "p.json")
    with pytest.raises(InputError, match="give them"):
        prune(memory, plan)
    cut = [prune(one, plan, texts=windows) for one in (memory, skeleton)]
    tokens = draw_tokens()
    assert torch.equal(walk(cut[0], tokens), walk(cut[1], tokens))
    assert cut[0].fingerprint == cut[1].fingerprint
    save(cut[1], tmp_path / "cut", check=False)
    assert torch.allclose(walk(open_model(tmp_path / "cut"), tokens), walk(cut[0], tokens), atol=1e-4)
