"""The plots, as Plotly figures in plain data. Colours are names of the page's style: it knows day and night."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.reporting.cells import ACCURACIES, Contents
from secateur.reporting.verdict import Row, pareto
from secateur.scores.profile import Matrix, Scores

_HEAT = [[0.0, "--heat-0"], [0.5, "--heat-1"], [1.0, "--heat-2"]]
_LABEL_GAP, _LABEL_ROOM, _LABEL_REACH = 15.0, 104, 0.25


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot.

    Attributes:
        name: its id on the page.
        title: what it shows.
        says: the same for those who do not see it.
        data, layout: for Plotly.
        height: in pixels.
    """

    name: str
    title: str
    says: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 300


def redundancy(scores: Scores) -> list[Figure]:
    """Draw a bar for each block; the quarter that is least needed stands out."""
    figures = []
    if scores.block_influence is not None:
        figures.append(
            _bars(
                "influence",
                "How much each block changes the hidden states",
                scores.block_influence,
                "1 − cosine (log)",
            )
        )
    if scores.removal_perplexity is not None:
        figure = _bars("removal", "Perplexity without the block", scores.removal_perplexity, "perplexity (log)")
        if scores.perplexity is not None:
            line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": scores.perplexity, "y1": scores.perplexity}
            figure.layout["shapes"] = [line | {"line": {"color": "--ink", "width": 1, "dash": "dot"}}]
        figures.append(figure)
    if scores.taylor is not None:
        figures.append(_bars("taylor", "Taylor importance", scores.taylor, "Σ|w·∂L/∂w| (log)"))
    return figures


def heat_maps(scores: Scores) -> list[Figure]:
    """Draw cosine between residual states, angular distance of last tokens, and CKA between block outputs."""
    state = "state entering block"
    maps: list[tuple[str, str, Matrix | None, str]] = [
        ("cosine", "Cosine between residual states", scores.cosine, state),
        ("cka-linear", "Linear CKA of block outputs", scores.cka_linear, "block"),
        ("cka-rbf", "RBF CKA of block outputs", scores.cka_rbf, "block"),
    ]
    return [_heat_map(name, title, matrix, axis) for name, title, matrix, axis in maps if matrix is not None]


def quality_figures(contents: Contents, rows: Sequence[Row], winner: str | None) -> list[Figure]:
    """Draw quality against size and against measured speed, each with its Pareto front."""
    measured = [row for row in rows if row.quality is not None]
    by_perplexity = any(row.ratio is not None for row in measured)
    by = "perplexity, × dense" if by_perplexity else "accuracy lost, points of 1"
    found = []
    for name, title, axis, read in (
        ("quality-size", "Quality against size", "parameters removed, %", _removed),
        ("quality-speed", _speed_title(contents), "tokens/s of writing, × dense", _decode),
    ):
        drawn = [row for row in measured if read(row) is not None]
        if len(drawn) > 1 and any(read(row) for row in drawn):
            found.append(_quality(name, title, axis, by, drawn, read, winner, log=by_perplexity))
    return found


def front_of(rows: Sequence[Row], read: Callable[[Row], float | None], dense: tuple[float, float]) -> list[Row]:
    """Give the rows on the Pareto front of low quality loss and much of what `read` gives; the dense model competes."""
    some = [(row, found, row.quality) for row in rows if (found := read(row)) is not None and row.quality is not None]
    kept = pareto([(-dense[0], dense[1]), *((-found, quality) for _, found, quality in some)])[1:]
    return [row for (row, _, _), stays in zip(some, kept, strict=True) if stays]


def size_front(rows: Sequence[Row]) -> list[Row]:
    """Give the rows on the front of quality and size."""
    by_perplexity = any(row.ratio is not None for row in rows)
    return front_of(rows, _removed, (0.0, 1.0 if by_perplexity else 0.0))


