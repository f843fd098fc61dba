"""Plots of scores as PNG files: redundancy bars, heat maps of cosines and CKA, and merged windows on the CKA map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from secateur.errors import InputError
from secateur.scores.profile import Matrix, Scores

_BLUE, _ORANGE, _GREY = "#2f6f9f", "#d9822b", "#8a8f98"


def draw_scores(scores: Scores, folder: Path) -> list[Path]:
    """Draw every plot these scores have data for, as PNG files in a folder; return their paths."""
    drawn = []
    for name, figure in _figures(scores).items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150, bbox_inches="tight")
        drawn.append(path)
    return drawn


def draw_windows(scores: Scores, windows: Sequence[tuple[int, int]], path: Path) -> None:
    """Draw the CKA maps with an outline around each window of blocks (lowest and highest), as a PNG file.

    Raises:
        InputError: the scores do not hold CKA.
    """
    if scores.cka_linear is None or scores.cka_rbf is None:
        raise InputError("these scores do not hold 'cka'; measure it first.")
    figure = _pair_of_heat_maps({"linear CKA": scores.cka_linear, "RBF CKA": scores.cka_rbf}, "output of block")
    for axes in figure.axes[:2]:
        for low, high in windows:
            size = high - low + 1
            axes.add_patch(Rectangle((low - 0.5, low - 0.5), size, size, fill=False, edgecolor=_ORANGE, linewidth=2.5))
    figure.suptitle("outlined: the blocks that become one", x=0.01, ha="left", fontsize="medium")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _figures(scores: Scores) -> dict[str, Figure]:
    figures = {}
    if scores.cosine is not None:
        figures["redundancy"] = _bars(scores)
        figures["cosine"] = _heat_map(
            scores.cosine,
            "Cosine between residual states",
            "input of block (last: output of the model)",
            shade_by_quantile=True,
        )
    if scores.cka_linear is not None and scores.cka_rbf is not None:
        figures["cka"] = _pair_of_heat_maps(
            {"linear CKA": scores.cka_linear, "RBF CKA": scores.cka_rbf}, "output of block"
        )
    return figures


def _bars(scores: Scores) -> Figure:
    influence = scores.block_influence
    assert influence is not None
    blocks = np.arange(len(influence))
    extra = scores.removal_perplexity is not None
    figure = Figure(figsize=(max(6.0, 0.32 * len(blocks) + 2), 3.2 * (1 + extra)), layout="constrained")
    axes = figure.subplots(1 + extra, 1, squeeze=False)[:, 0]
    axes[0].bar(blocks, influence, color=_shades(np.asarray(influence)))
    axes[0].set_yscale("log")
    axes[0].set_ylabel("block influence (log)")
    axes[0].set_title(f"How much each block changes the hidden states: {scores.model}", loc="left")
    if scores.removal_perplexity is not None and scores.perplexity is not None:
        axes[1].bar(blocks, scores.removal_perplexity, color=_shades(np.asarray(scores.removal_perplexity)))
        axes[1].axhline(scores.perplexity, color=_GREY, linestyle="--", linewidth=1)
        axes[1].set_yscale("log")
        axes[1].set_ylabel("perplexity without it (log)")
    for one in axes:
        one.set_xticks(blocks if len(blocks) <= 40 else blocks[:: len(blocks) // 20])
        one.set_xlabel("block (orange: the least needed quarter)")
        one.spines[["top", "right"]].set_visible(False)
    return figure


def _shades(values: np.ndarray) -> list[str]:
    least = np.sort(values)[max(0, len(values) // 4 - 1)]
    return [_ORANGE if value <= least else _BLUE for value in values]


def _heat_map(matrix: Matrix, title: str, label: str, *, shade_by_quantile: bool = False) -> Figure:
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    _draw_matrix(figure, figure.subplots(), matrix, title, label, shade_by_quantile=shade_by_quantile)
    return figure


def _pair_of_heat_maps(matrices: dict[str, Matrix], label: str) -> Figure:
    figure = Figure(figsize=(5.4 * len(matrices), 4.6), layout="constrained")
    for axes, (title, matrix) in zip(figure.subplots(1, len(matrices)), matrices.items(), strict=True):
        _draw_matrix(figure, axes, matrix, title, label)
    return figure


def _draw_matrix(
    figure: Figure,
    axes: mpl.axes.Axes,
    matrix: Matrix,
    title: str,
    label: str,
    *,
    shade_by_quantile: bool = False,
) -> None:
    values = np.asarray(matrix)
    off_diagonal = values[~np.eye(len(values), dtype=bool)]
    low = float(np.quantile(off_diagonal, 0.05)) if shade_by_quantile else float(off_diagonal.min())
    image = axes.imshow(values, vmin=low, vmax=1.0, cmap="viridis", origin="lower")
    axes.set_title(title, loc="left")
    axes.set_xlabel(label)
    axes.set_ylabel(label)
    figure.colorbar(image, ax=axes, shrink=0.85, extend="min" if shade_by_quantile else "neither")
