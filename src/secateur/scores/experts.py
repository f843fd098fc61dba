"""Importance of the experts of a mixture, from sums over the tokens that they were chosen for.

* REAP: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression" (arXiv:2510.13999).
* Expert activation norm (EAN) and frequency: the baselines of the same paper.

Legend: E = experts of a block.
"""

from __future__ import annotations

from collections.abc import Callable
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
