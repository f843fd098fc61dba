"""Slice hidden states with bases that many reading points share (docs/methods/stock-slicing.md).

One basis for the whole model needs no shortcut matrices and keeps the architecture stock; with k bases there are
shortcuts only where the basis changes. A basis holds the principal directions of Σ_p C_p over its reading points p,
weighted by how much the loss depends on them; the states are those of the dense model.

Legend: D = dense width, d = kept width, P (D, d) = orthonormal directions of one basis, M (D, d) = input weights of a
layer in place of P (`Reconstruction`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from secateur.calibration.folds import folds_of
from secateur.calibration.reading_points import (
    Visit,
    points_per_block,
    reading_norms,
    visit_gradients,
    visit_reading_points,
)
from secateur.calibration.statistics import device_with_float64
from secateur.data.windows import Windows
from secateur.models.anatomy import find
from secateur.models.decoder import Decoder
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.hidden.directions import (
    Covariance,
    Directions,
    Reconstruction,
    Signals,
    principal_directions,
    sensitive_directions,
    unit_scale,
)
from secateur.surgery.hidden.folding import folded_block, norm_eps
from secateur.surgery.hidden.outer import put_outer
from secateur.surgery.hidden.own_bases import (
    empty_sliced,
    imprint_of,
    rotate_readers,
    rotate_writers,
    sliced_fingerprint,
)
from secateur.surgery.hidden.stock import StockSlicing


@dataclass(frozen=True)
class SharedBases:
    """Which blocks share a basis, and the bases.

    Attributes:
        starts: first block of each basis, ascending, the first 0.
        directions: P of each basis, (D, d).
    """

    starts: tuple[int, ...]
    directions: tuple[Directions, ...]

    def of_block(self, index: int) -> Directions:
        """Return P of a block; the head, counted as one more block, belongs to the last basis."""
        return self.directions[basis_of(self.starts, index)]


def basis_of(starts: Sequence[int], block: int) -> int:
    """Return the number of a block's basis."""
    return sum(block >= start for start in starts) - 1


class Slicing(Protocol):
    """A sliced model under construction, block by block."""

    def block(self, index: int, readings: Sequence[Directions]) -> None:
        """Slice block `index`, whose dense weights are present, with M of each of its reading points."""

    def finish(self, reading: Directions) -> Decoder:
        """Slice embeddings and head, the latter with M, and give the model."""


class FoldedSlicing:
    """Slices into the architecture of the modelling file."""

    def __init__(self, decoder: Decoder, bases: SharedBases) -> None:
        """Start empty.

        Raises:
            ModelError: the family cannot be sliced.
        """
        points, blocks = points_per_block(decoder), decoder.block_count
        width = bases.directions[0].shape[1]
        borders = {points * start - 1 for start in bases.starts[1:]}
        self._points, self._dense, self._bases = points, decoder, bases
        self._assembly = empty_sliced(
            decoder, [width] * (points * blocks + 1), [one in borders for one in range(points * blocks)]
        )

    def block(self, index: int, readings: Sequence[Directions]) -> None:
        """Slice block `index`, whose dense weights are present, with M of each of its reading points."""
        assembly, here, following = self._assembly, self._bases.of_block(index), self._bases.of_block(index + 1)
        where = assembly.block_path(index)
        weights = folded_block(self._dense, index)
        assembly.put(where, rotate_readers(weights, readings[0], attention=True))
        assembly.put(where, rotate_readers(weights, readings[-1], attention=False))
        assembly.put(where, rotate_writers(weights, here if self._points == 2 else following, attention=True))
        assembly.put(where, rotate_writers(weights, following, attention=False))
        if following is not here:
            assembly.put(where, {"mlp_shortcut.weight": (here.T @ following).T})
        assembly.finish(index)

    def finish(self, reading: Directions) -> Decoder:
        """Slice embeddings and head, the latter with M, and give the model."""
        put_outer(self._assembly, self._bases.directions[0], reading)
        return self._assembly.result(sliced_fingerprint([imprint_of(one) for one in self._bases.directions]))


