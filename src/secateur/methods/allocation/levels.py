"""The widths that attention and the MLP of each block can be given, with the error that each leaves after repair.

Kurtic et al. 2023, "ZipLM: Inference-Aware Structured Pruning of Language Models" (NeurIPS): greedy removal by optimal
brain surgery gives all widths of a layer in one pass, as prefixes of one order. Errors are those of the repaired output
projection on windows held out of the fit, each token relative to the residual stream that leaves the block, so that
errors of different blocks can be compared. Everything is measured on the dense model.

Legend: W = output projection (out, n); level = number of channels, or of key/value groups, that stay, down to none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from secateur.calibration.folds import folds_of
from secateur.calibration.inputs import InputSums, Moments
from secateur.calibration.ridge import UNJUDGED, strength
from secateur.calibration.walk import open_store, stored_start, through_block
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths
from secateur.plan.steps import Widths
from secateur.run_options import DEFAULTS, RunOptions
from secateur.scores.removal import Branch
from secateur.scores.unit_scores import order_by_surgeon
from secateur.surgery.width.coupling import Part
from secateur.surgery.width.inputs import measure_inputs, writer_weights
from secateur.surgery.width.pruning import units_of

_MOST = 12
"""Maximum number of levels between all and none, about."""


@dataclass(frozen=True)
class Levels:
    """The widths that one branch can be given.

    Attributes:
        block: its block.
        part: attention or MLP.
        keep: key/value groups or channels that stay at each level, from all to none.
        errors: error at each level, as a share of the residual stream, squared; 0 for the first.
        probe: a level between, whose loss is measured; the last if there is none between.
    """

    block: int
    part: Part
    keep: tuple[int, ...]
    errors: tuple[float, ...]
    probe: int


def levels_of(units: int, multiple: int) -> tuple[int, ...]:
    """Return the levels of a branch, from all units to none, those between in multiples."""
    apart = max(1, round(units / _MOST / multiple)) * multiple
    return (units, *reversed(range(apart, units, apart)), 0)


def levels_by_branch(decoder: Decoder, free: Sequence[int], multiple: int, groups: Sequence[int]) -> dict[Branch, Keep]:
    """Return the levels of the MLPs of the free blocks, and of attention in blocks that may lose single groups.

    Args:
        decoder: the dense model.
        free: blocks whose MLP may lose channels.
        multiple: channels stay in multiples of this.
        groups: blocks whose attention may lose single key/value groups; with one, there is nothing between.
    """
    found: dict[Branch, Keep] = {}
    for block in free:
        widths = block_widths(decoder, block)
        if block in groups and widths.groups > 1:
            found[block, "heads"] = levels_of(widths.groups, 1)
        if widths.channels:
            found[block, "channels"] = levels_of(widths.channels, multiple)
    return found


class Known(Protocol):
    """What was measured of blocks before."""

    def __contains__(self, block: int, /) -> bool:
        """Return whether this block was measured."""


Keep = tuple[int, ...]
Writers = tuple[torch.Tensor, ...]
"""W of each expert (one if there are none), zeros in the removed columns; float32."""


@torch.no_grad()
def measure_levels(
    decoder: Decoder,
    windows: Windows,
    levels: Mapping[Branch, Keep],
    known: Known = (),
    *,
    candidates: float | None = None,
    options: RunOptions = DEFAULTS,
) -> Iterator[list[tuple[Levels, Writers]]]:
    """Measure the levels of branches on the dense model, block by block.

    With each comes its output projection at the level between. Blocks in `known` are not measured again. `candidates`
    is that of `order_by_surgeon`.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    wanted = {branch: keep for branch, keep in levels.items() if branch[0] not in known}
    last = max((block for block, _ in wanted), default=-1) + 1
    if not last:
        return
    folds = folds_of(windows)
    judged = folds.held_out if bool(folds.held_out.any()) else torch.ones_like(folds.held_out)
    scale = float((folds.weight * windows.token_counts())[judged].sum()) * decoder.hidden_size
    with open_store(decoder) as store:
        batches = stored_start(decoder, windows, store, options.batch_size)
        for index in options.progress(range(last), "measuring widths block by block", last):
            with decoder.block(index):
                parts = [part for block, part in wanted if block == index]
                if not parts:
                    through_block(decoder, index, batches, store)
                    continue
                sums = measure_inputs(decoder, index, parts, batches, store, folds, advance=True)
                yield [
                    _measured(decoder, (index, part), wanted[index, part], sums[part], scale, candidates)
                    for part in parts
                ]


