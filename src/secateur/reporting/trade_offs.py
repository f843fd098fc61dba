"""Plots of quality against size and speed: one line per method, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from secateur.reporting.cells import Contents
from secateur.reporting.figures import MARGIN, Figure, layout_of, plain
from secateur.reporting.verdict import Row, pareto

_LABEL_GAP, _LABEL_ROOM, _LABEL_REACH = 15.0, 104, 0.25


def quality_figures(contents: Contents, rows: Sequence[Row], winner: str | None) -> list[Figure]:
    """Draw quality against size and against measured speed, each with its Pareto front."""
    measured = [row for row in rows if row.quality is not None]
    by_perplexity = any(row.ratio is not None for row in measured)
    by = "perplexity, × dense" if by_perplexity else "accuracy lost, points of 1"
    found = []
    for name, title, axis, read in (
        ("quality-size", "Quality against size", "parameters removed, %", _removed),
        ("quality-speed", _speed_title(contents), "decoded tokens/s, × dense", _decode),
    ):
        drawn = [row for row in measured if read(row) is not None]
        if len(drawn) > 1 and any(read(row) for row in drawn):
            found.append(_quality(name, title, axis, by, drawn, read, winner, log=by_perplexity))
    return found


def front_of(rows: Sequence[Row], read: Callable[[Row], float | None], dense: tuple[float, float]) -> list[Row]:
    """Return the rows on the Pareto front of low quality loss and high `read`; the dense model competes."""
    some = [(row, found, row.quality) for row in rows if (found := read(row)) is not None and row.quality is not None]
    kept = pareto([(-dense[0], dense[1]), *((-found, quality) for _, found, quality in some)])[1:]
    return [row for (row, _, _), stays in zip(some, kept, strict=True) if stays]


def size_front(rows: Sequence[Row]) -> list[Row]:
    """Return the rows on the front of quality and size."""
    by_perplexity = any(row.ratio is not None for row in rows)
    return front_of(rows, _removed, (0.0, 1.0 if by_perplexity else 0.0))


def _quality(
    name: str,
    title: str,
    axis: str,
    by: str,
    rows: Sequence[Row],
    read: Callable[[Row], float | None],
    winner: str | None,
    *,
    log: bool,
) -> Figure:
    """Draw one line per method, the best in the accent colour, and the Pareto front as a dotted line."""
    dense = (0.0 if read is _removed else 1.0, 1.0 if log else 0.0)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row.cell.label, []).append(row)
    data: list[dict[str, Any]] = [_front_line(rows, read, dense)]
    ends: list[tuple[str, float, float]] = []
    for label, own in sorted(lines.items(), key=lambda item: item[0] == winner):
        points = sorted(own, key=lambda row: row.cell.removed or 0)
        xs, ys = [read(row) or 0.0 for row in points], [row.quality or 0.0 for row in points]
        color = "--accent" if label == winner else "--bar"
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(label),
                "x": xs,
                "y": ys,
                "text": [plain(f"{row.cell.label}, {row.cell.amount}") for row in points],
                "line": {"color": color, "width": 2.5 if label == winner else 1.25},
                "marker": {
                    "size": 9 if label == winner else 7,
                    "symbol": "diamond" if points[0].cell.healing else "circle",
                },
                "hovertemplate": f"%{{text}}<br>{axis}: %{{x:.3g}}<br>{by}: %{{y:.3f}}<extra></extra>",
            }
        )
        ends.append((label, xs[-1], ys[-1]))
    height = 420
    every_y = [dense[1], *(row.quality or 0.0 for row in rows)]
    low, high = _padded([math.log10(y) for y in every_y] if log else every_y)
    layout = layout_of(axis, by)
    layout["margin"] |= {"r": _LABEL_ROOM}
    layout["yaxis"] |= {"range": [low, high]} | ({"type": "log", **_log_ticks(low, high)} if log else {})
    across = _padded([dense[0], *(read(row) or 0.0 for row in rows)])
    layout["xaxis"] |= {"range": list(across)}
    layout["annotations"] = _labels(ends, winner, (across, (low, high)), height, log=log)
    on_front = front_of(rows, read, dense)
    says = f"On the Pareto front: {', '.join(row.cell.name for row in on_front) or 'only the dense model'}."
    return Figure(name=name, title=title, says=says, data=data, layout=layout, height=height)


def _front_line(rows: Sequence[Row], read: Callable[[Row], float | None], dense: tuple[float, float]) -> dict[str, Any]:
    points = sorted([dense, *((read(row) or 0.0, row.quality or 0.0) for row in front_of(rows, read, dense))])
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "Pareto front",
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": "--ink", "width": 1, "dash": "dot"},
        "marker": {"size": 15, "symbol": "circle-open", "color": "--ink", "line": {"width": 1}},
        "hoverinfo": "skip",
    }


def _labels(
    ends: Iterable[tuple[str, float, float]],
    winner: str | None,
    spans: tuple[tuple[float, float], tuple[float, float]],
    height: int,
    *,
    log: bool,
) -> list[dict[str, Any]]:
    """Label each line at its end, moving labels apart that would overlap."""
    (left, right), (low, high) = spans
    pixels = (height - MARGIN["t"] - MARGIN["b"]) / (high - low)
    groups: list[list[tuple[str, float, float]]] = []
    for label, x, y in sorted(ends, key=lambda end: end[1]):
        if not groups or x - groups[-1][-1][1] > _LABEL_REACH * (right - left):
            groups.append([])
        groups[-1].append((label, x, math.log10(y) if log else y))
    written = []
    for group in groups:
        ordered = sorted(group, key=lambda end: end[2])
        wanted = [y * pixels for _, _, y in ordered]
        for (label, x, y), at, placed in zip(ordered, wanted, _apart(wanted, _LABEL_GAP), strict=True):
            font = {"color": "--accent" if label == winner else "--muted", "size": 12}
            text = f"<b>{plain(label)}</b>" if label == winner else plain(label)
            place = {"x": x, "y": y, "xanchor": "left", "xshift": 10, "yanchor": "middle", "yshift": placed - at}
            written.append(place | {"text": text, "showarrow": False, "font": font})
    return written


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Move sorted positions so that neighbours are at least `gap` apart, with the least squared movement."""
    groups: list[tuple[float, int]] = []
    for number, at in enumerate(wanted):
        mean, count = at - number * gap, 1
        while groups and groups[-1][0] > mean:
            other, others = groups.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        groups.append((mean, count))
    level = [mean for mean, count in groups for _ in range(count)]
    return [mean + number * gap for number, mean in enumerate(level)]


_ROUND = (1, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2, 3, 5, 7)


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """Return round numbers between 10^low and 10^high, including 1, no closer than a seventh of the axis."""
    steps = _ROUND if high - low < 2 else (1,)
    inside = [
        step * 10.0**power for power in range(-6, 12) for step in steps if low <= math.log10(step) + power <= high
    ]
    up, down = [1.0], [1.0]
    for kept, ticks in ((up, inside), (down, inside[::-1])):
        sign = 1 if kept is up else -1
        for tick in ticks:
            if sign * math.log10(tick / kept[-1]) >= (high - low) / 7:
                kept.append(tick)
    ticks = sorted({*up, *down})
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low or 1.0)
    return low - room, high + room


def _speed_title(contents: Contents) -> str:
    asked = next((one for cell in contents.cells if (one := cell.measured.ratio("decode_tokens_per_second"))), None)
    settings = asked.settings if asked is not None else {}
    return f"Quality against speed (batch {settings.get('batch', '?')}, prompt {settings.get('prompt', '?')})"


def _removed(row: Row) -> float | None:
    return None if row.cell.removed is None else 100 * row.cell.removed


def _decode(row: Row) -> float | None:
    return row.decode
