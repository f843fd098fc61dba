"""One self-contained HTML page for a folder; it needs no network, and without JavaScript only the plots are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from secateur.files import replace_file
from secateur.reporting import figures
from secateur.reporting.blocks import LEGEND, Block, picture
from secateur.reporting.cells import Cell, Contents, Sample
from secateur.reporting.commands import commands_of
from secateur.reporting.expert_figures import removal_maps, routing_maps
from secateur.reporting.figures import Figure
from secateur.reporting.folders import read_folder
from secateur.reporting.tables import cells_table, healing_lines, tasks_table
from secateur.reporting.trade_offs import quality_figures, size_front
from secateur.reporting.verdict import Row, Verdict, rankings, rows_of, share, verdict

_SIDE_BY_SIDE = 2
"""Number of cells whose samples are shown next to the dense model's; the others are collapsed."""


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Make one HTML page of an output folder: the best method, what was removed, what remains, and how to reproduce it.

    The page needs no network and no other files. Sections without data are omitted; failed cells are listed with their
    message. The file is written atomically.

    Args:
        folder: a study, a run, a demo, a checkpoint, or a folder with scores, a plan or results.
        out: the file; None is `report.html` in the folder.

    Returns:
        The file.

    Raises:
        InputError: no such folder, nothing in it to report, files of another format version, or an output path that
            cannot be written.
    """
    contents = read_folder(folder)
    file = Path(out) if out is not None else Path(folder) / "report.html"
    replace_file(file, render(contents))
    return file


def render(contents: Contents) -> str:
    """Return the page as HTML text."""
    rows = rows_of(contents)
    summary = verdict(contents, rows)
    drawn = _figures(contents, rows, summary)
    environment = Environment(
        loader=PackageLoader("secateur.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    here = files("secateur.reporting") / "templates"
    shown = [figure for group in drawn.values() for figure in group]
    return environment.get_template("report.html.j2").render(
        contents=contents,
        verdict=summary,
        facts=_facts(contents),
        keys=_keys(summary.best),
        rankings=_bars(rows) if contents.is_study else [],
        strips=_strips(rows),
        legend=_legend(rows),
        figures=drawn,
        drawings={figure.name: {"data": figure.data, "layout": figure.layout} for figure in shown},
        table=cells_table(rows, size_front(rows) if contents.is_study else []) if rows else None,
        tasks=tasks_table(contents, rows),
        healing=healing_lines(contents),
        prompts=_prompts(contents, rows, summary),
        by_perplexity=any(row.ratio is not None for row in rows),
        failures=[(row.cell.name, row.cell.failure) for row in rows if row.cell.failure],
        commands=[(row.cell.name, commands_of(contents, row.cell)) for row in rows],
        style=Markup((here / "style.css").read_text(encoding="utf-8")),
        script=Markup((here / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()) if shown else None,
    )


def _figures(contents: Contents, rows: Sequence[Row], summary: Verdict) -> dict[str, list[Figure]]:
    winner = summary.best.cell.label if summary.best is not None else None
    scores, plan = contents.scores, contents.plan()
    return {
        "quality": quality_figures(contents, rows, winner),
        "redundancy": figures.redundancy(scores) if scores else [],
        "maps": (figures.heat_maps(scores) + routing_maps(scores) if scores else [])
        + removal_maps([plan] if plan is not None else []),
        "tasks": figures.task_figure(contents, rows, winner) if contents.is_study else [],
        "healing": figures.healing_curves(contents),
    }


def _facts(contents: Contents) -> list[tuple[str, str]]:
    facts = []
    plan = contents.plan()
    if plan is not None:
        sizes = f"{len(plan.model.block_parameters)} blocks, {plan.parameters_before:,} parameters"
        facts.append(("model", f"{contents.model} ({plan.model.family}; {sizes})"))
    else:
        facts.append(("model", contents.model))
    calibration = (contents.scores.texts if contents.scores else None) or (plan.texts if plan else None)
    if calibration:
        facts.append(("measured on", _texts(calibration)))
    dense = list(contents.dense.perplexities().values())
    read = dense or next(
        (list(found.values()) for cell in contents.cells if (found := cell.measured.perplexities())), []
    )
    if read:
        facts.append(("held out", "; ".join(_texts(one.texts) for one in read)))
    if dense:
        facts.append(("dense perplexity", ", ".join(f"{one.value:.3f}" for one in dense)))
    if read:
        settings = read[0].settings
        facts.append(("arithmetic", ", ".join(str(settings[name]) for name in ("dtype", "device") if name in settings)))
    checks = [cell.checked for cell in contents.cells if cell.checked is not None]
    if checks:
        facts.append(("reopened", f"{sum(checks)} of {len(checks)} in a fresh process: same logits, same generation"))
    if contents.versions:
        facts.append(("versions", ", ".join(f"{name} {number}" for name, number in contents.versions.items())))
    return facts


def _texts(texts: dict[str, Any]) -> str:
    return f"{texts.get('windows', '?')} windows of {texts.get('seq_len', '?')} tokens, {texts.get('source', '?')}"


def _keys(best: Row | None) -> list[tuple[str, str]]:
    """Return the key figures at the top of the page."""
    if best is None:
        return []
    shown = [
        ("perplexity, × dense", best.ratio, "{:.2f}".format),
        ("of the parameters removed", best.cell.removed, share),
        ("decoding speed, × dense", best.decode, "{:.2f}".format),
        ("accuracy", best.accuracy, "{:.3f}".format),
        ("stability of answers", best.stability, "{:.3f}".format),
    ]
    return [(name, form(value)) for name, value, form in shown if value is not None]


@dataclass(frozen=True, kw_only=True)
class _Bar:
    row: Row
    width: float


def _bars(rows: Sequence[Row]) -> list[tuple[str, list[_Bar]]]:
    """Return the cells of each amount with the width of their price bar, in per cent of the longest bar."""
    ranked = rankings(rows)
    longest = max((row.price or 0.0 for one in ranked for row in one.rows), default=0.0) or 1.0
    return [
        (
            (f"{one.amount} requested" if one.amount else "all") + (", healed" if one.healed else ""),
            [_Bar(row=row, width=100 * max(0.0, row.price or 0.0) / longest) for row in one.rows],
        )
        for one in ranked
    ]


def _strips(rows: Sequence[Row]) -> list[tuple[Cell, list[Block]]]:
    """Return the plan pictures; a healed cell shares the picture of the cell it was healed from."""
    drawn: list[tuple[Cell, list[Block]]] = []
    for cell in (row.cell for row in rows):
        blocks = picture(cell.plans)
        if blocks and not any(cell.plans == other.plans for other, _ in drawn):
            drawn.append((cell, blocks))
    return drawn


def _legend(rows: Sequence[Row]) -> list[tuple[str, str]]:
    used = {block.state for _, blocks in _strips(rows) for block in blocks}
    return [(state, says) for state, says in LEGEND.items() if state in used]


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    prompt: str
    shown: list[tuple[str, str]]
    folded: list[tuple[str, str]]


def _prompts(contents: Contents, rows: Sequence[Row], summary: Verdict) -> list[_Prompt]:
    """Return the samples side by side: the real continuation, the dense model, the best, then the others."""
    best = summary.best.cell if summary.best else None
    order = sorted(rows, key=lambda row: (row.cell is not best, row.quality is None, row.quality or 0.0))
    wrote = [(row.cell.name, row.cell.measured.samples) for row in order if row.cell.measured.samples]
    written: dict[str, list[tuple[str, Sample]]] = {}
    for name, samples in [("dense", contents.dense.samples), *wrote] if wrote else []:
        for sample in samples:
            written.setdefault(sample.prompt, []).append((name, sample))
    prompts = []
    for prompt, found in written.items():
        truth = next((sample.truth for _, sample in found if sample.truth), "")
        first = [("real continuation", truth)] if truth else []
        texts = [(name, sample.text) for name, sample in found]
        beside = _SIDE_BY_SIDE + (texts[0][0] == "dense")
        prompts.append(_Prompt(prompt=prompt, shown=first + texts[:beside], folded=texts[beside:]))
    return prompts