def _measured(
    decoder: Decoder,
    branch: Branch,
    levels: Keep,
    sums: list[InputSums],
    scale: float,
    candidates: float | None,
) -> tuple[Levels, Writers]:
    """Return the levels of attention or an MLP, or of all experts alike, and W at the level between."""
    block, part = branch
    dense = block_widths(decoder, block)
    units, _ = units_of(part, dense, Widths(groups=0, queries=max(1, dense.queries), channels=0))
    probe, each = len(levels) // 2, units.shape[2]
    errors, writers = torch.zeros(len(levels), dtype=torch.float64), []
    for weight, one in zip(writer_weights(decoder, block, part), sums, strict=True):
        weight = weight.to(one.total.device)
        assert one.fitted is not None
        units = units.to(weight.device)
        order = order_by_surgeon(weight, one, units, candidates=candidates)
        inputs, counts = units[0, order.flip(0)].flatten(), [each * keep for keep in levels]
        fits = nested_fits(weight, one.fitted, one.held_out or one.fitted, inputs)
        errors += torch.tensor([fits.error(count) for count in counts], dtype=torch.float64) / scale
        writer = torch.zeros_like(weight)
        writer[:, inputs[: counts[probe]]] = fits.weight(counts[probe])
        writers.append(writer.float().cpu().contiguous())
    return Levels(block, part, levels, tuple(errors.cummax(dim=0).values.tolist()), probe), tuple(writers)


@dataclass(frozen=True)
class NestedFits:
    """A projection refitted to the first 1, 2, 3, … of its inputs in some order.

    Attributes:
        factor: Cholesky factor L of G + λI, (n, n).
        turned: Lᵀ Wᵀ, (n, out).
        missing: P ∘ (Lᵀ Wᵀ)(Lᵀ Wᵀ)ᵀ with P = L⁻¹ H L⁻ᵀ, (n, n).
    """

    factor: torch.Tensor
    turned: torch.Tensor
    missing: torch.Tensor

    def weight(self, count: int) -> torch.Tensor:
        """Return W'_K for the first `count` inputs K, (out, K)."""
        corner = self.factor[:count, :count].T
        return torch.linalg.solve_triangular(corner, self.turned[:count], upper=True).T

    def error(self, count: int) -> float:
        """Return Σ w ‖W x − W'_K x_K‖² over the held-out tokens, for the first `count` inputs K."""
        return float(self.missing[count:, count:].sum())


def nested_fits(weight: torch.Tensor, fitted: Moments, held_out: Moments, order: torch.Tensor) -> NestedFits:
    """Refit a projection to the first 1, 2, 3, … of its inputs: W'_K (G_KK + λI) = W G_:K + λ W_K.

    With the inputs in this order the Cholesky factor of G + λI = L Lᵀ has that of every smaller one as its corner, so
    W'_K = [W L]_K L_KK⁻¹, and what it misses is [W L]_R L⁻¹ x at the others R. So one factor serves all, and the error
    of each is the sum of a corner of one matrix.

    Args:
        weight: W, (out, n), float64.
        fitted: sums G over the tokens of the fit.
        held_out: sums H over the tokens that evaluate it.
        order: the inputs, those that stay longest first, (n,).
    """
    gram = fitted.gram[order][:, order]
    gram.diagonal().add_(strength(fitted.gram, UNJUDGED))
    factor = torch.linalg.cholesky(gram)
    del gram
    turned = factor.T @ weight[:, order].T
    half = torch.linalg.solve_triangular(factor, held_out.gram[order][:, order], upper=False)
    missing = torch.linalg.solve_triangular(factor, half.T, upper=False)
    return NestedFits(factor, turned, missing.mul_(turned @ turned.T))
