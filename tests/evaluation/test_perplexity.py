"""Perplexity is what a plain forward gives, for both models on the same windows."""

import math

import pytest
import torch

from secateur import evaluate, make_plan, open_model, prune
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.evaluation.results import append_results
from secateur.run_options import RunOptions
from tiny_models import save_tiny


def test_bundled_perplexity_is_the_published_one(bundled):
    (result,) = evaluate(bundled, windows=16, seq_len=512)
    used = result.texts
    assert used["windows"] == 16
    assert "held-out" in used["fingerprint"]
    assert 10 < result.value < 25, "16.9 on 64 windows of 512, by the model's notes"


def test_against_a_plain_forward(bundled):
    windows = Windows.of(torch.randint(0, 4096, (3, 64), generator=torch.Generator().manual_seed(0)))
    plan = make_plan(bundled, method="last-n", blocks=2)
    pruned = prune(bundled, plan)
    results = evaluate(pruned, against=bundled, texts=windows, options=RunOptions(batch_size=2))
    for result, model in zip(results, (pruned, bundled), strict=True):
        with torch.no_grad():
            loss = model.module(input_ids=windows.tokens, labels=windows.tokens).loss
        assert result.value == pytest.approx(math.exp(float(loss)), rel=1e-5)
        assert result.parameters == model.parameter_count


def test_models_with_different_vocabularies_are_not_compared(bundled, tmp_path):
    other = open_model(save_tiny("llama", tmp_path / "other", tokenizer=True))
    windows = Windows.of(torch.zeros((2, 16), dtype=torch.long))
    with pytest.raises(InputError, match="different vocabularies"):
        evaluate(bundled, against=other, texts=windows)


def test_results_are_added_line_by_line(bundled, tmp_path):
    windows = Windows.of(torch.zeros((1, 16), dtype=torch.long))
    for _ in range(2):
        append_results(tmp_path / "results.jsonl", evaluate(bundled, texts=windows))
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
