"""ReplaceMe: windows of blocks are removed, each replaced by a matrix on the MLP output of the block before it.

Shopkhoev et al. 2025, "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization"
(arXiv:2505.02819). The matrix is the solution of a least-squares problem; nothing is trained, and it is folded into
existing weights, so the result is a stock model.

With the state X^l = R + P that enters the window (P: what the MLP of the block before adds) and X^{l+n} that leaves it,
T = argmin ‖R + P T − X^{l+n}‖² + λ‖T − I‖², λ = ridge · mean diagonal of Pᵀ P. Departures from the paper: the ridge
regularises toward the identity, so that a strong one simply drops the blocks; and the window can be chosen by the error
that remains after T, relative to the size of the target state, not only by the distance before.

Where the paper removes one window, by default the blocks of lowest influence are removed, those of ShortGPT, and
neighbours among them are one window: on a real model, errors of windows say little about what several cost together
(docs/methods/replaceme.md). The matrices are all measured on the uncut model, in one walk. The first block is never in
a window, since there is no block before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from secateur.calibration.ridge import UNJUDGED
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.methods.asked import Asked
from secateur.methods.budget import Budget, choose_blocks, weigh
from secateur.methods.method import Applied, Measurements, Settings, applies, method
from secateur.models.anatomy import mlp_writers
from secateur.models.decoder import Decoder
from secateur.plan.depth import LinearReplacement, Span, linear_replacement_work
from secateur.plan.work import Work
from secateur.scores.linearity import linear_sums, ridge_of
from secateur.surgery.depth.blocks import can_go, require_removable
from secateur.surgery.depth.linear_replacement import replace_linearly, require_plain_mlp_output

Choice = Literal["influence", "error", "cosine", "angular"]


class LinearReplacementSettings(Settings):
    """Settings of `replaceme`; the block before a window counts as changed."""

    choose: Choice = Field(
        "influence", description="the blocks of lowest influence, or windows by least-squares error, cosine or angle"
    )
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        "auto", description="regularisation of the matrix toward the identity; by default chosen on held-out windows"
    )
    objective: Literal["least-squares", "cosine"] = Field(
        "cosine", description="what the matrix minimises: the squared error of the state, or 1 − its cosine"
    )
    max_window: int | None = Field(
        None, ge=1, description="longest window; by default any with influence, else as short as the amount allows"
    )
    window: int | None = Field(None, ge=0, description="number of blocks to remove, all in one window (the paper's n)")

    @property
    def single_blocks(self) -> bool:
        """Whether blocks are chosen one by one, whatever windows they make."""
        return self.choose == "influence" and self.max_window is None and self.window is None

    def longest(self, count: int, free: int) -> int:
        """Return the longest window allowed when `count` of `free` neighbouring blocks are removed."""
        if self.window is not None:
            return max(1, count)
        return self.max_window or next(size for size in range(1, free) if most_blocks(free, size) >= count)

    def own_amount(self) -> Budget | None:
        """Return the paper's n."""
        return None if self.window is None else Budget("blocks", self.window, knob="window")


def _forwards(_asked: Asked, settings: LinearReplacementSettings, _windows: Windows) -> Work:
    return Work(2.0, covariances=1.0) if settings.choose == "error" else Work(1.0)


