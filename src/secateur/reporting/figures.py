"""Plots of redundancy, tasks and healing, and the building blocks shared by all plots."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.reporting.cells import ACCURACIES, Contents
from secateur.reporting.verdict import Row
from secateur.scores.profile import Matrix, Scores

_HEAT = [[0.0, "--heat-0"], [0.5, "--heat-1"], [1.0, "--heat-2"]]


def redundancy(scores: Scores) -> list[Figure]:
    """Draw a bar for each block, highlighting the least needed quarter."""
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


def healing_curves(contents: Contents) -> list[Figure]:
    """Draw the losses of each healing: on held-out text, the lowest in colour; for a few also the training loss."""
    trained = [(cell, facts) for cell in contents.cells for facts in cell.healed if _curve(facts, "held_out_loss")]
    if not trained:
        return []
    lowest = min(trained, key=lambda one: min(loss for _, loss in _curve(one[1], "held_out_loss")))
    data: list[dict[str, Any]] = []
    for cell, facts in trained:
        name = cell.name if contents.is_study else str(facts.get("with"))
        if len(trained) <= _FEW:
            faint = {"line": {"color": "--faint", "width": 1}, "mode": "lines"}
            data.append(_curve_line(_curve(facts, "loss"), f"{name}, training") | faint)
        color = "--accent" if facts is lowest[1] else "--bar"
        held_out = {"line": {"color": color, "width": 2}, "mode": "lines+markers", "marker": {"size": 6}}
        data.append(_curve_line(_curve(facts, "held_out_loss"), f"{name}, held out") | held_out)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    layout = layout_of("tokens seen", "loss, nats") | {"showlegend": len(trained) <= _FEW, "legend": legend}
    says = f"Loss on held-out text by tokens seen; lowest: {lowest[0].name}."
    return [Figure(name="healing", title="Loss while healing", says=says, data=data, layout=layout, height=340)]


_FEW = 3
"""Most curves that a legend can tell apart."""


def _curve(facts: dict[str, Any], key: str) -> list[tuple[float, float]]:
    logged = [entry for entry in facts.get("curve", []) if key in entry and "tokens" in entry]
    return [(entry["tokens"], entry[key]) for entry in logged if math.isfinite(entry[key])]


def _curve_line(points: Sequence[tuple[float, float]], name: str) -> dict[str, Any]:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    hover = f"{plain(name)}<br>%{{x:,}} tokens: %{{y:.3f}}<extra></extra>"
    return {"type": "scatter", "name": plain(name), "x": xs, "y": ys, "hovertemplate": hover}


def task_figure(contents: Contents, rows: Sequence[Row], winner: str | None) -> list[Figure]:
    """Draw the accuracy of every cell, mean over its tasks, next to the dense model's."""
    shown = sorted((row for row in rows if row.accuracy is not None), key=lambda row: row.accuracy or 0)
    if not shown:
        return []
    errors = [_mean_error(row) for row in shown]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [row.accuracy for row in shown],
            "y": [plain(row.cell.name) for row in shown],
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
    layout = layout_of("accuracy (± standard error)", "")
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
    """Return the standard error of a mean over tasks, from those of the tasks."""
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
    layout = layout_of("block", axis)
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
    layout = layout_of(axis, axis)
    ticks = {"dtick": _step(len(matrix)), "gridcolor": "rgba(0,0,0,0)", "constrain": "domain"}
    layout["xaxis"] |= ticks
    layout["yaxis"] |= ticks | {"scaleanchor": "x"}
    says = f"{len(matrix)} by {len(matrix)}, from {off[0] if off else 1:.3f} to 1."
    return Figure(name=name, title=title, says=says, data=[cells], layout=layout, height=360)


def _step(count: int) -> int:
    return max(1, -(-count // 16))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot.

    Attributes:
        name: its id on the page.
        title: its title.
        says: text alternative.
        data, layout: for Plotly.
        height: in pixels.
    """

    name: str
    title: str
    says: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 300


MARGIN = {"l": 56, "r": 16, "t": 24, "b": 48}


def layout_of(x: str, y: str) -> dict[str, Any]:
    """Return the common layout with these axis titles."""
    axis = {"gridcolor": "--line", "zeroline": False, "linecolor": "--line", "tickfont": {"color": "--muted"}}
    return {
        "margin": dict(MARGIN),
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "--sans", "size": 12, "color": "--ink"},
        "hoverlabel": {"bgcolor": "--surface", "bordercolor": "--line", "font": {"color": "--ink"}},
        "showlegend": False,
        "dragmode": False,
        "xaxis": axis | {"title": {"text": x, "font": {"color": "--muted"}}, "fixedrange": True},
        "yaxis": axis | {"title": {"text": y, "font": {"color": "--muted"}}, "fixedrange": True},
    }


def plain(text: str) -> str:
    """Escape names, so that Plotly does not interpret them as markup."""
    return html.escape(text, quote=False)
