"""Check what the offline recipes left behind: every stage finished, numbers that can be, a page that holds them."""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])


def results(path: Path) -> dict[tuple[str, str], float]:
    """Return values by role and measure."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["role"], line["measure"]): line["value"] for line in lines}


run = folder / "run"
state = json.loads((run / "state.json").read_text())
assert state["failed"] is None, state["failed"]
assert list(state["stages"]) == ["plan", "prune", "heal", "eval", "bench", "generate"], state["stages"]
measured = results(run / "results.jsonl")
assert measured["against", "perplexity"] < measured["model", "perplexity"] < 25, measured
assert 0.5 < measured["model", "stability"] <= 1, measured
assert json.loads((run / "healed" / "secateur.json").read_text())["check"]["without_secateur"]

study = folder / "study"
dense = results(study / "dense" / "results.jsonl")["against", "perplexity"]
cells = sorted((study / "cells").iterdir())
assert [cell.name for cell in cells] == ["obs-width-20", "shortgpt-20"], cells
pruned, short = (results(cell / "results.jsonl")["model", "perplexity"] for cell in cells)
assert dense < pruned < short < 2 * dense, (dense, pruned, short)
page = (study / "report.html").read_text()
assert all(cell.name.removesuffix("-20") in page for cell in cells)
sys.stdout.write(f"recipes checked: dense {dense:.2f}, obs-width {pruned:.2f}, shortgpt {short:.2f}\n")
