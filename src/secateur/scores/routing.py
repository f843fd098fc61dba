"""What the routers of a mixture do: how evenly they use the experts, and which experts they choose together.

Legend: E = experts of a block, k = experts that a token is sent to.
"""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict, Field

from secateur.calibration.routing import RoutingSums, measure_routing
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.models.experts import mixture_of
from secateur.run_options import DEFAULTS, RunOptions
from secateur.scores.experts import reap

_PAIRS = 8


class Pair(BaseModel):
    """Two experts of a block that are chosen together.

    Attributes:
        experts: their numbers.
        share: of the tokens of the rarer one, those that are sent to both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    experts: tuple[int, int]
    share: float = Field(ge=0, le=1)


class BlockRouting(BaseModel):
    """What the router of a block does.

    Attributes:
        load: share of the tokens that each expert is chosen for, (E,); they sum to k.
        saliency: S_j of REAP of each expert, (E,).
        balance: entropy of the load over that of an even load, in [0, 1]; 1 uses all experts alike.
        decision: mean entropy of a token's weights over that of even weights, in [0, 1]; 0 always trusts one expert.
        together: the experts most often chosen together, the closest pair first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    load: tuple[float, ...] = Field(min_length=1)
    saliency: tuple[float, ...] = Field(min_length=1)
    balance: float
    decision: float
    together: tuple[Pair, ...]

    @property
    def idle(self) -> tuple[int, ...]:
        """The experts that no token is sent to."""
        return tuple(expert for expert, share in enumerate(self.load) if share == 0)


class Routing(BaseModel):
    """What the routers of a model do.

    Attributes:
        blocks: one after the other; None for a block whose MLP is dense.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    blocks: tuple[BlockRouting | None, ...] = Field(min_length=1)


def routing_of(decoder: Decoder, windows: Windows, options: RunOptions = DEFAULTS) -> Routing:
    """Measure what the routers of a model do.

    Raises:
        ModelError: the model has no experts, or none that can be removed.
        NumericsError: NaN or infinity on the way.
    """
    sums = measure_routing(decoder, windows, mixture_of(decoder), options=options)
    return Routing(blocks=tuple(None if one is None else describe_block(one) for one in sums))


def describe_block(sums: RoutingSums) -> BlockRouting:
    """Return what sums over tokens say about a router."""
    count, tokens = len(sums.load), float(sums.tokens)
    picked = float(sums.load.sum()) / tokens
    even = float(torch.special.entr(sums.load / sums.load.sum()).sum())
    return BlockRouting(
        load=tuple((sums.load / tokens).tolist()),
        saliency=tuple(reap(sums).tolist()),
        balance=even / math.log(count) if count > 1 else 1.0,
        decision=float(sums.entropy) / tokens / math.log(picked) if picked > 1 else 0.0,
        together=_closest(sums),
    )


def _closest(sums: RoutingSums) -> tuple[Pair, ...]:
    rarer = torch.minimum(sums.load[:, None], sums.load[None, :]).clamp_min(1)
    shares = (sums.together / rarer).triu(1)
    order = torch.argsort(shares.flatten(), descending=True, stable=True)[:_PAIRS].tolist()
    pairs = [(place // len(shares), place % len(shares)) for place in order]
    return tuple(Pair(experts=pair, share=float(shares[pair])) for pair in pairs if shares[pair] > 0)
