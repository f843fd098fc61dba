"""What the tables in docs/ are made of: recorded results, and how numbers are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Record = dict[str, Any]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = (cell.replace("|", "\\|") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recorded(name: str) -> list[Record]:
    """Read what was measured; of the same setting the last."""
    file = RESULTS / f"{name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    last = {}
    for line in lines:
        one = json.loads(line)
        last[json.dumps(one["setting"], sort_keys=True)] = one
    return list(last.values())


def number(value: float | None) -> str:
    """Write a number with two digits after the point, and a dash if there is none."""
    return "–" if value is None else f"{value:.2f}"


def word(value: Any) -> str:
    """Write a value as `--set` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def per_cent(value: float, digits: int = 1) -> str:
    """Write a share in per cent."""
    return f"{100 * value:.{digits}f} %"
