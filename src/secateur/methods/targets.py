"""Amounts counted in bytes or seconds: the cost of a model, and what a plan may expect."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from secateur.errors import InputError
from secateur.methods.budget import Budget
from secateur.methods.cost import SpeedModel, memory_cost, time_cost
from secateur.models.decoder import Decoder
from secateur.plan.steps import AnyStep, Sizes

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


def expected(budget: Budget, decoder: Decoder, steps: Sequence[AnyStep]) -> dict[str, Any]:
    """Return what a target is based on, and what these last steps on this model are expected to reach."""
    cost = budget.cost
    if cost is None:
        return {}
    kept = tuple(range(decoder.block_count))
    inside = decoder.block_parameter_counts()
    sizes = Sizes(inside, decoder.parameter_count - sum(inside))
    for step in steps:
        kept = tuple(kept[place] for place in step.kept_blocks(len(kept)))
        sizes = step.sizes_after(sizes)
    left = cost.weigh(kept, sizes.total) if steps else cost.total
    if cost.unit == "bytes":
        return {"bytes": int(left), "dense_bytes": int(cost.dense)} | cost.facts
    return {"speedup": round(cost.dense / left, 4), "seconds": left, "dense_seconds": cost.dense} | cost.facts
