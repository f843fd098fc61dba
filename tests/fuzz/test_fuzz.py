"""The short run of the fuzzer: a few seeded mutations of every kind of file, and data drawn by hypothesis.

The long run, and the kills, are started by hand (docs/security.md).
"""

import contextlib
import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.kinds import KINDS, make_place, try_one
from secateur.errors import SecateurError
from secateur.evaluation.results import read_results
from secateur.experiments.recipe import as_recipe, read_recipe
from secateur.experiments.state import State
from secateur.plan.plan import Plan
from secateur.scores.profile import Scores

EACH = 2
SLOW = {"chat template", "recipe of training", "log of training", "state of a run"}
"""Kinds of which one mutation takes seconds."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("fuzz") / "place")


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused(kind, place):
    for seed in range(1 if kind in SLOW else EACH):
        finding = try_one(place, kind, seed)
        assert finding.fine, (finding.did, finding.code, finding.said)


NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 10**400])
TEXT = st.text(max_size=8) | st.sampled_from(["\ud800", "%", "nan", "25%"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXT, inside, max_size=3),
    max_leaves=6,
)
KEYS = {
    "plan": ["format", "version", "model", "requested", "texts", "seed", "steps", "counts_on", "search"],
    "recipe": ["model", "prune", "compare", "heal", "eval", "bench", "generate", "texts", "windows", "seed", "device"],
    "scores": ["format", "model", "fingerprint", "texts", "cosine", "magnitude", "perplexity", "taylor"],
    "state": ["format", "name", "stages", "failed"],
}
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def drawn(kind):
    """Objects with the keys of a kind of file, any of them missing, and any values."""
    return st.dictionaries(
        st.sampled_from(KEYS[kind]) | st.text(string.ascii_lowercase, max_size=3), VALUES, max_size=9
    )


@QUICK
@given(drawn("plan"))
def test_any_data_is_a_plan_or_refused(tmp_path, data):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    refuses(Plan.read, path)


@QUICK
@given(drawn("scores"))
def test_any_data_is_scores_or_refused(tmp_path, data):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(data))
    refuses(Scores.read, path)


@QUICK
@given(drawn("state"))
def test_any_data_is_a_state_or_refused(tmp_path, data):
    (tmp_path / "state.json").write_text(json.dumps(data))
    refuses(State.of, tmp_path)


@QUICK
@given(st.lists(VALUES, max_size=3))
def test_any_lines_are_results_or_refused(tmp_path, data):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in data))
    refuses(read_results, path)


@QUICK
@given(drawn("recipe"))
def test_any_data_is_a_recipe_or_refused(data):
    refuses(lambda found: as_recipe(found, "recipe.yaml"), data)


@QUICK
@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, errors="surrogatepass")
    refuses(read_recipe, path)


def refuses(read, given_):
    """Read; whatever else than an error of ours leaves this is a finding."""
    with contextlib.suppress(SecateurError):
        read(given_)


def test_a_recipe_that_repeats_itself_without_end_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    path.write_text("\n".join(lines))
    with pytest.raises(SecateurError, match=r"more than 100,000 values"):
        read_recipe(path)
    path.write_text("[" * 50_000)
    with pytest.raises(SecateurError, match=r"nested too deeply"):
        read_recipe(path)
