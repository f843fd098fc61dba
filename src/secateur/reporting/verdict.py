"""The ranking of cells by price, the Pareto front, and the sentence at the top of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The cells of one amount, cheapest first."""

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


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Say of each (cost, cost) point whether no other is at least as low in both and lower in one."""
    front = {points[place] for place in pareto_front(points)}
    return [point in front for point in points]


def rankings(rows: Sequence[Row]) -> list[Ranking]:
    """Rank the cells of each amount by price, healed cells separately."""
    groups: dict[tuple[bool, str], list[Row]] = {}
    for row in rows:
        if row.price is not None:
            groups.setdefault((row.cell.healing is not None, row.cell.amount), []).append(row)
    ranked = [
        Ranking(amount=amount, healed=healed, rows=tuple(sorted(group, key=_price)))
        for (healed, amount), group in groups.items()
    ]
    return sorted(ranked, key=lambda one: (one.healed, sum(row.cell.removed or 0 for row in one.rows) / len(one.rows)))


def verdict(contents: Contents, rows: Sequence[Row]) -> Verdict:
    """Return the verdict: which method keeps the most quality, or how the single model did."""
    model = contents.model_name
    ranked = rankings(rows)
    if contents.is_study and ranked:
        return _winner(model, ranked)
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


def _winner(model: str, ranked: Sequence[Ranking]) -> Verdict:
    fair = [one for one in ranked if not one.healed] or list(ranked)
    won: dict[str, list[Row]] = {}
    for one in fair:
        won.setdefault(one.rows[0].cell.label, []).append(one.rows[0])
    name, firsts = min(won.items(), key=lambda item: (-len(item[1]), sum(map(_price, item[1])) / len(item[1])))
    best = firsts[-1]
    rivals = next(one.rows for one in fair if best in one.rows)
    parts = [f"{describe_row(best)}."]
    if len(rivals) > 1:
        parts.append(f"Next is {rivals[1].cell.label}: {describe_row(rivals[1], short=True)}.")
    others = [f"{one.rows[0].cell.label} at {one.amount}" for one in fair if one.rows[0] not in firsts]
    if others:
        parts.append(f"Elsewhere {', '.join(others)} comes first.")
    elif len(fair) > 1:
        parts.append(f"It comes first at all {len(fair)} amounts.")
    healed = [row for one in ranked if one.healed and one not in fair for row in one.rows]
    if healed:
        cheapest = min(healed, key=lambda row: (row.cell.amount != best.cell.amount, row.price))
        parts.append(f"Best with training: {cheapest.cell.label}, {describe_row(cheapest, short=True)}.")
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
