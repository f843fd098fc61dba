"""The ranking of cells by price, the Pareto front, and the sentence at the top of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from secateur.evaluation.gate import Gate, accuracies_in
from secateur.evaluation.metrics.perplexity import mean_over_sources
from secateur.plan.plan import pareto_front
from secateur.reporting.cells import Cell, Contents, Measured


@dataclass(frozen=True, kw_only=True)
class Row:
    """Measurements of one cell relative to the dense model; None if not measured.

    Attributes:
        cell: the cell.
        perplexity: on held-out text; the geometric mean over several sources.
        ratio: of the perplexity to the dense model's; the geometric mean of `ratios`.
        ratios: the same for each source.
        accuracy: mean over the tasks, with `lost` the points (of 1) below the dense model.
        stability: mean over the tasks.
        flips: share of changed answers.
        decode, prefill: tokens per second, as ratios to the dense model in the same rounds.
        quality: the plotted loss of quality: `ratio`, or `lost` if no perplexity was measured. Higher is worse.
        price: quality lost for each 1 % of parameters removed: per cent of perplexity, or points of accuracy.
        passes: whether it passes the gate; None if there is none, or nothing was measured.
        fails: why it does not pass; empty if it does, or there is no gate.
    """

    cell: Cell
    perplexity: float | None = None
    ratio: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    lost: float | None = None
    stability: float | None = None
    flips: float | None = None
    decode: float | None = None
    prefill: float | None = None
    quality: float | None = None
    price: float | None = None
    passes: bool | None = None
    fails: str = ""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The cells of one amount, cheapest first, and after them those that do not pass the gate."""

    amount: str
    healed: bool
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The summary at the top of the page.

    Attributes:
        headline: the result in one line, without numbers if several cells are compared.
        sentence: the numbers.
        best: the row the headline is about; None if nothing was measured.
    """

    headline: str
    sentence: str
    best: Row | None

    @property
    def title(self) -> str:
        """Return headline and sentence as one text."""
        if self.best is None or self.best.ratio is None or not self.sentence:
            return self.headline
        return f"{self.headline}: {describe_row(self.best)}"


def rows_of(contents: Contents) -> list[Row]:
    """Return the measurements of every cell, amount by amount, cheapest first; unmeasured cells come last."""
    by_perplexity = any(cell.measured.perplexities() for cell in contents.cells)
    rows = [_row(cell, contents.dense, by_perplexity=by_perplexity) for cell in contents.cells]
    if contents.gate is not None:
        before = accuracies_in(contents.dense.results)
        rows = [_gated(row, contents.gate, before) for row in rows]
    ranked = [row for one in rankings(rows) for row in one.rows]
    return ranked + sorted((row for row in rows if row not in ranked), key=lambda row: row.cell.failure is not None)


def _row(cell: Cell, dense: Measured, *, by_perplexity: bool) -> Row:
    read, ratios = cell.measured.perplexities(), cell.measured.ratios_to(dense)
    ratio = mean_over_sources(ratios.values()) if ratios and len(ratios) == len(read) else None
    accuracy, before = cell.measured.accuracy(), dense.accuracy()
    lost = before - accuracy if accuracy is not None and before is not None else None
    quality = ratio if by_perplexity else lost
    cost = None if quality is None else 100 * (math.log(quality) if by_perplexity else quality)
    decode, prefill = (cell.measured.ratio(f"{what}_tokens_per_second") for what in ("decode", "prefill"))
    return Row(
        cell=cell,
        perplexity=mean_over_sources(one.value for one in read.values()) if read else None,
        ratio=ratio,
        ratios=ratios,
        accuracy=accuracy,
        lost=lost,
        stability=cell.measured.stability(),
        flips=cell.measured.flips(),
        decode=decode.ratio if decode else None,
        prefill=prefill.ratio if prefill else None,
        quality=quality,
        price=cost / (100 * cell.removed) if cost is not None and cell.removed and cell.removed > 0 else None,
    )


def _gated(row: Row, gate: Gate, dense: Mapping[str, float]) -> Row:
    """Hold a row against the gate; one that was not asked its probes does not pass."""
    found = accuracies_in(row.cell.measured.results)
    if not row.cell.measured.results:
        return row
    missing = [name for name in gate.able(dense) if name not in found]
    fails = f"was not asked {', '.join(missing)}" if missing else gate.failing(dense, found) or ""
    return replace(row, passes=not fails, fails=fails)


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Say of each (cost, cost) point whether no other is at least as low in both and lower in one."""
    front = {points[place] for place in pareto_front(points)}
    return [point in front for point in points]


def rankings(rows: Sequence[Row]) -> list[Ranking]:
    """Rank the cells of each amount by price, those that do not pass the gate last; healed cells separately."""
    groups: dict[tuple[bool, str], list[Row]] = {}
    for row in rows:
        if row.price is not None:
            groups.setdefault((row.cell.healing is not None, row.cell.amount), []).append(row)
    ranked = [
        Ranking(amount=amount, healed=healed, rows=tuple(sorted(group, key=lambda row: (bool(row.fails), row.price))))
        for (healed, amount), group in groups.items()
    ]
    return sorted(ranked, key=lambda one: (one.healed, sum(row.cell.removed or 0 for row in one.rows) / len(one.rows)))


