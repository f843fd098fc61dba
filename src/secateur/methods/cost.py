"""The cost of a model where it is not counted in parameters: bytes of memory, or seconds on this device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, Protocol

from secateur.distributed import process_count
from secateur.errors import InputError
from secateur.evaluation.timing import BlockTimes, Request, time_blocks
from secateur.models.decoder import Decoder
from secateur.models.depth import block_kind
from secateur.models.widths import cache_size, unit_counts
from secateur.plan.step import Units
from secateur.plan.units import UnitKind

REQUEST = Request(batch=1, prompt=128, new_tokens=32)
"""The request on which a speed-up is measured, as far as the model's positions allow."""

AS_DENSE: Units = MappingProxyType({})
"""Blocks have as many units of every kind as in the dense model."""


class Weigh(Protocol):
    """The cost of a model."""

    def __call__(self, kept: Sequence[int], parameters: int, units: Units = AS_DENSE, /) -> float:
        """Return it for a model with these blocks, this many parameters, and these numbers of units in each block.

        Kinds that are not named count as in the dense model.
        """


SpeedModel = Callable[[Decoder, BlockTimes], Weigh]
"""How a method's models run: from the dense model and its times to the seconds of a model."""


@dataclass(frozen=True)
class Cost:
    """The cost of a model, and of each of its blocks.

    Attributes:
        unit: bytes of weights and cache, or seconds of a request.
        blocks: cost that is saved with each block.
        total: cost of the model.
        dense: cost of the original model.
        weigh: cost of a model with these blocks, this many parameters, and these units in each.
        facts: what the cost is based on, for the plan.
    """

    unit: Literal["bytes", "seconds"]
    blocks: tuple[float, ...]
    total: float
    dense: float
    weigh: Weigh = field(compare=False, repr=False)
    facts: dict[str, Any] = field(default_factory=dict)

    def after(self, kept: Sequence[int], parameters: int) -> Cost:
        """Return the cost of the model with only these blocks and this many parameters, by what was measured here."""
        return replace(
            self,
            blocks=tuple(self.blocks[block] for block in kept),
            total=self.weigh(kept, parameters),
            weigh=lambda stay, count, units=AS_DENSE: self.weigh([kept[place] for place in stay], count, units),
        )


def memory_cost(decoder: Decoder, context: int) -> Cost:
    """Return the bytes of weights and of the cache of one sequence of `context` tokens, in the checkpoint's dtype."""
    each = decoder.saved_dtype.itemsize
    cache = [numbers * each for numbers in cache_size(decoder, context)]
    total = decoder.parameter_count * each + sum(cache)
    groups = unit_counts(decoder).get(UnitKind.KEY_VALUE_GROUP)

    def in_bytes(kept: Sequence[int], parameters: int, units: Units = AS_DENSE) -> float:
        held = [cache[block] for block in kept]
        left = units.get(UnitKind.KEY_VALUE_GROUP)
        if groups is not None and left is not None:
            shares = (now / max(1, groups[block]) for block, now in zip(kept, left, strict=True))
            return parameters * each + sum(one * share for one, share in zip(held, shares, strict=True))
        return parameters * each + sum(held)

    return Cost(
        unit="bytes",
        blocks=tuple(count * each + held for count, held in zip(decoder.block_parameter_counts(), cache, strict=True)),
        total=total,
        dense=total,
        weigh=in_bytes,
        facts={"context": context, "dtype": str(decoder.saved_dtype).removeprefix("torch.")},
    )


def time_cost(decoder: Decoder, speed_model: SpeedModel | None = None) -> Cost:
    """Measure where the time of a request is spent; blocks of equal kind and size count the same.

    Args:
        decoder: the model; a skeleton is read into memory for this.
        speed_model: how the method's models run; None: time in blocks follows their size.

    Raises:
        InputError: this is one of several processes: each would measure another time, and decide by it.
    """
    if process_count() > 1:
        raise InputError(
            "target-speedup is measured by one process: make the plan without a launcher "
            "(secateur plan … -o plan.json), and give it to all of them with --plan."
        )
    family, config = decoder.anatomy.family, decoder.config
    sizes = decoder.block_parameter_counts()
    kinds = [(block_kind(config, family, index), size) for index, size in enumerate(sizes)]
    request = _fitting(decoder)
    times = time_blocks(decoder, request, kinds=kinds)
    return Cost(
        unit="seconds",
        blocks=times.blocks,
        total=times.whole,
        dense=times.whole,
        weigh=(speed_model or by_size)(decoder, times),
        facts={
            "batch": request.batch,
            "prompt": request.prompt,
            "new_tokens": request.new_tokens,
            "block_seconds": [round(one, 7) for one in times.blocks],
            "other_seconds": round(times.other, 7),
            "device": str(decoder.device),
            "dtype": str(decoder.module.dtype).removeprefix("torch."),
        },
    )


def _fitting(decoder: Decoder) -> Request:
    room = decoder.max_positions
    if room is None or room >= REQUEST.prompt + REQUEST.new_tokens:
        return REQUEST
    return Request(1, max(1, room * 3 // 4), max(1, room // 4))


def by_size(decoder: Decoder, times: BlockTimes) -> Weigh:
    """Scale the time of the kept blocks by their size; a head that becomes untied adds nothing."""
    sizes = decoder.block_parameter_counts()
    outside = decoder.parameter_count - sum(sizes)

    def seconds(kept: Sequence[int], parameters: int, _units: Units = AS_DENSE) -> float:
        share = max(0, parameters - outside) / sum(sizes[block] for block in kept)
        return times.other + min(1.0, share) * sum(times.blocks[block] for block in kept)

    return seconds
