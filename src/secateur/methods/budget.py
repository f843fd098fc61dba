"""One budget for all methods: how much has to go, and the candidate that comes closest.

A fraction is of all parameters, embeddings and shortcut matrices included, measured on the result (tied tensors count
once). `remove` takes the closest non-zero cut; targets take the largest model that stays within them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from secateur.errors import InputError
from secateur.methods.cost import Cost
from secateur.plan.amount import Amount, gigabytes

Native = Literal["blocks", "slice", "ratio"]
"""What a method counts in by itself."""

Aim = Literal["blocks", "slice", "ratio", "remove", "target_params", "target_memory", "target_speedup", "own"]


class TooSmall(InputError):
    """Less is to go than the smallest cut of a method takes."""


@dataclass(frozen=True)
class Budget:
    """How much has to go.

    Attributes:
        aim: `blocks`: exactly that many blocks; `slice`: that fraction of the hidden directions; `ratio`: that fraction
            of what stands inside blocks; `remove`: the closest non-zero cut to this fraction of all parameters;
            `target_params`: the largest model that has no more than this many parameters; `target_memory`: the largest
            whose weights and cache take no more than this many bytes; `target_speedup`: the smallest cut by which a
            request is answered so many times as fast; `own`: what the method's own knob gives.
        value: a number of blocks, a fraction in [0, 1) or (0, 1), a number of parameters or bytes, a factor above 1,
            or the value of the knob.
        knob: name of the method's setting that asks for it, if one does.
        context: tokens in the cache that `target_memory` counts.
        cost: what the model at hand weighs in bytes or seconds, where the aim is counted in those.
        is_rest: whether it is what others left to do: half of the smallest cut is enough to make that one.
    """

    aim: Aim
    value: float
    knob: str | None = None
    context: int | None = None
    cost: Cost | None = None
    is_rest: bool = False

    @classmethod
    def of(cls, amount: Amount) -> Budget:
        """Return the budget of an amount.

        Raises:
            InputError: no amount was given, or several.
        """
        name, value = amount.require_one()
        return cls(cast(Aim, name), value, context=amount.context)

    @property
    def is_zero(self) -> bool:
        """Whether nothing is to go, which is legal only in a method's own unit."""
        return self.aim in ("blocks", "slice", "ratio") and self.value == 0

    @property
    def is_target(self) -> bool:
        """Whether the largest model is wanted that stays within what is asked for."""
        return self.aim.startswith("target_")

    def describe(self) -> dict[str, Any]:
        """Return the request as data for the plan."""
        name = (self.knob or "own") if self.aim == "own" else self.aim
        return {name: self.value} | ({"context": self.context} if self.context is not None else {})

    def limit(self, total: float) -> float:
        """Return what may be left of a model that weighs `total`."""
        if self.aim == "remove":
            return total * (1 - self.value)
        if self.aim == "target_speedup":
            assert self.cost is not None
            return self.cost.dense / self.value
        return self.value

    def asked(self) -> str:
        """Say what was asked for, as it is written on the command line."""
        if self.aim == "remove":
            return f"remove={self.value:.1%}"
        if self.aim == "target_memory":
            return f"target-memory={gigabytes(self.value)}"
        if self.aim == "target_speedup":
            return f"target-speedup={self.value:g}"
        return f"target-params={self.value:,.0f}"


def choose_blocks(
    budget: Budget,
    candidates: Iterable[tuple[int, ...]],
    block_parameters: tuple[int, ...],
    total: int,
    most: int,
) -> tuple[int, ...]:
    """Take the candidate that meets the budget.

    Args:
        budget: what is asked for.
        candidates: blocks to take out, for 1, 2, … `most` blocks; read only as far as needed.
        block_parameters: number of parameters of each block.
        total: number of all parameters.
        most: how many blocks may go at most.

    Raises:
        InputError: the budget lies outside what these candidates can reach; `TooSmall` where it lies below.
    """
    if budget.aim == "blocks":
        return _exactly(int(budget.value), candidates, most)
    weights, whole = weigh(budget, block_parameters, total)
    wanted = whole - budget.limit(whole)
    if wanted <= 0:
        raise InputError(already(budget, whole))
    slack = _ROUNDING if budget.aim == "remove" else 0.0
    smallest = min(weights)
    tried: list[tuple[float, tuple[int, ...]]] = []
    reached: list[float] = []
    for found in candidates:
        tried.append((sum(weights[block] for block in found), found))
        reached += [tried[-1][0]] * (tried[-1][0] >= wanted * (1 - slack))
        if reached and (len(found) + 1) * smallest >= min(reached):
            break  # one more block can no longer come closer
    if not reached:
        raise InputError(_too_much(budget, max(gone for gone, _ in tried), whole, most))
    if budget.is_target:
        return next(found for gone, found in tried if gone == min(reached))
    least = min(gone for gone, _ in tried)
    if wanted < least * (0.5 if budget.is_rest else 1 - _ROUNDING):
        raise TooSmall(
            f"remove={budget.value:.1%}: unreachable, this method's smallest cut is {least / whole:.1%} (one block)."
        )
    return min(tried, key=lambda one: abs(one[0] - wanted))[1]


