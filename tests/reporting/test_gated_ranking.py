"""The gate in the report: what fails it comes after all that passes, and it is said which would have come first."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from secateur.errors import InputError
from secateur.evaluation.gate import Gate
from secateur.evaluation.results import Result, append_results
from secateur.reporting.cells import Cell, Contents, Measured
from secateur.reporting.folders import read_folder
from secateur.reporting.page import render, report
from secateur.reporting.tables import cells_table
from secateur.reporting.verdict import rankings, rows_of, verdict

GATE = Gate(("probe-copy", "probe-sort"), 0.9)
FACTS = {"role": "model", "model": "m", "fingerprint": "f", "parameters": 1, "blocks": 1}


def measured(perplexity, copy=None, sort=0.1):
    read = Result(measure="perplexity", value=perplexity, texts={"source": "code", "fingerprint": "c"}, **FACTS)
    probes = {"probe-copy": copy, "probe-sort": sort} if copy is not None else {}
    return Measured(
        results=(read, *(Result(measure="acc", value=value, task=name, **FACTS) for name, value in probes.items()))
    )


def cell(name, amount, found, healing=None):
    return Cell(name=name, folder=Path(), method=name, amount=amount, removed=0.2, healing=healing, measured=found)


def judged(*cells, gate=GATE, dense=None):
    contents = Contents(
        kind="compare", folder=Path(), model="org/m", cells=cells, dense=dense or measured(10.0, 0.5), gate=gate
    )
    rows = rows_of(contents)
    return rows, verdict(contents, rows)


A, B, C = (
    cell("a", "20 %", measured(11.0, 0.2)),
    cell("b", "20 %", measured(12.0, 0.45)),
    cell("c", "20 %", measured(13.0, 0.5)),
)
WHY = "keeps 39% of probe-copy (accuracy 0.20, dense 0.50, floor 0.00); the gate asks for 90%"


def test_what_fails_comes_last_and_the_verdict_says_what_would_have_come_first():
    rows, said = judged(A, B, C, gate=None)
    assert [row.cell.name for row in rows] == ["a", "b", "c"]
    assert said.headline == "a preserves org/m best"
    assert {row.passes for row in rows} == {None}
    rows, said = judged(A, replace(B, measured=measured(12.0, 0.4501)), C)
    assert [(row.cell.name, row.passes, row.fails) for row in rows] == [
        ("b", True, ""),
        ("c", True, ""),
        ("a", False, WHY),
    ]
    assert said.headline == "b preserves org/m best"
    assert (
        f"By price alone a would come first, 1.10 × with 20.0\N{NO-BREAK SPACE}% removed, but it {WHY}."
        in said.sentence
    )
    assert "Next is c: " in said.sentence
    (names, entries) = zip(*((line.name, line.entries) for line in cells_table(rows, []).lines), strict=True)
    assert names == ("b", "c", "a")
    assert [{"passes", "fails"} & {one.text for one in row} for row in entries] == [{"passes"}, {"passes"}, {"fails"}]


def test_amounts_at_which_nothing_passes():
    far = (cell("a", "40 %", measured(30.0, 0.0)), cell("b", "40 %", measured(40.0, 0.1)))
    rows, said = judged(A, C, *far)
    assert said.headline == "c preserves org/m best"
    assert said.sentence.endswith("Nothing passes the gate at 40 %.")
    assert "Next is" not in said.sentence, "the next one fails"
    rows, said = judged(*far)
    assert said.headline == "No cut of org/m passes the gate"
    assert "Cheapest is a at 40 %, 3.00 × with" in said.sentence
    assert [row.cell.name for row in rows] == ["a", "b"]


def test_healed_cells_are_held_against_it_too():
    healed = (
        cell("a", "20 %", measured(10.5, 0.1), healing="lora"),
        cell("c", "20 %", measured(12.5, 0.5), healing="lora"),
    )
    rows, said = judged(C, *healed)
    assert "Best with training: c + lora, 1.25 ×" in said.sentence
    assert [row.cell.label for row in rankings(rows)[1].rows] == ["c + lora", "a + lora"]
    assert "Best with training: a + lora" in judged(C, healed[0])[1].sentence


def test_what_was_not_asked_does_not_pass():
    rows, _ = judged(C, cell("d", "20 %", measured(10.1)))
    assert [(row.cell.name, row.fails) for row in rows] == [("c", ""), ("d", "was not asked probe-copy")]


@pytest.fixture
def asked(study, tmp_path):
    """A copy of the study in which two cells and the dense model were asked to copy."""
    folder = shutil.copytree(study, tmp_path / "study")
    for place, right, role in (
        ("dense", 0.5, "against"),
        ("cells/shortgpt-1", 0.5, "model"),
        ("cells/shortgpt-2", 0.1, "model"),
    ):
        one = Result(measure="acc", value=right, task="probe-copy", **FACTS | {"role": role})
        append_results(folder / place / "results.jsonl", [one])
    return folder


def test_the_gate_of_a_recipe_and_one_that_is_asked_for(asked, tmp_path):
    assert read_folder(asked).gate is None
    (asked / "recipe.yaml").write_text(
        "model: tiny\ncompare: {methods: [shortgpt], remove: [10%]}\neval: {gate: 'probe-copy:0.5'}\n"
    )
    assert read_folder(asked).gate == Gate(("probe-copy",), 0.5)
    assert read_folder(asked, "probe-copy:0.1").gate.kept == 0.1
    page = report(asked, tmp_path / "page.html", gate="probe-copy").read_text()
    assert "<b>shortgpt-2</b> fails the gate: it keeps 19% of probe-copy" in page
    assert "probe-copy:0.9 of the dense model&#39;s probe-copy 0.50" in page
    assert page.count("fails the gate</small>") == 5, "one keeps too little, four were not asked"
    assert "fails the gate" not in render(replace(read_folder(asked), gate=None))


def test_a_gate_that_cannot_be_used_is_refused(asked, study):
    with pytest.raises(InputError, match=r"probe-copy not measured on the dense model.*compare --gate probe-copy:0\.9"):
        report(study, gate="probe-copy")
    with pytest.raises(InputError, match="'mmlu' is no probe"):
        report(asked, gate="mmlu")
    append_results(
        asked / "dense" / "results.jsonl",
        [Result(measure="acc", value=0.05, task="probe-sort", **FACTS | {"role": "against"})],
    )
    with pytest.raises(InputError, match=r"can do none of its probes \(probe-sort 0\.05"):
        report(asked, gate="probe-sort")
