"""The table of families in docs/families.md, from `results/families.json`, which `families.py` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "results" / "families.json"
COLUMNS = {
    "blocks": "shortgpt",
    "`replaceme`": "replaceme",
    "width": "obs-width",
    "heads": "heads",
    "experts": "reap",
    "slicing": "slicegpt",
    "stock slicing": "stock-slicing",
}
"""Heads of the columns, each with the run whose result it shows."""

Result = dict[str, Any]


def rows() -> Iterator[tuple[str, ...]]:
    """Yield the head of the table and a row for each family that opens."""
    yield ("family", "row", *COLUMNS)
    for name, found in results().items():
        if found["open"] == "ok":
            words = (_word(found.get(one)) for one in COLUMNS.values())
            yield (f"`{name}`", _word("ok" if found["row"] else ""), *words)


def summary() -> str:
    """Say how many families there are and what works on how many, and list those that do not open, with the reason."""
    found = results()
    opened = {name: one for name, one in found.items() if one["open"] == "ok"}
    counts = ", ".join(f"{head} on {_count(opened, method)}" for head, method in COLUMNS.items())
    refused = [f"* `{name}`: {_reason(one['open'])}" for name, one in found.items() if name not in opened]
    return "\n".join([f"{len(opened)} of {len(found)} families open; {counts}. Not opened:", "", *refused])


def _count(opened: dict[str, Result], method: str) -> str:
    outcomes = [one[method] for one in opened.values() if method in one]
    right = sum(outcome == "ok" for outcome in outcomes)
    return str(right) if len(outcomes) == len(opened) else f"{right} of {len(outcomes)} measured"


def results() -> dict[str, Result]:
    """Return the results by family."""
    found: dict[str, Result] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def _word(outcome: str | None) -> str:
    if outcome is None:
        return ""
    return "yes" if outcome == "ok" else "–"


def _reason(outcome: str) -> str:
    text = outcome.partition(": ")[2].rpartition("on a tiny copy failed: ")[2]
    return text.splitlines()[0]