def weigh(budget: Budget, block_parameters: tuple[int, ...], total: int) -> tuple[tuple[float, ...], float]:
    """Return what each block and the whole model weigh in the unit of a budget."""
    return (block_parameters, total) if budget.cost is None else (budget.cost.blocks, budget.cost.total)


def choose_size(budget: Budget, left: Sequence[int], total: int, kept: Sequence[Sequence[int]] | None = None) -> int:
    """Return the position of the candidate that meets a budget.

    Args:
        budget: a fraction or a target.
        left: parameters that each candidate leaves.
        total: parameters of the dense model.
        kept: blocks that each candidate keeps; None where all keep all.

    Raises:
        InputError: no candidate is smaller than the dense model, or the budget lies outside what they reach; `TooSmall`
            where it lies below.
    """
    weights: Sequence[float] = left
    whole: float = total
    if budget.cost is not None:
        blocks = kept if kept is not None else [range(len(budget.cost.blocks))] * len(left)
        weights = [budget.cost.weigh(stay, count) for stay, count in zip(blocks, left, strict=True)]
        whole = budget.cost.total
    smaller = [place for place, weight in enumerate(weights) if weight < whole]
    wanted = budget.limit(whole)
    least, most = (min(weights), max((weights[place] for place in smaller), default=whole))
    if budget.is_target:
        if wanted >= whole:
            raise InputError(already(budget, whole))
        below = [place for place in smaller if weights[place] <= wanted]
        if below:
            return max(below, key=lambda place: left[place])
    elif smaller and whole - wanted <= (whole - least) * (1 + _ROUNDING):
        if whole - wanted < (whole - most) * (1 - _ROUNDING) / 2:
            raise TooSmall(
                f"remove={budget.value:.1%}: unreachable, this method's smallest cut is {1 - most / whole:.1%}."
            )
        return min(smaller, key=lambda place: abs(weights[place] - wanted))
    raise InputError(f"{budget.asked()}: unreachable, at most {_at_most(budget, whole - least, whole)} like this.")


_ROUNDING = 0.005
"""A request this close (relative) to what can be reached counts as reached: 7.2% for 7.17%."""


def _exactly(count: int, candidates: Iterable[tuple[int, ...]], most: int) -> tuple[int, ...]:
    if count > most:
        raise InputError(f"blocks={count}: at most {most} blocks can go (some are protected, and one must stay).")
    return next(found for found in candidates if len(found) == count)


def already(budget: Budget, total: float) -> str:
    """Say that a model that weighs `total` needs no cut for this target."""
    if budget.aim == "target_memory":
        return f"{budget.asked()}: the model takes only {gigabytes(total)} as it is."
    if budget.aim == "target_speedup":
        return f"{budget.asked()}: the model is as fast as that already."
    return f"{budget.asked()}: the model has only {total:,} parameters."


def _too_much(budget: Budget, gone: float, total: float, most: int) -> str:
    everything = f"{budget.asked()}: unreachable, taking out all {most} blocks that may go"
    if budget.aim == "target_memory":
        return f"{everything} leaves {gigabytes(total - gone)}."
    if budget.aim == "target_speedup":
        assert budget.cost is not None
        return f"{everything} makes it {budget.cost.dense / (total - gone):.2f} times as fast."
    return f"{everything} removes {gone / total:.1%} of the parameters."


def _at_most(budget: Budget, gone: float, total: float) -> str:
    if budget.aim == "target_memory":
        return f"a cut to {gigabytes(total - gone)} is possible"
    if budget.aim == "target_speedup":
        assert budget.cost is not None
        return f"{budget.cost.dense / (total - gone):.2f} times as fast is possible"
    return f"{gone / total:.1%} of the parameters can go"
