"""What came of the cells of a study: what does not pass the gate is marked, and comes after what does."""

from io import StringIO

from rich.console import Console

from secateur.cli.study import outcomes_table
from secateur.evaluation.gate import Gate
from secateur.evaluation.results import Result, write_results
from secateur.experiments.state import State, outcome_of

GATE = Gate(("probe-copy",), 0.9)
FACTS = {"model": "m", "fingerprint": "f", "parameters": 1, "blocks": 1}


def measured(folder, perplexity, copy, role="model"):
    """Write the results of one model: its perplexity, and its accuracy in copying if it was asked."""
    folder.mkdir()
    results = [Result(measure="perplexity", value=perplexity, role=role, **FACTS)]
    if copy is not None:
        results.append(Result(measure="acc", value=copy, task="probe-copy", role=role, **FACTS))
    write_results(folder / "results.jsonl", results)
    State.of(folder).finish("eval", "key", 1.0)
    return folder


def test_what_fails_the_gate_is_marked_and_comes_last(tmp_path):
    dense = measured(tmp_path / "dense", 10.0, 0.8, role="against")
    ruined = measured(tmp_path / "ruined", 11.0, 0.2)
    cells = [ruined, measured(tmp_path / "sound", 12.0, 0.8), measured(tmp_path / "unasked", 13.0, None)]
    outcomes = [outcome_of(cell, GATE, dense) for cell in cells]
    assert [one.fails for one in outcomes] == [
        "keeps 24% of probe-copy (accuracy 0.20, dense 0.80, floor 0.00); the gate asks for 90%",
        None,
        None,
    ]
    assert outcome_of(ruined).fails is None, "no gate"
    console = Console(width=200, file=StringIO())
    console.print(outcomes_table(outcomes))
    shown = console.file.getvalue()
    assert [shown.index(name) for name in ("sound", "unasked", "ruined fails the gate")] == sorted(
        shown.index(name) for name in ("sound", "unasked", "ruined")
    )


def test_the_dense_model_may_stand_beside_the_cell(tmp_path):
    cell = measured(tmp_path / "cell", 11.0, 0.2)
    beside = Result(measure="acc", value=0.8, task="probe-copy", role="against", **FACTS)
    own = Result(measure="acc", value=0.2, task="probe-copy", role="model", **FACTS)
    write_results(cell / "results.jsonl", [own, beside])
    assert outcome_of(cell, GATE).fails.startswith("keeps 24%")
