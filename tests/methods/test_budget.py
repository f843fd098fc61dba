"""One budget for all methods (docs/guide.md): what is requested, what is removed, and what is out of reach."""

import pytest

from oracles import draw_windows
from secateur import make_plan
from secateur.errors import InputError
from secateur.methods.budget import Budget, choose_blocks
from secateur.plan.amount import Amount, read_count, read_fraction

SIZES = (10, 10, 20, 10, 30, 10)  # parameters of six blocks
TOTAL = 200


def budget(**amount):
    return Budget.of(Amount.of(amount))


def growing(*blocks):
    """Candidates of 1, 2, 3, … blocks in this order."""
    return [tuple(sorted(blocks[: count + 1])) for count in range(len(blocks))]


CANDIDATES = growing(0, 1, 2, 3, 4)  # 10, 20, 40, 50, 80 parameters


def chosen(candidates=CANDIDATES, **amount):
    return choose_blocks(budget(**amount), iter(candidates), SIZES, TOTAL, len(candidates))


# Reading


@pytest.mark.parametrize(
    ("text", "value"),
    [("25%", 0.25), (" 25 % ", 0.25), (0.25, 0.25), ("0.25", 0.25), ("12.5%", 0.125), ("99.9%", 0.999)],
)
def test_fractions(text, value):
    assert read_fraction(text) == pytest.approx(value)
    assert budget(remove=text).describe() == {"remove": pytest.approx(value)}


@pytest.mark.parametrize(
    "text", [0, "0", "0%", 1, "1", "100%", 25, "25", -0.1, "-10%", "101%", "nan", "inf", float("nan")]
)
def test_fractions_out_of_range(text):
    with pytest.raises(InputError, match=f"remove={text}: must be between 0 and 1"):
        read_fraction(text)


def test_a_forgotten_percent_sign_is_guessed():
    with pytest.raises(InputError, match=r"Did you mean 25%\?"):
        read_fraction("25")


@pytest.mark.parametrize("text", ["abc", "", "%", "1/4", "25%%", "a quarter"])
def test_fractions_that_are_none(text):
    with pytest.raises(InputError, match="not a number"):
        read_fraction(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5.5B", 5.5e9),
        ("350M", 3.5e8),
        ("12k", 12e3),
        ("12K", 12e3),
        ("1T", 1e12),
        (5_500_000_000, 5.5e9),
        ("100", 100),
    ],
)
def test_counts(text, value):
    assert read_count(text) == value


@pytest.mark.parametrize("text", ["abc", "", "B", "5.5X", "5.5BB", "five"])
def test_counts_that_are_none(text):
    with pytest.raises(InputError, match="not a number"):
        read_count(text)


@pytest.mark.parametrize("text", [0, "0", "-1B", "inf", "nan", "infM"])
def test_counts_out_of_range(text):
    with pytest.raises(InputError, match="positive number"):
        read_count(text)


def test_one_amount_is_asked_for():
    with pytest.raises(InputError, match="no amount given: give one of remove"):
        budget()
    with pytest.raises(InputError, match=r"several amounts given \(blocks, remove\)"):
        budget(blocks=1, remove=0.5)
    with pytest.raises(InputError, match=r"several amounts given \(blocks, remove, target_params\)"):
        budget(blocks=0, remove=0.5, target_params="1B")
    with pytest.raises(InputError, match="blocks=-1"):
        budget(blocks=-1)


def test_only_no_blocks_is_nothing():
    assert budget(blocks=0).is_zero
    assert not budget(blocks=1).is_zero
    assert not budget(remove=0.001).is_zero


# Taking


def test_so_many_blocks():
    for count in range(1, 6):
        assert chosen(blocks=count) == CANDIDATES[count - 1]
    with pytest.raises(InputError, match="blocks=6: at most 5 blocks can be removed"):
        chosen(blocks=6)


@pytest.mark.parametrize(
    ("remove", "blocks"),
    [
        (0.05, 1),
        (0.06, 1),  # 12 of 200: 10 is closer than 20
        (0.08, 2),
        (0.10, 2),
        (0.14, 2),  # 28: 20 is closer than 40
        (0.16, 3),  # 32: 40 is closer than 20
        (0.22, 3),
        (0.23, 4),
        (0.32, 4),
        (0.33, 5),
        (0.40, 5),
    ],
)
def test_remove_takes_the_closest(remove, blocks):
    assert chosen(remove=remove) == CANDIDATES[blocks - 1]


@pytest.mark.parametrize("remove", [0.001, 0.02, 0.049])
def test_remove_less_than_one_block(remove):
    """Not the empty cut either: the closest non-zero one, or an error that names it."""
    with pytest.raises(InputError, match=r"unreachable, .*smallest cut .*5\.0%"):
        chosen(remove=remove)


@pytest.mark.parametrize("remove", [0.42, 0.5, 0.99])
def test_remove_more_than_may_go(remove):
    with pytest.raises(InputError, match=r"unreachable, dropping all 5 removable blocks removes 40\.0%"):
        chosen(remove=remove)


@pytest.mark.parametrize("remove", ["5%", "40%", 0.3999, 0.4001, 0.04999])
def test_a_rounded_request_is_reached(remove):
    assert chosen(remove=remove) in (CANDIDATES[0], CANDIDATES[4])


@pytest.mark.parametrize(
    ("target", "blocks"),
    [(190, 1), (195, 1), (199, 1), (189, 2), (180, 2), (179, 3), (160, 3), (159, 4), (150, 4), (149, 5), (120, 5)],
)
def test_target_takes_the_largest_model_at_or_below(target, blocks):
    assert chosen(target_params=target) == CANDIDATES[blocks - 1]