@method(
    order=40,
    name="replaceme",
    summary="remove windows of blocks and fold a least-squares matrix for each into the block before it",
    paper="Shopkhoev et al. 2025, ReplaceMe",
    settings=LinearReplacementSettings,
    forwards=_forwards,
    apply_forwards=lambda _asked, _settings, _tokens: linear_replacement_work(),
)
def decide(
    measurements: Measurements, settings: LinearReplacementSettings, budget: Budget
) -> Sequence[LinearReplacement]:
    """Choose the windows.

    Raises:
        InputError: too few blocks are free, or the budget is out of reach.
        ModelError: the family has a norm between the MLP and the residual stream.
        NumericsError: NaN or infinity while measuring.
    """
    if budget.is_zero:
        return ()
    decoder = measurements.decoder
    require_plain_mlp_output(decoder)
    free = settings.free_blocks(decoder.block_count)
    most = most_blocks(len(free), settings.max_window)
    if most < 1:
        raise InputError(
            f"replaceme: fewer than two of {decoder.block_count} blocks may change; lower protect_first or "
            "protect_last."
        )
    errors: dict[Span, float] = {}

    def windows_for(count: int) -> tuple[Span, ...]:
        if settings.single_blocks:
            return least_influence(decoder, measurements.block_influence(), free, count)
        sizes = window_sizes(count, settings.longest(count, len(free)))
        costs = _costs(measurements, settings, free, sizes)
        if settings.choose == "error":
            errors.update(costs)
        found = best_windows(free, sizes, costs)
        if not all(math.isfinite(costs[span]) for span in found):
            require_removable(decoder, [block for low, high in found for block in range(low, high + 1)])
            raise _too_many(count)
        return found

    found = _windows_within(budget, windows_for, most, decoder)
    return (
        LinearReplacement(
            method="replaceme",
            settings=settings.model_dump(exclude_none=True),
            windows=found,
            ridge=settings.ridge,
            objective=settings.objective,
            error=tuple(errors[span] for span in found if span in errors),
        ),
    )


def _windows_within(
    budget: Budget, windows_for: Callable[[int], tuple[Span, ...]], most: int, decoder: Decoder
) -> tuple[Span, ...]:
    """Choose the number of blocks that meets the budget; if it is not known in advance, try 1, 2, 3, …"""
    sizes, total = decoder.block_parameter_counts(), decoder.parameter_count
    if budget.aim == "blocks" or len(set(weigh(budget, sizes, total)[0])) == 1:
        any_blocks = (tuple(range(count)) for count in range(1, most + 1))
        return windows_for(len(choose_blocks(budget, any_blocks, sizes, total, most)))
    tried: dict[tuple[int, ...], tuple[Span, ...]] = {}

    def candidates() -> Iterator[tuple[int, ...]]:
        for count in range(1, most + 1):
            windows = windows_for(count)
            blocks = tuple(block for low, high in windows for block in range(low, high + 1))
            tried[blocks] = windows
            yield blocks

    return tried[choose_blocks(budget, candidates(), sizes, total, most)]


def most_blocks(free: int, longest: int | None) -> int:
    """Return how many of `free` neighbouring blocks can be removed if a block remains before each window."""
    if longest is None:
        return max(0, free - 1)
    whole, rest = divmod(free, longest + 1)
    return whole * longest + max(0, rest - 1)


