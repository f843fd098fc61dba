"""The loss without some blocks: the loss of the model they were taken out of, with nothing computed twice."""

import itertools
import random

import pytest
import torch

from oracles import draw_windows, loss_without, no_real_parameters
from secateur.calibration.store import StateStore
from secateur.calibration.walk import open_store
from secateur.data.windows import Windows
from secateur.errors import InputError, NumericsError
from secateur.models.opening import open_model
from secateur.scores.removal import RemovalProbe
from tiny_models import build

SINGLES = [(block,) for block in range(8)]
SETS = [(), (3, 4), (0, 7), (1, 2, 3), (0, 1), (6, 7), (2, 5), (0, 2, 4, 6), tuple(range(1, 8)), tuple(range(7))]
BUDGETS = pytest.mark.parametrize("budget", [None, 20_000, 0], ids=["memory", "a little memory", "disk"])
PLACES = pytest.mark.parametrize(
    ("skeleton", "budget"),
    [(False, None), (False, 20_000), (False, 0), (True, 0)],
    ids=["memory", "a little memory", "disk", "skeleton and disk"],
)


def least_work(asked):
    """Block evaluations that cannot be avoided: a block on a state, once for each set of blocks gone below it."""
    return len(
        {(block, tuple(b for b in gone if b < block)) for gone in asked for block in range(8) if block not in gone}
    )


@pytest.fixture(scope="module")
def windows():
    return draw_windows()


@pytest.fixture(scope="module")
def truth(tiny, windows):
    """Losses of models from which blocks were physically taken out."""
    known = {}

    def loss(gone, name="llama", of=windows):
        key = (tuple(gone), name, of.fingerprint)
        if key not in known:
            known[key] = loss_without(tiny(name), gone, of)
        return known[key]

    return loss


@PLACES
def test_single_blocks_and_sets(skeleton, budget, tiny, windows, truth):
    decoder = tiny("llama", skeleton=skeleton)
    with StateStore(budget) as store:
        probe = RemovalProbe(decoder, windows, store, batch_size=3)
        for gone in (*SINGLES, *SETS):
            assert probe.loss(gone) == pytest.approx(truth(gone), abs=1e-4), gone
    assert not skeleton or no_real_parameters(decoder.module)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("llama", "left"),
        ("llama", "right"),
        ("gemma3_text", "left"),
        ("gpt2", "right"),
        ("qwen3_moe-mixed", "left"),
        ("smollm3", "right"),
        ("opt-post-norm", "left"),
    ],
)
def test_families_and_padding(name, side, tiny, truth):
    padded = draw_windows(side=side)
    with StateStore() as store:
        probe = RemovalProbe(tiny(name), padded, store)
        for gone in ((), (0,), (7,), (2, 5)):
            assert probe.loss(gone) == pytest.approx(truth(gone, name, padded), abs=1e-4), gone


@BUDGETS
@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_asking(seed, budget, tiny, windows, truth):
    asked = [*SINGLES, *SETS]
    random.Random(seed).shuffle(asked)
    with StateStore(budget) as store:
        probe = RemovalProbe(tiny("llama"), windows, store)
        for gone in asked:
            assert probe.loss(gone) == pytest.approx(truth(gone), abs=1e-4), gone


@PLACES
def test_after_settling(skeleton, budget, tiny, windows, truth):
    with StateStore(budget) as store:
        probe = RemovalProbe(tiny("llama", skeleton=skeleton), windows, store)
        gone = ()
        for settled in (3, 5, 0, 4):
            for block in set(range(8)) - set(gone):
                wanted = (*gone, block)
                assert probe.loss(wanted) == pytest.approx(truth(tuple(sorted(wanted))), abs=1e-4), wanted
            gone = (*gone, settled)
            probe.fix(gone)
        for wanted in ((), (2,), (3, 6), (0, 3, 4, 5, 7)):
            assert probe.loss(wanted) == pytest.approx(truth(wanted), abs=1e-4), wanted


@BUDGETS
def test_the_first_thing_asked_may_be_anything(budget, tiny, windows, truth):
    """Nothing may rely on the whole model having been measured first."""
    for first, second in itertools.product([(0,), (1,), (0, 1), (4,), (7,)], repeat=2):
        with StateStore(budget) as store:
            probe = RemovalProbe(tiny("llama"), windows, store)
            assert probe.loss(first) == pytest.approx(truth(first), abs=1e-4)
            assert probe.loss(second) == pytest.approx(truth(second), abs=1e-4)


def test_all_blocks_gone(tiny, windows):
    module = build("llama")
    with torch.no_grad():
        hidden = module.model.norm(module.model.embed_tokens(windows.tokens))
        chances = module.lm_head(hidden)[:, :-1].log_softmax(-1)
    expected = -float(chances.gather(2, windows.tokens[:, 1:, None]).mean())
    with StateStore() as store:
        assert RemovalProbe(tiny("llama"), windows, store).loss(range(8)) == pytest.approx(expected, abs=1e-5)


def test_the_order_and_the_number_of_mentions_do_not_matter(tiny, windows):
    with StateStore() as store:
        probe = RemovalProbe(tiny("llama"), windows, store)
        before = probe.loss((2, 5))
        work = probe.evaluated
        assert probe.loss([5, 2]) == probe.loss({2, 5}) == probe.loss((5, 2, 2)) == before
        assert probe.evaluated == work


