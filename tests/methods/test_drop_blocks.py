"""Each method that takes out blocks against a straightforward computation of what its paper says."""

import math

import pytest
import torch

from oracles import draw_windows, loss_without, plain_states, plain_taylor
from secateur import make_plan, prune
from secateur.errors import InputError, NumericsError
from secateur.methods.method import find_method
from secateur.models.opening import open_model
from secateur.run_options import RunOptions
from secateur.scores.measure import score_model
from secateur.scores.profile import KINDS, Scores
from tiny_models import build

METHODS = [*("shortgpt", "uidl", "last-n", "shortened-llama", "sleb"), "streamline"]
CUT_ALONE = {"streamline": {"network": "none"}}
"""Nothing is put in the place of the blocks."""

BLOCKS = 10  # room between the ends that Shortened-LLaMA protects


def dropped(decoder, method, blocks, windows=None, **settings):
    settings = CUT_ALONE.get(method, {}) | settings
    plan = make_plan(decoder, method=method, blocks=blocks, texts=windows, settings=settings)
    (step,) = plan.steps
    assert step.method == method
    return step.blocks


# What the papers say, on the states of a plain forward pass: the blocks to take out for 1, 2, … MOST blocks

MOST = 4


def unit_states(decoder, windows):
    states = [state.double() for state in plain_states(decoder, windows.tokens, windows.mask)]
    return [state / state.norm(dim=-1, keepdim=True) for state in states]


def mean_cosine(before, after, mask):
    cosines = (before * after).sum(-1)
    return float(cosines.mean() if mask is None else cosines[mask].mean())


def mean_angle(before, after, mask):
    cosines = (before * after).sum(-1)
    last = [-1] * len(cosines) if mask is None else [int(row.nonzero().max()) for row in mask]
    return sum(math.acos(float(row[place])) for row, place in zip(cosines, last, strict=True)) / len(cosines)


def lowest(values, count):
    return tuple(sorted(sorted(values, key=values.get)[:count]))


def by_influence(decoder, windows):
    units = unit_states(decoder, windows)
    influence = {b: 1 - mean_cosine(units[b], units[b + 1], windows.mask) for b in range(decoder.block_count)}
    return [lowest(influence, count) for count in range(1, MOST + 1)]


def best_windows(decoder, windows, cost):
    units = unit_states(decoder, windows)
    for length in range(1, MOST + 1):
        costs = {s: cost(units[s], units[s + length], windows.mask) for s in range(decoder.block_count - length + 1)}
        best = min(costs, key=costs.get)
        yield tuple(range(best, best + length))


def by_angle(decoder, windows):
    return list(best_windows(decoder, windows, mean_angle))


def by_cosine(decoder, windows):
    return list(best_windows(decoder, windows, lambda *states: -mean_cosine(*states)))


def by_loss(decoder, windows):
    losses = {b: loss_without(decoder, (b,), windows) for b in range(decoder.block_count)}
    return [lowest(losses, count) for count in range(1, MOST + 1)]


def greedily(decoder, windows):
    """Take out for good, again and again, the block without which the loss is lowest; the ends stay."""
    gone, answers = set(), []
    for _ in range(MOST):
        free = set(range(1, decoder.block_count - 1)) - gone
        losses = {b: loss_without(decoder, gone | {b}, windows) for b in free}
        gone.add(min(losses, key=losses.get))
        answers.append(tuple(sorted(gone)))
    return answers


ORACLES = {
    "shortgpt": by_influence,
    "uidl": by_angle,
    "streamline": by_cosine,
    "shortened-llama": by_loss,
    "sleb": greedily,
}


@pytest.mark.parametrize(("name", "seed", "side"), [("llama", 0, None), ("llama", 0, "right"), ("gemma2", 5, None)])
@pytest.mark.parametrize("method", ORACLES)
def test_against_the_oracle(method, name, seed, side, tiny):
    windows = draw_windows(seed=seed, side=side)
    decoder, skeleton = tiny(name), tiny(name, skeleton=True)
    expected, exact = ORACLES[method](decoder, windows), {"again": 1} if method == "sleb" else {}
    assert [len(blocks) for blocks in expected] == [1, 2, 3, 4]
    for count in (1, 2, 4):
        assert dropped(decoder, method, count, windows, **exact) == expected[count - 1]
    assert dropped(skeleton, method, 3, windows, **exact) == expected[2]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_taylor_ranks_between_the_ends(count, tiny):
    """The paper's Taylor+: blocks 0 to 3 and the last two stay."""
    windows = draw_windows()
    values = plain_taylor(build("llama", blocks=BLOCKS), windows)
    expected = lowest({b: values[b] for b in range(4, BLOCKS - 2)}, count)
    assert dropped(tiny("llama", blocks=BLOCKS), "shortened-llama", count, windows, criterion="taylor") == expected
    free = lowest(dict(enumerate(values)), count)
    unprotected = {"criterion": "taylor", "protect_first": 0, "protect_last": 0}
    assert dropped(tiny("llama", blocks=BLOCKS), "shortened-llama", count, windows, **unprotected) == free


