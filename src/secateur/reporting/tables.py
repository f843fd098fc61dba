"""The tables of the page as data: their non-empty columns, and the values they are sorted by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from secateur.evaluation.results import Result
from secateur.reporting.cells import ACCURACIES, Contents, Measured
from secateur.reporting.verdict import Row, share


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a table: the displayed text, and the value it is sorted by."""

    text: str
    value: float | str | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row: its name, its entries, whether it is highlighted, and the stage that failed, if one did."""

    name: str
    entries: tuple[Entry, ...]
    marked: bool = False
    failed: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns (heading, meaning, whether numeric) and rows."""

    columns: tuple[tuple[str, str, bool], ...]
    lines: tuple[Line, ...]


_GATE: dict[bool | None, str] = {True: "passes", False: "fails"}
_Column = tuple[str, str, Callable[[Row], Any], Callable[[Any], str]]
_COLUMNS: tuple[_Column, ...] = (
    ("method", "method of pruning", lambda row: row.cell.method, str),
    ("asked", "requested amount", lambda row: row.cell.amount or None, str),
    ("healing", "healing recipe", lambda row: row.cell.healing, str),
    ("removed", "share of all parameters removed", lambda row: row.cell.removed, share),
    ("parameters", "of the result", lambda row: row.cell.parameters, "{:,}".format),
    ("blocks", "of the result", lambda row: row.cell.blocks, "{:d}".format),
    ("perplexity", "on held-out text; the geometric mean of several", lambda row: row.perplexity, "{:.2f}".format),
    ("× dense", "perplexity as a multiple of the dense model's", lambda row: row.ratio, "{:.3f}".format),
    ("price", "quality lost per 1 % of parameters removed", lambda row: row.price, "{:.2f}".format),
    ("gate", "whether it keeps what the dense model can do", lambda row: _GATE.get(row.passes), str),
    ("accuracy", "mean over tasks", lambda row: row.accuracy, "{:.3f}".format),
    ("stability", "answers that stay right or wrong, weighted", lambda row: row.stability, "{:.3f}".format),
    ("flips", "share of changed answers", lambda row: row.flips, share),
    ("decode", "decoded tokens/s, × dense", lambda row: row.decode, "{:.2f} ×".format),
    ("prefill", "prefill tokens/s, × dense", lambda row: row.prefill, "{:.2f} ×".format),
    ("time", "time of all stages", lambda row: sum(row.cell.seconds.values()) or None, lambda value: duration(value)),
)


def cells_table(rows: Sequence[Row], front: Sequence[Row]) -> Table:
    """One line per cell; columns that no cell has anything in are left out."""
    possible = (*_COLUMNS, *_ratios_by_source(rows), *_further_metrics(rows))
    kept = [one for one in possible if any(one[2](row) is not None for row in rows)]
    lines = []
    for row in rows:
        values = [(read(row), show) for _, _, read, show in kept]
        lines.append(
            Line(
                name=row.cell.name,
                entries=tuple(_entry(value, show) for value, show in values),
                marked=row in front,
                failed=row.cell.failure.stage if row.cell.failure else "",
            )
        )
    columns = tuple((name, says, name not in ("method", "asked", "healing", "gate")) for name, says, _, _ in kept)
    return Table(columns=columns, lines=tuple(lines))


def _ratios_by_source(rows: Sequence[Row]) -> Iterator[_Column]:
    """Yield a column of perplexity ratios for each source, where there are several."""
    sources = list(dict.fromkeys(source for row in rows for source in row.ratios))
    for source in sources if len(sources) > 1 else ():
        meaning = f"perplexity on {source} as a multiple of the dense model's"
        yield f"× dense, {Path(source).name}", meaning, partial(_ratio_on, source), "{:.3f}".format


def _ratio_on(source: str, row: Row) -> float | None:
    return row.ratios.get(source)


def _further_metrics(rows: Sequence[Row]) -> Iterator[_Column]:
    """Yield a column for each metric but perplexity, which has its own."""
    names = dict.fromkeys(name for row in rows for name in row.cell.measured.metrics())
    for name in names:
        yield name, "on held-out text", partial(_metric, name), "{:.3f}".format


def _metric(name: str, row: Row) -> float | None:
    found = row.cell.measured.metrics().get(name)
    return None if found is None else found.value


def tasks_table(contents: Contents, rows: Sequence[Row]) -> Table | None:
    """Return accuracy, stability and flips of every task, the dense model first; None if no task was run."""
    cells = [row.cell for row in rows if row.cell.measured.tasks()]
    tasks = list(dict.fromkeys(task for cell in cells for task in cell.measured.tasks()))
    if not tasks:
        return None
    wanted = [
        (task, name, measures)
        for task in tasks
        for name, measures in (("accuracy", ACCURACIES), ("stability", ("stability",)), ("flips", ("flips",)))
        if any(cell.measured.of_task(task, *measures) for cell in cells)
    ]
    models: list[tuple[str, Measured]] = [("dense", contents.dense)] if contents.dense.tasks() else []
    models += [(cell.name, cell.measured) for cell in cells]
    lines = tuple(
        Line(name=name, entries=tuple(_score(measured.of_task(task, *measures)) for task, _, measures in wanted))
        for name, measured in models
    )
    meanings = {
        "accuracy": "share of right answers",
        "stability": "answers that stay right or wrong",
        "flips": "changed",
    }
    columns = tuple((f"{task} {name}", meanings[name], True) for task, name, _ in wanted)
    return Table(columns=columns, lines=lines)


def healing_lines(contents: Contents) -> list[tuple[str, str]]:
    """Return a line for each healing: recipe, amount of text, and the gain on held-out text."""
    lines = []
    for cell in contents.cells:
        for facts in cell.healed:
            source = (facts.get("texts") or {}).get("source", "text")
            parts = [f"{facts.get('with')}, {facts.get('tokens', 0):,} tokens of {source}"]
            if "start_loss" in facts:
                parts.append(f"held-out loss {facts['start_loss']:.3f} → {facts['best_loss']:.3f}")
            parts += [
                f"block {block}: error {one['start_loss']:.3g} → {one['best_loss']:.3g}"
                for block, one in facts.get("blocks", {}).items()
            ]
            lines.append((cell.name, "; ".join(parts)))
    return lines


def duration(seconds: float) -> str:
    """Format a duration."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _entry(value: Any, show: Callable[[Any], str]) -> Entry:
    return Entry(text="—") if value is None else Entry(text=show(value), value=value)


def _score(result: Result | None) -> Entry:
    if result is None:
        return Entry(text="—")
    error = result.spread.get("stderr")
    return Entry(text=f"{result.value:.3f}" + (f" ±{error:.3f}" if error is not None else ""), value=result.value)
