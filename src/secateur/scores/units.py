"""How much each input of a writing projection matters, and so each head, group or channel: the scores of the papers.

* FLAP: An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (AAAI): variance of
  an input × squared norm of its weight column, z-scored over one layer. The released code squares it for attention
  only and updates the variance with a mean that it has already overwritten; neither is reproduced.
* Wanda-sp: the same paper's structured version of Sun et al. 2024, "Wanda": Σ_i |W_ij| · ‖x_j‖₂.
* Minitron: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation": how large a
  channel, or the output of a head, is: mean over the tokens of a window, 2-norm over windows.

Legend: W (out, n), x_j one of the n inputs; P pens of U units of C inputs each: all channels are one pen, so are all
groups; the query heads of each group are a pen of their own, because as many must go in each.
"""

from __future__ import annotations

import torch

from secateur.calibration.inputs import InputSums


def fluctuation(weight: torch.Tensor, sums: InputSums) -> torch.Tensor:
    """FLAP: `Var(x_j) · ‖W_:,j‖²`, (n,)."""
    return sums.variance() * weight.square().sum(dim=0)


def weighted_norm(weight: torch.Tensor, sums: InputSums) -> torch.Tensor:
    """Wanda-sp: `Σ_i |W_ij| · ‖x_j‖₂`, (n,)."""
    return weight.abs().sum(dim=0) * sums.squares.sqrt()


def magnitude(_: torch.Tensor, sums: InputSums) -> torch.Tensor:
    """Minitron: the length of each head's output, or the size of a channel, (heads or channels,)."""
    return sums.magnitudes.sqrt()


def z_scores(values: torch.Tensor) -> torch.Tensor:
    """Bring values to mean 0 and standard deviation 1; values that are all alike become 0."""
    return (
        (values - values.mean()) / values.std().clamp_min(torch.finfo(values.dtype).tiny)
        if len(values) > 1
        else torch.zeros_like(values)
    )


def best_units(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Mark the `keep` units of highest score in each pen; (P, U) → (P, U) bool. Of equals the first stay."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
