"""Small random models of the shapes that a method makes, timed in the place of models that do not exist yet."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from secateur.evaluation.timing import BlockTimes, Request, time_blocks
from secateur.models.anatomy import Family, resolve, set_parameter
from secateur.models.decoder import Decoder
from secateur.models.loading import empty_model

BLOCKS = 2
"""Blocks of a sample."""
_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Sample:
    """A shape to time: configuration of a small model, and the parameters that the whole model would have."""

    config: Any
    family: Family
    parameters: int


def time_samples(decoder: Decoder, samples: Sequence[Sample], request: Request) -> list[list[BlockTimes]]:
    """Time samples in turn, on the device and in the dtype of a decoder; a row of their times for each round."""
    return [
        [time_blocks(_random(decoder, one), request, repeats=1) for one in samples] for _ in range(_ROUNDS)
    ]  # each is built anew, because tables of several would not fit beside the model


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the median ratio of times measured in the same round."""
    return statistics.median(one / dense if dense > 0 else 1.0 for one, dense in pairs)


def _random(decoder: Decoder, sample: Sample) -> Decoder:
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