def slice_with_shared_bases(
    decoder: Decoder,
    windows: Windows,
    bases: SharedBases,
    *,
    stock: bool,
    reconstruct: bool = True,
    options: RunOptions = DEFAULTS,
) -> Decoder:
    """Slice with the given bases.

    Args:
        decoder: the dense model; it is not changed.
        windows: calibration windows, read if `reconstruct` is on.
        bases: the bases; a stock model takes one.
        stock: keep the architecture, or use the modelling file.
        reconstruct: use M, fitted by least squares, instead of P where that is better on held-out windows.
        options: batch size and progress.

    Raises:
        ModelError: the family cannot be sliced, or not as a stock model.
        NumericsError: NaN or infinity on the way.
    """
    target: Slicing = StockSlicing(decoder, bases.directions[0]) if stock else FoldedSlicing(decoder, bases)
    points, head = points_per_block(decoder), points_per_block(decoder) * decoder.block_count
    if not reconstruct:
        for index in range(decoder.block_count):
            with decoder.block(index) as block:
                target.block(index, [bases.of_block(index)] * len(reading_norms(decoder, block)))
        return target.finish(bases.directions[-1])
    eps = norm_eps(find(decoder.module, decoder.anatomy.family.final[0]))
    fits: dict[int, Reconstruction] = {}
    folds = folds_of(windows)

    def visit(point: int, states: torch.Tensor, window: torch.Tensor) -> None:
        if point not in fits:
            fits[point] = Reconstruction(bases.of_block(point // points), eps)
        fits[point].update(states, folds.weight[window], folds.held_out[window])

    def after_block(index: int) -> None:
        norms = reading_norms(decoder, decoder.block_list[index])
        target.block(index, [fits.pop(points * index + one).reading() for one in range(len(norms))])

    visit_reading_points(decoder, windows, visit, after_block=after_block, options=options)
    return target.finish(fits.pop(head).reading())


def find_bases(
    decoder: Decoder,
    windows: Windows,
    width: int,
    starts: tuple[int, ...] = (0,),
    *,
    signals: Signals = "normed",
    sensitivity: bool = True,
    options: RunOptions = DEFAULTS,
) -> SharedBases:
    """Measure the bases.

    Args:
        decoder: the dense model.
        windows: calibration windows.
        width: d, number of kept directions.
        starts: first block of each basis.
        signals: whether covariances are those of the states before or after the norm.
        sensitivity: weight errors by their effect on the loss (costs a backward pass).
        options: batch size and progress.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    points = points_per_block(decoder)

    def into(sums: list[Covariance]) -> Visit:
        return lambda point, states, _: sums[basis_of(starts, point // points)].update(states)

    covariances = [Covariance(decoder.hidden_size, signals) for _ in starts]
    visit_reading_points(decoder, windows, into(covariances), options=options)
    if not sensitivity:
        found = [principal_directions(one.matrix())[:, :width] for one in covariances]
        return SharedBases(starts, tuple(found))
    gradients = [Covariance(decoder.hidden_size) for _ in starts]
    visit_gradients(decoder, windows, into(gradients), options=options)
    pairs = zip(covariances, gradients, strict=True)
    return SharedBases(starts, tuple(sensitive_directions(c.matrix(), g.matrix(), width) for c, g in pairs))


def find_coordinates(decoder: Decoder, windows: Windows, width: int, *, options: RunOptions = DEFAULTS) -> SharedBases:
    """Return the hidden dimensions with the largest activations, as a basis of unit vectors (Minitron).

    A dimension's activation is the mean over tokens of its absolute value after the norms of attention and MLP,
    including their scales, summed over all blocks. (Muralidharan et al. 2024, "Compact Language Models via Pruning and
    Knowledge Distillation", section 2.2, takes the 2-norm of such means over windows of text.)
    """
    family, points = decoder.anatomy.family, points_per_block(decoder)
    sizes = torch.zeros(decoder.hidden_size, dtype=torch.float64)

    def visit(point: int, states: torch.Tensor, _: torch.Tensor) -> None:
        if point >= points * decoder.block_count:
            return
        norms: list[Any] = [*reading_norms(decoder, decoder.block_list[point // points])]
        scale = norms[point % points].weight.to(states.device, torch.float32) + (family.norm == "rms-plus-one")
        sizes.add_((unit_scale(states.float()) * scale).abs().sum(dim=0).cpu().double())

    visit_reading_points(decoder, windows, visit, options=options)
    largest = sizes.argsort(descending=True, stable=True)[:width].sort().values
    directions = torch.eye(len(sizes), dtype=torch.float64)[:, largest]
    return SharedBases((0,), (directions.to(device_with_float64(decoder.device)),))


def find_borders(
    decoder: Decoder, windows: Windows, count: int, *, signals: Signals = "normed", options: RunOptions = DEFAULTS
) -> tuple[int, ...]:
    """Return the first block of each of `count` bases, with borders where adjacent covariances differ most.

    The distance between two blocks is the Frobenius norm of the difference of their covariances, each scaled to trace
    1.
    """
    if count == 1:
        return (0,)
    points = points_per_block(decoder)
    distances: dict[int, float] = {}
    last: list[torch.Tensor] = []
    current = Covariance(decoder.hidden_size, signals)

    def visit(point: int, states: torch.Tensor, _: torch.Tensor) -> None:
        if point < points * decoder.block_count:
            current.update(states)

    def after_block(index: int) -> None:
        nonlocal current
        shape = (current.matrix() / current.matrix().trace()).cpu()
        if last:
            distances[index] = float(torch.linalg.norm(shape - last.pop()))
        last.append(shape)
        current = Covariance(decoder.hidden_size, signals)

    visit_reading_points(decoder, windows, visit, after_block=after_block, options=options)
    farthest = sorted(distances, key=lambda block: (-distances[block], block))[: count - 1]
    return (0, *sorted(farthest))
