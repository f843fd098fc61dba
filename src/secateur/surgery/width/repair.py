"""Refit a projection when some of its inputs are removed: closed-form least squares whose ridge is cross-validated.

With the Gram matrix G = Σ w x xᵀ of the inputs over calibration tokens, K the remaining inputs, and R the removed ones:

    W'_K = W_K + (W_R G[R,K] + Σ w m x_Kᵀ) (G[K,K] + λI)⁻¹,    λ = ridge · mean diagonal of G,

which minimises Σ w ‖W x + m − W'_K x_K‖² + λ ‖W'_K − W_K‖². Here m is what the output lacks even before anything is
removed from it: nothing, or what would bring the states of a model that is cut below back to those of the dense one.
The ridge pulls toward the plain slice, not toward 0, so that with nothing removed nothing changes, an expert that saw
few tokens keeps what it knew, and greedy selection, which works with the inverse of G + λI, ends at the same weights
for m = 0.

A least-squares fit learns the domain of its texts and forgets others. So λ is the one that performs best on windows
held out of the fit, and a projection whose fit does worse there than the plain slice keeps the plain slice.

With a bias the inputs are centred: `b' = b + W μ − W'_K μ_K`. Without repair that is what FLAP adds.

Sources: Hassibi & Stork 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon"; Kurtic et al.
2023, "ZipLM". Choosing λ on held-out text is not theirs. Legend: W is (out, n), float64; G and H (n, n), μ (n,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from secateur.calibration.inputs import InputSums, Moments
from secateur.calibration.ridge import GRID, RIDGE, UNJUDGED, Ridge, held_out_gains, strength


@dataclass(frozen=True)
class Fit:
    """How a projection is fitted, and its error on tokens that took no part in the fit.

    Attributes:
        ridge: λ in mean diagonals of G; None keeps the plain slice.
        bias: whether a constant compensates for a part.
        error: Σ w ‖W x + m − W'_K x_K‖² / Σ w ‖W x‖² over held-out tokens; None if there were none.
        plain: the same for the plain slice.
    """

    ridge: float | None
    bias: bool
    error: float | None = None
    plain: float | None = None

    def applied(
        self, weight: torch.Tensor, sums: InputSums, stay: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the result of `rewritten` with this ridge and bias."""
        if self.ridge is None:
            return rewritten(weight, sums, stay, repair=False, bias=self.bias)
        return rewritten(weight, sums, stay, repair=True, bias=self.bias, ridge=self.ridge)


def described(fits: Sequence[Fit]) -> dict[str, Any]:
    """Return what was chosen for a projection, or for those of all experts in lists, ready for JSON."""
    rows = [
        {
            "ridge": fit.ridge,
            "error": None if fit.error is None else round(fit.error, 5),
            "error_without_repair": None if fit.plain is None else round(fit.plain, 5),
        }
        for fit in fits
    ]
    return rows[0] if len(rows) == 1 else {name: [row[name] for row in rows] for name in rows[0]}


def choose_fit(
    weight: torch.Tensor, sums: InputSums, stay: torch.Tensor, *, repair: bool, bias: bool, ridge: Ridge = "auto"
) -> Fit:
    """Choose ridge and bias by their error on the held-out tokens; a given number is used without a choice.

    Args:
        weight: W, (out, n), float64.
        sums: sums over its inputs.
        stay: which inputs remain, (n,) bool.
        repair: whether least squares may compensate for the others.
        bias: whether a constant may.
        ridge: λ in mean diagonals of G, or "auto"; if nothing was held out that is 0.1.
    """
    if not repair:
        return Fit(None, bias)
    assert sums.fitted is not None, "repair needs the Gram matrix"
    if ridge != "auto":
        return Fit(ridge, bias)
    if sums.held_out is None:
        return Fit(UNJUDGED, bias)
    size = float(torch.sum((weight @ sums.held_out.gram) * weight))
    if size <= 0:
        return Fit(UNJUDGED, bias)
    found = []
    for constant in (False, True) if bias else (False,):
        fitted, held_out = sums.fitted, sums.held_out
        if constant:
            point = fitted.mean()
            fitted, held_out = fitted.about(point), held_out.about(point)
        plain, errors = held_out_errors(weight, fitted, held_out, stay)
        found += [(plain, None, constant), *((error, one, constant) for error, one in zip(errors, GRID, strict=True))]
    error, best, constant = min(found, key=lambda one: one[0])
    return Fit(best, constant, error / size, found[0][0] / size)


