"""How much the output distribution changes: the distance between what the dense model and a pruned one predict.

Mean over tokens, instead of the loss: Zhang et al. 2024, "FinerCut: Finer-grained Interpretable Layer Pruning for Large
Language Models", by the Jensen–Shannon divergence or the angle; Tang et al. 2025, "DarwinLM: Evolutionary Structured
Pruning of Large Language Models", by the Kullback–Leibler divergence. That is how much the loss rises where the dense
model is right about its chances, without the luck of which tokens the text has: a thousand tokens tell changes apart
that are lost in the noise of the loss. And a model that learnt the texts it is judged on gains nothing by it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, parts_of
from secateur.models.decoder import Decoder
from secateur.models.forward import logits, require_finite

Between = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The distance of two predictions given as logits, (…, V) and (…, V) → (…)."""
States = Callable[[Batch], torch.Tensor]
"""Returns the output of the last block for a batch."""


class OutputChange:
    """The mean distance of next-token predictions from those of the model that is measured first."""

    def __init__(self, store: StateStore, between: Between) -> None:
        """Start without a reference.

        Args:
            store: holds the reference's final states; closed by its owner.
            between: the distance between the two predictions of a token.
        """
        self._store, self._between = store, between
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
            sums, tokens = _summed(
                decoder, batch, self._store.get(batch.index), [functools.partial(_same, hidden)], self._between
            )
            total, count = total + sums[0], count + tokens
        return total / count


def _same(hidden: torch.Tensor, _: Batch) -> torch.Tensor:
    return hidden


def mean_distances(
    decoder: Decoder, batches: Iterable[Batch], reference: States, others: Sequence[States], between: Between
) -> list[float]:
    """Return the mean distance of the next-token predictions of several models from those of a reference.

    Args:
        decoder: has final norm and head of all of them loaded.
        batches: the windows.
        reference: its states.
        others: those of the others.
        between: the distance between the two predictions of a token.

    Raises:
        NumericsError: NaN or infinity.
    """
    totals, count = [0.0] * len(others), 0
    for batch in batches:
        sums, tokens = _summed(decoder, batch, reference(batch), others, between)
        totals = [total + one for total, one in zip(totals, sums, strict=True)]
        count += tokens
    return [total / count for total in totals]


def _summed(
    decoder: Decoder, batch: Batch, reference: torch.Tensor, others: Sequence[States], between: Between
) -> tuple[list[float], int]:
    """Return the sums of distances over the real tokens of a batch, and their number."""
    sums, count = [0.0] * len(others), 0
    for rows, part in parts_of(decoder, batch):
        before = logits(decoder, reference[rows], part.tokens, part.mask).float()
        real = torch.ones_like(part.tokens, dtype=torch.bool) if part.mask is None else part.mask
        for place, states in enumerate(others):
            each = between(before, logits(decoder, states(batch)[rows], part.tokens, part.mask).float())
            require_finite(each[..., None], "the change of the output", part.mask)
            sums[place] += float(each[real.to(each.device)].double().sum())
        count += int(real.sum())
    return sums, count


def js_divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the Jensen–Shannon divergence in nats of two distributions given as logits, (…, V) → (…)."""
    logs = [one.log_softmax(dim=-1) for one in (before, after)]
    chances = [one.exp() for one in logs]
    middle = ((chances[0] + chances[1]) / 2).clamp_min(torch.finfo(before.dtype).tiny).log()
    return sum(((p * (log - middle)).sum(dim=-1) for p, log in zip(chances, logs, strict=True)), torch.tensor(0.0)) / 2


def kl_divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the Kullback–Leibler divergence in nats of a distribution from the one before, as logits, (…, V) → (…)."""
    old, new = (one.log_softmax(dim=-1) for one in (before, after))
    return (old.exp() * (old - new)).sum(dim=-1)


def angle(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the angle between two vectors of logits divided by π, (…, V) → (…)."""
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    return cosine.clamp(-1, 1).arccos() / torch.pi
