"""How much each input of an output projection matters, and so each head, group or channel: the scores of the papers.

* FLAP: An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (AAAI): variance of
  an input × squared norm of its weight column, z-scored over one layer. The released code squares it for attention
  only and updates the variance with a mean that it has already overwritten; neither is reproduced.
* Wanda-sp: the same paper's structured version of Sun et al. 2024, "Wanda": Σ_i |W_ij| · ‖x_j‖₂.
* Minitron: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation": how large a
  channel, or the output of a head, is: mean over the tokens of a window, 2-norm over windows.
* 2SSP: Sandri et al. 2025, "2SSP: A Two-Stage Framework for Structured Pruning of LLMs": 2-norm over tokens.

Legend: W (out, n), x_j one of the n inputs; P groups of U units of C inputs each: all channels are one group, so are
all key/value heads; the query heads of each key/value head are a group of their own, because as many must go in each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from secateur.calibration.inputs import InputSums
from secateur.calibration.ridge import RIDGE, strength

_BATCHES = 128
"""How often costs are recomputed while all units would be removed."""
_ROOM = 1.5
"""Candidates of greedy removal for each unit that goes, at least."""
_SPARSE = 7 / 8
"""Share of the inputs in W and H⁻¹ below which those that are gone are left out of them."""


def fluctuation(weight: torch.Tensor, sums: InputSums) -> torch.Tensor:
    """Return the score of FLAP, `Var(x_j) · ‖W_:,j‖²`, (n,)."""
    return sums.variance() * weight.square().sum(dim=0)


def weighted_norm(weight: torch.Tensor, sums: InputSums) -> torch.Tensor:
    """Return the score of Wanda-sp, `Σ_i |W_ij| · ‖x_j‖₂`, (n,)."""
    return weight.abs().sum(dim=0) * sums.squares.sqrt()


def magnitude(_: torch.Tensor, sums: InputSums) -> torch.Tensor:
    """Return the score of Minitron: length of each head's output, or size of a channel, (heads or channels,)."""
    return sums.magnitudes.sqrt()


def activation_norm(_: torch.Tensor, sums: InputSums) -> torch.Tensor:
    """Return the score of 2SSP: the 2-norm of each input over all tokens, (n,)."""
    return sums.squares.sqrt()


def z_scores(values: torch.Tensor) -> torch.Tensor:
    """Standardise values to mean 0 and standard deviation 1; values that are all equal become 0."""
    return (
        (values - values.mean()) / values.std().clamp_min(torch.finfo(values.dtype).tiny)
        if len(values) > 1
        else torch.zeros_like(values)
    )


def best_units(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Mark the `keep` units of highest score in each group; (P, U) → (P, U) bool. Of equals the first stay."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def cheapest_to_lose(
    weight: torch.Tensor, gram: torch.Tensor, units: torch.Tensor, keep: int, *, batch: int = 8, ridge: float = RIDGE
) -> torch.Tensor:
    """Remove units in batches until `keep` of each group are left.

    Args:
        weight: W, (out, n), float64.
        gram: Σ x xᵀ, (n, n), float64.
        units: inputs of each unit, (P groups, U units, C inputs) int64; as many units are removed in each group.
        keep: units to keep in each group.
        batch: units removed before costs are recomputed.
        ridge: λ in mean diagonals of the Gram matrix.

    Returns:
        Which units remain, (P, U) bool.
    """
    stay = torch.ones(units.shape[:2], dtype=torch.bool, device=weight.device)
    for gone in _losing(weight, gram, units, keep, batch, ridge):
        stay.view(-1)[gone] = False
    return stay