def healing_curves(contents: Contents) -> list[Figure]:
    """Draw the losses of every training; held-back text in full, training faint."""
    data: list[dict[str, Any]] = []
    for cell in contents.cells:
        for facts in cell.healed:
            name = cell.name if contents.is_study else str(facts.get("with"))
            for key, what, style in (
                ("loss", "training", {"color": "--faint", "width": 1}),
                ("held_out_loss", "held back", {"color": "--accent" if not data else "--ink", "width": 2}),
            ):
                points = [
                    (entry["tokens"], entry[key])
                    for entry in facts.get("curve", [])
                    if key in entry and "tokens" in entry and math.isfinite(entry[key])
                ]
                if points:
                    tokens, losses = zip(*points, strict=True)
                    data.append(
                        {
                            "type": "scatter",
                            "mode": "lines+markers" if key == "held_out_loss" else "lines",
                            "name": _plain(f"{name}, {what}"),
                            "x": tokens,
                            "y": losses,
                            "line": style,
                            "marker": {"size": 6},
                        }
                    )
    if not data:
        return []
    layout = _layout("tokens seen", "loss, nats") | {
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
    says = "Loss on held-back text and on training text, by tokens seen."
    return [Figure(name="healing", title="Loss while healing", says=says, data=data, layout=layout, height=340)]


def task_figure(contents: Contents, rows: Sequence[Row], winner: str | None) -> list[Figure]:
    """Draw the accuracy of every cell, mean over its tasks, beside the dense model's."""
    shown = sorted((row for row in rows if row.accuracy is not None), key=lambda row: row.accuracy or 0)
    if not shown:
        return []
    errors = [_mean_error(row) for row in shown]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [row.accuracy for row in shown],
            "y": [_plain(row.cell.name) for row in shown],
            "marker": {"color": ["--accent" if row.cell.label == winner else "--bar" for row in shown], "size": 9},
            "error_x": {
                "type": "data",
                "array": [one or 0 for one in errors],
                "color": "--faint",
                "thickness": 1.5,
                "width": 0,
            },
            "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
        }
    ]
    layout = _layout("accuracy (± standard error)", "")
    layout["yaxis"] |= {"automargin": True, "gridcolor": "--line", "type": "category"}
    dense = contents.dense.accuracy()
    if dense is not None:
        line = {"color": "--ink", "width": 1, "dash": "dot"}
        layout["shapes"] = [{"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": dense, "x1": dense, "line": line}]
        layout["annotations"] = [
            {"x": dense, "y": 1, "yref": "paper", "text": "dense", "showarrow": False, "yanchor": "bottom"}
        ]
    says = "; ".join(f"{row.cell.name} {row.accuracy:.3f}" for row in reversed(shown))
    height = 110 + 24 * len(shown)
    return [
        Figure(name="accuracy", title="Accuracy, mean over tasks", says=says, data=data, layout=layout, height=height)
    ]


def _mean_error(row: Row) -> float | None:
    """Standard error of a mean over tasks, from those of the tasks."""
    found = [row.cell.measured.of_task(task, *ACCURACIES) for task in row.cell.measured.tasks()]
    errors = [one.spread["stderr"] for one in found if one is not None and "stderr" in one.spread]
    return math.sqrt(math.fsum(one**2 for one in errors)) / len(found) if found and len(errors) == len(found) else None


