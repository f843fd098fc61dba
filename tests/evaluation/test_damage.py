"""What a cut has cost, said after every `prune`."""

import dataclasses

import pytest

from secateur import make_plan, prune
from secateur.data.texts import windows_by_source
from secateur.evaluation.damage import LEAST_VARIED, RUINED, Damage, _varied, beyond_use, damage_of
from secateur.evaluation.metrics.perplexity import perplexity
from secateur.evaluation.results import Result
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


FACTS = {"model": "m", "fingerprint": "f", "parameters": 1, "blocks": 1}


def read(ratio, source="code"):
    texts = {"source": source, "fingerprint": source}
    pairs = {"against": 4.0, "model": 4.0 * ratio}
    return [Result(measure="perplexity", value=value, role=role, texts=texts, **FACTS) for role, value in pairs.items()]


def asked(probe, after, before):
    pairs = {"model": after, "against": before}
    return [Result(measure="acc", value=value, role=role, task=probe, **FACTS) for role, value in pairs.items()]


def test_an_evaluation_says_when_a_model_is_beyond_use():
    assert beyond_use([*read(2.99), *read(1.0, "prose")]) is None
    said = beyond_use([*read(3.01), *read(1.0, "prose")])
    assert said.startswith("This model is beyond use as it is: it predicts text far worse than before (×3.01 of")
    assert "on code). " in said
    assert "Remove less" in said
    kept, lost = asked("probe-copy", 0.11, 0.5), asked("probe-copy", 0.09, 0.5)
    assert beyond_use([*read(1.1), *kept]) is None
    assert beyond_use([*lost, *asked("probe-format", 0.4, 0.4)]) is None, "one of them it can do"
    assert "it does no probe clearly better than guessing (probe-copy 0.09, dense 0.50)" in beyond_use(
        [*read(1.1), *lost]
    )
    assert beyond_use(asked("probe-copy", 0.0, 0.09)) is None, "nor can the dense model"
    assert beyond_use([one for one in [*read(9.0), *lost] if one.role == "model"]) is None, "nothing to compare with"


def test_how_varied_a_text_is():
    assert _varied([1, 2, 3] * 16) < LEAST_VARIED < _varied(list(range(48)))
    assert _varied([5, 5, 5]) == 1.0


def test_without_a_tokenizer_there_is_nothing_to_read(bundled):
    assert damage_of(dataclasses.replace(bundled, tokenizer=None), bundled) is None
