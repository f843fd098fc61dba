"""What all plots share. They are Plotly figures in plain data; colours are names of the page's style (`--accent`)."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any


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


MARGIN = {"l": 56, "r": 16, "t": 24, "b": 48}


def layout_of(x: str, y: str) -> dict[str, Any]:
    """Give a calm layout with these axis titles."""
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
    """Keep Plotly from reading tags in names."""
    return html.escape(text, quote=False)
