"""The speed of sliced models, predicted: small random models of the same shapes are timed at a few widths.

The speed-up of a sliced block falls short of the share of its parameters that is removed: attention itself, the cache
and the shortcut matrices stay. So the first blocks of the model are built with random weights at full width and at
smaller ones, and the seconds measured on the real model are scaled by the ratios found; widths in between are
interpolated by the number of parameters that a model of this width has.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from secateur.evaluation.timing import BlockTimes, time_blocks
from secateur.methods.cost import SpeedModel
from secateur.modeling import SecateurConfig
from secateur.models.anatomy import Family, resolve, set_parameter
from secateur.models.decoder import Decoder
from secateur.models.depth import config_with_blocks
from secateur.models.families import FAMILIES
from secateur.models.loading import empty_model
from secateur.surgery.hidden.folding import folded_config, stream_sizes
from secateur.surgery.hidden.stock import config_of_width, stock_stream_sizes, width_step

_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Widths that are timed, as fractions of the full one."""
_BLOCKS = 2
_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class _Sample:
    """A shape to time: configuration of a small model, and the parameters that the whole model would have."""

    config: Any
    family: Family
    parameters: int


def speed_with_own_bases(_settings: Any) -> SpeedModel:
    """Return how models run that have a basis, and a shortcut matrix, at every reading point."""
    return lambda decoder, times: _curve(decoder, times, [_with_own_bases(decoder, share) for share in _SHARES])


def speed_with_shared_bases(settings: Any) -> SpeedModel:
    """Return how models run that have one basis, or a few: stock ones where there can be one."""

    def speed_model(decoder: Decoder, times: BlockTimes) -> Callable[[int], float]:
        step = width_step(decoder, settings.rounding) if settings.bases == 1 else None
        if step is None:
            return _curve(decoder, times, [_folded(decoder, share, shortcuts=False) for share in _SHARES])
        widths = [max(1, round(share * decoder.hidden_size / step)) * step for share in _SHARES[:-1]]
        return _curve(decoder, times, [_stock(decoder, width) for width in widths] + [_dense(decoder)])

    return speed_model


def _with_own_bases(decoder: Decoder, share: float) -> _Sample:
    return _folded(decoder, share, shortcuts=True)


def _folded(decoder: Decoder, share: float, *, shortcuts: bool) -> _Sample:
    family = FAMILIES[SecateurConfig.model_type]
    full = folded_config(decoder)
    sizes = stream_sizes(full)
    width = max(8, round(share * sizes.width / 8) * 8)
    head = sizes.width if shortcuts else width
    each = sizes.points_per_block

    def points(blocks: int) -> list[int]:
        return [width] * (each * blocks) + [head]

    small = config_with_blocks(full, family, range(min(_BLOCKS, decoder.block_count)))
    small.widths, small.shortcuts = points(small.num_hidden_layers), [shortcuts] * (each * small.num_hidden_layers)
    every = points(decoder.block_count)
    return _Sample(small, family, sizes.sizes_at(every, [shortcuts] * (len(every) - 1)).total)


def _stock(decoder: Decoder, width: int) -> _Sample:
    family, sizes = decoder.anatomy.family, stock_stream_sizes(decoder)
    each = sizes.points_per_block
    every = [width] * (each * decoder.block_count + 1)
    small = config_with_blocks(config_of_width(decoder, width), family, range(min(_BLOCKS, decoder.block_count)))
    return _Sample(small, family, sizes.sizes_at(every, [False] * (len(every) - 1)).total)


def _dense(decoder: Decoder) -> _Sample:
    family = decoder.anatomy.family
    small = config_with_blocks(decoder.config, family, range(min(_BLOCKS, decoder.block_count)))
    return _Sample(small, family, decoder.parameter_count)


def _curve(decoder: Decoder, times: BlockTimes, samples: Sequence[_Sample]) -> Callable[[int], float]:
    """Time the samples and the dense shape in turn; return seconds by the number of parameters."""
    shapes = (_dense(decoder), *samples)
    rounds = [
        [time_blocks(_random(decoder, one), times.request, repeats=1) for one in shapes] for _ in range(_ROUNDS)
    ]  # each is built anew, because tables of several would not fit beside the model
    seconds = [
        times.other * _ratio([(row[place].other, row[0].other) for row in rounds])
        + sum(times.blocks) * _ratio([(sum(row[place].blocks), sum(row[0].blocks)) for row in rounds])
        for place in range(1, len(shapes))
    ]
    order = np.argsort([sample.parameters for sample in samples])
    parameters = np.array([sample.parameters for sample in samples], dtype=np.float64)[order]
    rising = np.maximum.accumulate(np.array(seconds)[order])  # noise must not make a smaller model the slower one
    return lambda left: float(np.interp(left, parameters, rising))


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(one / dense if dense > 0 else 1.0 for one, dense in pairs)


def _random(decoder: Decoder, sample: _Sample) -> Decoder:
    """Build a model of a shape on the decoder's device: with random blocks, so that routers do not all choose alike."""
    dtype, device = decoder.module.dtype, decoder.device
    module = empty_model(sample.config, dtype, device, trust_remote_code=False).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, empty in list(module.named_parameters()):
        value = torch.full(empty.shape, 0.01, dtype=dtype, device=device)
        if name.startswith(f"{sample.family.blocks}."):
            value.normal_(std=0.02, generator=generator)
        set_parameter(module, name, value)
    module.tie_weights()
    return dataclasses.replace(decoder, module=module, anatomy=resolve(module, sample.family), shards=None)
