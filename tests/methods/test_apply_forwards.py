"""What a method says applying its plans will cost is what the steps of its plan say."""

import pytest

from secateur.jobs.plan import PlanJob
from secateur.plan.work import Work

CASES = [
    ("shortgpt", {"blocks": 2}, {}),
    ("swm", {"blocks": 1}, {}),
    ("replaceme", {"blocks": 2}, {}),
    ("streamline", {"blocks": 2}, {"train_tokens": 640, "loss": "mse+lm"}),
    ("streamline", {"blocks": 2}, {"network": "none"}),
    ("slicegpt", {"slicing": 0.25}, {}),
    ("dynamic-slicing", {"slicing": 0.25}, {"slice_base": 0.1}),
    ("stock-slicing", {"slicing": 0.25}, {}),
    ("stock-slicing", {"slicing": 0.25}, {"sensitivity": False, "reconstruct": False}),
    ("flap", {}, {"ratio": 0.2, "heads": "never"}),
    ("obs-width", {}, {"ratio": 0.2}),
    ("obs-width", {"remove": 0.6}, {}),
    ("obs-width", {"remove": 0.1}, {"align": True}),
    ("llm-pruner", {}, {"ratio": 0.2, "protect_first": 1, "protect_last": 1}),
    ("minitron-width", {}, {"ratio": 0.2, "hidden": 0.25}),
]
MEASURING = {"replaceme", "slicegpt", "dynamic-slicing", "stock-slicing", "flap", "obs-width", "llm-pruner"}


@pytest.mark.parametrize(("name", "amount", "settings"), CASES, ids=str)
def test_before_and_after_there_is_a_plan(name, amount, settings, tiny, window_file):
    job = PlanJob.prepare(tiny("llama"), method=name, texts=window_file, windows=4, settings=settings, **amount)
    expected, plan, tokens = job.apply_forwards(), job.run(), job.windows.token_count
    assert Work.total(step.forwards(tokens) for step in plan.steps) == expected
    assert expected.forwards > 0 or name not in MEASURING


def announced(model, window_file, name, settings, **amount):
    """Return the work of deciding that is announced, and of applying."""
    job = PlanJob.prepare(model, method=name, texts=window_file, windows=4, settings=settings, **amount)
    return job.forwards(), job.apply_forwards()


@pytest.mark.parametrize("name", ["slicegpt", "dynamic-slicing"])
def test_an_amount_of_directions_tries_no_sliced_head(name, tiny, window_file):
    trial = Work(2.0, covariances=1.0, rotations=1.0)
    of_directions, _ = announced(tiny("llama"), window_file, name, {}, slicing=0.25)
    of_parameters, _ = announced(tiny("llama"), window_file, name, {}, remove=0.1)
    assert of_parameters == of_directions + (2 if name == "slicegpt" else 1) * trial


def test_alignment_counts_where_it_will_be_done(tiny, window_file):
    _, little = announced(tiny("llama"), window_file, "obs-width", {}, remove=0.1)
    _, much = announced(tiny("llama"), window_file, "obs-width", {}, remove=0.6)
    _, without = announced(tiny("llama"), window_file, "obs-width", {"align": False}, remove=0.6)
    assert little == without
    assert much.covariances > little.covariances