def window_sizes(count: int, longest: int) -> tuple[int, ...]:
    """Split a number of blocks into as few windows as allowed, as equal in size as possible, largest first."""
    parts = -(-count // longest)
    small, larger = divmod(count, parts)
    return (small + 1,) * larger + (small,) * (parts - larger)


def best_windows(free: range, sizes: tuple[int, ...], costs: Mapping[Span, float]) -> tuple[Span, ...]:
    """Place windows of these sizes among the free blocks, each after a block that remains, at the lowest total cost."""

    @cache
    def best(first: int, sizes: tuple[int, ...]) -> tuple[float, tuple[Span, ...]] | None:
        if not sizes:
            return 0.0, ()
        if first + len(sizes) + sum(sizes) > free.stop:
            return None
        found = [best(first + 1, sizes)]
        for size in sorted(set(sizes)):
            span = (first + 1, first + size)
            others = list(sizes)
            others.remove(size)
            rest = best(span[1] + 1, tuple(others))
            if rest is not None:
                found.append((costs[span] + rest[0], (span, *rest[1])))
        return min((one for one in found if one is not None), default=None)

    placed = best(free.start, sizes)
    assert placed is not None, "most_blocks leaves room for these sizes"
    return placed[1]


def least_influence(decoder: Decoder, influence: Sequence[float], free: range, count: int) -> tuple[Span, ...]:
    """Return the windows that the blocks of lowest influence make, of those that can be replaced.

    Args:
        decoder: the model.
        influence: of every block.
        free: blocks that may change; the first of them stays, since a matrix is folded into the one before a window.
        count: number of blocks to remove.

    Raises:
        InputError: fewer can be.
    """
    windows: tuple[Span, ...] = ()
    for block in sorted(free[1:], key=lambda block: influence[block]):
        if sum(high - low + 1 for low, high in windows) == count:
            break
        found = _with_block(windows, block)
        if all(_can_be_replaced(decoder, span) for span in found):
            windows = found
    if sum(high - low + 1 for low, high in windows) < count:
        require_removable(decoder, free[1:])
        raise _too_many(count)
    return windows


def _with_block(windows: tuple[Span, ...], block: int) -> tuple[Span, ...]:
    """Add a block to windows, which join where they meet."""
    low, high = block, block
    apart = []
    for first, last in windows:
        if first <= block + 1 and last >= block - 1:
            low, high = min(low, first), max(high, last)
        else:
            apart.append((first, last))
    return tuple(sorted([*apart, (low, high)]))


def _too_many(count: int) -> InputError:
    return InputError(f"replaceme: no {count} blocks of this model stand after an MLP and can be removed.")


def _costs(
    measurements: Measurements, settings: LinearReplacementSettings, free: range, sizes: tuple[int, ...]
) -> dict[Span, float]:
    """Return the cost of each window of these sizes, by the chosen criterion."""
    everywhere = [
        (low, low + size - 1) for size in sorted(set(sizes)) for low in range(free.start + 1, free.stop - size + 1)
    ]
    spans = [span for span in everywhere if _can_be_replaced(measurements.decoder, span)]
    impossible = dict.fromkeys(set(everywhere) - set(spans), math.inf)
    if settings.choose == "error":
        ridge = UNJUDGED if settings.ridge == "auto" else settings.ridge
        known = measurements.cache.setdefault(("least-squares error", ridge), {})
        unknown = [span for span in spans if span not in known]
        if unknown:
            sums = linear_sums(measurements.decoder, measurements.need_windows(), unknown, options=measurements.options)
            known.update({span: one.held_out_error(ridge) for span, one in sums})
        return impossible | {span: known[span] for span in spans}
    if settings.choose == "influence":
        influence = measurements.block_influence()
        return impossible | {(low, high): sum(influence[low : high + 1]) for low, high in spans}
    scores = measurements.scores(settings.choose)
    if settings.choose == "cosine":
        return impossible | {(low, high): 1 - scores.window_cosine(high - low + 1)[low] for low, high in spans}
    return impossible | {(low, high): scores.window_angle(high - low + 1)[low] for low, high in spans}


def _can_be_replaced(decoder: Decoder, span: Span) -> bool:
    """Return whether a window may go and the block before it has an MLP whose output the matrix can be folded into."""
    low, high = span
    writers = mlp_writers(decoder.block_list[low - 1], decoder.anatomy.family)
    return next(writers, None) is not None and can_go(decoder, range(low, high + 1))


@applies(LinearReplacement)
def apply(measurements: Measurements, step: LinearReplacement) -> Applied:
    """Measure the matrices and replace the step's windows by them."""
    decoder = measurements.decoder
    step.kept_blocks(decoder.block_count)
    require_plain_mlp_output(decoder)
    matrices, fits = dict[Span, torch.Tensor](), list[dict[str, Any]]()
    cosine = step.ridge if step.objective == "cosine" else None
    for span, sums in linear_sums(
        decoder, measurements.need_windows(), step.windows, cosine=cosine, options=measurements.options
    ):
        ridge = ridge_of(sums, step.ridge)
        matrices[span] = sums.result(ridge)
        fits.append(
            {
                "window": list(span),
                "ridge": ridge,
                "error": round(sums.held_out_error(ridge), 5),
                "error_without_repair": round(sums.held_out_error(None), 5),
            }
        )
    return Applied(replace_linearly(decoder, matrices), {"repair": fits})
