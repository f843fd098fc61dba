"""One run from a recipe: what is written, what is skipped the second time, what is done again and why."""

import json
from pathlib import Path

import numpy as np
import pytest

import secateur
from secateur.errors import InputError, SecateurError
from secateur.experiments.recipe import Recipe
from secateur.experiments.stages_run import Run
from secateur.experiments.state import State
from secateur.experiments.study import Queue


@pytest.fixture
def recipe(tiny_with_tokenizer, window_file):
    def make(**changes):
        asked = {
            "model": tiny_with_tokenizer,
            "texts": window_file,
            "windows": "all",
            "check": False,
            "prune": {"method": "shortgpt", "blocks": 2},
            "eval": {"windows": "all"},
        }
        return Recipe.model_validate(asked | changes)

    return make


@pytest.fixture
def run(tmp_path):
    """Run a recipe in one folder; gives the stages that were done and what came of it."""

    def call(asked):
        done = []
        (outcome,) = secateur.run(asked, tmp_path / "run", stage=done.append)
        return done, outcome

    return call


def test_stages_are_done_once(run, recipe, tmp_path):
    heal = {"with": "full", "tokens": 128, "seq_len": 16, "settings": {"batch_size": 2}}
    whole = {"heal": heal, "bench": {"repeats": 1, "prompts": [4]}}
    done, outcome = run(recipe(**whole))
    assert done == ["plan", "prune", "heal", "eval", "bench"]
    assert outcome.removed == pytest.approx(secateur.Plan.read(tmp_path / "run" / "plan.json").removed_fraction)
    assert outcome.perplexity > 1
    assert set(outcome.speedup) == {"prefill", "decode"}
    assert run(recipe(**whole)) == ([], outcome)
    done, _ = run(recipe(**whole, eval={"windows": 4}))
    assert done == ["eval"]
    done, _ = run(recipe(**whole | {"heal": heal | {"tokens": 64}}))
    assert done == ["heal", "eval", "bench"]


def test_both_models_are_measured_on_the_same_text(run, recipe, tmp_path, window_file):
    run(recipe())
    results = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [one["role"] for one in results] == ["model", "against"]
    pruned = secateur.open_model(tmp_path / "run" / "cut")
    assert results[0]["value"] == pytest.approx(secateur.evaluate(pruned, texts=window_file, windows=None)[0].value)


def test_what_a_later_stage_needs_is_made_again(run, recipe, tmp_path):
    run(recipe())
    (tmp_path / "run" / "cut").rename(tmp_path / "away")
    assert run(recipe())[0] == []
    assert run(recipe(eval={"windows": 4}))[0] == ["prune", "eval"]
    (tmp_path / "run" / "plan.json").unlink()
    assert run(recipe(prune={"method": "shortgpt", "blocks": 3}))[0] == ["plan", "prune", "eval"]


def test_a_failed_stage_is_noted_and_tried_again(run, recipe, tmp_path):
    with pytest.raises(SecateurError):
        run(recipe(prune={"method": "shortgpt", "blocks": 8}))
    failed = State.of(tmp_path / "run").failed
    assert (failed["stage"], failed["kind"]) == ("plan", "InputError")
    done, outcome = run(recipe())
    assert done == ["plan", "prune", "eval"]
    assert outcome.failed is None


def test_folders_of_others_are_left_alone(recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="was not written by secateur"):
        secateur.run(recipe(), tmp_path / "mine")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "secateur.json").write_text('{"secateur": "0.1.0"}')
    with pytest.raises(InputError, match="holds what `secateur prune` wrote"):
        secateur.run(recipe(), tmp_path / "cut")


def test_a_state_of_another_version_is_refused(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"format": 99, "name": "x", "stages": {}, "failed": None}))
    with pytest.raises(InputError, match="format 99"):
        State.of(tmp_path)
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(InputError, match="not a valid state of a run"):
        State.of(tmp_path)