def _bars(name: str, title: str, values: Sequence[float], axis: str) -> Figure:
    least = sorted(values)[max(0, len(values) // 4 - 1)]
    colors = ["--accent" if value <= least else "--bar" for value in values]
    bars = {
        "type": "bar",
        "x": list(range(len(values))),
        "y": list(values),
        "marker": {"color": colors},
        "hovertemplate": "block %{x}: %{y:.4g}<extra></extra>",
    }
    layout = _layout("block", axis)
    layout["yaxis"] |= {"type": "log", "dtick": 1, "tickformat": "~g"} if min(values) > 0 else {}
    layout["xaxis"] |= {"dtick": _step(len(values)), "gridcolor": "rgba(0,0,0,0)"}
    layout["bargap"] = 0.25
    order = sorted(range(len(values)), key=lambda block: values[block])
    says = f"Lowest first: {', '.join(f'block {block} {values[block]:.4g}' for block in order)}."
    return Figure(name=name, title=title, says=says, data=[bars], layout=layout, height=280)


def _heat_map(name: str, title: str, matrix: Matrix, axis: str) -> Figure:
    off = sorted(value for a, row in enumerate(matrix) for b, value in enumerate(row) if a != b)
    low = off[int(0.05 * (len(off) - 1))] if off else 0.0
    cells = {
        "type": "heatmap",
        "z": [list(row) for row in matrix],
        "zmin": low,
        "zmax": 1.0,
        "colorscale": _HEAT,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "%{y} and %{x}: %{z:.3f}<extra></extra>",
        "colorbar": {"thickness": 10, "len": 0.9, "outlinewidth": 0, "tickfont": {"color": "--muted"}, "nticks": 5},
    }
    layout = _layout(axis, axis)
    ticks = {"dtick": _step(len(matrix)), "gridcolor": "rgba(0,0,0,0)", "constrain": "domain"}
    layout["xaxis"] |= ticks
    layout["yaxis"] |= ticks | {"scaleanchor": "x"}
    says = f"{len(matrix)} by {len(matrix)}, from {off[0] if off else 1:.3f} to 1."
    return Figure(name=name, title=title, says=says, data=[cells], layout=layout, height=360)


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
    """Draw one line per method, the winner's in the accent colour, with the front dotted through what is on it."""
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
                "name": _plain(label),
                "x": xs,
                "y": ys,
                "text": [_plain(f"{row.cell.label}, {row.cell.amount}") for row in points],
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
    layout = _layout(axis, by)
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
    """Write each line's name beside its end; names that would touch move apart."""
    (left, right), (low, high) = spans
    pixels = (height - _MARGIN["t"] - _MARGIN["b"]) / (high - low)
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
            text = f"<b>{_plain(label)}</b>" if label == winner else _plain(label)
            place = {"x": x, "y": y, "xanchor": "left", "xshift": 10, "yanchor": "middle", "yshift": placed - at}
            written.append(place | {"text": text, "showarrow": False, "font": font})
    return written


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Move sorted places so that neighbours are `gap` apart, and all together as little as can be (least squares)."""
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
    """Round numbers between 10^low and 10^high, 1 among them, not closer than a seventh of the axis."""
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


_MARGIN = {"l": 56, "r": 16, "t": 24, "b": 48}


def _layout(x: str, y: str) -> dict[str, Any]:
    axis = {"gridcolor": "--line", "zeroline": False, "linecolor": "--line", "tickfont": {"color": "--muted"}}
    return {
        "margin": dict(_MARGIN),
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "--sans", "size": 12, "color": "--ink"},
        "hoverlabel": {"bgcolor": "--surface", "bordercolor": "--line", "font": {"color": "--ink"}},
        "showlegend": False,
        "dragmode": False,
        "xaxis": axis | {"title": {"text": x, "font": {"color": "--muted"}}, "fixedrange": True},
        "yaxis": axis | {"title": {"text": y, "font": {"color": "--muted"}}, "fixedrange": True},
    }


def _step(count: int) -> int:
    return max(1, -(-count // 16))


def _speed_title(contents: Contents) -> str:
    asked = next((one for cell in contents.cells if (one := cell.measured.ratio("decode_tokens_per_second"))), None)
    settings = asked.settings if asked is not None else {}
    return f"Quality against speed (batch {settings.get('batch', '?')}, prompt {settings.get('prompt', '?')})"


def _removed(row: Row) -> float | None:
    return None if row.cell.removed is None else 100 * row.cell.removed


def _decode(row: Row) -> float | None:
    return row.decode


def _plain(text: str) -> str:
    """Keep Plotly from reading tags in names."""
    return html.escape(text, quote=False)
