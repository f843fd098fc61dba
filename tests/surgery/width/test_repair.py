"""Closed-form repair and the greedy choice, against plain least squares and plain inverses in float64."""

import math

import pytest
import torch

from secateur.calibration.folds import folds_of
from secateur.calibration.inputs import InputSums
from secateur.calibration.ridge import GRID, RIDGE, UNJUDGED, strength
from secateur.data.windows import Windows
from secateur.methods.apply_widths import BrainSurgeon
from secateur.scores.unit_scores import cheapest_to_lose, forget, order_by_surgeon
from secateur.surgery.width.pruning import Place, Refit
from secateur.surgery.width.repair import aimed, choose_fit, described, rewritten

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


def greedy_by_hand(weight, gram, units, keep, candidates=None):
    """One unit after the other: the one whose absence, all others making up for it, costs least.

    `candidates` lists the units of the only group that may be the first to go, the second, and so on.
    """
    heavy = gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    gone = {group: [] for group in range(len(units))}

    def cost(columns):
        stay = [one for one in range(len(gram)) if one not in columns]
        best = weight @ heavy[:, stay] @ torch.linalg.inv(heavy[stay][:, stay])
        missed = weight.clone()
        missed[:, stay] -= best
        return torch.trace(missed @ heavy @ missed.T)

    while any(len(one) < len(units[0]) - keep for one in gone.values()):
        before = [column for group, ones in gone.items() for one in ones for column in units[group][one]]
        free = [
            (group, one)
            for group in gone
            if len(gone[group]) < len(units[0]) - keep
            for one in range(len(units[0]))
            if one not in gone[group] and (candidates is None or one in candidates[len(gone[group])])
        ]
        group, one = min(free, key=lambda at: cost([*before, *units[at[0]][at[1]]]))
        gone[group].append(one)
    return [[one not in gone[group] for one in range(len(units[0]))] for group in gone]


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


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_the_greedy_choice_among_the_smallest_by_hand(share):
    x, weight = inputs(), drawn(5, 8, seed=2)
    x[:, 5] *= 10
    weight[:, 5] *= 1e-3  # large, and cheap to lose
    sums, units = summed(x), torch.arange(8).view(1, 8, 1)
    sizes = sum(part.abs().mean(dim=0).square() for part in x.split(17))
    smallest = sizes.argsort().tolist()
    found = order_by_surgeon(weight, sums, units, 3, candidates=share).tolist()
    candidates = [smallest[: max(int(8 * share), math.ceil(1.5 * gone))] for gone in range(1, 6)]
    stay = greedy_by_hand(weight, x.T @ x, units.tolist(), 3, candidates)[0]
    assert sorted(found) == [one for one in range(8) if not stay[one]]
    assert all(set(found[: gone + 1]) <= set(candidates[gone]) for gone in range(5))
    assert found[0] != 5
    assert order_by_surgeon(weight, sums, units, 7).tolist() == [5]


def test_all_may_be_candidates():
    x, weight = inputs(), drawn(5, 8, seed=2)
    units = torch.arange(8).view(1, 8, 1)
    every = order_by_surgeon(weight, summed(x), units, 1)
    assert torch.equal(order_by_surgeon(weight, summed(x), units, 1, candidates=1.0), every)


def test_heads_have_no_candidates():
    x, weight = inputs(), drawn(5, 8, seed=2)
    units = torch.arange(8).view(1, 4, 2)
    every = order_by_surgeon(weight, summed(x), units)
    assert torch.equal(order_by_surgeon(weight, summed(x), units, candidates=0.25), every)


def test_batches_take_no_more_than_may_go():
    found = cheapest_to_lose(drawn(5, 8), inputs().T @ inputs(), torch.arange(8).view(2, 4, 1), 3, batch=5)
    assert found.sum(dim=1).tolist() == [3, 3]


# Cross-validation


def summed_apart(fit, held_out, fit_weight=None, held_weight=None):
    """Sums of tokens that are fitted and of others that are held out, fed together in two parts."""
    sums = InputSums(fit.shape[1], torch.device("cpu"))
    x, held = torch.cat([fit, held_out]), torch.arange(len(fit) + len(held_out)) >= len(fit)
    weights = [torch.ones(len(one)) if w is None else w for one, w in ((fit, fit_weight), (held_out, held_weight))]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(4))
    for rows in order.split(33):
        sums.update(x[rows], torch.zeros(len(rows), dtype=torch.long), torch.cat(weights)[rows].double(), held[rows])
    return sums


