"""Bad folders are refused with what is wrong, where, and what to do; the command answers with exit code 2."""

import json
import sys

import pytest

from secateur.cli import main as cli
from secateur.cli import terminal
from secateur.errors import InputError
from secateur.reporting.folders import read_folder
from secateur.reporting.page import report


def test_no_folder_an_empty_one_and_a_dense_model(tmp_path, study):
    with pytest.raises(InputError, match="no such folder; name a folder that secateur wrote"):
        read_folder(tmp_path / "none")
    with pytest.raises(InputError, match=r"nothing to report.*Name a folder written by compare, run"):
        read_folder(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        read_folder(study / "scores.json")
    with pytest.raises(InputError, match="nothing to report"):
        read_folder(study.parent / "tiny<i>&")


def test_another_format_is_refused(copied):
    state = json.loads((copied / "state.json").read_text())
    (copied / "state.json").write_text(json.dumps(state | {"format": 2}))
    with pytest.raises(InputError, match=r"state\.json: written by another version of secateur \(format 2\)"):
        read_folder(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": None}, "results.jsonl, line 1: not a result of this version"),
        ({"value": "good"}, "not a result of this version"),
        ({"value": float("nan")}, "perplexity is nan"),
        ({"colour": "red"}, "not a result of this version"),
    ],
)
def test_results_of_another_version_are_refused(copied, change, message):
    path = copied / "results.jsonl"
    first = json.loads(path.read_text().splitlines()[0]) | change
    path.write_text(json.dumps({name: value for name, value in first.items() if value is not None or name == "task"}))
    with pytest.raises(InputError, match=message):
        read_folder(copied)


def test_damaged_files_are_named(copied):
    for name in ("generations.json", "recipe.yaml", "state.json"):
        before = (copied / name).read_text()
        (copied / name).write_text("[{")
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            read_folder(copied)
        (copied / name).write_text(before)


def test_a_cell_is_read_with_the_study_around_it(study):
    alone = read_folder(study / "cells" / "shortgpt-2-lora")
    assert alone.dense.perplexities() == read_folder(study).dense.perplexities()
    (cell,) = alone.cells
    assert (cell.method, cell.amount, cell.healing, cell.blocks) == ("shortgpt", "2 blocks", "lora", 6)
    (read,) = cell.measured.perplexities().values()
    assert cell.removed == pytest.approx(1 - read.parameters / cell.plans[0].parameters_before)


def test_who_is_named_what(copied, tmp_path):
    """By the recipe where there is one, else by the plan, else by what was measured."""
    (copied / "recipe.yaml").write_text("model: tiny\nprune: {method: auto, remove: 20%}\n")
    assert read_folder(copied).cells[0].method == "auto"
    (copied / "recipe.yaml").unlink()
    assert read_folder(copied).cells[0].method == "shortgpt"
    measured = tmp_path / "measured"
    measured.mkdir()
    (measured / "results.jsonl").write_text((copied / "results.jsonl").read_text())
    (cell,) = read_folder(measured).cells
    assert cell.method == cell.measured.results[0].model


def test_nothing_is_left_where_it_cannot_be_written(study, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        report(study, tmp_path / "file" / "report.html")


def test_the_command(study, tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("typer.launch", opened.append)
    monkeypatch.setattr(terminal.err, "width", 1000, raising=False)
    monkeypatch.setattr(sys, "argv", ["secateur", "report", str(study), "-o", str(tmp_path / "r.html"), "--open"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert opened == [str(tmp_path / "r.html")]
    assert "Written" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["secateur", "report", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "no such folder" in capsys.readouterr().err
