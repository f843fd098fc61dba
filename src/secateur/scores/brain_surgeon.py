"""Greedy choice of what goes, by what its absence costs after repair: the optimal brain surgeon for whole units.

Taking the inputs S of a projection W out, and letting all others make up for it, costs
`tr(W_S ([H⁻¹]_SS)⁻¹ W_Sᵀ)` with H = Σ x xᵀ + λI; for a single input that is `‖W_:,j‖² / [H⁻¹]_jj` (Hassibi and Stork
1993, "Second order derivatives for network pruning"; METHODS §8b). After each small batch of units W and H⁻¹ are
brought up to date, the latter by its Schur complement.
"""

from __future__ import annotations

import torch

from secateur.surgery.repair import RIDGE, strength


def cheapest_to_lose(
    weight: torch.Tensor, gram: torch.Tensor, units: torch.Tensor, keep: int, *, batch: int = 8, ridge: float = RIDGE
) -> torch.Tensor:
    """Take units out one batch after the other until `keep` of each pen are left.

    Args:
        weight: W, (out, n), float64.
        gram: Σ x xᵀ, (n, n), float64.
        units: inputs of each unit, (P pens, U units, C inputs) int64; the same number of units goes in each pen.
        keep: units that stay in each pen.
        batch: units taken out before costs are computed anew.
        ridge: λ in mean diagonals of the Gram matrix.

    Returns:
        Which units stay, (P, U) bool.
    """
    weight, heavy = weight.clone(), gram.clone()
    heavy.diagonal().add_(strength(gram, ridge))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(heavy))
    del heavy
    pens, each, _ = units.shape
    stay = torch.ones(pens, each, dtype=torch.bool, device=weight.device)
    while int(stay.sum()) > keep * pens:
        costs = _costs(weight, inverse, units).masked_fill(~stay, torch.inf)
        costs[stay.sum(dim=1) <= keep] = torch.inf
        gone = _cheapest(costs, stay.sum(dim=1) - keep, batch)
        stay.view(-1)[gone] = False
        forget(weight, inverse, units.flatten(0, 1)[gone].flatten())
    return stay


def _cheapest(costs: torch.Tensor, allowance: torch.Tensor, batch: int) -> torch.Tensor:
    """Give the flat numbers of the cheapest units, no more of a pen than may still go there."""
    ranks = costs.argsort(dim=1, stable=True).argsort(dim=1)
    allowed = costs.masked_fill(ranks >= allowance[:, None], torch.inf).flatten()
    order = allowed.argsort(stable=True)[:batch]
    return order[torch.isfinite(allowed[order])]


def _costs(weight: torch.Tensor, inverse: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """`tr(W_S ([H⁻¹]_SS)⁻¹ W_Sᵀ)` of every unit, (P, U); those that are gone already give 0."""
    if units.shape[2] == 1:
        flat = units[..., 0]
        return weight.square().sum(dim=0)[flat] / inverse.diagonal()[flat].clamp_min(1e-300)
    flat = units.flatten(0, 1)
    blocks = inverse[flat[:, :, None], flat[:, None, :]]
    gone = blocks.diagonal(dim1=1, dim2=2).sum(dim=1) == 0
    blocks[gone] = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    own = weight.T[flat]
    return (own * torch.linalg.solve(blocks, own)).sum(dim=(1, 2)).view(units.shape[:2])


def forget(weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> None:
    """Take inputs out of W, which makes up for them, and out of H⁻¹; both change in place.

    `W ← W − W_S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S,:` and `H⁻¹ ← H⁻¹ − [H⁻¹]_:,S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S,:`: what is left is the inverse
    of H without S. Rows and columns of S become 0.
    """
    rows = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    weight.addmm_(weight[:, gone], rows, alpha=-1)
    inverse.addmm_(inverse[:, gone], rows, alpha=-1)
    weight[:, gone] = 0
    inverse[:, gone] = 0
    inverse[gone] = 0
