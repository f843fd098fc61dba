"""Figures of scores as PNG files, drawn from the same data as those of the page.

Plotly writes PNG only through a browser, which a machine that prunes models often lacks; Matplotlib needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.errors import InputError
from secateur.reporting.expert_figures import routing_maps
from secateur.reporting.figures import Figure, heat_maps, redundancy
from secateur.scores.profile import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_COLORS = {"--accent": "#d9822b", "--bar": "#2f6f9f", "--ink": "#8a8f98"}
Span = tuple[int, int]


def draw_scores(scores: Scores, folder: Path) -> list[Path]:
    """Draw everything these scores hold, as PNG files in a folder; return their paths.

    `redundancy` has a bar for each block, the least needed quarter in orange; `cosine`, `cka` and `experts` are heat
    maps.
    """
    maps = {one.name: one for one in heat_maps(scores)}
    pictures = {
        "redundancy": [one for one in redundancy(scores) if one.name != "taylor"],
        "cosine": [maps[name] for name in ("cosine",) if name in maps],
        "cka": [maps[name] for name in ("cka-linear", "cka-rbf") if name in maps],
        "experts": routing_maps(scores),
    }
    drawn = {name: figures for name, figures in pictures.items() if figures}
    return [_draw(figures, folder / f"{name}.png") for name, figures in drawn.items()]


def draw_windows(scores: Scores, windows: Sequence[Span], path: Path) -> None:
    """Draw the CKA maps with an outline around each window of blocks (lowest and highest), as a PNG file.

    Raises:
        InputError: the scores do not hold CKA.
    """
    if scores.cka_linear is None or scores.cka_rbf is None:
        raise InputError("these scores do not hold 'cka'; measure it first.")
    maps = [one for one in heat_maps(scores) if one.name.startswith("cka")]
    _draw(maps, path, outlined=windows, note="outlined: the blocks that are merged into one")


def _draw(figures: Sequence[Figure], path: Path, *, outlined: Sequence[Span] = (), note: str = "") -> Path:
    """Draw bars one above the other, heat maps side by side."""
    from matplotlib import figure as mpl_figure  # here: most runs of the command line draw nothing
    from matplotlib.patches import Rectangle

    bars = figures[0].data[0]["type"] == "bar"
    count = len(figures)
    blocks = len(figures[0].data[0]["x" if bars else "z"])
    size = (max(6.0, 0.32 * blocks + 2), 3.2 * count) if bars else (5.4 * count, 4.6)
    canvas = mpl_figure.Figure(figsize=size, layout="constrained")
    places = canvas.subplots(count if bars else 1, 1 if bars else count, squeeze=False).flatten()
    for axes, figure in zip(places, figures, strict=True):
        _draw_bars(axes, figure) if bars else _draw_map(canvas, axes, figure)
        axes.set_title(figure.title, loc="left")
        axes.set_xlabel(figure.layout["xaxis"]["title"]["text"])
        axes.set_ylabel(figure.layout["yaxis"]["title"]["text"])
        for low, high in outlined:
            side = high - low + 1
            axes.add_patch(
                Rectangle((low - 0.5, low - 0.5), side, side, fill=False, edgecolor=_COLORS["--accent"], linewidth=2.5)
            )
    if note:
        canvas.suptitle(note, x=0.01, ha="left", fontsize="medium")
    canvas.savefig(path, dpi=150, bbox_inches="tight")
    return path


def _draw_bars(axes: Axes, figure: Figure) -> None:
    bars = figure.data[0]
    axes.bar(bars["x"], bars["y"], color=[_COLORS[color] for color in bars["marker"]["color"]])
    if figure.layout["yaxis"].get("type") == "log":
        axes.set_yscale("log")
    for line in figure.layout.get("shapes", ()):
        axes.axhline(line["y0"], color=_COLORS["--ink"], linestyle="--", linewidth=1)
    axes.set_xticks(bars["x"][:: figure.layout["xaxis"]["dtick"]])
    axes.spines[["top", "right"]].set_visible(False)


def _draw_map(canvas: Canvas, axes: Axes, figure: Figure) -> None:
    cells: dict[str, Any] = figure.data[0]
    image = axes.imshow(
        np.array(cells["z"], dtype=float), vmin=cells["zmin"], vmax=cells["zmax"], cmap="viridis", origin="lower"
    )
    canvas.colorbar(image, ax=axes, shrink=0.85, extend="min")