def test_results_never_outlive_the_cut_they_are_of(run, recipe, tmp_path):
    _, before = run(recipe())
    assert before.perplexity
    with pytest.raises(SecateurError):
        run(recipe(prune={"method": "shortgpt", "blocks": 3}, eval={"texts": "nowhere.npy"}))
    assert State.of(tmp_path / "run").failed["stage"] == "eval"
    assert not (tmp_path / "run" / "results.jsonl").exists()
    _, after = run(recipe(prune={"method": "shortgpt", "blocks": 3}, eval=None))
    assert after.perplexity is None
    assert after.failed is None, "what is not asked for any more has not failed"


def test_a_cut_that_is_made_again_leaves_its_results(run, recipe, tmp_path):
    _, before = run(recipe())
    written = (tmp_path / "run" / "results.jsonl").stat().st_mtime_ns
    (tmp_path / "run" / "cut").rename(tmp_path / "away")
    done, after = run(recipe(bench={"repeats": 1, "prompts": [4]}))
    assert done == ["prune", "bench"]
    assert after.perplexity == before.perplexity
    assert (tmp_path / "run" / "results.jsonl").stat().st_mtime_ns == written


def test_without_healing_nothing_of_it_is_left(run, recipe, tmp_path):
    heal = {"with": "full", "tokens": 64, "seq_len": 16, "settings": {"batch_size": 2}}
    run(recipe(heal=heal, bench={"repeats": 1, "prompts": [4]}))
    done, _ = run(recipe())
    assert done == ["eval"]
    assert set(State.of(tmp_path / "run").stages) == {"plan", "prune", "eval"}
    assert not (tmp_path / "run" / "healed").exists()
    assert not (tmp_path / "run" / "bench.jsonl").exists()


def test_other_text_in_the_same_file_is_read_again(run, recipe, tmp_path, window_file):
    own = tmp_path / "own.npy"
    own.write_bytes(Path(window_file).read_bytes())
    assert run(recipe(texts=str(own)))[0] == ["plan", "prune", "eval"]
    assert run(recipe(texts=str(own)))[0] == []
    np.save(own, np.load(window_file)[:6])
    assert run(recipe(texts=str(own)))[0] == ["plan", "prune", "eval"]


def test_options_of_studies_are_refused(recipe, tmp_path):
    with pytest.raises(InputError, match="a single run has no cells"):
        secateur.run(recipe(), tmp_path / "run", queue=Queue(keep=False))


def test_mistakes_are_found_before_anything_is_done(recipe, tmp_path):
    for changes, message in (
        ({"prune": {"method": "shortgppt", "blocks": 2}}, "Did you mean 'shortgpt'"),
        ({"prune": {"method": "shortgpt", "slice": 0.2}}, "does not count in slice"),
        ({"heal": {"with": "lroa"}}, "Did you mean 'lora'"),
        ({"heal": {"with": "lora", "instructions": True}}, "need a source"),
        ({"eval": {"tasks": "stdlib-clozze"}}, "stdlib-cloze"),
    ):
        with pytest.raises(InputError, match=message):
            secateur.run(recipe(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_goes_with_the_cut(recipe, tiny_with_tokenizer, tmp_path):
    """The checkpoint's own stays in the cut; the one asked for is given whenever a model of the run is opened."""
    other = tmp_path / "tokenizer"
    tokenizer = secateur.open_model(tiny_with_tokenizer).tokenizer
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(other)
    secateur.run(recipe(tokenizer=str(other)), tmp_path / "run")
    opened = Run(recipe(tokenizer=str(other)), tmp_path / "run").final()
    assert opened.tokenizer.chat_template == "{{ messages }}"


def test_training_of_other_settings_is_not_gone_on_with(recipe, tmp_path):
    run = Run(recipe(heal={"with": "full", "tokens": 64}), tmp_path)
    (tmp_path / "healing-of-before").mkdir()
    assert run.work("healing", "heal").name == f"healing-{run.keys['heal']}"
    assert not list(tmp_path.glob("healing-*"))