def by_hand(fit, w, held_out, v, weight, ridge, *, constant=False):
    """The weighted error on the tokens held out of a fit made with a tall matrix, relative to what W writes."""
    mean = (w[:, None] * fit).sum(dim=0) / w.sum() if constant else torch.zeros(8, dtype=fit.dtype)
    x, y = (w.sqrt()[:, None] * (fit - mean)), v.sqrt()[:, None] * (held_out - mean)
    found = weight * STAY
    if ridge is not None:
        root = (ridge * (x.T @ x).diagonal().mean()).sqrt()
        tall = torch.cat([x[:, STAY], root * torch.eye(5, dtype=x.dtype)])
        target = torch.cat([x @ weight.T, root * weight[:, STAY].T])
        found[:, STAY] = torch.linalg.lstsq(tall, target).solution.T
    return float((y @ (weight - found).T).square().sum() / (v[:, None] * (held_out @ weight.T).square()).sum())


@pytest.mark.parametrize("tokens", [12, 24, 400])
def test_the_ridge_is_the_one_that_serves_the_tokens_held_out_best(tokens):
    fit, held_out, weight = inputs(tokens) + drawn(tokens, 8, seed=7), inputs(50) + drawn(50, 8, seed=8), drawn(5, 8)
    w, v = drawn(tokens, seed=5).abs() + 0.1, drawn(50, seed=6).abs() + 0.1
    errors = {ridge: by_hand(fit, w, held_out, v, weight, ridge) for ridge in (None, *GRID)}
    best = min(errors, key=errors.get)
    sums = summed_apart(fit, held_out, w, v)
    found = choose_fit(weight, sums, STAY, repair=True, bias=False)
    assert found.ridge == best
    assert (found.error, found.plain) == pytest.approx((errors[best], errors[None]))
    both, heavy = torch.cat([fit, held_out]), torch.cat([w, v]).sqrt()[:, None]
    refitted = rewritten(weight, summed(heavy * both), STAY, repair=True, bias=False, ridge=best)[0]
    torch.testing.assert_close(found.applied(weight, sums, STAY)[0], refitted)


def test_more_tokens_want_less_ridge():
    weight, chosen = drawn(5, 8), []
    for tokens in (6, 24, 4000):
        x = inputs(tokens) + 0.3 * drawn(tokens, 8, seed=7)
        sums = summed_apart(x, inputs(50) + 0.3 * drawn(50, 8, seed=8))
        chosen.append(choose_fit(weight, sums, STAY, repair=True, bias=False).ridge)
    assert chosen[0] > chosen[1] > chosen[2]


def test_a_repair_that_serves_other_text_worse_is_not_made():
    """What goes equals a channel that stays in the fit, and its opposite in the text held out."""
    fit, held_out, weight = drawn(200, 8), drawn(50, 8, seed=1), drawn(5, 8, seed=2)
    fit[:, 1], held_out[:, 1] = fit[:, 0], -held_out[:, 0]
    fit[:, 4], held_out[:, 4] = fit[:, 2], -held_out[:, 2]
    fit[:, 7], held_out[:, 7] = fit[:, 3], -held_out[:, 3]
    sums = summed_apart(fit, held_out)
    found = choose_fit(weight, sums, STAY, repair=True, bias=False)
    assert (found.ridge, found.error) == (None, found.plain)
    assert torch.equal(found.applied(weight, sums, STAY)[0], weight * STAY)
    assert choose_fit(
        weight, summed_apart(fit, drawn(50, 8, seed=1) * 0 + fit[:50]), STAY, repair=True, bias=False
    ).ridge


def test_a_bias_is_put_in_only_where_it_serves_the_tokens_held_out():
    weight = drawn(5, 8, seed=2)
    fit, same, opposite = inputs(400, mean=3.0), inputs(50, mean=3.0), inputs(50, mean=-3.0)
    one = torch.ones(400, dtype=fit.dtype), torch.ones(50, dtype=fit.dtype)
    found = choose_fit(weight, summed_apart(fit, same), STAY, repair=True, bias=True)
    errors = {r: by_hand(fit, one[0], same, one[1], weight, r, constant=True) for r in (None, *GRID)}
    assert (found.bias, found.ridge) == (True, min(errors, key=errors.get))
    assert found.error == pytest.approx(min(errors.values()))
    assert not choose_fit(weight, summed_apart(fit, opposite), STAY, repair=True, bias=True).bias


def test_without_tokens_held_out_the_ridge_is_fixed():
    sums, weight = summed(inputs()), drawn(5, 8, seed=2)
    assert choose_fit(weight, sums, STAY, repair=True, bias=True).ridge == UNJUDGED
    assert choose_fit(weight, sums, STAY, repair=True, bias=True, ridge=0.5).ridge == 0.5
    assert choose_fit(weight, sums, STAY, repair=False, bias=True).ridge is None
    silent = summed_apart(inputs(), torch.zeros(5, 8, dtype=torch.float64))
    assert choose_fit(weight, silent, STAY, repair=True, bias=False).ridge == UNJUDGED


def test_what_was_chosen_is_told_for_one_projection_or_for_all_experts():
    weight, sums = drawn(5, 8), summed_apart(inputs(400), inputs(50))
    fit = choose_fit(weight, sums, STAY, repair=True, bias=False)
    assert described([fit]) == {
        "ridge": fit.ridge,
        "error": round(fit.error, 5),
        "error_without_repair": round(fit.plain, 5),
    }
    assert described([fit, fit])["ridge"] == [fit.ridge, fit.ridge]


