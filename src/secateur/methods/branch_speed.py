"""The speed of models with narrower or fewer branches, predicted from a table of measured times.

What a narrower MLP saves is less than its share of the parameters, and attention takes its time with the cache, not
with its weights. So two blocks of the model are built with random weights at a few widths of the MLP, without it, and
without attention, in the form such a result has; the seconds measured on the real model are scaled by the ratios found.
The table is measured once for a shape and a device, and kept.

Kurtic et al. 2023, "ZipLM: Inference-Aware Structured Pruning of Language Models", choose by such a table.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter

from secateur.errors import ModelError
from secateur.evaluation.timing import BlockTimes, Request
from secateur.files import cache_folder
from secateur.methods.cost import AS_DENSE, SpeedModel, Weigh, by_size
from secateur.methods.records import recorded
from secateur.methods.sample_models import BLOCKS, Sample, ratio, time_samples
from secateur.modeling import SecateurConfig
from secateur.models.decoder import Decoder
from secateur.models.depth import config_with_blocks
from secateur.models.families import FAMILIES
from secateur.models.widths import unit_counts
from secateur.plan.step import Units
from secateur.plan.steps import Widths
from secateur.plan.units import UnitKind
from secateur.surgery.width.target import dense_widths, folded_at, with_widths
from secateur.versions import digest

_FORMAT = 1
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Widths of the MLP that are timed, as shares of the full one."""


@dataclass(frozen=True)
class BranchTimes:
    """The time of a block with less in it, as a share of its time.

    Attributes:
        mlp: with 0, 1/4, 1/2, 3/4 and all of the channels.
        no_attention: without attention.
    """

    mlp: Annotated[tuple[float, ...], Field(min_length=len(_SHARES), max_length=len(_SHARES))]
    no_attention: float

    def share(self, groups: float, channels: float) -> float:
        """Return the share of the time with these shares of key/value groups and channels."""
        attention = (1 - min(1.0, self.no_attention)) * (1 - groups)
        return max(0.0, float(np.interp(channels, _SHARES, self.mlp)) - attention)


def speed_by_branch(_settings: Any) -> SpeedModel:
    """Return how models run whose blocks differ in their widths; by size, if the modelling file cannot hold them."""
    return _weigh


def _weigh(decoder: Decoder, times: BlockTimes) -> Weigh:
    dense = unit_counts(decoder)
    groups, channels = dense.get(UnitKind.KEY_VALUE_GROUP), dense.get(UnitKind.CHANNEL)
    plain = by_size(decoder, times)
    try:
        table = branch_times(decoder, times.request) if groups and channels else None
    except ModelError:
        table = None

    def seconds(kept: Any, parameters: int, units: Units = AS_DENSE) -> float:
        some, wide = units.get(UnitKind.KEY_VALUE_GROUP), units.get(UnitKind.CHANNEL)
        if table is None or groups is None or channels is None or some is None or wide is None:
            return plain(kept, parameters, units)
        return times.other + sum(
            times.blocks[block] * table.share(_part(own, groups[block]), _part(inner, channels[block]))
            for block, own, inner in zip(kept, some, wide, strict=True)
        )

    return seconds


def _part(left: int, dense: int) -> float:
    return left / dense if dense else 1.0


def branch_times(decoder: Decoder, request: Request) -> BranchTimes:
    """Return the table of a model on its device, measured or read from the cache.

    Raises:
        ModelError: the modelling file cannot hold the model.
    """
    config = folded_at(decoder, dense_widths(decoder), bias=False)
    device = torch.cuda.get_device_name(decoder.device) if decoder.device.type == "cuda" else platform.processor()
    place = (decoder.device.type, device, torch.get_num_threads(), str(decoder.module.dtype))
    key = digest(_FORMAT, config.to_json_string(), place, asdict(request))
    path = cache_folder("times", f"{key}.json")
    return recorded(path, TypeAdapter(BranchTimes), lambda: _measured(decoder, config, request))


def _measured(decoder: Decoder, config: SecateurConfig, request: Request) -> BranchTimes:
    family, full = FAMILIES[config.model_type], dense_widths(decoder)[0]
    count = min(BLOCKS, decoder.block_count)

    def sample(**other: int) -> Sample:
        widths: list[Widths] = [full.model_copy(update=other)] * count
        return Sample(with_widths(config_with_blocks(config, family, range(count)), widths), family, 0)

    wide = [sample(channels=round(share * full.channels)) for share in reversed(_SHARES)]
    rounds = time_samples(decoder, [*wide, sample(groups=0)], request)
    shares = [ratio([(sum(row[place].blocks), sum(row[0].blocks)) for row in rounds]) for place in range(len(wide) + 1)]
    rising = np.minimum(1.0, np.maximum.accumulate(shares[-2::-1]))  # noise must not make the narrower one the slower
    return BranchTimes(tuple(rising.tolist()), shares[-1])