@pytest.mark.parametrize("count", [1, 2, 4])
def test_magnitude_ranks_between_the_ends(count, tiny):
    decoder = tiny("llama", blocks=BLOCKS)
    values = [float(sum(p.double().abs().sum() for p in block.parameters())) for block in decoder.block_list]
    expected = lowest({b: values[b] for b in range(4, BLOCKS - 2)}, count)
    assert dropped(decoder, "shortened-llama", count, criterion="magnitude") == expected
    free = lowest(dict(enumerate(values)), count)
    assert dropped(decoder, "shortened-llama", count, criterion="magnitude", protect_first=0, protect_last=0) == free


@pytest.mark.parametrize(("count", "expected"), [(1, (8,)), (2, (7, 8)), (9, tuple(range(9)))])
def test_last_n_keeps_the_last(count, expected, tiny):
    assert dropped(tiny("llama", blocks=BLOCKS), "last-n", count) == expected


def test_last_n_with_other_protection(tiny):
    decoder = tiny("llama", blocks=BLOCKS)
    assert dropped(decoder, "last-n", 2, protect_last=0) == (8, 9)
    assert dropped(decoder, "last-n", 2, protect_last=3) == (5, 6)


# Protection

PROTECTED = {
    "shortgpt": (0, 0, {}),
    "uidl": (0, 0, {}),
    "streamline": (0, 0, {}),
    "last-n": (0, 1, {}),
    "sleb": (1, 1, {}),
    "shortened-llama": (0, 0, {}),
    "shortened-llama taylor": (4, 2, {"criterion": "taylor"}),
    "shortened-llama magnitude": (4, 2, {"criterion": "magnitude"}),
}


def test_every_method_is_listed_here():
    assert {name.split()[0] for name in PROTECTED} == set(METHODS)


@pytest.mark.parametrize("name", PROTECTED)
def test_the_ends_the_paper_keeps(name, tiny):
    """All that may go goes, and not one block more."""
    first, last, settings = PROTECTED[name]
    decoder = tiny("llama", blocks=BLOCKS)
    method = name.split()[0]
    free = tuple(range(first, BLOCKS - last))
    most = min(len(free), BLOCKS - 1)
    found = dropped(decoder, method, most, draw_windows(windows=2), **settings)
    assert set(found) <= set(free)
    assert len(found) == most
    with pytest.raises(InputError, match=f"blocks={most + 1}: at most {most} blocks can be removed"):
        dropped(decoder, method, most + 1, draw_windows(windows=2), **settings)


@pytest.mark.parametrize("name", PROTECTED)
def test_protection_as_asked(name, tiny):
    *_, settings = PROTECTED[name]
    decoder = tiny("llama", blocks=BLOCKS)
    asked = {**settings, "protect_first": 3, "protect_last": 5}
    assert dropped(decoder, name.split()[0], 2, draw_windows(windows=2), **asked) == (3, 4)
    with pytest.raises(InputError, match="at most 2 blocks"):
        dropped(decoder, name.split()[0], 3, draw_windows(windows=2), **asked)


@pytest.mark.parametrize("name", PROTECTED)
def test_everything_protected(name, tiny):
    *_, settings = PROTECTED[name]
    asked = {**settings, "protect_first": 6, "protect_last": 4}
    with pytest.raises(InputError, match=r"all 10 blocks are protected; lower protect_first or protect_last"):
        dropped(tiny("llama", blocks=BLOCKS), name.split()[0], 1, draw_windows(windows=2), **asked)


def test_one_block_cannot_be_taken_out_of_one(tiny):
    with pytest.raises(InputError):
        dropped(tiny("llama", blocks=1), "shortgpt", 1, draw_windows())