# Which windows are held out


def test_windows_are_held_out_by_source_and_sources_weigh_the_same():
    source_of = torch.tensor([0, 1, 0, 0, 1, 0, 2, 0, 1, 0, 0, 0, 1])
    mask = torch.ones(13, 6, dtype=torch.bool)
    mask[1, 3:] = False
    windows = Windows(torch.ones(13, 6, dtype=torch.long), mask, "a,b,c", "", 0, False, (), part_of=source_of)
    folds = folds_of(windows)
    assert folds.held_out.nonzero().flatten().tolist() == [5, 11, 12]
    of_sources = [float((folds.weight * mask.sum(dim=1))[source_of == one].sum()) for one in range(3)]
    assert of_sources == pytest.approx([1.0] * 3)
    assert len({round(one, 9) for one in folds.weight[source_of == 1].tolist()}) == 1
    alone = folds_of(windows.some([0, 2, 3]))
    assert not alone.held_out.any()
    assert folds.slice(4, 3).held_out.tolist() == [False, True, False]


def test_what_the_output_lacks_is_part_of_the_fit_and_of_its_error():
    """With m as an output of its own the sums are those of W x + m, by a tall matrix and error by error."""
    fit, held_out, weight = inputs(200), inputs(50) + drawn(50, 8, seed=8), drawn(5, 8, seed=2)
    x, m = torch.cat([fit, held_out]), torch.cat([fit @ drawn(8, 5, seed=9), drawn(50, 5, seed=10)])
    held, w = torch.arange(250) >= 200, drawn(250, seed=11).abs() + 0.1
    sums = InputSums(8, torch.device("cpu"))
    for rows in torch.arange(250).split(33):
        sums.update(x[rows], torch.zeros(len(rows), dtype=torch.long), w[rows], held[rows], m[rows])

    def solved(rows, ridge):
        root = w[rows].sqrt()[:, None]
        tall = root * x[rows][:, STAY]
        strong = (ridge * (root * x[rows]).square().sum(dim=0).mean()).sqrt()
        wanted = torch.cat([root * (x @ weight.T + m)[rows], strong * weight[:, STAY].T])
        return torch.linalg.lstsq(torch.cat([tall, strong * torch.eye(5, dtype=x.dtype)]), wanted).solution

    def missed(matrix):
        return float((w * (x @ weight.T + m - x[:, STAY] @ matrix).square().sum(dim=1))[held].sum())

    errors = {None: missed(weight[:, STAY].T)} | {ridge: missed(solved(~held, ridge)) for ridge in GRID}
    found = choose_fit(weight, sums, STAY, repair=True, bias=False)
    assert found.ridge == min(errors, key=errors.get)
    size = float((w * (x @ weight.T).square().sum(dim=1))[held].sum())
    assert (found.error, found.plain) == pytest.approx((errors[found.ridge] / size, errors[None] / size))
    everything = torch.ones(250, dtype=torch.bool)
    torch.testing.assert_close(found.applied(weight, sums, STAY)[0][:, STAY].T, solved(everything, found.ridge))


def test_units_are_chosen_for_what_the_projection_is_to_write():
    """Greedy removal from the least-squares solution with all inputs, not from the weights as they are."""
    x, weight, units, ridge = inputs(300), drawn(5, 8, seed=2), [[[one] for one in range(8)]], 0.2
    m = x @ (torch.linspace(0, 6, 8, dtype=x.dtype)[:, None] * drawn(8, 5, seed=9)) - x @ weight.T
    sums = InputSums(8, torch.device("cpu"))
    sums.update(x, torch.zeros(300, dtype=torch.long), lacking=m)
    gram = x.T @ x
    strong = ridge * gram.diagonal().mean() * torch.eye(8, dtype=x.dtype)
    whole = weight + torch.linalg.solve(gram + strong, x.T @ m).T
    torch.testing.assert_close(aimed(weight, sums, ridge), whole)
    found = BrainSurgeon(aim=ridge)(Place(0, "channels"), weight, sums, torch.tensor(units), 4).tolist()
    assert found == greedy_by_hand(whole, gram, units, 4)
    assert found != greedy_by_hand(weight, gram, units, 4)


def test_where_nothing_lacks_units_are_chosen_for_the_projection_as_it_is():
    sums, weight = summed(inputs(60)), drawn(5, 8, seed=2)
    assert aimed(weight, sums) is weight


@pytest.mark.parametrize(("repair", "align", "aim"), [(True, True, 0.3), (True, False, None), (False, True, None)])
def test_only_where_projections_are_aligned(repair, align, aim):
    assert BrainSurgeon.before(Refit(repair=repair, align=align, ridge=0.3))._aim == aim
