"""What a cut has cost, said after every `prune`."""

import dataclasses

import pytest

from secateur import make_plan, prune
from secateur.data.texts import windows_by_source
from secateur.evaluation.damage import LEAST_VARIED, RUINED, Damage, _varied, damage_of
from secateur.evaluation.metrics.perplexity import perplexity
from secateur.run_options import DEFAULTS


def without_blocks(model, count):
    return prune(model, make_plan(model, method="last-n", blocks=count))


def test_the_ratios_are_those_of_the_perplexities(bundled):
    pruned = without_blocks(bundled, 1)
    found = damage_of(bundled, pruned)
    assert list(found.ratios) == ["python-stdlib", "python-docs"]
    for windows in windows_by_source(bundled, None, windows=4, seq_len=512):
        expected = perplexity(pruned, windows, DEFAULTS) / perplexity(bundled, windows, DEFAULTS)
        assert found.ratios[windows.source] == pytest.approx(expected)
    assert found.prompts == 8
    assert not found.ruined
    assert "ruined" not in found.sentence()


def test_a_ruined_model_is_called_so(bundled):
    found = damage_of(bundled, without_blocks(bundled, 8))
    assert max(found.ratios.values()) > RUINED
    assert found.as_dict()["ruined"]
    assert "This cut has ruined the model" in found.sentence()


def test_repeating_alone_is_ruin_too():
    found = Damage({"code": 1.2}, prompts=8, repeating=5)
    assert found.ruined
    assert "repeats itself in 5 of 8 continuations" in found.sentence()
    assert not Damage({"code": 1.2}, prompts=8, repeating=4).ruined


def test_how_varied_a_text_is():
    assert _varied([1, 2, 3] * 16) < LEAST_VARIED < _varied(list(range(48)))
    assert _varied([5, 5, 5]) == 1.0


def test_without_a_tokenizer_there_is_nothing_to_read(bundled):
    assert damage_of(dataclasses.replace(bundled, tokenizer=None), bundled) is None
