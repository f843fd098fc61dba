"""Metrics are found by name, and a new one is one function with a decorator."""

import math

import pytest
import torch

from oracles import draw_windows
from secateur.errors import InputError
from secateur.evaluation.metrics.metric import METRICS, measure, metric
from secateur.run_options import RunOptions


@pytest.fixture
def bits(monkeypatch):
    """Register a metric for one test: bits per token."""
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))
    METRICS.load()

    @metric("bits-per-token")
    def bits_per_token(model, windows, options):
        (perplexity,) = measure(("perplexity",), model, "model", windows, options)
        return math.log2(perplexity.value)

    return bits_per_token


def test_perplexity_is_that_of_a_plain_forward(tiny):
    decoder, windows = tiny("llama"), draw_windows()
    (result,) = measure(("perplexity",), decoder, "against", windows, RunOptions(batch_size=3))
    with torch.no_grad():
        loss = decoder.module(input_ids=windows.tokens, labels=windows.tokens).loss
    assert result.value == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert (result.measure, result.role, result.fingerprint) == ("perplexity", "against", decoder.fingerprint)
    assert result.texts == windows.describe()


def test_a_metric_of_ones_own(tiny, bits):
    found = measure(("bits-per-token", "perplexity"), tiny("llama"), "model", draw_windows())
    assert [one.measure for one in found] == ["bits-per-token", "perplexity"]
    assert found[0].value == pytest.approx(math.log2(found[1].value))
    assert list(METRICS) == ["perplexity", "bits-per-token"]


def test_unknown_metrics_name_the_known_ones(tiny):
    with pytest.raises(InputError, match=r"unknown metric 'perplexty'\. Did you mean 'perplexity'"):
        measure(("perplexty",), tiny("llama"), "model", draw_windows())


def test_two_metrics_of_one_name_are_refused(bits):
    with pytest.raises(InputError, match="metric 'bits-per-token' is defined twice"):
        metric("bits-per-token")(bits)
