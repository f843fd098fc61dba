"""Search over splits between depth, experts and width with Optuna: which to try next, given the losses so far.

Akiba et al. 2019, "Optuna: A Next-generation Hyperparameter Optimization Framework" (KDD); its tree-structured Parzen
estimator: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization" (NeurIPS). If there are no more splits
than may be tried, all are tried.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from secateur.progress import Progress

_NONE = "none"
_GUIDED_AFTER = 3
"""Splits drawn at random after the first ones, before results guide the search."""
_REPEATS = 5
"""Proposals in a row that are already known, before an untried split is drawn instead."""


SHARES = (0.25, 0.5, 0.75)
"""What experts may take of what is left to remove, if a width method takes the rest."""


class Split(NamedTuple):
    """One way to divide the amount.

    Attributes:
        depth: method that removes blocks; None for none.
        width: method that slices or prunes the widths of the rest; None for none.
        blocks: number of blocks to remove if another method follows; 0 if none are removed, or as many as it takes.
        experts: method that leaves fewer experts, after blocks and before widths; None for none.
        share: what it takes of what is left to remove, if a width method takes the rest; 1 without one.
    """

    depth: str | None
    width: str | None
    blocks: int = 0
    experts: str | None = None
    share: float = 1.0

    @property
    def methods(self) -> set[str]:
        """The methods involved."""
        return {one for one in (self.depth, self.experts, self.width) if one}


def all_splits(
    depth: Sequence[str | None], width: Sequence[str | None], most: int, experts: Sequence[str | None] = (None,)
) -> tuple[Split, ...]:
    """List single methods first, then those of several methods, with 1 to `most` blocks removed if any are."""
    found = [
        Split(d, w, blocks, e, share)
        for blocks in range(most + 1)
        for e in experts
        for d in depth
        for w in width
        for share in (SHARES if e and w else (1.0,))
        if bool(blocks) == bool(d and (e or w))
    ]
    single = {
        side: [one for one in found if one.methods == {getattr(one, side)}] for side in ("depth", "experts", "width")
    }
    return (*itertools.chain(*single.values()), *(one for one in found if len(one.methods) > 1))


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
    most_blocks = max((one.blocks for one in splits), default=0)
    has_experts = any(one.experts for one in splits)
    first = list(splits) if len(splits) <= trials else [one for one in splits if len(one.methods) == 1]
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=len(first) + _GUIDED_AFTER)
    study = optuna.create_study(sampler=sampler)
    draw, found = random.Random(seed), dict[Split, float | None]()

    def enqueue(one: Split) -> None:
        more: dict[str, object] = {"blocks": one.blocks} if one.blocks else {}
        if has_experts:
            more |= {"experts": one.experts or _NONE} | ({"share": one.share} if one.share < 1 else {})
        study.enqueue_trial({"depth": one.depth or _NONE, "width": one.width or _NONE} | more)

    def method(trial: optuna.Trial, side: str) -> str | None:
        found = trial.suggest_categorical(side, sorted({getattr(one, side) or _NONE for one in splits}))
        return None if found == _NONE else found

    def read(trial: optuna.Trial) -> Split:
        depth, width = method(trial, "depth"), method(trial, "width")
        experts = method(trial, "experts") if has_experts else None
        share = trial.suggest_categorical("share", SHARES) if experts and width else 1.0
        if not depth or not (experts or width) or not most_blocks:
            return Split(depth, width, 0, experts, share)
        return Split(depth, width, trial.suggest_int("blocks", 1, most_blocks), experts, share)

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
