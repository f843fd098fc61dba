"""How results look in a terminal: perplexity, tasks and speed, each beside the dense model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from secateur.evaluation.results import Result
from secateur.methods.amounts import gigabytes

Pair = tuple[Result | None, Result | None]
"""The model's result, and that of the model it is compared with."""

_FORMS: dict[str, tuple[str, Callable[[float], str]]] = {
    "prefill_tokens_per_second": ("prefill tokens/s", lambda value: f"{value:,.1f}"),
    "decode_tokens_per_second": ("decode tokens/s", lambda value: f"{value:,.1f}"),
    "time_to_first_token": ("time to first token", lambda value: f"{1000 * value:,.1f} ms"),
    "peak_resident_bytes": ("peak resident", gigabytes),
    "peak_allocated_bytes": ("peak allocated", gigabytes),
    "peak_reserved_bytes": ("peak reserved", gigabytes),
    "cache_bytes_per_token": ("cache per token", lambda value: f"{value:,.0f} bytes"),
    "checkpoint_bytes": ("checkpoint", gigabytes),
    "parameters": ("parameters", lambda value: f"{value:,.0f}"),
}


def results_tables(results: Sequence[Result]) -> RenderableType:
    """Give a table for each kind of result that there is."""
    perplexities = [one for one in results if one.measure == "perplexity"]
    tasks = [one for one in results if one.task is not None]
    speeds = [one for one in results if one.measure in _FORMS]
    tables: list[RenderableType] = []
    if perplexities:
        tables.append(results_table(perplexities))
    if tasks:
        tables.append(_tasks_table(tasks))
    if speeds:
        tables.append(_speeds_table(speeds))
    return Group(*tables)


def results_table(results: Sequence[Result]) -> Table:
    """One row per measured model, with ratios to the one it is compared with."""
    table = Table(title=f"{results[0].measure} on {results[0].texts['source']} (held out)", title_justify="left")
    for name in ("model", "blocks", "parameters", "size", results[0].measure, "ratio"):
        table.add_column(name, justify="left" if name == "model" else "right")
    dense = next((result for result in results if result.role == "against"), None)
    for result in results:
        size = f"{result.parameters / dense.parameters:.1%}" if dense else "—"
        ratio = f"{result.value / dense.value:.3f}" if dense else "—"
        table.add_row(result.model, str(result.blocks), f"{result.parameters:,}", size, f"{result.value:.3f}", ratio)
    return table


def _tasks_table(results: Sequence[Result]) -> Table:
    """One row per task and measure: this model, the dense one, the difference."""
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
    """One row per measure and request: this model, the dense one, the ratio."""
    table = Table(title="speed and memory (median ± half the distance of the quartiles)", title_justify="left")
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
    """Put results of the two models that belong together side by side, in the order in which they come."""
    found: dict[tuple[Any, ...], dict[str, Result]] = {}
    for one in results:
        found.setdefault(key(one), {})[one.role] = one
    yield from ((name, (both.get("model"), both.get("against"))) for name, both in found.items())
