"""Scores of heads, groups and channels, each written out once more in float64 from its formula."""

import copy

import pytest
import torch

from oracles import draw_windows, predictions, token_losses
from secateur.calibration.inputs import InputSums
from secateur.scores.taylor import taylor_by_unit
from secateur.scores.unit_scores import best_units, fluctuation, magnitude, weighted_norm, z_scores
from tiny_models import build

WEIGHT = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STATES = 2 + torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def summed(unit=1):
    """Five windows of seven tokens; the last two tokens of the first are padding. Two batches."""
    sums = InputSums(12, torch.device("cpu"), unit=unit, gram=False)
    window = torch.arange(5).repeat_interleave(7)
    real = torch.ones(35, dtype=torch.bool)
    real[5:7] = False
    flat = STATES.flatten(0, 1)
    for windows in ([0, 1, 2], [3, 4]):
        rows = real & torch.isin(window, torch.tensor(windows))
        sums.update(flat[rows], window[rows] - windows[0])
    return sums, flat[real]


def test_fluctuation_is_variance_times_squared_column():
    sums, x = summed()
    expected = [x[:, j].var(correction=0) * sum(WEIGHT[i, j] ** 2 for i in range(3)) for j in range(12)]
    torch.testing.assert_close(fluctuation(WEIGHT, sums), torch.stack(expected))


def test_weighted_norm_is_weights_times_norm():
    sums, x = summed()
    expected = [sum(abs(WEIGHT[i, j]) * x[:, j].square().sum().sqrt() for i in range(3)) for j in range(12)]
    torch.testing.assert_close(weighted_norm(WEIGHT, sums), torch.stack(expected))


@pytest.mark.parametrize("unit", [1, 4])
def test_magnitude_is_a_mean_over_tokens_and_a_norm_over_windows(unit):
    expected = []
    for first in range(0, 12, unit):
        means = [
            torch.stack([STATES[w, t, first : first + unit].norm() for t in range(5 if w == 0 else 7)]).mean()
            for w in range(5)
        ]
        expected.append(torch.stack(means).norm())
    torch.testing.assert_close(magnitude(WEIGHT, summed(unit)[0]), torch.stack(expected))


def test_z_scores_and_ties():
    found = z_scores(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert (float(found.mean()), float(found.std())) == pytest.approx((0.0, 1.0))
    assert z_scores(torch.full((4,), 3.0)).tolist() == [0.0] * 4
    assert best_units(torch.tensor([[1.0, 2.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0]]), 2).tolist() == [
        [False, True, True, False],
        [True, True, False, False],
    ]


def saliencies(name, windows):
    """|w · ∂L/∂w| of every parameter, from one plain backward pass."""
    module = copy.deepcopy(build(name)).requires_grad_(True)
    (token_losses(module, windows).sum() / int(predictions(windows.tokens).sum())).backward()
    return {n: (p * p.grad).detach().abs().double() for n, p in module.named_parameters() if p.grad is not None}


def test_taylor_of_heads_that_share_keys_and_values(tiny):
    """Groups get the rows of their own key and value head, query heads their own; LLM-Pruner's code mixes them up."""
    windows = draw_windows()
    heads, channels = taylor_by_unit(tiny("llama"), windows)[3]
    own = {n.removeprefix("model.layers.3."): s for n, s in saliencies("llama", windows).items() if ".layers.3." in n}
    size = 8
    q, k, v, o = (own[f"self_attn.{one}_proj.weight"] for one in "qkvo")
    for head in range(4):
        rows = slice(head * size, (head + 1) * size)
        assert float(heads[head]) == pytest.approx(float(q[rows].sum() + o[:, rows].sum()), rel=1e-4)
    for group in range(2):
        rows = slice(group * size, (group + 1) * size)
        assert float(heads[4 + group]) == pytest.approx(float(k[rows].sum() + v[rows].sum()), rel=1e-4)
    gate, up, down = (own[f"mlp.{one}_proj.weight"] for one in ("gate", "up", "down"))
    expected = gate.sum(dim=1) + up.sum(dim=1) + down.sum(dim=0)
    torch.testing.assert_close(channels[0], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["gpt_neox", "falcon-new", "mixtral"])
def test_taylor_of_fused_projections(name, tiny):
    """Rows that lie group by group, and experts in one tensor."""
    windows = draw_windows()
    own = saliencies(name, windows)
    heads, channels = taylor_by_unit(tiny(name), windows)[2]
    if name == "mixtral":
        both, down = (own[f"model.layers.2.mlp.experts.{one}_proj"] for one in ("gate_up", "down"))
        expected = both[:, :48].sum(dim=2) + both[:, 48:].sum(dim=2) + down.sum(dim=1)
        torch.testing.assert_close(channels, expected, rtol=1e-4, atol=1e-8)
        return
    path, writer = {
        "gpt_neox": ("gpt_neox.layers.2.attention.query_key_value", "gpt_neox.layers.2.attention.dense"),
        "falcon-new": ("transformer.h.2.self_attention.query_key_value", "transformer.h.2.self_attention.dense"),
    }[name]
    queries = 2 if name == "falcon-new" else 1
    rows = own[f"{path}.weight"].view(4 // queries, queries + 2, 8, -1).sum(dim=(2, 3))
    columns = own[f"{writer}.weight"].view(-1, 4, 8).sum(dim=(0, 2))
    torch.testing.assert_close(heads[:4], rows[:, :queries].flatten() + columns, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(heads[4:], rows[:, queries:].sum(dim=1), rtol=1e-4, atol=1e-8)