def test_the_model_is_left_alone(tiny, windows):
    decoder = tiny("llama")
    before = {name: tensor.clone() for name, tensor in decoder.module.state_dict().items()}
    with StateStore() as store:
        probe = RemovalProbe(decoder, windows, store)
        probe.loss((1,))
        probe.fix((1,))
        probe.loss((1, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.module.state_dict().items())


# Work

# With everything in memory, L blocks: the whole model costs L. Leaving out block b afterwards finds the state that
# enters b and runs the L − 1 − b blocks above: L + Σ_b (L − 1 − b) = L + L(L − 1)/2 in all. Without the whole model
# the same prefix is built on the way, but for the last block, which no candidate runs on the plain prefix.
WHOLE_AND_SINGLES = 8 + 8 * 7 // 2
SINGLES_ONLY = 7 + 8 * 7 // 2


@pytest.mark.parametrize("order", ["up", "down", "mixed"])
@pytest.mark.parametrize("budget", [None, 0], ids=["memory", "disk"])
def test_work_of_all_single_blocks(order, budget, tiny, windows):
    blocks = {"up": range(8), "down": range(7, -1, -1), "mixed": (3, 0, 7, 5, 1, 6, 2, 4)}[order]
    for whole_first, expected in ((True, WHOLE_AND_SINGLES), (False, SINGLES_ONLY)):
        with StateStore(budget) as store:
            probe = RemovalProbe(tiny("llama"), windows, store)
            if whole_first:
                probe.loss(())
                assert probe.evaluated == 8
            for block in blocks:
                probe.loss((block,))
            assert probe.evaluated == expected
    assert least_work([(), *SINGLES]) == WHOLE_AND_SINGLES
    assert least_work(SINGLES) == SINGLES_ONLY


@pytest.mark.parametrize("seed", range(2))
def test_no_block_runs_twice_on_the_same_state(seed, tiny, windows):
    asked = [*SINGLES, *SETS]
    random.Random(seed).shuffle(asked)
    with StateStore() as store:
        probe = RemovalProbe(tiny("llama"), windows, store, batch_size=1)
        for number in range(1, len(asked) + 1):
            probe.loss(asked[number - 1])
            assert probe.evaluated == least_work(asked[:number])


def greedy_asking(settle):
    """What SLEB asks, given where it settles, without measuring anything."""
    gone = ()
    for best in settle:
        yield [tuple(sorted((*gone, block))) for block in range(1, 7) if block not in gone], (gone := (*gone, best))


@pytest.mark.parametrize("settle", [(1, 2, 3), (6, 5, 4), (3, 5, 1), (4, 2, 6)])
def test_work_of_a_greedy_search(settle, tiny, windows):
    """In memory nothing is repeated, in later rounds neither what an earlier round has seen."""
    asked = []
    with StateStore() as store:
        probe = RemovalProbe(tiny("llama"), windows, store)
        for candidates, gone in greedy_asking(settle):
            for candidate in candidates:
                probe.loss(candidate)
            asked += candidates
            probe.fix(gone)
            assert probe.evaluated == least_work(asked)


@pytest.mark.parametrize("settle", [(6, 5, 4), (3, 5, 1)])
@pytest.mark.parametrize("budget", [0, None], ids=["disk", "half a block"])
def test_work_of_a_greedy_search_where_memory_is_short(settle, budget, tiny, windows):
    """The states of the model as settled are always kept, so a candidate costs at most the blocks above its new gap."""
    skeleton = tiny("llama", skeleton=True)
    allowed = 0
    with StateStore(0) if budget == 0 else open_store(skeleton) as store:
        probe = RemovalProbe(skeleton, windows, store, batch_size=2)
        for candidates, gone in greedy_asking(settle):
            before = gone[:-1]
            # once for the settled model's own states that are not known yet …
            allowed += sum(block not in before for block in range(min(before, default=0), 7))
            for candidate in candidates:
                (new,) = set(candidate) - set(before)
                # … and for each candidate what lies above what is new
                allowed += sum(block not in candidate for block in range(new, 8))
                probe.loss(candidate)
            probe.fix(gone)
            assert probe.evaluated <= allowed


def test_settling_forgets_what_no_candidate_can_use(tiny, windows):
    with StateStore() as store:
        probe = RemovalProbe(tiny("llama"), windows, store)
        for gone in ((), *SINGLES):
            probe.loss(gone)
        held = set(store.keys())
        probe.fix((3,))
        kept = set(store.keys())
        assert kept < held
        assert {depth for _, depth, below in kept if below == ()} == {0, 1, 2, 3}
        assert all(depth <= 3 or 3 in below for _, depth, below in kept)
        before = probe.evaluated
        probe.loss((3,))
        assert probe.evaluated == before


# Damage


def damaged(place):
    module = build("llama")
    with torch.no_grad():
        module.get_parameter(place).view(-1)[5] = float("nan")
    return open_model(module)


def test_damage_in_a_block_is_named(windows):
    with StateStore() as store:
        probe = RemovalProbe(damaged("model.layers.3.mlp.down_proj.weight"), windows, store)
        with pytest.raises(NumericsError, match="block 3"):
            probe.loss(())
        with pytest.raises(NumericsError, match="block 3"):
            probe.loss((2,))
        assert probe.loss((3,)) == pytest.approx(loss_without(open_model(build("llama")), (3,), windows), abs=1e-4)


@pytest.mark.parametrize("place", ["model.norm.weight", "lm_head.weight"])
def test_damage_after_the_blocks_never_becomes_a_loss(place, windows):
    with StateStore() as store:
        probe = RemovalProbe(damaged(place), windows, store)
        with pytest.raises(NumericsError):
            probe.loss((3,))


def test_windows_without_a_prediction_are_refused(tiny):
    with StateStore() as store, pytest.raises(InputError):
        RemovalProbe(tiny("llama"), Windows.of([[5], [6]]), store).loss(())
