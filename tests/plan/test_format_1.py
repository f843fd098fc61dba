"""Plans that secateur 0.1 wrote are read, count the same parameters and are applied."""

import json
from pathlib import Path

import pytest

from secateur import Plan, make_plan, prune
from secateur.errors import InputError
from secateur.plan.plan import plans_in

FILES = {file.stem: file for file in sorted((Path(__file__).parent / "format_1").glob("*.json"))}
KINDS = {
    "obs-width": "prune-width",
    "replaceme": "linear-replacement",
    "slicegpt": "slice-hidden",
    "stock-slicing": "slice-hidden",
    "streamline": "replace-blocks",
    "swm": "merge-blocks",
}


def test_there_is_a_file_of_each_kind_that_changed():
    assert set(FILES) == set(KINDS)
    assert all(json.loads(file.read_text())["format"] == 1 for file in FILES.values())


@pytest.mark.parametrize("name", FILES)
def test_read(name):
    before = json.loads(FILES[name].read_text())
    plan = Plan.read(FILES[name])
    assert [step.kind for step in plan.steps] == [KINDS[name]]
    assert plan.parameters_after == before["parameters_after"]
    assert plan.removed_fraction == before["removed_fraction"]
    assert plan.steps[0].settings == before["steps"][0]["settings"]
    data = json.loads(plan.to_json())
    assert data["format"] == 2
    assert Plan.model_validate(data) == plan
    assert plans_in([{"plan": before}, {"healing": {}}]) == (plan,)


@pytest.mark.parametrize("name", FILES)
def test_applied(name, bundled):
    plan = Plan.read(FILES[name])
    if name == "streamline":  # one step of training tells as much
        shorter = plan.steps[0].model_copy(update={"settings": plan.steps[0].settings | {"evaluations": 1}})
        plan = plan.model_copy(update={"steps": (shorter,)})
    pruned = prune(bundled, plan, texts="python-stdlib")
    assert pruned.parameter_count == json.loads(FILES[name].read_text())["parameters_after"]
    assert plans_in(pruned.history) == (plan,)


@pytest.mark.parametrize("name", ["slicegpt", "stock-slicing"])
def test_the_same_request_gives_the_same_step_today(name, bundled):
    """What was a setting in format 1 becomes the field that deciding fills in now; `head` is newer."""
    before = Plan.read(FILES[name])
    given = {"signals": before.steps[0].signals} | ({"head": "whole"} if name == "slicegpt" else {})
    now = make_plan(bundled, method=name, remove=0.2, texts="python-stdlib", windows=4, seq_len=64, settings=given)
    found = now.steps[0].model_dump(exclude={"error", "texts"})
    found["settings"].pop("head", None)
    assert found == before.steps[0].model_dump(exclude={"error", "texts"})


def test_the_threshold_of_a_plan_gives_its_windows_today(bundled):
    """The search for a threshold visits others now, and may find a better one; the run at one is the same."""
    (before,) = Plan.read(FILES["swm"]).steps
    rule = {"rule": before.rule}
    own = rule | {"threshold": before.threshold}
    (now,) = make_plan(bundled, method="swm", settings=own, texts="python-stdlib", windows=4, seq_len=64).steps
    assert (now.windows, now.rule) == (before.windows, before.rule)
    assert now.similarity == pytest.approx(before.similarity, abs=1e-3)
    (found,) = make_plan(
        bundled, method="swm", settings=rule, remove=0.2, texts="python-stdlib", windows=4, seq_len=64
    ).steps
    assert found.similarity > before.similarity - 1e-3


STEP = {"method": "m", "widths": [4, 4], "head_width": 4, "settings": {}}


@pytest.mark.parametrize(
    ("step", "fields"),
    [
        ({"bases": None}, {"signals": "raw", "sensitivity": False, "reconstruct": False}),
        ({"bases": None, "settings": {"signals": "normed"}}, {"signals": "normed"}),
        ({"bases": [0]}, {"signals": "normed", "sensitivity": True, "reconstruct": True}),
        ({"bases": [0], "settings": {"sensitivity": False, "reconstruct": False}}, {"sensitivity": False}),
        ({"bases": [0], "coordinates": True}, {"sensitivity": False, "reconstruct": True}),
    ],
)
def test_what_was_not_written_is_what_format_1_took(step, fields):
    rows = [1, 1]
    sizes = dict.fromkeys(("attention_in", "attention_out", "mlp_in", "mlp_out", "fixed"), rows)
    sizes |= {"width": 4, "parallel": False, "tables": 1, "head": 1, "other_fixed": 0}
    model = {
        "source": "m", "fingerprint": "0", "family": "llama", "block_parameters": [9, 9], "other_parameters": 1
    }  # fmt: skip
    old = {"kind": "slice-hidden", "sizes": sizes} | STEP | step
    (read,) = Plan.model_validate({"format": 1, "version": "0", "model": model, "steps": [old]}).steps
    assert {name: getattr(read, name) for name in fields} == fields


@pytest.mark.parametrize("steps", ["none", [3], [{"kind": 4}], [{}], [{"kind": "drop-blocks", "settings": 3}]])
def test_steps_that_are_none_are_refused(steps, tmp_path):
    data = json.loads(FILES["swm"].read_text()) | {"steps": steps}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"plan\.json: not a valid plan"):
        Plan.read(tmp_path / "plan.json")
