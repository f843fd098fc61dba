"""The speed of sliced models, predicted: small random models of the same shapes are timed at a few widths.

The speed-up of a sliced block falls short of the share of its parameters that is removed: attention itself, the cache
and the shortcut matrices stay. So the first blocks of the model are built with random weights at full width and at
smaller ones, and the seconds measured on the real model are scaled by the ratios found; widths in between are
interpolated by the number of parameters that a model of this width has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from secateur.evaluation.timing import BlockTimes
from secateur.methods.cost import AS_DENSE, SpeedModel, Weigh
from secateur.methods.sample_models import BLOCKS, Sample, ratio, time_samples
from secateur.methods.slice_widths import OwnBases
from secateur.modeling import SecateurConfig
from secateur.models.decoder import Decoder
from secateur.models.depth import config_with_blocks
from secateur.models.families import FAMILIES
from secateur.surgery.hidden.folding import folded_config, stream_sizes
from secateur.surgery.hidden.stock import config_of_width, stock_stream_sizes, width_step
from secateur.surgery.hidden.stream_trial import with_stream

_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Widths that are timed, as fractions of the full one."""


def speed_with_own_bases(settings: Any) -> SpeedModel:
    """Return how models run that have a basis, and a shortcut matrix, at every reading point."""

    def speed_model(decoder: Decoder, times: BlockTimes) -> Weigh:
        bases = OwnBases(decoder, rounding=1, slices_head=settings.head == "sliced")
        samples = []
        for share in _SHARES:
            width = _rounded(share, bases.sizes.width)
            samples.append(_folded(decoder, width, bases.head((width,) * decoder.block_count), shortcuts=True))
        return _curve(decoder, times, samples)

    return speed_model


def speed_with_shared_bases(settings: Any) -> SpeedModel:
    """Return how models run that have one basis, or a few: stock ones where there can be one."""

    def speed_model(decoder: Decoder, times: BlockTimes) -> Weigh:
        decoder = with_stream(decoder) if settings.bases == 1 else decoder
        step = width_step(decoder, settings.rounding) if settings.bases == 1 else None
        if step is None:
            widths = [_rounded(share, decoder.hidden_size) for share in _SHARES]
            return _curve(decoder, times, [_folded(decoder, width, width, shortcuts=False) for width in widths])
        widths = [max(1, round(share * decoder.hidden_size / step)) * step for share in _SHARES[:-1]]
        return _curve(decoder, times, [_stock(decoder, width) for width in widths] + [_dense(decoder)])

    return speed_model


def _rounded(share: float, width: int) -> int:
    return max(8, round(share * width / 8) * 8)


def _folded(decoder: Decoder, width: int, head: int, *, shortcuts: bool) -> Sample:
    family = FAMILIES[SecateurConfig.model_type]
    full = folded_config(decoder)
    sizes = stream_sizes(full)
    each = sizes.points_per_block

    def points(blocks: int) -> list[int]:
        return [width] * (each * blocks) + [head]

    small = config_with_blocks(full, family, range(min(BLOCKS, decoder.block_count)))
    small.widths, small.shortcuts = points(small.num_hidden_layers), [shortcuts] * (each * small.num_hidden_layers)
    every = points(decoder.block_count)
    return Sample(small, family, sizes.sizes_at(every, [shortcuts] * (len(every) - 1)).total)


def _stock(decoder: Decoder, width: int) -> Sample:
    family, sizes = decoder.anatomy.family, stock_stream_sizes(decoder)
    each = sizes.points_per_block
    every = [width] * (each * decoder.block_count + 1)
    small = config_with_blocks(config_of_width(decoder, width), family, range(min(BLOCKS, decoder.block_count)))
    return Sample(small, family, sizes.sizes_at(every, [False] * (len(every) - 1)).total)


def _dense(decoder: Decoder) -> Sample:
    family = decoder.anatomy.family
    small = config_with_blocks(decoder.config, family, range(min(BLOCKS, decoder.block_count)))
    return Sample(small, family, decoder.parameter_count)


def _curve(decoder: Decoder, times: BlockTimes, samples: Sequence[Sample]) -> Weigh:
    """Time the samples and the dense shape in turn; return seconds by the number of parameters."""
    shapes = (_dense(decoder), *samples)
    rounds = time_samples(decoder, shapes, times.request)
    seconds = [
        times.other * ratio([(row[place].other, row[0].other) for row in rounds])
        + sum(times.blocks) * ratio([(sum(row[place].blocks), sum(row[0].blocks)) for row in rounds])
        for place in range(1, len(shapes))
    ]
    order = np.argsort([sample.parameters for sample in samples])
    parameters = np.array([sample.parameters for sample in samples], dtype=np.float64)[order]
    rising = np.maximum.accumulate(np.array(seconds)[order])  # noise must not make a smaller model the slower one
    return lambda _kept, left, _units=AS_DENSE: float(np.interp(left, parameters, rising))
