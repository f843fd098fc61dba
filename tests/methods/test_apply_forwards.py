"""What a method says applying its plans will cost is what the steps of its plan say."""

import pytest

from secateur import make_plan
from secateur.methods.method import METHODS
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
    ("llm-pruner", {}, {"ratio": 0.2, "protect_first": 1, "protect_last": 1}),
    ("minitron-width", {}, {"ratio": 0.2, "hidden": 0.25}),
]
MEASURING = {"replaceme", "slicegpt", "dynamic-slicing", "stock-slicing", "flap", "obs-width", "llm-pruner"}


@pytest.mark.parametrize(("name", "amount", "settings"), CASES, ids=str)
def test_before_and_after_there_is_a_plan(name, amount, settings, tiny, window_file):
    plan = make_plan(tiny("llama"), method=name, texts=window_file, windows=4, settings=settings, **amount)
    method, tokens = METHODS[name], 4 * 16
    expected = method.apply_forwards(method.read_settings(settings), tokens)
    assert Work.total(step.forwards(tokens) for step in plan.steps) == Work.of(expected)
    assert Work.of(expected).forwards > 0 or name not in MEASURING