def aimed(weight: torch.Tensor, sums: InputSums, ridge: Ridge = "auto") -> torch.Tensor:
    """Return the projection, (out, n), as it would be refitted if all its inputs remained.

    Where a projection is to write something else than it does, it is this one that the removed inputs are missed by.
    Arguments as for `choose_fit`.
    """
    if sums.fitted is None or sums.fitted.cross is None:
        return weight
    every = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    return choose_fit(weight, sums, every, repair=True, bias=False, ridge=ridge).applied(weight, sums, every)[0]


def held_out_errors(
    weight: torch.Tensor, fitted: Moments, held_out: Moments, stay: torch.Tensor
) -> tuple[float, list[float]]:
    """Return Σ w ‖W x + m − W'_K x_K‖² on held-out tokens, of the plain slice and of the repair at each ridge.

    The plain slice misses W_R x_R + m, which the repair predicts from x_K.
    """
    kept, gone = stay.nonzero().flatten(), (~stay).nonzero().flatten()
    lost = weight[:, gone]
    plain = _plain_error(lost, held_out, gone)
    gains = held_out_gains(
        fitted.gram[kept][:, kept],
        _missed(lost, fitted, kept, gone),
        held_out.gram[kept][:, kept],
        _missed(lost, held_out, kept, gone),
        [strength(fitted.gram, ridge) for ridge in GRID],
    )
    return plain, [plain + gain for gain in gains]


def _missed(lost: torch.Tensor, moments: Moments, kept: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Return Σ w x_K (W_R x_R + m)ᵀ, (K, out)."""
    missed = moments.gram[kept][:, gone] @ lost.T
    return missed if moments.cross is None else missed + moments.cross[kept]


def rewritten(
    weight: torch.Tensor, sums: InputSums, stay: torch.Tensor, *, repair: bool, bias: bool, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the projection refitted to read only the inputs `stay`, fitted on all tokens.

    Args:
        weight: W, (out, n), float64.
        sums: sums over its inputs; with the Gram matrix if it is to be repaired.
        stay: which inputs remain, (n,) bool.
        repair: compensate for the others by least squares; else their columns are left out.
        bias: put what a constant can compensate for into a bias.
        ridge: λ in mean diagonals of G.

    Returns:
        W' with zeros in the removed columns, (out, n), and what is added to the bias, (out,) or None.
    """
    result = torch.where(stay, weight, 0.0)
    moments = sums.moments if repair else None
    mean = sums.mean() if moments is None else moments.mean()
    if moments is not None:
        moments = moments.about(mean) if bias else moments
        result[:, stay] += correction(weight, moments, stay, ridge)
    return result, (weight - result) @ mean if bias else None


def correction(weight: torch.Tensor, moments: Moments, stay: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return Δ = W'_K − W_K fitted on these sums, (out, K), for W (out, n) and the inputs `stay` (n,) that remain."""
    kept, gone = stay.nonzero().flatten(), (~stay).nonzero().flatten()
    if not len(kept) or (not len(gone) and moments.cross is None):
        return torch.zeros_like(weight[:, kept])
    left = moments.gram[kept][:, kept]
    left.diagonal().add_(strength(moments.gram, ridge))
    factor = torch.linalg.cholesky(left)
    return torch.cholesky_solve(_missed(weight[:, gone], moments, kept, gone), factor).T


def _plain_error(lost: torch.Tensor, moments: Moments, gone: torch.Tensor) -> float:
    """Return Σ w ‖W_R x_R + m‖², the error of the plain slice."""
    plain = float(torch.sum((lost @ moments.gram[gone][:, gone]) * lost) + moments.lacking)
    if moments.cross is not None:
        plain += 2 * float(torch.sum(lost.T * moments.cross[gone]))
    return plain
