"""Directions of the hidden states to keep, and least-squares input weights for layers that read only those.

Legend: D = dense width, d = kept width, H (tokens, D) = states at a reading point, P (D, d) = kept orthonormal
directions, x = H P. Sums are float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch

from secateur.calibration.products import GramSum, add_product, at_work
from secateur.calibration.ridge import GRID, held_out_gains, safest, strength
from secateur.calibration.statistics import device_with_float64
from secateur.distributed import add_up
from secateur.errors import NumericsError
from secateur.plan.hidden import Signals

Directions = torch.Tensor
"""P, (D, d) float64."""

RowsChange = Callable[[torch.Tensor], torch.Tensor]
"""A function of rows that acts on each independently."""

_SENSITIVITY_FLOOR = 0.3
"""Weight of the identity added to the gradient's second moments (trace D); 0.3 and 1 measured alike."""
_PRIOR = 1.0
"""Weight of the plain slice in `Reconstruction`, in multiples of as many tokens as there are kept directions.

Without it, few tokens do harm (the bundled model at 144 of 192 directions and 512 tokens: perplexity 36 instead of 25);
with many tokens it has no effect.
"""
_CHUNK_BYTES = 32 << 20


class Covariance:
    """Running sum of `Hᵀ H` over tokens, (D, D), float64."""

    def __init__(self, width: int, signals: Signals = "raw") -> None:
        """Start at zero for a stream of this width."""
        self._sum: GramSum | None = None
        self._width, self._normed = width, signals == "normed"

    def update(self, states: torch.Tensor) -> None:
        """Add states (tokens, D)."""
        if self._sum is None:
            self._sum = GramSum.zero(self._width, device_with_float64(states.device))
        states = at_work(states, self._sum.device)  # of a model spread over devices, states come from several
        if self._normed:
            states = unit_scale(states)
        self._sum.add(states, states)

    def combine(self) -> None:
        """Add what the other processes have summed."""
        assert self._sum is not None, "windows are never empty"
        add_up(self._sum.matrix)

    def matrix(self) -> torch.Tensor:
        """Return the sum so far.

        Raises:
            NumericsError: the states held NaN or infinity.
        """
        assert self._sum is not None, "windows are never empty"
        found = self._sum.matrix
        if not bool(torch.isfinite(found).all()):
            raise NumericsError("NaN or infinity in the hidden states (or their gradients); try --dtype float32.")
        return found


def principal_directions(covariance: torch.Tensor) -> Directions:
    """Return all eigenvectors as columns, largest eigenvalue first, (D, D), with the signs made unique."""
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * largest.sign()


def sensitive_directions(covariance: torch.Tensor, gradients: torch.Tensor, width: int) -> Directions:
    """Return loss-weighted principal directions, (D, d).

    With Γ the second moments of the loss gradient with respect to the states, errors are weighted by
    `S = (Γ·D/trace Γ + 0.3 I)^½`; the principal directions of S·C·S are mapped back by S⁻¹ and orthonormalised.
    """
    size = len(covariance)
    gradients = gradients.to(covariance.device)
    weight = gradients * (size / gradients.trace().clamp_min(1e-300))
    weight.diagonal().add_(_SENSITIVITY_FLOOR)
    values, vectors = torch.linalg.eigh(weight)
    root = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors * values.rsqrt()) @ vectors.T
    return torch.linalg.qr(inverse @ principal_directions(root @ covariance @ root)[:, :width]).Q


class Reconstruction:
    """Least squares for the input weights of a layer: M (D, d) such that norm(x) Mᵀ is closest to norm(H).

    A plain slice has input weights `W P`. `W M` also predicts the dropped directions from the kept ones, and
    compensates for the energy that the norm no longer sees. The solution is regularised toward P, as strongly as is
    best on held-out tokens; where none is better there, it is P.
    """

    def __init__(self, directions: Directions, eps: float) -> None:
        """Start for these directions; `eps` is that of the norm."""
        dense, width = directions.shape
        self._directions, self._eps = directions, eps
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=directions.device)
        self._grams = [GramSum(one) for one in zeros(2, width, width)]  # fitted tokens, then held-out ones
        self._cross = zeros(2, width, dense)
        self._tokens = 0

    def update(
        self, states: torch.Tensor, weight: torch.Tensor | None = None, held_out: torch.Tensor | None = None
    ) -> None:
        """Add states H (tokens, D), with the weight of each token and whether it evaluates the fit, both (tokens,)."""
        states = at_work(states, self._directions.device)
        self._tokens += len(states)
        kept = states @ self._directions.to(states)
        kept = kept / (kept.pow(2).sum(-1, keepdim=True) / states.shape[1] + self._eps).sqrt()
        whole = unit_scale(states, self._eps)
        folds = torch.zeros(len(states), dtype=torch.bool) if held_out is None else held_out.cpu()
        heavy = states.new_ones(len(states)) if weight is None else weight.to(states)
        for fold in folds.unique().tolist():
            rows = (folds == fold).nonzero().flatten().to(states.device)
            weighted = kept[rows] * heavy[rows, None]
            self._grams[int(fold)].add(weighted, kept[rows])
            add_product(self._cross[int(fold)], weighted, whole[rows])

    def reading(self) -> Directions:
        """Return M, (D, d)."""
        gram = torch.stack([one.matrix for one in self._grams])
        missing = self._cross - gram @ self._directions.T
        ridge = self._best_strength(gram, missing)
        if ridge is None:
            return self._directions
        steady = gram.sum(dim=0)
        steady.diagonal().add_(ridge)
        return self._directions + torch.linalg.solve(steady, missing.sum(dim=0)).T

    def _best_strength(self, gram: torch.Tensor, missing: torch.Tensor) -> float | None:
        """Return λ; without held-out tokens it fades as their number grows."""
        if not bool(gram[1].any()):
            return float(_PRIOR * gram[0].diagonal().mean()) * gram.shape[1] / max(1, self._tokens) or 1.0
        strengths = [strength(gram[0], ridge) for ridge in GRID]
        return safest(held_out_gains(gram[0], missing[0], gram[1], missing[1], strengths), strengths)


def unit_scale(states: torch.Tensor, eps: float = 1e-24) -> torch.Tensor:
    """Divide each state by its root mean square."""
    return states / (states.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def times(tensor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply in float64 and return float32, some rows at a time, so that no float64 copy of a whole table is made."""

    def product(rows: torch.Tensor) -> torch.Tensor:
        return (rows.to(matrix.device, torch.float64) @ matrix).float()

    return product(tensor) if tensor.dim() == 1 else by_rows(tensor, product)


def by_rows(tensor: torch.Tensor, change: RowsChange, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Apply a function to some rows (along the first dimension) at a time, so that only the result is full size."""
    step = max(1, _CHUNK_BYTES // (8 * tensor[0].numel()))
    parts = (change(tensor[first : first + step]) for first in range(0, len(tensor), step))
    first = next(parts)
    found = first.new_empty(len(tensor), *first.shape[1:], dtype=dtype)
    for number, part in enumerate(itertools.chain([first], parts)):
        found[number * step : number * step + step] = part
    return found
