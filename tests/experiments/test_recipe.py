"""Recipes: what is read, what is refused, and that what is written reads the same."""

from pathlib import Path

import pytest

from secateur.data.sources import text_names
from secateur.errors import InputError
from secateur.experiments.grid import rows_of
from secateur.experiments.recipe import Recipe, Study, read_recipe
from secateur.jobs.heal import find_healing_recipe
from secateur.methods.sequence import read_sequence, whole_budget
from secateur.settings import read_settings


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_a_run_and_a_study_come_back_as_they_were(file):
    run = read_recipe(file("model: m\nprune: {method: sleb, remove: 20%}\nheal: {with: full, tokens: 3M}\nbench: {}\n"))
    assert isinstance(run, Recipe)
    assert run.prune.amount().remove == 0.2
    assert run.heal.with_ == "full"
    assert run.eval.windows == 64
    assert read_recipe(file(run.to_yaml())) == run
    study = read_recipe(
        file("model: m\ncompare: {methods: [sleb, {method: swm, settings: {rule: mean}}], remove: [0.1, 20%]}\n")
    )
    assert isinstance(study, Study)
    assert study.compare.methods[1].settings == {"rule": "mean"}
    assert read_recipe(file(study.to_yaml())) == study


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nprune: {method: sleb, remvoe: 20%}", "unknown key 'prune.remvoe'. Did you mean 'prune.remove'"),
        ("model: m\nprune: {method: sleb}\nheel: {}", "unknown key 'heel'. Did you mean 'heal'"),
        (
            "model: m\ncompare: {methods: [{method: a, setings: {}}], remove: [1%]}",
            "Did you mean 'compare.methods.0",
        ),
        ("model: m\ncompare: {methods: [], remove: [1%]}", "compare.methods"),
        ("prune: {method: sleb}", "model is missing"),
        ("model: m\nprune: {method: sleb}\neval: {stability: true}", "name some, such as stdlib-cloze"),
        ("model: m\nprune: {method: sleb}\nbench: {repeats: 0}", "bench.repeats"),
        ("model: m\nprune: {method: sleb}\neval: {gate: mmlu}", "'mmlu' is no probe"),
        ("model: [", "not YAML"),
        ("just words", "not a recipe"),
    ],
)
def test_what_cannot_be_used_is_named(file, text, message):
    with pytest.raises(InputError, match=r"recipe\.yaml") as caught:
        read_recipe(file(text))
    assert message in str(caught.value)


def test_a_gate_adds_its_probes_to_the_tasks(file):
    text = "model: m\nprune: {method: sleb}\neval: {gate: 'probe-copy,probe-sort', stability: true"
    alone = read_recipe(file(text + "}")).eval
    assert alone.request().names == ("probe-copy", "probe-sort")
    assert (alone.asked_gate().kept, alone.request().stability) == (0.9, True)
    beside = read_recipe(file(text + ", tasks: 'stdlib-cloze,probe-sort', limit: 8}")).eval
    assert (beside.request().names, beside.request().limit) == (("stdlib-cloze", "probe-sort", "probe-copy"), 8)
    assert read_recipe(file("model: m\nprune: {method: sleb}")).eval.request() is None


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_comes_with_the_repository_can_be_run(path):
    """Methods, ways of healing, settings, amounts and named texts exist."""
    asked = read_recipe(path)
    known = {row.name for row in text_names()}
    assert {asked.texts, *asked.measuring()["texts"].split(",")} <= known
    if isinstance(asked, Study):
        assert rows_of(asked)
        return
    parts = read_sequence(asked.prune.method, asked.prune.settings)
    whole_budget(parts, asked.prune.amount())
    if asked.heal is not None:
        read_settings("heal", find_healing_recipe(asked.heal.with_).settings, asked.heal.settings)