# Made-up scores: ties, windows, and what is measured again


def made_up(decoder, windows, **fields):
    return Scores(model="m", fingerprint=decoder.fingerprint, texts=windows.describe(), **fields)


def cosines(neighbours, far=0.1):
    """A matrix with these cosines next to the diagonal and one value elsewhere."""
    size = len(neighbours) + 1
    matrix = [[far] * size for _ in range(size)]
    for index in range(size):
        matrix[index][index] = 1.0
    for index, value in enumerate(neighbours):
        matrix[index][index + 1] = matrix[index + 1][index] = value
    return tuple(map(tuple, matrix))


def test_ties_go_to_the_lower_block(tiny):
    decoder, windows = tiny("llama"), draw_windows()
    same = cosines([0.5] * 8)
    scores = made_up(decoder, windows, cosine=same, angular=same, magnitude=(2.0,) * 8)

    def found(method, **settings):
        settings = CUT_ALONE.get(method, {}) | settings
        plan = make_plan(decoder, method=method, blocks=2, texts=windows, scores=scores, settings=settings)
        return plan.steps[0].blocks

    assert found("shortgpt") == (0, 1)
    assert found("streamline") == (0, 1)
    assert found("uidl") == (0, 1)
    assert found("shortened-llama", criterion="magnitude") == (4, 5)


def test_blocks_are_ranked_alone_and_windows_as_a_whole(tiny):
    decoder, windows = tiny("llama"), draw_windows()
    matrix = [list(row) for row in cosines([0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5])]
    matrix[5][7] = matrix[7][5] = 0.99  # blocks 5 and 6 undo each other
    scores = made_up(decoder, windows, cosine=tuple(map(tuple, matrix)))

    def found(method):
        settings = CUT_ALONE.get(method)
        return (
            make_plan(decoder, method=method, blocks=2, texts=windows, scores=scores, settings=settings).steps[0].blocks
        )

    assert found("shortgpt") == (0, 2)
    assert found("streamline") == (5, 6)


def no_measuring(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr("secateur.methods.method.score_model", refuse)


@pytest.mark.parametrize("method", ["shortgpt", "uidl", "streamline", "shortened-llama"])
def test_known_scores_are_not_measured_again(method, tiny, monkeypatch):
    decoder, windows = tiny("llama"), draw_windows()
    scores = score_model(decoder, windows, [kind for kind in KINDS if kind != "experts"])
    fresh = make_plan(decoder, method=method, blocks=3, texts=windows)
    no_measuring(monkeypatch)
    assert make_plan(decoder, method=method, blocks=3, texts=windows, scores=scores) == fresh


def test_scores_that_lack_what_is_needed_are_completed(tiny):
    decoder, windows = tiny("llama"), draw_windows()
    scores = score_model(decoder, windows, ["cosine"])
    fresh = make_plan(decoder, method="uidl", blocks=3, texts=windows)
    assert make_plan(decoder, method="uidl", blocks=3, texts=windows, scores=scores) == fresh


def test_scores_on_other_texts_are_not_used(tiny):
    decoder, windows = tiny("llama"), draw_windows()
    wrong = made_up(decoder, draw_windows(seed=9), cosine=cosines([0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]))
    fresh = make_plan(decoder, method="shortgpt", blocks=1, texts=windows)
    assert fresh.steps[0].blocks != (1,)
    assert make_plan(decoder, method="shortgpt", blocks=1, texts=windows, scores=wrong) == fresh


def test_scores_of_another_model_are_refused(tiny):
    windows = draw_windows()
    scores = score_model(tiny("qwen2"), windows, ["cosine"])
    with pytest.raises(InputError, match="scores are of another model"):
        make_plan(tiny("llama"), method="shortgpt", blocks=1, texts=windows, scores=scores)


# Settings


def test_unknown_method_names_the_known():
    with pytest.raises(InputError, match=r"unknown method 'short-gpt'. Did you mean 'shortgpt'\? Known: .*sleb"):
        find_method("short-gpt")


@pytest.mark.parametrize("method", METHODS)
def test_unknown_setting_names_the_known(method, tiny):
    with pytest.raises(InputError, match=rf"unknown setting of {method} 'protect_frist'.*protect_first"):
        dropped(tiny("llama"), method, 1, draw_windows(), protect_frist=1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("shortgpt", {"protect_first": -1}),
        ("shortgpt", {"protect_first": "many"}),
        ("sleb", {"protect_last": 1.5}),
        ("uidl", {"window": -2}),
        ("streamline", {"window": "wide"}),
        ("shortened-llama", {"criterion": "loss"}),
    ],
)
def test_values_a_setting_cannot_take(method, settings, tiny):
    (name, value), *_ = settings.items()
    with pytest.raises(InputError, match=f"{method}: {name}={value}"):
        dropped(tiny("llama"), method, 1, draw_windows(), **settings)


