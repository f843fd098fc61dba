"""Closed-form repair and the greedy choice, against plain least squares and plain inverses in float64."""

import pytest
import torch

from secateur.calibration.inputs import InputSums
from secateur.scores.unit_scores import cheapest_to_lose, forget
from secateur.surgery.width.repair import RIDGE, rewritten, strength

STAY = torch.tensor([True, False, True, True, False, True, True, False])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens=60, mean=0.0):
    """Inputs that depend on each other, (tokens, 8)."""
    return drawn(tokens, 8) @ drawn(8, 8, seed=1) + mean


def summed(x):
    sums = InputSums(x.shape[1], torch.device("cpu"))
    for part in x.split(17):
        sums.update(part, torch.zeros(len(part), dtype=torch.long))
    return sums


def test_repair_is_least_squares():
    x, weight = inputs(), drawn(5, 8, seed=2)
    found, shift = rewritten(weight, summed(x), STAY, repair=True, bias=False, ridge=0.0)
    assert shift is None
    assert not found[:, ~STAY].any()
    torch.testing.assert_close(found[:, STAY], torch.linalg.lstsq(x[:, STAY], x @ weight.T).solution.T)
    gram = x.T @ x
    of_paper = weight @ gram[:, STAY] @ torch.linalg.inv(gram[STAY][:, STAY])  # W G[:,K] (G[K,K] + λI)⁻¹ for λ → 0
    torch.testing.assert_close(found[:, STAY], of_paper)


def test_the_ridge_pulls_toward_the_plain_slice():
    x, weight = inputs(), drawn(5, 8, seed=2)
    root = (RIDGE * (x.T @ x).diagonal().mean()).sqrt()
    tall = torch.cat([x[:, STAY], root * torch.eye(5, dtype=torch.float64)])
    target = torch.cat([x @ weight.T, root * weight[:, STAY].T])
    found, _ = rewritten(weight, summed(x), STAY, repair=True, bias=False)
    torch.testing.assert_close(found[:, STAY], torch.linalg.lstsq(tall, target).solution.T)


def test_repair_with_a_bias_is_least_squares_with_a_constant():
    x, weight = inputs(mean=3.0), drawn(5, 8, seed=2)
    found, shift = rewritten(weight, summed(x), STAY, repair=True, bias=True, ridge=0.0)
    best = torch.linalg.lstsq(torch.cat([x[:, STAY], torch.ones(60, 1, dtype=x.dtype)], dim=1), x @ weight.T).solution
    torch.testing.assert_close(found[:, STAY], best[:-1].T)
    torch.testing.assert_close(shift, best[-1])


def test_without_repair_the_bias_is_the_mean_of_what_went():
    x, weight = inputs(mean=3.0), drawn(5, 8, seed=2)
    found, shift = rewritten(weight, summed(x), STAY, repair=False, bias=True)
    assert torch.equal(found[:, STAY], weight[:, STAY])
    torch.testing.assert_close(shift, weight[:, ~STAY] @ x[:, ~STAY].mean(dim=0))


def test_nothing_removed_changes_nothing():
    weight = drawn(5, 8, seed=2)
    found, _ = rewritten(weight, summed(inputs()), torch.ones(8, dtype=torch.bool), repair=True, bias=False)
    assert torch.equal(found, weight)


def test_where_no_token_came_by_the_plain_slice_stays():
    weight = drawn(5, 8, seed=2)
    found, shift = rewritten(weight, summed(inputs(0)), STAY, repair=True, bias=True)
    assert torch.equal(found[:, STAY], weight[:, STAY])
    assert not shift.any()


def test_what_is_forgotten_leaves_the_inverse_of_the_rest():
    x, weight = inputs(), drawn(5, 8, seed=2)
    gram = x.T @ x
    gram.diagonal().add_(strength(gram))
    inverse, repaired = torch.linalg.inv(gram), weight.clone()
    for gone in ([4], [7, 1]):
        forget(repaired, inverse, torch.tensor(gone))
    torch.testing.assert_close(inverse[STAY][:, STAY], torch.linalg.inv(gram[STAY][:, STAY]))
    assert not inverse[~STAY].any()
    torch.testing.assert_close(repaired, rewritten(weight, summed(x), STAY, repair=True, bias=False)[0])


def greedy_by_hand(weight, gram, units, keep):
    """One unit after the other: the one whose absence, all others making up for it, costs least."""
    heavy = gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    gone = {pen: [] for pen in range(len(units))}

    def cost(columns):
        stay = [one for one in range(len(gram)) if one not in columns]
        best = weight @ heavy[:, stay] @ torch.linalg.inv(heavy[stay][:, stay])
        missed = weight.clone()
        missed[:, stay] -= best
        return torch.trace(missed @ heavy @ missed.T)

    while any(len(one) < len(units[0]) - keep for one in gone.values()):
        before = [column for pen, ones in gone.items() for one in ones for column in units[pen][one]]
        free = [
            (pen, one)
            for pen in gone
            if len(gone[pen]) < len(units[0]) - keep
            for one in range(len(units[0]))
            if one not in gone[pen]
        ]
        pen, one = min(free, key=lambda at: cost([*before, *units[at[0]][at[1]]]))
        gone[pen].append(one)
    return [[one not in gone[pen] for one in range(len(units[0]))] for pen in gone]


@pytest.mark.parametrize(
    ("units", "keep"),
    [
        ([[[0], [1], [2], [3], [4], [5], [6], [7]]], 3),  # channels
        ([[[0, 1], [2, 3], [4, 5], [6, 7]]], 2),  # heads
        ([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], 1),  # query heads, one of each group
    ],
)
def test_the_greedy_choice_by_hand(units, keep):
    x, weight = inputs(), drawn(5, 8, seed=2)
    found = cheapest_to_lose(weight, x.T @ x, torch.tensor(units), keep, batch=1)
    assert found.tolist() == greedy_by_hand(weight, x.T @ x, units, keep)


def test_batches_take_no_more_than_may_go():
    found = cheapest_to_lose(drawn(5, 8), inputs().T @ inputs(), torch.arange(8).view(2, 4, 1), 3, batch=5)
    assert found.sum(dim=1).tolist() == [3, 3]
