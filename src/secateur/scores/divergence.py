"""How much the output distribution changes: what FinerCut prunes by.

Zhang et al. 2024, "FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models": instead of the loss,
the distance between what the dense model and the pruned one predict, mean over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch

from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, parts_of
from secateur.models.decoder import Decoder
from secateur.models.forward import logits, require_finite

Distance = Literal["js", "angular"]
"""Jensen–Shannon divergence of the distributions in nats, or the angle between the logits as a share of a half turn."""


class OutputChange:
    """The mean distance of next-token predictions from those of the model that is measured first."""

    def __init__(self, store: StateStore, distance: Distance) -> None:
        """Start without a reference.

        Args:
            store: holds the reference's final states; closed by its owner.
            distance: between the two predictions of a token.
        """
        self._store, self._between = store, _BETWEEN[distance]
        self._has_reference = False

    def __call__(self, decoder: Decoder, last: Iterator[tuple[Batch, torch.Tensor]]) -> float:
        """Return the mean distance, given the output of the last block; of the first model measured it is 0.

        Raises:
            NumericsError: NaN or infinity.
        """
        if not self._has_reference:
            for batch, hidden in last:
                self._store.put(batch.index, hidden)
            self._has_reference = True
            return 0.0
        total, count = 0.0, 0
        for batch, hidden in last:
            reference = self._store.get(batch.index)
            for rows, part in parts_of(decoder, batch):
                before, after = (logits(decoder, one[rows], part.tokens, part.mask) for one in (reference, hidden))
                each = self._between(before.float(), after.float())
                require_finite(each[..., None], "the change of the output", part.mask)
                real = torch.ones_like(each, dtype=torch.bool) if part.mask is None else part.mask.to(each.device)
                total += float(each[real].double().sum())
                count += int(real.sum())
        return total / count


def js_divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the Jensen–Shannon divergence in nats of two distributions given as logits, (…, V) → (…)."""
    logs = [one.log_softmax(dim=-1) for one in (before, after)]
    chances = [one.exp() for one in logs]
    middle = ((chances[0] + chances[1]) / 2).clamp_min(torch.finfo(before.dtype).tiny).log()
    return sum(((p * (log - middle)).sum(dim=-1) for p, log in zip(chances, logs, strict=True)), torch.tensor(0.0)) / 2


def angle(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the angle between two vectors of logits divided by π, (…, V) → (…)."""
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    return cosine.clamp(-1, 1).arccos() / torch.pi


_BETWEEN: dict[Distance, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "js": js_divergence,
    "angular": angle,
}