def test_settings_as_typed_on_a_command_line(tiny):
    assert dropped(tiny("llama", blocks=BLOCKS), "last-n", 2, protect_last="3") == (5, 6)


@pytest.mark.parametrize("method", ["uidl", "streamline"])
def test_the_window_of_the_papers(method, tiny):
    decoder, windows = tiny("llama"), draw_windows()
    alone = CUT_ALONE.get(method, {})
    by_window = make_plan(decoder, method=method, texts=windows, settings={"window": 3} | alone)
    assert by_window.steps[0].blocks == dropped(decoder, method, 3, windows)
    assert make_plan(decoder, method=method, texts=windows, settings={"window": "3"} | alone).steps[0].blocks == (
        by_window.steps[0].blocks
    )
    nothing = make_plan(decoder, method=method, settings={"window": 0} | alone)
    assert nothing.parameters_after == nothing.parameters_before


@pytest.mark.parametrize("amount", [{"remove": 0.3}, {"blocks": 2}, {"target_params": 60_000}])
def test_a_window_and_another_amount_contradict_each_other(amount, tiny):
    with pytest.raises(InputError, match="window"):
        make_plan(tiny("llama"), method="uidl", texts=draw_windows(), settings={"window": 3}, **amount)


def test_methods_without_a_window(tiny):
    with pytest.raises(InputError, match="unknown setting of shortgpt 'window'"):
        make_plan(tiny("llama"), method="shortgpt", texts=draw_windows(), settings={"window": 3})


# Around a decision


@pytest.mark.parametrize("name", PROTECTED)
def test_nothing_is_measured_for_nothing(name, tiny, monkeypatch):
    decoder = tiny("llama")
    *_, settings = PROTECTED[name]
    no_measuring(monkeypatch)
    monkeypatch.setattr("secateur.methods.greedy.RemovalProbe", None)
    plan = make_plan(decoder, method=name.split()[0], blocks=0, settings=settings)
    assert plan.texts is None
    assert plan.kept_blocks() == tuple(range(8))
    assert plan.removed_fraction == 0
    assert plan.parameters_after == decoder.parameter_count
    assert torch.equal(
        prune(decoder, plan).module(draw_windows().tokens).logits, decoder.module(draw_windows().tokens).logits
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_says_what_it_was_made_of(method, tiny):
    decoder, windows = tiny("llama"), draw_windows()
    plan = make_plan(
        decoder, method=method, blocks=2, texts=windows, settings={"protect_first": 1}, options=RunOptions(seed=7)
    )
    assert plan.model.fingerprint == decoder.fingerprint
    assert plan.requested == {"blocks": 2}
    assert plan.seed == 7
    assert plan.steps[0].settings["protect_first"] == 1
    assert plan.texts == (None if method == "last-n" else windows.describe())


@pytest.mark.parametrize("method", METHODS)
def test_planning_leaves_the_model_alone(method, tiny_folder):
    decoder = open_model(tiny_folder("llama"))
    before = {name: tensor.clone() for name, tensor in decoder.module.state_dict().items()}
    make_plan(decoder, method=method, blocks=2, texts=draw_windows())
    assert decoder.block_count == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.module.state_dict().items())


@pytest.mark.parametrize("method", [name for name in METHODS if name != "last-n"])
@pytest.mark.parametrize("place", ["model.layers.3.mlp.down_proj.weight", "lm_head.weight"])
def test_damage_never_becomes_a_decision(method, place):
    module = build("llama")
    with torch.no_grad():
        module.get_parameter(place).view(-1)[5] = float("nan")
    decoder = open_model(module)
    reads_the_head = method in ("sleb", "shortened-llama")
    if place == "lm_head.weight" and not reads_the_head:
        assert len(dropped(decoder, method, 2, draw_windows())) == 2
        return
    with pytest.raises(NumericsError, match="block 3" if "layers.3" in place else None):
        dropped(decoder, method, 2, draw_windows())