def verdict(contents: Contents, rows: Sequence[Row]) -> Verdict:
    """Return the verdict: which method keeps the most quality, or how the single model did."""
    model = contents.model_name
    ranked = rankings(rows)
    if contents.is_study and ranked:
        fair = [one for one in ranked if not one.healed] or ranked
        passing = [one for one in fair if not one.rows[0].fails]
        return _winner(model, ranked, fair, passing) if passing else _nothing_passes(model, fair)
    row = next(iter(rows), None)
    if row is not None and not contents.is_study:
        return _single(model, row)
    if contents.scores is not None and contents.scores.block_influence is not None:
        influence = contents.scores.block_influence
        least = sorted(sorted(range(len(influence)), key=lambda block: influence[block])[: max(1, len(influence) // 4)])
        return Verdict(
            headline=f"{model} depends least on block{'s' if len(least) > 1 else ''} {_listed(least)}",
            sentence="They change the hidden states least, which makes them the first candidates for removal.",
            best=None,
        )
    failed = sum(cell.failure is not None for cell in contents.cells)
    state = f"{failed} of {len(contents.cells)} cells failed; nothing was compared." if failed else ""
    return Verdict(headline=f"{model}: nothing compared with the dense model yet", sentence=state, best=None)


def _nothing_passes(model: str, ranked: Sequence[Ranking]) -> Verdict:
    cheapest = min((row for one in ranked for row in one.rows), key=_price)
    return Verdict(
        headline=f"No cut of {model} passes the gate",
        sentence=f"Cheapest is {cheapest.cell.label} at {cheapest.cell.amount}, {describe_row(cheapest, short=True)}, "
        f"but it {cheapest.fails}.",
        best=None,
    )


def _winner(model: str, ranked: Sequence[Ranking], fair: Sequence[Ranking], passing: Sequence[Ranking]) -> Verdict:
    """Return the verdict about the cells that come first, of the amounts at which one passes the gate."""
    won: dict[str, list[Row]] = {}
    for one in passing:
        won.setdefault(one.rows[0].cell.label, []).append(one.rows[0])
    name, firsts = min(won.items(), key=lambda item: (-len(item[1]), sum(map(_price, item[1])) / len(item[1])))
    best = firsts[-1]
    rivals = next(one.rows for one in fair if best in one.rows)
    parts = [f"{describe_row(best)}."]
    cheaper = min(rivals, key=_price)
    if cheaper.fails:
        parts.append(
            f"By price alone {cheaper.cell.label} would come first, {describe_row(cheaper, short=True)}, "
            f"but it {cheaper.fails}."
        )
    if len(rivals) > 1 and not rivals[1].fails:
        parts.append(f"Next is {rivals[1].cell.label}: {describe_row(rivals[1], short=True)}.")
    others = [f"{one.rows[0].cell.label} at {one.amount}" for one in passing if one.rows[0] not in firsts]
    if others:
        parts.append(f"Elsewhere {', '.join(others)} comes first.")
    elif len(passing) > 1:
        parts.append(f"It comes first at all {len(passing)} amounts.")
    refused = [one.amount for one in fair if one not in passing]
    if refused:
        parts.append(f"Nothing passes the gate at {', '.join(refused)}.")
    healed = [row for one in ranked if one.healed and one not in fair for row in one.rows]
    if healed:
        cheapest = min(healed, key=lambda row: (bool(row.fails), row.cell.amount != best.cell.amount, row.price))
        but = f", but it {cheapest.fails}" if cheapest.fails else ""
        parts.append(f"Best with training: {cheapest.cell.label}, {describe_row(cheapest, short=True)}{but}.")
    return Verdict(headline=f"{name} preserves {model} best", sentence=" ".join(parts), best=best)


def _single(model: str, row: Row) -> Verdict:
    cell = row.cell
    sentence = ""
    if cell.failure is not None:
        headline, sentence = f"{cell.label} failed at {cell.failure.stage}", cell.failure.error
    elif row.quality is None and cell.removed is not None:
        headline = f"{cell.label} removes {share(cell.removed)} of {model}"
        sentence = "Its quality was not compared with the dense model's."
    elif row.quality is None:
        speed = (
            f" decodes {row.decode:.2f} × as fast as {model}" if row.decode else " was not compared with another model"
        )
        headline = f"{Path(cell.label).name}{speed}"
    else:
        kept = f"perplexity at {row.ratio:.2f} × dense" if row.ratio else f"an accuracy of {row.accuracy:.3f}"
        size = f" with {share(cell.removed)} of {model} removed" if cell.removed else f" ({model})"
        headline = f"{cell.label} keeps {kept}{size}"
    if row.fails:
        sentence = f"It fails the gate: it {row.fails}."
    return Verdict(headline=headline, sentence=sentence, best=row)


def describe_row(row: Row, *, short: bool = False) -> str:
    """Return a clause about what one cell lost and how much it removed."""
    removed = share(row.cell.removed)
    size = f"{removed} removed" if short else f"{removed} of the parameters removed"
    if row.ratio is not None:
        return f"{row.ratio:.2f} ×{'' if short else ' the dense perplexity'} with {size}"
    lost = 100 * (row.lost or 0)
    return f"{abs(lost):.1f} points of accuracy {'lost' if lost > 0 else 'gained'} with {size}"


def share(value: float | None) -> str:
    """Format a fraction as a percentage with a non-breaking space."""
    return f"{100 * (value or 0):.1f}\N{NO-BREAK SPACE}%"


def _price(row: Row) -> float:
    assert row.price is not None
    return row.price


def _listed(numbers: Sequence[int]) -> str:
    words = [str(one) for one in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
