"""Commands say what was asked for: settings that were chosen, not those that were found or left as they are."""

from pathlib import Path

from secateur.plan.plan import ModelRef, Plan
from secateur.reporting.cells import Cell, Contents
from secateur.reporting.commands import commands_of


def lines(requested, *steps, **more):
    model = ModelRef(
        source="my model", fingerprint="0", family="llama", block_parameters=(9,) * 6, other_parameters=1
    )  # fmt: skip
    dropping = [{"kind": "drop-blocks", "blocks": [2]} | step for step in steps]
    plan = Plan.model_validate({"version": "0", "model": model, "requested": requested, "steps": dropping} | more)
    cell = Cell(name="c", folder=Path("f/cells/c"), method="m", plans=(plan,))
    return commands_of(Contents(kind="compare", folder=Path("f"), model="my model", cells=(cell,)), cell)


def test_chosen_settings_and_nothing_else():
    settings = {"protect_first": 2, "protect_last": 1, "slice": 0.4}
    first, second = lines({"remove": 0.2}, {"method": "sleb", "settings": settings})
    assert first == "secateur plan 'my model' --method sleb --remove 0.2 --set protect_first=2 --seed 0 -o plan.json"
    assert second == "secateur prune 'my model' --plan plan.json -o cut/"
    found = {"slice_base": 0.4, "loss_by_slice_base": {"0.4": 2.5}, "cap": 0.8}
    assert "--set cap=0.8 --seed" in lines({"remove": 0.2}, {"method": "dynamic-slicing", "settings": found})[0]


def test_a_search_is_made_again_as_a_search():
    settings = {"depth": "none,sleb", "trials": 16, "of": {"sleb": {"protect_last": 2}}}
    search = {
        "settings": settings,
        "candidates": [{"depth": "sleb", "blocks": None, "width": None}],
        "front": [],
        "best": 0,
        "fitted": 24,
        "held_back": 8,
        "dense_loss": 2.8,
    }
    (first, _) = lines({"remove": 0.2}, {"method": "sleb"}, search=search)
    assert "--method auto --remove 0.2 --set depth=none,sleb --set sleb.protect_last=2 --seed 0" in first


def test_several_methods_in_order():
    asked = {"target_params": 40.0, "methods": "sleb:0.5,shortgpt:0.5"}
    steps = ({"method": "sleb", "settings": {"protect_first": 2}}, {"method": "shortgpt"}, {"method": "shortgpt"})
    (first, _) = lines(asked, *steps)
    assert "--method sleb:0.5,shortgpt:0.5 --target-params 40.0 --set sleb.protect_first=2 --seed" in first
