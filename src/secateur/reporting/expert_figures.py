"""Maps of blocks and experts: where the routers send tokens, and by which scores experts were removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.plan.experts import DropExperts
from secateur.plan.plan import Plan
from secateur.reporting.figures import Figure, layout_of
from secateur.scores.profile import Scores

_HEAT = [[0.0, "--heat-0"], [0.5, "--heat-1"], [1.0, "--heat-2"]]

Rows = list[list[float | None]]


def routing_maps(scores: Scores) -> list[Figure]:
    """Draw the share of the tokens that each expert of each block is chosen for."""
    if scores.routing is None:
        return []
    most = max(len(one.load) for one in scores.routing.blocks if one is not None)
    rows: Rows = [[None] * most if one is None else list(one.load) for one in scores.routing.blocks]
    idle = sum(len(one.idle) for one in scores.routing.blocks if one is not None)
    says = f"Share of the tokens sent to each expert; {idle} experts never fire."
    return [_map("experts", "Tokens sent to each expert", rows, says)]


def removal_maps(plans: Sequence[Plan]) -> list[Figure]:
    """Draw the scores by which each plan removed experts, relative to the highest in the block, with those removed."""
    steps = [step for plan in plans for step in plan.steps if isinstance(step, DropExperts) and any(step.scores)]
    figures = []
    for number, step in enumerate(steps):
        most = max(map(len, step.scores))
        rows: Rows = [[one / (max(row) or 1.0) for one in row] if row else [None] * most for row in step.scores]
        gone = [(block, expert) for block in range(len(rows)) for expert in step.removed(block)]
        says = f"{len(gone)} experts removed by {step.method}; crosses mark them."
        name = "experts-removed" + (f"-{number}" if number else "")
        figure = _map(name, f"Scores of experts ({step.method}), relative to the highest of the block", rows, says)
        crosses: dict[str, Any] = {
            "type": "scatter",
            "mode": "markers",
            "x": [expert for _, expert in gone],
            "y": [block for block, _ in gone],
            "marker": {"symbol": "x", "size": 6, "color": "--accent"},
            "hovertemplate": "block %{y}, expert %{x}: removed<extra></extra>",
        }
        figure.data.append(crosses)
        figures.append(figure)
    return figures


def _map(name: str, title: str, rows: Rows, says: str) -> Figure:
    found = [value for row in rows for value in row if value is not None]
    cells = {
        "type": "heatmap",
        "z": rows,
        "zmin": 0.0,
        "zmax": max(found) or 1.0,
        "colorscale": _HEAT,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "block %{y}, expert %{x}: %{z:.3f}<extra></extra>",
        "colorbar": {"thickness": 10, "len": 0.9, "outlinewidth": 0, "tickfont": {"color": "--muted"}, "nticks": 5},
    }
    layout = layout_of("expert", "block")
    for axis, count in (("xaxis", len(rows[0])), ("yaxis", len(rows))):
        layout[axis] |= {"dtick": max(1, -(-count // 16)), "gridcolor": "rgba(0,0,0,0)"}
    return Figure(name=name, title=title, says=says, data=[cells], layout=layout, height=360)
