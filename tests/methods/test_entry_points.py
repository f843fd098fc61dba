"""A package of its own adds a method and a kind of step: one file and an entry point, seen by every command."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import secateur
from toy_packages import installed

TOY = Path(__file__).parent / "toy_package" / "toy_scale.py"
SOURCE = Path(secateur.__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return installed(tmp_path_factory.mktemp("toy") / "site", TOY.read_text())


@pytest.fixture(scope="module")
def run(warm_python):
    """Return what runs a command in a fresh process; it gives what was printed, or the error where it is to fail."""

    def command(*words, site=None, ok=True):
        places = [str(place) for place in (site, SOURCE) if place is not None]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "COLUMNS": "400"}
        done = warm_python.run("-m", "secateur", *words, environment=environment)
        assert (done.returncode == 0) is ok, done.stderr
        return done.stdout if ok else done.stderr

    return command


def test_it_is_listed_last_but_auto(run, site):
    names = [one["name"] for one in json.loads(run("methods", "--json", site=site))]
    assert "toy" in names
    assert "toy" not in [one["name"] for one in json.loads(run("methods", "--json"))]
    assert json.loads(run("methods", "toy", "--json", site=site)) == {
        "factor": "what MLP outputs are multiplied by (default: 0.5)"
    }


@pytest.fixture(scope="module")
def made(run, site, tiny_with_tokenizer, tmp_path_factory):
    """Return a folder with a plan and a cut of the toy method."""
    folder = tmp_path_factory.mktemp("made")
    plan = folder / "plan.json"
    shown = run("plan", tiny_with_tokenizer, "--method", "toy", "--remove", "25%", "-o", plan, site=site)
    assert "the MLPs of 6, 7 by 0.5" in shown
    run("prune", tiny_with_tokenizer, "--plan", plan, "-o", folder / "cut", site=site)
    return folder


def test_its_plan_is_a_plan_file(made):
    data = json.loads((made / "plan.json").read_text())
    (step,) = data["steps"]
    assert (data["format"], step["kind"], step["blocks"], step["factor"]) == (2, "toy-scale", [6, 7], 0.5)
    assert data["parameters_after"] == data["parameters_before"]


def test_its_cut_reopens_and_is_scaled(made, tiny_with_tokenizer):
    assert json.loads((made / "cut" / "secateur.json").read_text())["check"]["passed"]
    before = load_file(Path(tiny_with_tokenizer) / "model.safetensors")
    after = load_file(made / "cut" / "model.safetensors")
    changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    assert changed == {f"model.layers.{block}.mlp.down_proj.weight" for block in (6, 7)}
    assert all(after[name].equal(before[name] * 0.5) for name in changed)
    assert "| 1 | toy | scales the MLPs of 6, 7 by 0.5 |" in (made / "cut" / "README.md").read_text()


def test_it_is_compared_and_reported(run, site, tiny_with_tokenizer, window_file, tmp_path):
    study = tmp_path / "study"
    amounts = ["--methods", "toy", "--remove", "25%", "--samples", "0"]
    asked = [*amounts, "--texts", window_file, "--windows", "4", "--eval-windows", "2"]
    cells = json.loads(run("compare", tiny_with_tokenizer, *asked, "-o", study, "--json", site=site))
    assert {cell["name"]: cell["failed"] for cell in cells} == {"toy-25": None}
    run("report", study, site=site)
    page = (study / "report.html").read_text()
    assert page.count('<li class="block changed"') == 2
    assert "block 7: MLP output times 0.5" in page


def test_without_the_package_its_plan_says_what_is_missing(run, made, tiny_with_tokenizer):
    said = run("prune", tiny_with_tokenizer, "--plan", made / "plan.json", "-o", made / "again", ok=False)
    assert "unknown kind of step 'toy-scale'; known: drop-blocks, " in said
    assert "A package that adds it may not be installed" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        (TOY.read_text().replace('name="toy"', 'name="swm"'), "the method 'swm' is defined twice"),
        (TOY.read_text().replace('"toy-scale"', '"drop-blocks"'), "the kind of step 'drop-blocks' is defined twice"),
    ],
    ids=["cannot be imported", "takes a method's name", "takes a step's name"],
)
def test_a_package_that_cannot_be_used_is_named(run, text, message, tmp_path):
    site = installed(tmp_path / "site", text, module="broken_one")
    said = " ".join(run("methods", site=site, ok=False).split())
    assert "the installed package broken-one cannot be used (entry point secateur.methods: broken_one)" in said
    assert message in said
    assert "Traceback" not in said


def test_steps_alone_have_a_group_of_their_own(run, tmp_path, made, tiny_with_tokenizer):
    site = installed(tmp_path / "site", TOY.read_text(), group="secateur.steps")
    shutil.copy(made / "plan.json", tmp_path / "plan.json")
    run("report", tmp_path, site=site)
    assert "scales the MLPs of 6, 7 by 0.5" in (tmp_path / "report.html").read_text()
