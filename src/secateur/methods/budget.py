"""One budget for all methods: how much to remove, and the candidate that comes closest.

A fraction is of all parameters, embeddings and shortcut matrices included, measured on the result (tied tensors count
once). `remove` takes the closest non-zero cut; targets take the largest model within them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from secateur.errors import InputError
from secateur.methods.cost import AS_DENSE, Cost, SpeedModel, memory_cost, time_cost
from secateur.models.decoder import Decoder
from secateur.models.widths import unit_counts
from secateur.plan.amount import Amount, gigabytes
from secateur.plan.step import Units
from secateur.plan.steps import AnyStep, Sizes

Native = Literal["blocks", "slice", "ratio"]
"""The native unit of a method."""

Aim = Literal["blocks", "slice", "ratio", "remove", "target_params", "target_memory", "target_speedup", "own"]


class TooSmall(InputError):
    """The request is below the smallest cut of a method."""


@dataclass(frozen=True)
class Budget:
    """How much to remove.

    Attributes:
        aim: `blocks`: exactly that many blocks; `slice`: that fraction of the hidden directions; `ratio`: that fraction
            of what is inside blocks; `remove`: the closest non-zero cut to this fraction of all parameters;
            `target_params`: the largest model with at most this many parameters; `target_memory`: the largest whose
            weights and cache take at most this many bytes; `target_speedup`: the smallest cut that makes a request this
            many times as fast; `own`: whatever the method's own setting gives.
        value: a number of blocks, a fraction in [0, 1) or (0, 1), a number of parameters or bytes, a factor above 1,
            or the value of the setting.
        knob: name of the method's setting that requests it, if one does.
        context: tokens in the cache that `target_memory` counts.
        cost: cost of the current model in bytes or seconds, if the aim is in those units.
        is_rest: whether it is the remainder left by other methods: half of the smallest cut is enough to make that cut.
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
        """Whether nothing is to be removed, which is allowed only in a method's own unit."""
        return self.aim in ("blocks", "slice", "ratio") and self.value == 0

    @property
    def is_target(self) -> bool:
        """Whether the request is for the largest model within a limit."""
        return self.aim.startswith("target_")

    def describe(self) -> dict[str, Any]:
        """Return the request as data for the plan."""
        name = (self.knob or "own") if self.aim == "own" else self.aim
        return {name: self.value} | ({"context": self.context} if self.context is not None else {})

    def limit(self, total: float) -> float:
        """Return how much may remain of a model whose cost is `total`."""
        if self.aim == "remove":
            return total * (1 - self.value)
        if self.aim == "target_speedup":
            assert self.cost is not None
            return self.cost.dense / self.value
        return self.value

    def asked(self) -> str:
        """Return the request as it is written on the command line."""
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
    """Return the candidate that meets the budget.

    Args:
        budget: the request.
        candidates: blocks to remove, for 1, 2, … `most` blocks; read only as far as needed.
        block_parameters: number of parameters of each block.
        total: number of all parameters.
        most: maximum number of blocks that can be removed.

    Raises:
        InputError: the budget is outside the range of these candidates; `TooSmall` if it is below.
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
    """Return the cost of each block and of the whole model in the unit of a budget."""
    return (block_parameters, total) if budget.cost is None else (budget.cost.blocks, budget.cost.total)


def choose_size(
    budget: Budget,
    left: Sequence[int],
    total: int,
    kept: Sequence[Sequence[int]] | None = None,
    units: Sequence[Units] | None = None,
) -> int:
    """Return the index of the candidate that meets a budget.

    Args:
        budget: a fraction or a target.
        left: parameters that remain with each candidate.
        total: parameters of the dense model.
        kept: blocks that each candidate keeps; None if all keep all.
        units: numbers of units in each kept block with each candidate; None if they are as they were.

    Raises:
        InputError: no candidate is smaller than the dense model, or the budget is outside their range; `TooSmall` if it
            is below.
    """
    weights: Sequence[float] = left
    whole: float = total
    if budget.cost is not None:
        blocks = kept if kept is not None else [range(len(budget.cost.blocks))] * len(left)
        inside = units if units is not None else [AS_DENSE] * len(left)
        weights = [budget.cost.weigh(*one) for one in zip(blocks, left, inside, strict=True)]
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
    raise InputError(f"{budget.asked()}: unreachable, at most {_at_most(budget, whole - least, whole)} this way.")


_ROUNDING = 0.005
"""A request this close (relative) to what can be reached counts as reached: 7.2% for 7.17%."""


def _exactly(count: int, candidates: Iterable[tuple[int, ...]], most: int) -> tuple[int, ...]:
    if count > most:
        raise InputError(
            f"blocks={count}: at most {most} blocks can be removed (some are protected, and one must remain)."
        )
    most = 0
    for found in candidates:
        if len(found) == count:
            return found
        most = max(most, len(found))
    raise InputError(f"blocks={count}: this method can remove at most {most} here; others must stay, or are protected.")


def already(budget: Budget, total: float) -> str:
    """Return the message that a model of this cost needs no cut for this target."""
    if budget.aim == "target_memory":
        return f"{budget.asked()}: the model takes only {gigabytes(total)} as it is."
    if budget.aim == "target_speedup":
        return f"{budget.asked()}: the model is already that fast."
    return f"{budget.asked()}: the model has only {total:,} parameters."


def _too_much(budget: Budget, gone: float, total: float, most: int) -> str:
    everything = f"{budget.asked()}: unreachable, dropping all {most} removable blocks"
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
    return f"{gone / total:.1%} of the parameters can be removed"


CONTEXT = 4096


def with_cost(budget: Budget, decoder: Decoder, speed_model: SpeedModel | None) -> Budget:
    """Return the budget with the cost of the current model, if it is in bytes or seconds; the dense cost is kept.

    Args:
        budget: the request.
        decoder: the current model.
        speed_model: how the models run that the next method makes.

    Raises:
        InputError: the context is longer than the model's positions.
    """
    if budget.aim == "target_memory":
        context = budget.context or min(CONTEXT, decoder.max_positions or CONTEXT)
        if context > (decoder.max_positions or context):
            raise InputError(f"context={context}: the model has only {decoder.max_positions} positions.")
        cost = memory_cost(decoder, context)
        budget = dataclasses.replace(budget, context=context)
    elif budget.aim == "target_speedup":
        cost = time_cost(decoder, speed_model)
    else:
        return budget
    dense = cost.dense if budget.cost is None else budget.cost.dense
    return dataclasses.replace(budget, cost=dataclasses.replace(cost, dense=dense))


def sizes_of(decoder: Decoder) -> Sizes:
    """Return the sizes of a model with the units of each block."""
    inside = decoder.block_parameter_counts()
    return Sizes(inside, decoder.parameter_count - sum(inside), unit_counts(decoder))


def expected(budget: Budget, decoder: Decoder, steps: Sequence[AnyStep]) -> dict[str, Any]:
    """Return what a target is based on, and what these last steps on this model are expected to reach."""
    cost = budget.cost
    if cost is None:
        return {}
    kept = tuple(range(decoder.block_count))
    sizes = sizes_of(decoder)
    for step in steps:
        kept = tuple(kept[place] for place in step.kept_blocks(len(kept)))
        sizes = step.sizes_after(sizes)
    left = cost.weigh(kept, sizes.total, sizes.units) if steps else cost.total
    if cost.unit == "bytes":
        return {"bytes": int(left), "dense_bytes": int(cost.dense)} | cost.facts
    return {"speedup": round(cost.dense / left, 4), "seconds": left, "dense_seconds": cost.dense} | cost.facts
