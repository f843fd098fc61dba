"""A small study folder, made by the functions that make real ones, of a model and texts whose names hold HTML."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import secateur
from secateur.data.windows import Windows
from secateur.evaluation.results import append_results
from secateur.evaluation.speed import Timing
from secateur.jobs.runs import write_marker
from secateur.reporting.page import report
from tiny_models import VOCABULARY, save_tiny

CELLS = {
    "shortgpt-1": ("shortgpt", {"blocks": 1}),
    "shortgpt-2": ("shortgpt", {"blocks": 2}),
    "replaceme-1": ("replaceme", {"blocks": 1}),
    "swm-2": ("swm", {"blocks": 2}),
    "flap-10": ("flap", {"remove": 0.1}),
}
NASTY = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """Return a study folder of six cells, one of them healed, one failed; to be read only."""
    root = tmp_path_factory.mktemp("study")
    model = secateur.open_model(save_tiny("llama", root / "tiny<i>&", tokenizer=True))
    texts, learnt = (Windows.of(np.random.default_rng(count).integers(3, VOCABULARY, (count, 16))) for count in (2, 40))
    folder = root / "study"
    (folder / "dense").mkdir(parents=True)
    write_marker(folder, "compare", {"model": model.source})
    secateur.score(model, texts=texts).write(folder / "scores.json")
    for name, (method, amount) in CELLS.items():
        plan = secateur.make_plan(model, method=method, texts=texts, **amount)
        pruned = secateur.prune(model, plan, texts=texts if any(step.measures for step in plan.steps) else None)
        _write_cell(folder, name, model, pruned, texts, plan=plan)
        if name == "shortgpt-2":
            healed = secateur.heal(pruned, by="lora", texts=learnt)
            _write_cell(folder, f"{name}-lora", model, healed, texts, plan=plan, where="healed")
    _write_failure(folder / "cells" / "sleb-9")
    return folder


def _write_cell(study, name, model, made, texts, *, plan, where="cut"):
    folder = study / "cells" / name
    folder.mkdir(parents=True)
    plan.write(folder / "plan.json")
    secateur.save(made, folder / where, check=False)
    results = secateur.evaluate(made, against=model, texts=texts)
    answered = [
        dataclasses.replace(one, task="cloze", measure=measure, value=value, spread={"stderr": 0.1})
        for one in results
        for measure, value in {"acc": 0.5, "stability": 0.75, "flips": 0.25}.items()
        if one.role == "model" or measure == "acc"
    ]
    append_results(folder / "results.jsonl", [one for one in [*results, *answered] if one.role == "model"])
    if not (study / "dense" / "results.jsonl").exists():
        append_results(study / "dense" / "results.jsonl", [o for o in [*results, *answered] if o.role == "against"])
        _write_samples(study / "dense")
    timed = secateur.bench(made, against=model, timing=Timing(batch_sizes=[1], prompts=[4], new_tokens=2, repeats=2))
    append_results(folder / "bench.jsonl", timed)
    _write_samples(folder)
    heal = "heal: {with: lora}\n" if where == "healed" else ""
    (folder / "recipe.yaml").write_text(f"model: tiny\nprune: {{method: {plan.steps[0].method}}}\n{heal}")
    stages = {"plan": {"key": "0", "seconds": 1.5}, "prune": {"key": "0", "seconds": 0.5, "cut": "cut"}}
    (folder / "state.json").write_text(json.dumps({"format": 1, "name": name, "stages": stages, "failed": None}))


def _write_samples(folder):
    (folder / "generations.json").write_text(json.dumps([{"prompt": "a<b>", "text": NASTY, "truth": "it follows"}]))


def _write_failure(folder):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        "model: tiny\nprune: {method: sleb, remove: 90%, settings: {protect_last: 2}}\n"
    )
    failed = {"stage": "plan", "kind": "InputError", "error": "9 blocks <cannot> go"}
    (folder / "state.json").write_text(json.dumps({"format": 1, "name": "sleb-9", "stages": {}, "failed": failed}))


@pytest.fixture(scope="session")
def page(study, tmp_path_factory):
    """Return the study's report."""
    return report(study, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def copied(study, tmp_path):
    """Return a copy of one cell of the study, to be changed."""
    return shutil.copytree(study / "cells" / "shortgpt-1", tmp_path / "run")
