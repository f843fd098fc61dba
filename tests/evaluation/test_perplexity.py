"""Perplexity is what a plain forward gives, for both models on the same windows."""

import io
import math

import pytest
import torch
from rich.console import Console

from sample_texts import prose
from secateur import evaluate, make_plan, open_model, prune
from secateur.cli.tables import results_tables
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.evaluation.results import append_results
from secateur.jobs.evaluate import measure_reference
from secateur.run_options import RunOptions
from tiny_models import save_tiny


def test_bundled_perplexity_is_the_published_one(bundled):
    (result,) = evaluate(bundled, texts="python-stdlib", windows=16, seq_len=512)
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


def test_without_a_word_code_and_prose_are_measured(bundled):
    code, prose = evaluate(bundled, windows=2, seq_len=64)
    assert (code.texts["source"], prose.texts["source"]) == ("python-stdlib", "python-docs")
    assert code.value < prose.value, "it was trained on code"


def test_each_source_is_measured_by_itself(bundled, tmp_path):
    (tmp_path / "one.txt").write_text(" ".join(map(prose, range(40))))
    pruned = prune(bundled, make_plan(bundled, method="last-n", blocks=2))
    texts = f"python-stdlib,python-docs,{tmp_path / 'one.txt'}"
    results = evaluate(pruned, against=bundled, texts=texts, windows=2, seq_len=64)
    assert [(one.measure, one.role) for one in results[:-1]] == [("perplexity", "model"), ("perplexity", "against")] * 3
    assert [one.texts["source"] for one in results[:-1:2]] == texts.split(",")
    alone = evaluate(pruned, against=bundled, texts="python-docs", windows=2, seq_len=64)
    assert [one.value for one in alone] == [one.value for one in results[2:4]]
    mean = results[-1]
    ratios = [own.value / dense.value for own, dense in zip(results[:-1:2], results[1:-1:2], strict=True)]
    assert mean.measure == "perplexity_ratio_geomean"
    assert mean.value == pytest.approx(math.prod(ratios) ** (1 / 3))
    assert mean.spread == {"low": min(ratios), "high": max(ratios)}
    assert list(mean.settings["ratios"].values()) == ratios
    console = Console(file=io.StringIO(), width=120)
    console.print(results_tables(results))
    assert "geometric mean of the ratios" in console.file.getvalue()
    assert f"{mean.value:.3f}" in console.file.getvalue()


def test_a_mixture_with_weights_is_one_text(bundled):
    (result,) = evaluate(bundled, texts="python-stdlib:1,python-docs:1", windows=4, seq_len=64)
    assert result.texts["windows"] == 4


def test_sources_of_a_reference_are_those_it_was_measured_on(bundled):
    settings = {"windows": 2, "seq_len": 64}
    known = measure_reference(bundled, texts="python-stdlib,python-docs", **settings)
    results = evaluate(bundled, against=known, texts="python-docs,python-stdlib", **settings)
    assert results[-1].value == pytest.approx(1.0)
    with pytest.raises(InputError, match="measured on other texts"):
        evaluate(bundled, against=known, texts="python-docs", windows=3, seq_len=64)


def test_own_text_is_that_of_the_dense_model(bundled):
    pruned = prune(bundled, make_plan(bundled, method="last-n", blocks=2))
    own, dense = evaluate(pruned, against=bundled, texts="self", windows=2, seq_len=32)
    assert bundled.fingerprint[:16] in own.texts["fingerprint"]
    assert dense.value < own.value


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
