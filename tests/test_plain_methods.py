"""The methods that benchmarks write from papers: what they remove, and that they are right where that can be told."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from oracles import draw_windows
from secateur import make_plan
from tiny_models import build

SHARE = 0.2


@pytest.fixture(scope="module")
def plain():
    path = Path(__file__).parents[1] / "benchmarks" / "plain_methods.py"
    specification = importlib.util.spec_from_file_location("plain_methods", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["plain_methods"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["plain_methods"]


@pytest.fixture(scope="module")
def tokens():
    return draw_windows(windows=4).tokens


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("name", ["shortgpt", "sleb", "slicegpt", "flap", "llm-pruner", "optipfair"])
def test_what_is_asked_for_goes_and_the_model_stays(name, plain, tokens):
    model = build("llama").requires_grad_(False)  # as models are when they are opened
    before = logits(model, tokens)
    smaller = plain.METHODS[name](model, tokens, SHARE)
    removed = 1 - plain.parameters(smaller) / plain.parameters(model)
    assert removed == pytest.approx(SHARE, abs=0.07)
    assert torch.equal(logits(model, tokens), before)
    assert torch.isfinite(logits(smaller, tokens)).all()
    assert not torch.equal(logits(smaller, tokens), before)


@pytest.mark.parametrize("name", ["shortgpt", "sleb"])
def test_they_remove_the_blocks_that_secateur_does(name, plain, tokens, tiny):
    windows, share = draw_windows(windows=4), 2.1 * tiny("llama").block_parameter_counts()[0]
    exact = {"again": 1, "tokens": windows.token_count} if name == "sleb" else {}
    plan = make_plan(tiny("llama"), method=name, blocks=2, texts=windows, settings=exact)
    model = build("llama")
    smaller = plain.METHODS[name](model, windows.tokens, share / plain.parameters(model))
    expected = plain.without_blocks(model, plan.steps[0].blocks)
    assert torch.equal(logits(smaller, tokens), logits(expected, tokens))


def test_nothing_is_lost_by_a_rotation_alone(plain, tokens, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(plain, "_sliced_width", lambda model, _: model.config.hidden_size)
    torch.testing.assert_close(
        logits(plain.slicegpt(model, tokens, 0.0), tokens), logits(model, tokens), atol=1e-3, rtol=1e-3
    )
