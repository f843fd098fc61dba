"""Search over splits between depth and width with Optuna: which to try next, given the losses so far.

Akiba et al. 2019, "Optuna: A Next-generation Hyperparameter Optimization Framework" (KDD); its tree-structured Parzen
estimator: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization" (NeurIPS). If there are no more splits
than may be tried, all are tried.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from secateur.progress import Progress

_NONE = "none"
_GUIDED_AFTER = 3
"""Splits drawn at random after the first ones, before results guide the search."""
_REPEATS = 5
"""Proposals in a row that are already known, before an untried split is drawn instead."""


class Split(NamedTuple):
    """One way to divide the amount.

    Attributes:
        depth: method that removes blocks; None for none.
        width: method that slices or prunes the widths of the rest; None for none.
        blocks: number of blocks to remove if both are given; 0 if one of them does everything.
    """

    depth: str | None
    width: str | None
    blocks: int = 0


def all_splits(depth: Sequence[str | None], width: Sequence[str | None], most: int) -> tuple[Split, ...]:
    """List single methods first, then every pair with 1 to `most` blocks removed."""
    single = [Split(one, None) for one in depth if one and None in width]
    single += [Split(None, one) for one in width if one and None in depth]
    pairs = [Split(d, w, gone) for gone in range(1, most + 1) for d in depth for w in width if d and w]
    return tuple(single + pairs)


def search(
    splits: Sequence[Split],
    measure: Callable[[Split], float | None],
    *,
    trials: int,
    seed: int,
    progress: Progress,
) -> None:
    """Measure up to `trials` of the splits: single methods first, then where a low loss is expected.

    Args:
        splits: all of them, each once.
        measure: returns the loss of a split, or None if it has none; that does not count as a trial.
        trials: maximum number of losses.
        seed: seed of the sampler.
        progress: reports progress.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pairs = [one for one in splits if one.blocks]
    first = list(splits) if len(splits) <= trials else [one for one in splits if not one.blocks]
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=len(first) + _GUIDED_AFTER)
    study = optuna.create_study(sampler=sampler)
    draw, found = random.Random(seed), dict[Split, float | None]()

    def enqueue(one: Split) -> None:
        blocks = {"blocks": one.blocks} if one.blocks else {}
        study.enqueue_trial({"depth": one.depth or _NONE, "width": one.width or _NONE} | blocks)

    def read(trial: optuna.Trial) -> Split:
        depth, width = (
            trial.suggest_categorical(name, sorted({getattr(one, name) or _NONE for one in splits}))
            for name in ("depth", "width")
        )
        if _NONE in (depth, width) or not pairs:
            return Split(None if depth == _NONE else depth, None if width == _NONE else width)
        return Split(depth, width, trial.suggest_int("blocks", 1, max(one.blocks for one in pairs)))

    def measure_another() -> None:
        repeats = 0
        while len(found) < len(splits):
            trial = study.ask()
            split = read(trial)
            known = split in found or split not in splits
            if not known:
                found[split] = measure(split)
            loss = found.get(split)
            study.tell(trial, loss, state=optuna.trial.TrialState.PRUNED if loss is None else None)
            if not known and loss is not None:
                return
            repeats += known
            if repeats == _REPEATS:
                repeats = 0
                enqueue(draw.choice([one for one in splits if one not in found]))

    for one in first:
        enqueue(one)
    most = min(trials, len(splits))
    for _ in progress(range(most), "trying plans", most):
        measure_another()
