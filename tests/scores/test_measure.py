"""Scores of a model: what is measured, what is read off it, what never becomes a number."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

import secateur
from oracles import draw_windows, loss_without, plain_states
from secateur.calibration import walk as stream
from secateur.errors import InputError, NumericsError
from secateur.models.opening import open_model
from secateur.run_options import RunOptions
from secateur.scores.measure import score_model, weight_magnitudes
from secateur.scores.profile import KINDS, ONE_PASS, Scores
from tiny_models import build

OF_ALL = tuple(kind for kind in KINDS if kind != "experts")
"""Scores of every model; `test_routing.py` is about those of mixtures."""
FIELDS = {
    "cosine": {"cosine"},
    "angular": {"angular"},
    "magnitude": {"magnitude", "relative_magnitude"},
    "cka": {"cka_linear", "cka_rbf"},
    "perplexity": {"perplexity", "removal_perplexity"},
    "taylor": {"taylor"},
}
MEASURED = set().union(*FIELDS.values())
MODES = pytest.mark.parametrize("skeleton", [False, True], ids=["memory", "skeleton"])


def some_scores(**fields):
    return Scores(model="model", fingerprint="print", **fields)


COSINE = ((1.0, 0.9, 0.5, 0.2), (0.9, 1.0, 0.8, 0.4), (0.5, 0.8, 1.0, 0.6), (0.2, 0.4, 0.6, 1.0))


# Measuring


@MODES
def test_everything_from_npy_windows(skeleton, tiny, tmp_path):
    """All scores from a file of windows, used exactly as given, against plain forward passes in float64."""
    windows = draw_windows()
    np.save(tmp_path / "windows.npy", windows.tokens.numpy())
    decoder = tiny("llama")
    scores = secateur.score(tiny("llama", skeleton=skeleton), texts=str(tmp_path / "windows.npy"), kinds=OF_ALL)
    states = [state.double() for state in plain_states(decoder, windows.tokens)]
    unit = [state / state.norm(dim=-1, keepdim=True) for state in states]
    cosine = torch.tensor([[float((a * b).sum(-1).mean()) for b in unit] for a in unit])
    np.testing.assert_allclose(scores.cosine, cosine, atol=1e-5)
    last = [u[:, -1] for u in unit]
    angle = [[float(torch.arccos((a * b).sum(-1).clamp(-1, 1)).mean()) / math.pi for b in last] for a in last]
    np.testing.assert_allclose(scores.angular, np.array(angle) * (1 - np.eye(9)), atol=1e-5)
    relative = [float(((b - a).norm(dim=-1) / b.norm(dim=-1)).mean()) for a, b in itertools.pairwise(states)]
    assert scores.relative_magnitude == pytest.approx(relative, rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(loss_without(decoder, (), windows)), rel=1e-4)
    removed = [math.exp(loss_without(decoder, (block,), windows)) for block in range(8)]
    assert scores.removal_perplexity == pytest.approx(removed, rel=1e-4)
    assert scores.model == tiny("llama", skeleton=skeleton).source
    assert scores.fingerprint == decoder.fingerprint
    assert (scores.texts["windows"], scores.texts["seq_len"]) == (4, 16)
    assert len(scores.cka_linear) == len(scores.cka_rbf) == len(scores.taylor) == len(scores.magnitude) == 8


@pytest.mark.parametrize("kind", OF_ALL)
def test_only_what_was_asked_for(kind, tiny):
    scores = score_model(tiny("llama"), draw_windows(), [kind])
    assert {name for name in MEASURED if getattr(scores, name) is not None} == FIELDS[kind]
    for other in OF_ALL:
        assert scores.has([other]) == (other == kind)


def test_in_memory_and_skeleton_agree(tiny):
    windows = draw_windows(side="right")
    one = score_model(tiny("qwen3_moe-mixed"), windows, OF_ALL)
    other = score_model(tiny("qwen3_moe-mixed", skeleton=True), windows, OF_ALL)
    for name in MEASURED:
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6)
    assert one.fingerprint == other.fingerprint


@MODES
def test_cheap_scores_cost_one_walk(skeleton, tiny, monkeypatch):
    """Every block once per batch, whatever is asked for."""
    runs = []
    plain = stream.run_block
    monkeypatch.setattr(stream, "run_block", lambda block, *rest: (runs.append(block), plain(block, *rest))[1])
    score_model(tiny("llama", skeleton=skeleton), draw_windows(), ONE_PASS, options=RunOptions(batch_size=2))
    assert len(runs) == 2 * 8


def test_magnitude_of_the_weights_needs_no_windows(tiny):
    scores = score_model(tiny("llama"), None, ["magnitude"])
    assert scores.relative_magnitude is None
    assert scores.texts is None
    assert scores.magnitude == weight_magnitudes(tiny("llama"))
    with pytest.raises(InputError, match="need texts"):
        score_model(tiny("llama"), None, ["magnitude", "cosine"])


@MODES
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe-mixed", "falcon-rw"])
def test_magnitudes_are_sums_of_absolute_weights(name, skeleton, tiny):
    expected = []
    for block in tiny(name).block_list:
        values = [p.double().abs().sum() for n, p in block.named_parameters() if not n.endswith("bias")]
        expected.append(float(sum(values)))
    assert weight_magnitudes(tiny(name, skeleton=skeleton)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_magnitudes_in_half_precision_are_summed_in_full(dtype, tiny_folder):
    decoder = open_model(tiny_folder("llama"), dtype=dtype)
    expected = [float(sum(p.double().abs().sum() for p in block.parameters())) for block in decoder.block_list]
    assert weight_magnitudes(decoder) == pytest.approx(expected, rel=1e-5)


def test_seed_draws_the_tokens_of_cka(tiny):
    windows = draw_windows(windows=9, positions=60)
    first, again, other = (
        score_model(tiny("llama", blocks=2), windows, ["cka"], options=RunOptions(seed=seed)) for seed in (0, 0, 1)
    )
    assert first.cka_linear == again.cka_linear
    assert first.cka_linear != other.cka_linear


def test_unknown_kind_names_the_known(tiny):
    with pytest.raises(InputError, match=r"unknown score 'cosin'. Did you mean 'cosine'\? Known: .*taylor"):
        score_model(tiny("llama"), draw_windows(), ["cosin"])


def test_windows_the_model_cannot_read(tiny):
    with pytest.raises(InputError, match="64 positions"):
        score_model(tiny("llama"), draw_windows(positions=70), ["cosine"])


@MODES
def test_a_model_of_one_block(skeleton, tiny):
    windows = draw_windows()
    scores = score_model(tiny("llama", blocks=1, skeleton=skeleton), windows, OF_ALL)
    assert np.shape(scores.cosine) == np.shape(scores.angular) == (2, 2)
    assert scores.cka_linear == scores.cka_rbf == ((1.0,),)
    assert scores.block_influence == (1 - scores.cosine[0][1],)
    assert scores.layer_redundancy == (1.0,)
    assert scores.window_cosine(1) == (scores.cosine[0][1],)
    assert len(scores.removal_perplexity) == len(scores.taylor) == len(scores.magnitude) == 1
    assert scores.removal_perplexity[0] > 0
    with pytest.raises(InputError, match="this model has 1"):
        scores.window_cosine(2)


# Damage: never a number


@pytest.mark.parametrize("kind", OF_ALL)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damage_in_a_block_is_named(kind, value):
    module = build("llama")
    with torch.no_grad():
        module.model.layers[3].mlp.down_proj.weight[3, 4] = value
    with pytest.raises(NumericsError, match="block 3"):
        score_model(open_model(module), draw_windows(), [kind])


def test_damage_in_the_weights_alone_is_named():
    module = build("llama")
    with torch.no_grad():
        module.model.layers[3].mlp.down_proj.weight[3, 4] = float("nan")
    with pytest.raises(NumericsError, match="block 3"):
        score_model(open_model(module), None, ["magnitude"])


@pytest.mark.parametrize("kind", ["perplexity", "taylor"])
@pytest.mark.parametrize("place", ["model.norm.weight", "lm_head.weight"])
def test_damage_after_the_blocks(kind, place):
    module = build("llama")
    with torch.no_grad():
        module.get_parameter(place).view(-1)[5] = float("nan")
    with pytest.raises(NumericsError):
        score_model(open_model(module), draw_windows(), [kind])


def test_a_loss_too_large_for_a_perplexity():
    """exp(710) is no float64 any more."""
    module = build("llama")
    with torch.no_grad():
        module.lm_head.weight.mul_(1e4)
    with pytest.raises(NumericsError):
        score_model(open_model(module), draw_windows(), ["perplexity"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", sorted(MEASURED))
def test_scores_hold_no_nan(name, value):
    broken = value
    if name != "perplexity":
        broken = (1.0, value)
    if name in ("cosine", "angular", "cka_linear", "cka_rbf"):
        broken = ((1.0, 0.5), (value, 1.0))
    with pytest.raises(NumericsError, match=name):
        some_scores(**{name: broken})


# What is read off


def test_block_influence():
    assert some_scores(cosine=COSINE).block_influence == pytest.approx((0.1, 0.2, 0.4))
    assert some_scores().block_influence is None


def test_layer_redundancy():
    assert some_scores(cosine=COSINE).layer_redundancy == pytest.approx((1, 2 / 3, 0))
    same = ((1.0, 0.5, 0.2), (0.5, 1.0, 0.5), (0.2, 0.5, 1.0))
    assert some_scores(cosine=same).layer_redundancy == (1.0, 1.0)
    assert some_scores().layer_redundancy is None


def test_windows_of_every_length():
    scores = some_scores(cosine=COSINE, angular=tuple(tuple(-x for x in row) for row in COSINE))
    assert scores.window_cosine(1) == (0.9, 0.8, 0.6)
    assert scores.window_cosine(2) == (0.5, 0.4)
    assert scores.window_cosine(3) == (0.2,)
    assert scores.window_angle(2) == (-0.5, -0.4)
    for length in (0, -1, 4):
        with pytest.raises(InputError, match=f"a window of {length} blocks; this model has 3"):
            scores.window_cosine(length)


def test_what_was_not_measured_cannot_be_read():
    with pytest.raises(InputError, match="do not hold 'cosine'"):
        some_scores().window_cosine(1)
    with pytest.raises(InputError, match="do not hold 'angular'"):
        some_scores(cosine=COSINE).window_angle(1)


# The file


def test_round_trip(tiny, tmp_path):
    scores = score_model(tiny("llama"), draw_windows(side="right"), OF_ALL)
    path = tmp_path / "scores.json"
    scores.write(path)
    again = Scores.read(path)
    assert again == scores
    assert again.block_influence == scores.block_influence
    written = json.loads(path.read_text())
    assert np.shape(written["cosine"]) == (9, 9)
    assert written["block_influence"] == list(scores.block_influence)
    assert written["layer_redundancy"] == list(scores.layer_redundancy)


def test_derived_values_in_the_file_are_not_believed(tmp_path):
    path = tmp_path / "scores.json"
    some_scores(cosine=COSINE).write(path)
    edited = json.loads(path.read_text()) | {"block_influence": [9, 9, 9]}
    path.write_text(json.dumps(edited))
    assert Scores.read(path).block_influence == pytest.approx((0.1, 0.2, 0.4))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"model": "m"}',
        b'{"model": "m", "fingerprint": "f", "colour": 1}',
        b'{"model": "m", "fingerprint": "f", "format": 2}',
        b'{"model": "m", "fingerprint": "f", "cosine": [[1, 0.5], [0.5]]}',
        b'{"model": "m", "fingerprint": "f", "cosine": [[1, 0.5, 0.2], [0.5, 1, 0.1]]}',
        b'{"model": "m", "fingerprint": "f", "cosine": [[1, 0.5], [0.5, 1]], "taylor": [1, 2, 3]}',
        b"\xff\xfe\x00",
    ],
    ids=["empty", "torn", "list", "incomplete", "unknown", "format", "ragged", "not square", "sizes", "not text"],
)
def test_a_file_that_holds_no_scores(content, tmp_path):
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"scores\.json"):
        Scores.read(path)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(InputError, match="the scores file cannot be read"):
            Scores.read(path)


def test_nan_in_a_file_is_not_read(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text('{"model": "m", "fingerprint": "f", "taylor": [1.0, NaN]}')
    with pytest.raises((NumericsError, InputError)):
        Scores.read(path)


def test_scores_cannot_be_changed():
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        some_scores(cosine=COSINE).cosine = None
