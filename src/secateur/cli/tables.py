"""Terminal output: tables of scores, plans, healing and results, and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from secateur.calibration.walk import perplexity_of
from secateur.evaluation.gate import Gate
from secateur.evaluation.metrics.perplexity import GEOMEAN
from secateur.evaluation.results import Result
from secateur.methods.method import METHODS
from secateur.plan.amount import gigabytes
from secateur.plan.plan import Plan, Search
from secateur.plan.step import Step
from secateur.plan.units import summary
from secateur.progress import Progress
from secateur.scores.profile import Scores
from secateur.scores.routing import Routing

Item = TypeVar("Item")


@contextmanager
def showing_progress(console: Console) -> Iterator[Progress]:
    """Show progress bars with the remaining time for the duration of the block."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console, transient=True) as bars:

        def track(items: Iterable[Item], description: object, total: int, /) -> Iterable[Item]:
            task = bars.add_task(str(description), total=total)
            for item in items:
                yield item
                bars.update(task, advance=1, description=str(description))
            bars.update(task, total=bars.tasks[task].completed)

        yield track


def scores_table(scores: Scores) -> RenderableType:
    """Return a table with a row per block, the least needed quarter by each score highlighted, and one of routers."""
    columns: list[tuple[str, Sequence[float] | None, str, bool]] = [
        ("block influence", scores.block_influence, ".4f", False),
        ("layer redundancy", scores.layer_redundancy, ".3f", True),
        ("relative magnitude", scores.relative_magnitude, ".3f", False),
        ("weights Σ|w|", scores.magnitude, ".3e", False),
        ("perplexity without", scores.removal_perplexity, ".2f", False),
        ("Taylor", scores.taylor, ".3e", False),
    ]
    shown = [column for column in columns if column[1] is not None]
    table = Table(title=f"Redundancy of {scores.model}", title_justify="left")
    table.add_column("block", justify="right")
    for name, _, _, _ in shown:
        table.add_column(name, justify="right")
    marked = [_least_needed(values or (), most_is_least=turned) for _, values, _, turned in shown]
    for block in range(len(shown[0][1] or ()) if shown else 0):
        cells = []
        for (_, values, form, _), least in zip(shown, marked, strict=True):
            text = format((values or ())[block], form)
            cells.append(f"[bold yellow]{text}[/]" if block in least else text)
        table.add_row(str(block), *cells)
    return table if scores.routing is None else Group(table, "", routing_table(scores.routing))


def routing_table(routing: Routing) -> Table:
    """Return a table with a row per block with experts: how evenly its router uses them, and the closest pair."""
    table = Table(title="What the routers do", title_justify="left")
    for name in ("block", "experts", "never fire", "busiest", "balance", "decision", "most often together"):
        table.add_column(name, justify="right")
    for block, one in enumerate(routing.blocks):
        if one is None:
            continue
        pair = one.together[0] if one.together else None
        table.add_row(
            str(block),
            str(len(one.load)),
            str(len(one.idle)) if one.idle else "–",
            f"{max(one.load):.1%}",
            f"{one.balance:.3f}",
            f"{one.decision:.3f}",
            "–" if pair is None else f"{pair.experts[0]} and {pair.experts[1]} ({pair.share:.0%})",
        )
    return table


