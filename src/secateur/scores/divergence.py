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
from typing import TypeVar

import torch

from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, parts_of
from secateur.models.decoder import Decoder
from secateur.models.forward import logits, require_finite

Distance = Callable[[torch.Tensor], torch.Tensor]
"""Takes a prediction as logits (…, V) and returns its distance from one known before, (…)."""
Between = Callable[[torch.Tensor], Distance]
"""Takes a prediction as logits (…, V) and returns the distance from it."""
Name = TypeVar("Name")
_KEPT_BYTES = 1 << 30
"""Predictions of the reference are kept up to so many bytes; beyond, they are made anew for each model."""


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
        self._known: dict[tuple[int, int], Distance] = {}
        self._room = _KEPT_BYTES

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
            sums, tokens = _summed(decoder, batch, self._distance, [hidden.__getitem__])
            total, count = total + sums[0], count + tokens
        return total / count

    def _distance(self, decoder: Decoder, batch: Batch, rows: slice, part: Batch) -> Distance:
        key = (batch.index, rows.start)
        if key in self._known:
            return self._known[key]
        before = _predictions(decoder, self._store.get(batch.index)[rows], part)
        found, size = self._between(before), before.nbytes
        if size <= self._room:
            self._known[key], self._room = found, self._room - size
        return found


def mean_distances(
    decoder: Decoder,
    batches: Iterable[Batch],
    state: Callable[[Batch, Name], torch.Tensor],
    reference: Name,
    others: Sequence[Name],
    between: Between,
) -> list[float]:
    """Return the mean distance of the next-token predictions of several models from those of a reference.

    Args:
        decoder: has final norm and head of all of them loaded.
        batches: the windows.
        state: returns the output of the last block of a model for a batch.
        reference: the model they are compared with.
        others: the models.
        between: the distance between the two predictions of a token.

    Raises:
        NumericsError: NaN or infinity.
    """

    def distance(decoder: Decoder, batch: Batch, rows: slice, part: Batch) -> Distance:
        return between(_predictions(decoder, state(batch, reference)[rows], part))

    def rows_of(batch: Batch, model: Name, rows: slice) -> torch.Tensor:
        return state(batch, model)[rows]

    totals, count = [0.0] * len(others), 0
    for batch in batches:
        models = [functools.partial(rows_of, batch, model) for model in others]
        sums, tokens = _summed(decoder, batch, distance, models)
        totals = [total + one for total, one in zip(totals, sums, strict=True)]
        count += tokens
    return [total / count for total in totals]


def _summed(
    decoder: Decoder,
    batch: Batch,
    distance_on: Callable[[Decoder, Batch, slice, Batch], Distance],
    others: Sequence[Callable[[slice], torch.Tensor]],
) -> tuple[list[float], int]:
    """Return the sums of distances over the real tokens of a batch, and their number.

    Args:
        decoder: has final norm and head loaded.
        batch: the windows.
        distance_on: returns the distance from the reference on some of them: their slice, and the smaller batch.
        others: return the output of the last block of the models whose distance is wanted, on a slice of the windows.
    """
    sums, count = [0.0] * len(others), 0
    for rows, part in parts_of(decoder, batch):
        distance = distance_on(decoder, batch, rows, part)
        real = torch.ones_like(part.tokens, dtype=torch.bool) if part.mask is None else part.mask
        for place, states in enumerate(others):
            each = distance(_predictions(decoder, states(rows), part))
            require_finite(each[..., None], "the change of the output", part.mask)
            sums[place] += float(each[real.to(each.device)].double().sum())
        count += int(real.sum())
    return sums, count


def _predictions(decoder: Decoder, hidden: torch.Tensor, part: Batch) -> torch.Tensor:
    return logits(decoder, hidden, part.tokens, part.mask).float()


def js_divergence(before: torch.Tensor) -> Distance:
    """Return the Jensen–Shannon divergence in nats of distributions given as logits from this one."""
    own = before.log_softmax(dim=-1)

    def distance(after: torch.Tensor) -> torch.Tensor:
        logs = (own, after.log_softmax(dim=-1))
        chances = [one.exp() for one in logs]
        middle = ((chances[0] + chances[1]) / 2).clamp_min(torch.finfo(own.dtype).tiny).log()
        each = [(p * (log - middle)).sum(dim=-1) for p, log in zip(chances, logs, strict=True)]
        return (each[0] + each[1]) / 2

    return distance


def kl_divergence(before: torch.Tensor) -> Distance:
    """Return the Kullback–Leibler divergence in nats of distributions given as logits from this one."""
    chances = before.softmax(dim=-1)
    certain = (chances * before.log_softmax(dim=-1)).sum(dim=-1)
    return lambda after: certain + after.logsumexp(dim=-1) - (chances * after).sum(dim=-1)


def angle(before: torch.Tensor) -> Distance:
    """Return the angle between vectors of logits and this one, divided by π."""

    def distance(after: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(before, after, dim=-1).clamp(-1, 1).arccos() / torch.pi

    return distance
