"""Importance of the experts of a mixture, from sums over the tokens that they were chosen for.

* REAP: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression" (arXiv:2510.13999).
* Super experts: Su et al. 2025, "Unveiling Super Experts in Mixture-of-Experts Large Language Models"
  (arXiv:2507.23279).
* Expert activation norm (EAN) and frequency: the baselines of the same paper.

Legend: E = experts of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from secateur.calibration.routing import RoutingSums

Criterion = Literal["reap", "expert-frequency", "expert-activation"]


def reap(sums: RoutingSums) -> torch.Tensor:
    """Return S_j = mean over the tokens that expert j was chosen for of g_j ‖f_j‖, (E,); 0 without such tokens.

    g_j is the weight that the router gives it, as a share of those of all experts chosen for the token.
    """
    return sums.gated / sums.load.clamp_min(1)


def frequency(sums: RoutingSums) -> torch.Tensor:
    """Return for how many tokens each expert was chosen, (E,)."""
    return sums.load


def activation(sums: RoutingSums) -> torch.Tensor:
    """Return Σ ‖f_j‖ over the tokens that expert j was chosen for, (E,)."""
    return sums.norms


SALIENCY: dict[Criterion, Callable[[RoutingSums], torch.Tensor]] = {
    "reap": reap,
    "expert-frequency": frequency,
    "expert-activation": activation,
}


_PERCENTILE, _OF_LARGEST = 0.995, 0.1


def super_experts(sums: Sequence[RoutingSums | None]) -> tuple[torch.Tensor | None, ...]:
    """Return for each block which experts write the massive activations that the model relies on, (E,) bool.

    Those whose largest output is above the 99.5th percentile of all experts of the model, and above a tenth of the
    largest.
    """
    peaks = torch.cat([one.peaks for one in sums if one is not None])
    threshold = max(float(peaks.quantile(_PERCENTILE)), _OF_LARGEST * float(peaks.max()))
    return tuple(None if one is None else one.peaks >= threshold for one in sums)
