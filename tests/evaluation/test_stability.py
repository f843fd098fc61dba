"""Stability and answer flips against the formulas of LLM-Streamline, written out with plain numbers.

Chen et al. 2024, "Streamlining Redundant Layers to Compress Large Language Models", section 3.4: w = softmax(c)
with c_i the standard deviation of the original model's losses over the options of question i; stability is Σ w_i over
the questions that both models get right, or both wrong.
"""

import math
import random
import statistics

import pytest

from secateur.errors import InputError, NumericsError
from secateur.evaluation.stability import Answer, accuracy, flips, stability


def drawn(seed, questions=40, options=4):
    """Answers of an original model and of one that is somewhat off."""
    rng = random.Random(seed)
    original, pruned = [], []
    for _ in range(questions):
        tokens = tuple(rng.randint(1, 9) for _ in range(options))
        gold = frozenset({rng.randrange(options)})
        sums = tuple(-rng.uniform(0.5, 6) * count for count in tokens)
        original.append(Answer(sums, tokens, gold))
        pruned.append(Answer(tuple(one * rng.uniform(0.7, 1.4) for one in sums), tokens, gold))
    return original, pruned


def mean_losses(answer):
    return [-total / count for total, count in zip(answer.sums, answer.tokens, strict=True)]


def is_right(answer):
    losses = mean_losses(answer)
    return losses.index(min(losses)) in answer.gold


def oracle_weights(original):
    exponentials = [math.exp(statistics.pstdev(mean_losses(one))) for one in original]
    return [one / math.fsum(exponentials) for one in exponentials]


@pytest.mark.parametrize("seed", range(4))
def test_as_defined(seed):
    original, pruned = drawn(seed)
    weights = oracle_weights(original)
    agree = [is_right(one) == is_right(other) for one, other in zip(original, pruned, strict=True)]
    assert 0 < sum(agree) < len(agree)
    expected = math.fsum(weight for weight, same in zip(weights, agree, strict=True) if same)
    assert stability(original, pruned) == pytest.approx(expected, abs=1e-12)
    changed = [
        mean_losses(one).index(min(mean_losses(one))) != mean_losses(other).index(min(mean_losses(other)))
        for one, other in zip(original, pruned, strict=True)
    ]
    assert flips(original, pruned) == sum(changed) / len(changed)
    assert accuracy(pruned) == sum(map(is_right, pruned)) / len(pruned)


def test_a_model_against_itself():
    original, _ = drawn(7)
    assert stability(original, original) == 1.0
    assert flips(original, original) == 0.0


def test_not_the_first_weights_as_the_released_script_has_it():
    """The script sums the first k weights, k the number of questions on which the models agree."""
    sure = Answer((-0.1, -9.0), (1, 1), frozenset({0}))
    unsure = Answer((-1.0, -1.1), (1, 1), frozenset({0}))
    lost = Answer((-9.0, -0.1), (1, 1), frozenset({0}))
    original, pruned = [sure, unsure, unsure], [lost, unsure, unsure]
    first, second, third = oracle_weights(original)
    released = math.fsum([first, second])
    assert released > 0.9
    assert stability(original, pruned) == pytest.approx(second + third)
    assert stability(original, pruned) < 0.1


def test_the_normalised_loss_decides_what_is_right():
    longer = Answer((-4.0, -3.0), (4, 1), frozenset({0}))
    assert longer.right(), "the sum prefers the other option, the mean per token this one"


def test_large_differences_do_not_overflow():
    original = [Answer((0.0, -4000.0), (1, 1), frozenset({0})), Answer((-1.0, -2.0), (1, 1), frozenset({0}))]
    assert stability(original, list(reversed(original))) == 1.0


def test_several_right_options_and_both_wrong():
    either = Answer((-1.0, -2.0, -3.0), (1, 1, 1), frozenset({0, 1}))
    other = Answer((-2.0, -1.0, -3.0), (1, 1, 1), frozenset({0, 1}))
    assert stability([either], [other]) == 1.0
    assert flips([either], [other]) == 1.0
    wrong, also_wrong = (Answer(sums, (1, 1, 1), frozenset({2})) for sums in (either.sums, other.sums))
    assert stability([wrong], [also_wrong]) == 1.0


def test_what_cannot_be_compared_is_refused():
    original, pruned = drawn(0)
    with pytest.raises(InputError, match="no questions"):
        stability([], [])
    with pytest.raises(InputError, match="not asked the same"):
        stability(original, pruned[1:])
    bad = [Answer((math.nan, *one.sums[1:]), one.tokens, one.gold) for one in pruned]
    with pytest.raises(NumericsError):
        stability(original, bad)
