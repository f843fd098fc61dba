"""Widths improved by what the pruned model itself has lost: a few levels up in some blocks, down in others.

Each round measures what the model pruned to the widths so far has lost, and with one block at a time a level wider,
narrower, or with or without its attention (`operating_point.py`). Dynamic programming finds the exchange that promises
most at the amount asked for, and the next round measures what it is really worth, on windows that took no part in the
search: the best of many exchanges is lucky in part. Widths that lost no less there than those before are given up; then
only changes that promise more are tried. So what is lost never rises from round to round, and what was measured is kept
on disk.

Tang et al. 2025, "DarwinLM: Evolutionary Structured Pruning of Large Language Models", also exchange levels at equal
size and judge by the divergence; their exchanges are drawn at random, and their models stitched together from a
database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter

from secateur.files import cache_folder
from secateur.methods.allocation.frontier import Option, best_choices
from secateur.methods.allocation.operating_point import Parts, Point, losses_around
from secateur.methods.allocation.savings import AllWidths, Savings
from secateur.methods.allocation.widths import fading_of, lasting, without_empty
from secateur.methods.apply_widths import BrainSurgeon
from secateur.methods.method import Measurements
from secateur.methods.records import recorded
from secateur.plan.steps import Widths
from secateur.surgery.width.pruning import Refit
from secateur.versions import digest

_FORMAT = 5
_LEAST = 0.002
"""Nats that a change must promise after one round brought nothing."""
_MORE = 3.0
"""How many times as much after each further one."""


@dataclass(frozen=True)
class Neighbours:
    """Which widths may be exchanged.

    Attributes:
        levels: for each kind of width the units that may stay in a block, from all to none.
    """

    levels: Mapping[str, Mapping[int, Sequence[int]]]

    def of(self, widths: AllWidths) -> dict[int, list[Widths]]:
        """Return the other widths of each block: its MLP or its attention a level wider or narrower."""
        found: dict[int, list[Widths]] = {}
        for name, of_block in self.levels.items():
            for block, levels in of_block.items():
                own = widths[block]
                place = min(range(len(levels)), key=lambda one: abs(levels[one] - getattr(own, name)))
                near = [levels[one] for one in (place - 1, place + 1) if 0 <= one < len(levels)]
                found.setdefault(block, []).extend(own.model_copy(update={name: one}) for one in near)
        return found


def refined(
    measurements: Measurements,
    start: AllWidths,
    savings: Savings,
    neighbours: Neighbours,
    *,
    parts: Parts,
    refit: Refit,
    rounds: int,
    candidates: float | None = None,
) -> AllWidths:
    """Return widths that save as much as those at the start, at no more loss on the windows that judge.

    Args:
        measurements: of the dense model.
        start: widths that meet the budget.
        savings: what widths save in the unit of the budget.
        neighbours: which widths may be exchanged.
        parts: of the calibration windows.
        refit: how output projections are refitted when the plan is applied.
        rounds: how often exchanges are looked for.
        candidates: channels that go are among the smallest, this share of all; None: among all.

    Raises:
        NumericsError: NaN or infinity on the way.
    """

    def measured(widths: AllWidths, *, around: bool) -> Point:
        others = neighbours.of(widths) if around else {}
        return _measured(measurements, parts, widths, others, refit, candidates)

    best, least = measured(start, around=rounds > 0), 0.0
    seen = {start}
    for left in reversed(range(rounds)):
        proposal = exchange(best, savings, least, fading_of(measurements.decoder, refit))
        if proposal in seen:
            break
        seen.add(proposal)
        found = measured(proposal, around=left > 0)
        if found.judged < best.judged:
            best = found
        else:
            least = max(_LEAST, _MORE * least)
    return best.widths


def exchange(point: Point, savings: Savings, least: float = 0.0, fading: float = 0.0) -> AllWidths:
    """Return the widths that promise the lowest loss among those that save as much as those of a point.

    Args:
        point: widths, and the losses with others in one block.
        savings: what they save.
        least: nats that each change must promise to be made.
        fading: share by which a loss counts less for each block above it.
    """
    parts: list[tuple[int, str]] = []
    options: list[list[Option]] = []
    values: list[list[int]] = []
    for block, own in enumerate(point.widths):
        for name in ("channels", "groups"):
            now = getattr(own, name)
            found = {now: 0.0}
            for (changed, other), loss in point.others.items():
                if changed == block and getattr(other, name) != now:
                    rise = loss - point.loss
                    found[getattr(other, name)] = rise * lasting(block, len(point.widths), fading) + least
            parts.append((block, name))
            values.append(list(found))
            options.append([Option(savings.of(block, **{name: value}), loss) for value, loss in found.items()])
    path: dict[AllWidths, float] = {}
    for chosen in best_choices(options):
        widths = list(point.widths)
        for (block, name), value, level in zip(parts, values, chosen.levels, strict=True):
            widths[block] = widths[block].model_copy(update={name: value[level]})
        path.setdefault(tuple(widths), chosen.loss)
    limit = savings.weight(point.widths)
    hopeful = [one for one in without_empty(savings, path) if path[one] < 0]
    within = [one for one in hopeful if savings.weight(one) <= limit]
    return min(within, key=lambda one: (path[one], savings.weight(one)), default=point.widths)


def _measured(
    measurements: Measurements,
    parts: Parts,
    widths: AllWidths,
    others: Mapping[int, Sequence[Widths]],
    refit: Refit,
    candidates: float | None,
) -> Point:
    """Return the losses at these widths, from the disk if they were measured before."""
    decoder, options = measurements.decoder, measurements.options
    place = (str(decoder.module.dtype), decoder.device.type, options.batch_size, decoder.fingerprint)
    texts = [parts.fitted.fingerprint, parts.searched.fingerprint, parts.judged.fingerprint]
    asked = [_numbers(widths), [(block, _numbers(found)) for block, found in others.items()]]
    key = digest(_FORMAT, place, texts, asked, refit.repair, refit.ridge, refit.target, refit.align, candidates)
    path = cache_folder("widths", "around", f"{key}.json")
    trials = [(block, one) for block, found in others.items() for one in found]

    def losses() -> list[float]:
        choose = BrainSurgeon.before(refit, candidates)
        found = losses_around(decoder, parts, widths, others, choose, refit=refit, options=options)
        return [found.loss, found.judged, *(found.others[trial] for trial in trials)]

    count = len(trials) + 2
    kind = TypeAdapter(Annotated[list[float], Field(min_length=count, max_length=count)])
    loss, judged, *changed = recorded(path, kind, losses)
    return Point(widths, loss, judged, dict(zip(trials, changed, strict=True)))


def _numbers(widths: Sequence[Widths]) -> list[tuple[int, ...]]:
    return [(one.groups, one.queries, one.channels) for one in widths]