def removal_order(
    weight: torch.Tensor,
    gram: torch.Tensor,
    units: torch.Tensor,
    keep: int = 0,
    *,
    batch: int = 8,
    ridge: float = RIDGE,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the numbers of the units of one group, (1, U, C), in the order in which greedy removal takes them.

    The first U − k of them are what `cheapest_to_lose` removes to keep k. Arguments as there; (U − keep,).

    Args:
        after: for each unit, how many go, those of its own batch included, before it may, (U,): see `after_smaller`.
    """
    return torch.cat(list(_losing(weight, gram, units, keep, batch, ridge, after)))


def after_smaller(sizes: torch.Tensor, share: float) -> torch.Tensor:
    """Return how many units must go before each may, (U,), so that greedy removal leaves the largest alone.

    All units of which n are removed are among the smallest: a share of all, or half as many more than n if that is
    more. What others can replace on the calibration texts they may fail to replace on texts of another kind; that is no
    great loss where little was.

    Args:
        sizes: of the units, (U,).
        share: of all units; 1 leaves none alone.
    """
    ranks = torch.empty_like(sizes)
    ranks[sizes.argsort(stable=True)] = torch.arange(len(sizes), dtype=sizes.dtype, device=sizes.device)
    return torch.where(ranks < share * len(sizes), 0.0, ranks / _ROOM)


def order_by_surgeon(
    weight: torch.Tensor, sums: InputSums, units: torch.Tensor, keep: int = 0, *, candidates: float | None = None
) -> torch.Tensor:
    """Return the order in which greedy removal takes the units of one group, (1, U, C), as `removal_order` does.

    Args:
        weight: W, (out, n), float64.
        sums: over its inputs, with the Gram matrix.
        units: inputs of each unit.
        keep: units to keep.
        candidates: units of one input that go are among the smallest, this share of all: see `after_smaller`; None:
            among all.
    """
    moments = sums.moments
    assert moments is not None, "greedy removal needs the Gram matrix"
    after = None if candidates is None or units.shape[2] > 1 else after_smaller(sums.magnitudes, candidates)
    return removal_order(weight, moments.gram, units, keep, batch=batch_for(units), after=after)


def batch_for(units: torch.Tensor) -> int:
    """Return how many of the units (P, U, C) greedy removal takes before costs are recomputed."""
    return max(1, units.shape[:2].numel() // _BATCHES)


def _losing(
    weight: torch.Tensor,
    gram: torch.Tensor,
    units: torch.Tensor,
    keep: int,
    batch: int,
    ridge: float,
    after: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the flat indices of the units removed together, batch after batch, until `keep` of each group are left."""
    weight, heavy = weight.clone(), gram.clone()
    heavy.diagonal().add_(strength(gram, ridge))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(heavy))
    del heavy
    stay = torch.ones(units.shape[:2], dtype=torch.bool, device=weight.device)
    inputs = torch.arange(weight.shape[1], device=weight.device)
    place = inputs.clone()
    costs = torch.full(stay.shape, torch.inf, dtype=weight.dtype, device=weight.device)
    while int(stay.sum()) > keep * len(units):
        costs.fill_(torch.inf)
        costs[stay] = _costs(weight, inverse, place[units[stay]])
        costs[stay.sum(dim=1) <= keep] = torch.inf
        if after is not None:
            costs[:, after >= int((~stay).sum()) + batch] = torch.inf
        gone = _cheapest(costs, stay.sum(dim=1) - keep, batch)
        stay.view(-1)[gone] = False
        yield gone
        forget(weight, inverse, place[units.flatten(0, 1)[gone].flatten()])
        left = stay.sum() * units.shape[2]
        if left < _SPARSE * len(inputs):
            inputs = units[stay].flatten().sort().values
            rows, place[inputs] = place[inputs], torch.arange(len(inputs), device=weight.device)
            weight, inverse = weight[:, rows], inverse[rows][:, rows]


def _cheapest(costs: torch.Tensor, allowance: torch.Tensor, batch: int) -> torch.Tensor:
    """Return the flat indices of the cheapest units, no more of a group than may still be removed there."""
    ranks = costs.argsort(dim=1, stable=True).argsort(dim=1)
    allowed = costs.masked_fill(ranks >= allowance[:, None], torch.inf).flatten()
    order = allowed.argsort(stable=True)[:batch]
    return order[torch.isfinite(allowed[order])]


def _costs(weight: torch.Tensor, inverse: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Return `tr(W_S ([H⁻¹]_SS)⁻¹ W_Sᵀ)` of every unit, for the inputs of each (U, C); (U,)."""
    if units.shape[1] == 1:
        flat = units[:, 0]
        return weight.square().sum(dim=0)[flat] / inverse.diagonal()[flat].clamp_min(1e-300)
    own = weight.T[units]
    return (own * torch.linalg.solve(inverse[units[:, :, None], units[:, None, :]], own)).sum(dim=(1, 2))


def forget(weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> None:
    """Remove inputs from W, which compensates for them, and from H⁻¹; both change in place.

    `W ← W − W_S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S,:` and `H⁻¹ ← H⁻¹ − [H⁻¹]_:,S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S,:`: the result is the inverse
    of H without S. Rows and columns of S become 0.
    """
    rows = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    weight.addmm_(weight[:, gone], rows, alpha=-1)
    inverse.addmm_(inverse[:, gone], rows, alpha=-1)
    weight[:, gone] = 0
    inverse[:, gone] = 0
    inverse[gone] = 0