def test_a_target_is_never_missed_by_a_little():
    """Each target one below what fewer blocks leave: with large numbers, no rounding may hide the one."""
    sizes, total = (1_000_000,) * 6, 8_000_000
    for blocks in range(1, 5):
        target = total - blocks * 1_000_000 - 1
        found = choose_blocks(budget(target_params=target), growing(0, 1, 2, 3, 4), sizes, total, 5)
        assert total - sum(sizes[block] for block in found) <= target


def test_target_below_reach():
    with pytest.raises(InputError, match=r"target-params=119: unreachable, .*all 5 removable blocks .*40\.0%"):
        chosen(target_params=119)


def test_target_above_the_model():
    with pytest.raises(InputError, match="the model has only 200 parameters"):
        chosen(target_params=201)


def test_closest_where_windows_do_not_nest():
    """A longer window elsewhere may hold smaller blocks, so more blocks are not always more parameters."""
    candidates = [(0,), (2, 4), (0, 1, 3)]  # 10, 50, 30 parameters
    assert chosen(candidates, remove=0.16) == (0, 1, 3)
    assert chosen(candidates, target_params=171) == (0, 1, 3)
    assert chosen(candidates, remove=0.25) == (2, 4)


def test_candidates_are_read_only_as_far_as_needed():
    """Each further candidate of a greedy method is expensive."""

    def candidates():
        yield from CANDIDATES[:3]
        raise AssertionError("asked for more than needed")

    assert choose_blocks(budget(blocks=2), candidates(), SIZES, TOTAL, 5) == CANDIDATES[1]
    assert choose_blocks(budget(blocks=3), candidates(), SIZES, TOTAL, 5) == CANDIDATES[2]
    alike = (10,) * 6
    assert choose_blocks(budget(remove=0.1), candidates(), alike, 100, 5) == CANDIDATES[0]
    assert choose_blocks(budget(remove=0.3), candidates(), alike, 100, 5) == CANDIDATES[2]
    assert choose_blocks(budget(target_params=70), candidates(), alike, 100, 5) == CANDIDATES[2]


# On models


@pytest.mark.parametrize("method", ["shortgpt", "last-n"])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_remove_on_a_model(name, method, tiny):
    decoder = tiny(name)
    share = decoder.block_parameter_counts()[0] / decoder.parameter_count
    assert len(set(decoder.block_parameter_counts())) == 1
    for count in range(1, 6):
        for asked in ((count - 0.4) * share, count * share, (count + 0.4) * share):
            if asked < share * 0.99:
                continue
            plan = make_plan(decoder, method=method, remove=asked, texts=draw_windows(windows=2, positions=8))
            assert len(plan.steps[0].blocks) == count
            assert plan.removed_fraction == pytest.approx(count * share)
            assert plan.requested == {"remove": asked}


def test_remove_counts_all_parameters(tiny):
    """25 % of the model, embeddings included and tied ones once, not 25 % of the blocks."""
    decoder = tiny("llama-tied")
    plan = make_plan(decoder, method="last-n", remove="25%")
    sizes = decoder.block_parameter_counts()
    closest = min(range(1, 8), key=lambda n: abs(n * sizes[0] / decoder.parameter_count - 0.25))
    assert len(plan.steps[0].blocks) == closest
    assert plan.parameters_before == decoder.parameter_count == decoder.module.num_parameters()


def test_remove_with_blocks_of_two_sizes(tiny):
    decoder = tiny("qwen3_moe-mixed")
    sizes = decoder.block_parameter_counts()
    assert len(set(sizes)) == 2
    for asked in (0.15, 0.3, 0.5):
        plan = make_plan(decoder, method="last-n", remove=asked)
        cuts = {n: sum(sizes[7 - n : 7]) / decoder.parameter_count for n in range(1, 8)}
        best = min(cuts, key=lambda n: abs(cuts[n] - asked))
        assert plan.steps[0].blocks == tuple(range(7 - best, 7))


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("spare", [0, 1])
def test_target_on_a_model(blocks, spare, tiny):
    """Just reached is reached; one parameter too many takes another block."""
    decoder = tiny("llama")
    target = decoder.parameter_count - blocks * decoder.block_parameter_counts()[0] - spare
    plan = make_plan(decoder, method="last-n", target_params=target)
    assert plan.parameters_after <= target
    assert len(plan.steps[0].blocks) == blocks + spare


@pytest.mark.parametrize("method", ["shortgpt", "last-n", "sleb", "uidl"])
def test_out_of_reach_on_a_model(method, tiny):
    windows = draw_windows(windows=2, positions=8)
    decoder = tiny("llama")
    share = decoder.block_parameter_counts()[0] / decoder.parameter_count
    most = {"last-n": 7, "sleb": 6}.get(method, 7)
    with pytest.raises(InputError, match=f"{share:.1%}"):
        make_plan(decoder, method=method, remove=share / 2, texts=windows)
    with pytest.raises(InputError, match=rf"all {most} removable blocks .*{most * share:.1%}"):
        make_plan(decoder, method=method, remove=0.95, texts=windows)


@pytest.mark.parametrize(
    "amount", [{"remove": 0}, {"remove": 1}, {"remove": 25}, {"remove": "abc"}, {}, {"blocks": -1}]
)
def test_amounts_that_are_refused(amount, tiny):
    with pytest.raises(InputError):
        make_plan(tiny("llama"), method="last-n", **amount)


def test_several_amounts_are_refused(tiny):
    with pytest.raises(InputError, match="several amounts"):
        make_plan(tiny("llama"), method="last-n", blocks=1, remove=0.25)