def _least_needed(values: Sequence[float], *, most_is_least: bool) -> set[int]:
    order = sorted(range(len(values)), key=lambda block: values[block], reverse=most_is_least)
    return set(order[: max(1, len(values) // 4)])


def plan_summary(plan: Plan) -> RenderableType:
    """Return a summary of a plan: what stays, what is removed, sizes, and the candidates it was chosen from."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("model", f"{plan.model.source} ({plan.model.family})")
    for step in plan.steps:
        settings = ", ".join(f"{name}={value}" for name, value in _unusual(step).items())
        table.add_row("method", step.method + (f" ({settings})" if settings else ""))
        table.add_row(*step.describe())
    removed = summary(plan.removes())
    if removed:
        table.add_row("removes", removed)
    table.add_row("blocks", _strip(plan))
    table.add_row(
        "parameters",
        f"{plan.parameters_before:,} → {plan.parameters_after:,} ({plan.removed_fraction:.1%} removed{_asked(plan)})",
    )
    if plan.counts_on:
        table.add_row("counts on", _counted(plan.counts_on))
    if plan.texts:
        table.add_row(
            "measured on",
            f"{plan.texts['windows']} windows of {plan.texts['seq_len']}, {plan.texts['source']}",
        )
    return table if plan.search is None else Group(table, "", search_table(plan.search, plan.parameters_before))


def search_table(search: Search, parameters: int) -> RenderableType:
    """Return the plans that were tried, best first, and below them why others were refused."""
    table = Table(
        title=f"Plans tried: fitted to {search.fitted} windows, perplexity on {search.held_back} others "
        f"(dense: {perplexity_of(search.dense_loss):.2f})",
        title_justify="left",
        caption="front: no other plan is both smaller and better; dim: removes less than requested",
        caption_justify="left",
    )
    experts = any(one.experts for one in search.candidates)
    for name in ("", "depth", "blocks", *(["experts"] if experts else []), "width", "removed", "perplexity"):
        table.add_column(name, justify="right" if name in ("blocks", "removed", "perplexity") else "left")
    measured = [place for place, one in enumerate(search.candidates) if one.loss is not None]
    for place in sorted(measured, key=lambda place: search.candidates[place].loss or 0.0):
        one = search.candidates[place]
        mark = "best" if place == search.best else "front" if place in search.front else ""
        mark = "refused" if one.refused else mark
        table.add_row(
            mark,
            one.depth or "–",
            str(one.blocks or "–"),
            *([one.experts_label or "–"] if experts else []),
            one.width or "–",
            f"{1 - (one.parameters or 0) / parameters:.1%}",
            f"{perplexity_of(one.loss or 0.0):.2f}",
            style="bold" if mark == "best" else "dim" if one.refused or not one.enough else None,
        )
    refused = [f"{one.label}: {one.refused}" for one in search.candidates if one.refused]
    return Group(table, *(Text(line, style="dim") for line in (*_gated(search), *refused)))


def _gated(search: Search) -> list[str]:
    """Return a line about the gate: what the dense model can do, and what it cannot, so that it does not count."""
    if not search.probes:
        return []
    gate = Gate.read(str(search.settings["gate"]))
    able = gate.able(search.probes)
    listed = ", ".join(f"{name} {search.probes[name]:.2f}" for name in able)
    idle = [name for name in gate.probes if name not in able]
    more = f"; not counted, since the dense model cannot do them: {', '.join(idle)}" if idle else ""
    return [f"Gate {search.settings['gate']}: accuracy of the dense model {listed}{more}."]


def _unusual(step: Step) -> dict[str, Any]:
    """Return the settings of a step that are not the method's defaults."""
    fields = METHODS[step.method].settings.model_fields if step.method in METHODS else {}
    defaults = {name: field.default for name, field in fields.items()}
    return {name: value for name, value in step.settings.items() if value and value != defaults.get(name)}


def _asked(plan: Plan) -> str:
    readers: dict[str, Callable[[float], str]] = {
        "remove": lambda value: f"; requested {value:.1%}",
        "target_params": lambda value: f"; requested at most {value:,.0f}",
        "target_memory": lambda value: f"; requested at most {gigabytes(value)}",
        "target_speedup": lambda value: f"; requested {value:g} times as fast",
    }
    asked = {name: value for name, value in plan.requested.items() if name in readers}
    return "".join(readers[name](value) for name, value in asked.items() if isinstance(value, int | float))


def _counted(facts: dict[str, Any]) -> str:
    """Describe what a target in bytes or seconds is based on, and what is expected."""
    if "bytes" in facts:
        return (
            f"{gigabytes(facts['bytes'])} of weights and cache instead of {gigabytes(facts['dense_bytes'])}, one "
            f"sequence of {facts['context']:,} tokens, {facts['dtype']}"
        )
    return (
        f"{facts['speedup']:.2f} times as fast: {1000 * facts['seconds']:.4g} ms instead of "
        f"{1000 * facts['dense_seconds']:.4g} for {facts['prompt']} tokens read and {facts['new_tokens']} written, "
        f"{facts['dtype']} on {facts['device']}, measured block by block"
    )


def _strip(plan: Plan) -> Text:
    kept = set(plan.kept_blocks())
    strip = Text()
    for block in range(len(plan.model.block_parameters)):
        strip.append(f"{block}" if block in kept else f"✂{block}", style="green" if block in kept else "bold red")
        strip.append(" ")
    return strip


def healing_table(facts: dict[str, Any]) -> Table:
    """Return a table of a healing: what was trained, on how much, and the gain on held-out text."""
    rows = {"healed with": facts["with"], "tokens": f"{facts['tokens']:,} of {facts['texts']['source']}"}
    if "start_loss" in facts:
        rows["weights trained"] = f"{facts['trained_weights']:,}"
        rows["loss on held-out text"] = f"{facts['start_loss']:.4f} → {facts['best_loss']:.4f}"
        rows["steps"] = f"{facts['steps']:,} of {facts['planned']:,}, best after {facts['best_step']:,}"
    for block, outcome in facts.get("blocks", {}).items():
        rows[f"block {block}"] = f"error {outcome['start_loss']:.4g} → {outcome['best_loss']:.4g}"
    return facts_table("Healing", rows)


def facts_table(title: str, facts: dict[str, Any]) -> Table:
    """Return a table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table


Pair = tuple[Result | None, Result | None]
"""The result of the model, and that of the model it is compared with."""

_FORMS: dict[str, tuple[str, Callable[[float], str]]] = {
    "prefill_tokens_per_second": ("prefill tokens/s", lambda value: f"{value:,.1f}"),
    "decode_tokens_per_second": ("decode tokens/s", lambda value: f"{value:,.1f}"),
    "assisted_tokens_per_second": ("tokens/s with the draft; without", lambda value: f"{value:,.1f}"),
    "draft_acceptance": ("drafted tokens that are kept", lambda value: f"{value:.1%}"),
    "tokens_per_check": ("tokens per pass of the dense model", lambda value: f"{value:.2f}"),
    "time_to_first_token": ("time to first token", lambda value: f"{1000 * value:,.1f} ms"),
    "peak_resident_bytes": ("peak resident", gigabytes),
    "peak_allocated_bytes": ("peak allocated", gigabytes),
    "peak_reserved_bytes": ("peak reserved", gigabytes),
    "cache_bytes_per_token": ("cache per token", lambda value: f"{value:,.0f} bytes"),
    "checkpoint_bytes": ("checkpoint", gigabytes),
    "parameters": ("parameters", lambda value: f"{value:,.0f}"),
}


def results_tables(results: Sequence[Result]) -> RenderableType:
    """Return a table for each kind of result that there is."""
    tasks = [one for one in results if one.task is not None]
    speeds = [one for one in results if one.measure in _FORMS]
    metrics: dict[str, list[Result]] = {}
    for one in results:
        if one.task is None and one.measure not in _FORMS:
            metrics.setdefault(one.measure, []).append(one)
    mean = next(iter(metrics.pop(GEOMEAN, [])), None)
    tables: list[RenderableType] = [
        _sources_table(measured, mean) if len(_sources(measured)) > 1 else results_table(measured)
        for measured in metrics.values()
    ]
    if tasks:
        tables.append(_tasks_table(tasks))
    if speeds:
        tables.append(_speeds_table(speeds))
    return Group(*tables)


def results_table(results: Sequence[Result]) -> Table:
    """Return a table with a row per measured model, with ratios to the one it is compared with."""
    table = Table(title=f"{results[0].measure} on {results[0].texts['source']} (held out)", title_justify="left")
    for name in ("model", "blocks", "parameters", "size", results[0].measure, "ratio"):
        table.add_column(name, justify="left" if name == "model" else "right")
    dense = next((result for result in results if result.role == "against"), None)
    for result in results:
        size = f"{result.parameters / dense.parameters:.1%}" if dense else "—"
        ratio = f"{result.value / dense.value:.3f}" if dense else "—"
        table.add_row(result.model, str(result.blocks), f"{result.parameters:,}", size, f"{result.value:.3f}", ratio)
    return table


def _sources(results: Sequence[Result]) -> set[str | None]:
    return {one.texts.get("fingerprint") for one in results}


def _sources_table(results: Sequence[Result], mean: Result | None) -> Table:
    """Return a table with a row per source: this model, the dense one, the ratio; below the mean of the ratios."""
    table = Table(title=f"{results[0].measure} by source (held out)", title_justify="left")
    for name in ("source", "windows", "model", "dense", "ratio"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for source, (one, dense) in _pairs(results, lambda result: result.texts["source"]):
        either = one or dense
        assert either is not None
        ratio = f"{one.value / dense.value:.3f}" if one and dense else "—"
        values = [f"{result.value:.3f}" if result else "—" for result in (one, dense)]
        table.add_row(escape(source), f"{either.texts['windows']:,}", *values, ratio)
    if mean is not None:
        table.add_section()
        table.add_row("geometric mean of the ratios", "", "", "", f"{mean.value:.3f}", style="bold")
    return table


def _tasks_table(results: Sequence[Result]) -> Table:
    """Return a table with a row per task and measure: this model, the dense one, the difference."""
    table = Table(title="tasks", title_justify="left")
    for name in ("task", "asked", "measure", "model", "dense", "change"):
        left = name in ("task", "measure")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    shown = ""
    for (task, measure), (one, dense) in _pairs(results, lambda result: (result.task, result.measure)):
        either = one or dense
        assert either is not None
        questions = either.settings.get("questions", "")
        table.add_row(
            task if task != shown else "",
            f"{questions:,}" if questions and task != shown else "",
            measure,
            _with_error(one),
            _with_error(dense),
            f"{one.value - dense.value:+.3f}" if one and dense else "—",
        )
        shown = task
    return table


def _with_error(result: Result | None) -> str:
    if result is None:
        return "—"
    error = result.spread.get("stderr")
    return f"{result.value:.3f}" + (f" ±{error:.3f}" if error is not None else "")


def _speeds_table(results: Sequence[Result]) -> Table:
    """Return a table with a row per measure and request: this model, the dense one, the ratio."""
    title = "speed and memory: medians over rounds ± half the interquartile range; ratios are medians of ratios"
    table = Table(title=title, title_justify="left")
    for name in ("batch", "prompt", "measure", "model", "dense", "ratio"):
        table.add_column(name, justify="left" if name == "measure" else "right", no_wrap=name == "measure")

    def key(result: Result) -> tuple[Any, ...]:
        asked = result.settings if "batch" in result.settings else {}
        return asked.get("batch", ""), asked.get("prompt", ""), result.measure

    for (batch, prompt, measure), (one, dense) in _pairs(results, key):
        name, form = _FORMS[measure]
        ratio = f"{one.ratio:.3f}" if one is not None and one.ratio is not None else "—"
        table.add_row(str(batch), str(prompt), name, _spread(one, form), _spread(dense, form), ratio)
    return table


def _spread(result: Result | None, form: Callable[[float], str]) -> str:
    if result is None:
        return "—"
    half = (result.spread["high"] - result.spread["low"]) / 2 if "low" in result.spread else None
    return form(result.value) + (f" ±{half / result.value:.0%}" if half is not None else "")


def _pairs(results: Sequence[Result], key: Callable[[Result], tuple[Any, ...]]) -> Iterator[tuple[Any, Pair]]:
    """Pair the results of the two models, in order."""
    found: dict[tuple[Any, ...], dict[str, Result]] = {}
    for one in results:
        found.setdefault(key(one), {})[one.role] = one
    yield from ((name, (both.get("model"), both.get("against"))) for name, both in found.items())
