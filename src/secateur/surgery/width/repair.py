"""What is left of a projection when some of its inputs go: closed-form least squares (METHODS §8b).

With the Gram matrix G = Σ x xᵀ of the inputs over calibration tokens, and K the inputs that stay, R those that go:

    W'_K = W_K + W_R G[R,K] (G[K,K] + λI)⁻¹,    λ = ridge · mean diagonal of G,

which minimises Σ ‖W x − W'_K x_K‖² + λ ‖W'_K − W_K‖². For λ → 0 this is `W G[:,K] G[K,K]⁻¹`. Departure from §8b, whose
`W G[:,K] (G[K,K] + λI)⁻¹` pulls W' toward 0: here it is pulled toward the plain slice, so that with nothing removed
nothing changes, an expert that few tokens came by keeps what it knew, and greedy selection, which works with the
inverse of G + λI, ends at the same weights. On the bundled model both give the same perplexity.

With a bias the inputs are taken from their means: `b' = b + W μ − W'_K μ_K`. Without repair that is what FLAP adds.
Legend: W is (out, n), float64; G (n, n), μ (n,).
"""

from __future__ import annotations

import torch

from secateur.calibration.inputs import InputSums

RIDGE = 1e-3


def strength(gram: torch.Tensor, ridge: float = RIDGE) -> float:
    """Return λ; 1 where nothing was seen."""
    scale = float(gram.diagonal().mean())
    return ridge * scale if scale > 0 else 1.0


def rewritten(
    weight: torch.Tensor, sums: InputSums, stay: torch.Tensor, *, repair: bool, bias: bool, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the projection whose inputs `stay` are all it reads.

    Args:
        weight: W, (out, n), float64.
        sums: sums over its inputs; with the Gram matrix where it is to be repaired.
        stay: which inputs stay, (n,) bool.
        repair: make up for the others by least squares; else their columns are left out.
        bias: put what can be made up for by a constant into a bias.
        ridge: λ in mean diagonals of G.

    Returns:
        W' with zeros in the columns that go, (out, n), and what is added to the bias, (out,) or None.
    """
    result = torch.zeros_like(weight)
    kept, gone = stay.nonzero().flatten(), (~stay).nonzero().flatten()
    result[:, kept] = weight[:, kept]
    mean = sums.mean()
    if repair and len(gone):
        assert sums.gram is not None, "repair needs the Gram matrix"
        gram = sums.gram - sums.tokens * torch.outer(mean, mean) if bias else sums.gram
        left = gram[kept][:, kept]
        left.diagonal().add_(strength(gram, ridge))
        factor = torch.linalg.cholesky(left)
        result[:, kept] += torch.cholesky_solve(gram[kept][:, gone] @ weight[:, gone].T, factor).T
    return result, (weight - result) @ mean if bias else None
