"""What the router of a block decides, and sums over tokens of what each expert then does.

Every mixture of transformers has a router that returns logits, alone or with (weights, experts), for each token, and a
module of experts called with (states, experts, weights). Both are read where they are called, whatever a family
computes in them. In Llama 4 the router returns (weights, logits) for all experts, and the weights multiply what enters
the experts, which are called with a copy of all tokens for each.

Legend: M = tokens, E = experts of a block, k = experts that a token is sent to, d = width of the residual stream.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.calibration.inputs import inside_expert
from secateur.calibration.shares import share_of
from secateur.calibration.statistics import device_with_float64
from secateur.calibration.walk import Batch, open_store, step, stored_start
from secateur.data.windows import Windows
from secateur.distributed import add_up, take_largest
from secateur.errors import NumericsError
from secateur.models.anatomy import Family, find
from secateur.models.decoder import Decoder
from secateur.models.experts import Mixture, experts_module, has_experts, router_path
from secateur.run_options import DEFAULTS, RunOptions

_CHUNK_BYTES = 64 << 20
_TINY = 1e-30


@dataclass(frozen=True)
class Routed:
    """The real tokens of a batch at the mixture of a block.

    Attributes:
        states: what enters it, (M, d).
        logits: of the router, (M, E).
        chosen: the experts of each token, (M, k) int64.
        weights: their weights, (M, k), as the block applies them to what they write.
        rows: indices of the tokens among all of the batch, window after window, (M,) int64 on the CPU.
        factors: what their inputs are multiplied by, (M, k); None: nothing.
    """

    states: torch.Tensor
    logits: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    factors: torch.Tensor | None = None

    @property
    def shares(self) -> torch.Tensor:
        """The weights of each token, renormalised so that they sum to 1, (M, k) float32."""
        weights = self.weights.float()
        return weights / weights.sum(dim=-1, keepdim=True).clamp_min(_TINY)

    def sent(self, places: torch.Tensor) -> torch.Tensor:
        """Return what the experts of these tokens are given, one after the other, (len(places) · k, d)."""
        states = self.states[places].repeat_interleave(self.chosen.shape[1], dim=0)
        return states if self.factors is None else states * self.factors[places].flatten()[:, None].to(states)


@contextmanager
def capturing_routing(block: nn.Module, family: Family, batch: Batch) -> Iterator[list[Routed]]:
    """Fill a list with what the mixture of a block does while the block runs on a batch."""
    found, called = list[Routed](), list[tuple[torch.Tensor, Any]]()
    real = torch.ones(batch.tokens.numel(), dtype=torch.bool) if batch.mask is None else batch.mask.flatten().cpu()
    rows = real.nonzero().flatten()

    def of_router(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        called.append((args[0], output))

    def of_experts(_: nn.Module, args: tuple[Any, ...]) -> None:
        (entering, output), factors = called.pop(), None
        if len(args) == 1:
            scores, logits = output
            factors, chosen = scores.topk(int((scores != 0).sum(dim=-1).max()), dim=-1)
            states, weights = entering, torch.ones_like(factors)
        else:
            logits = output[0] if isinstance(output, tuple) else output
            states, chosen, weights = args[:3]
        places = rows.to(states.device)
        found.append(
            Routed(
                states[places],
                logits.reshape(-1, logits.shape[-1])[places],
                chosen[places].long(),
                weights[places],
                rows,
                None if factors is None else factors[places],
            )
        )

    hooks = [
        find(block, router_path(block, family)).register_forward_hook(of_router),
        experts_module(block, family).register_forward_pre_hook(of_experts),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def expert_outputs(experts: Any, states: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the output of one expert for each state, (M, d), before any weight; `numbers` says which, (M,)."""
    if len(inspect.signature(experts.forward).parameters) > 1:
        result: torch.Tensor = experts.forward(states, numbers[:, None], states.new_ones(len(states), 1))
        return result
    result = torch.empty_like(states)
    for number in numbers.unique().tolist():
        own = numbers == number
        result[own] = inside_expert(experts, number, states[own]) @ experts.down_proj[number]
    return result


class RoutingSums:
    """Sums over tokens of what the router of a block decides and of what its experts write, float64 on the CPU.

    Attributes:
        tokens: number of tokens, ().
        load: how many tokens each expert was chosen for, (E,).
        gated: Σ g ‖f‖ over the tokens that each expert was chosen for, g being its share of the token's weights and f
            what it writes, (E,).
        norms: Σ ‖f‖ over the same tokens, (E,).
        peaks: the largest |f| of any token and direction among the same tokens, (E,).
        together: for how many tokens two experts were both chosen, (E, E).
        entropy: Σ over tokens of the entropy of their shares in nats, ().
    """

    def __init__(self, experts: int) -> None:
        """Start at zero."""
        self.tokens, self.entropy = torch.zeros(2, dtype=torch.float64)
        self.load, self.gated, self.norms, self.peaks = torch.zeros(4, experts, dtype=torch.float64)
        self.together = torch.zeros(experts, experts, dtype=torch.float64)

    def update(self, routed: Routed, experts: Any) -> None:
        """Add tokens; `experts` is the module that computes what they write."""
        width, count = routed.states.shape[1], len(self.load)
        home = device_with_float64(routed.states.device)
        shares = routed.shares.to(home).double()
        self.tokens += len(shares)
        self.entropy += torch.special.entr(shares).sum().cpu()
        hits = torch.zeros(len(shares), count, dtype=torch.float64, device=home)
        hits.scatter_(1, routed.chosen.to(home), 1.0)
        self.together += (hits.T @ hits).cpu()
        picked = routed.chosen.shape[1]
        for part in torch.arange(len(shares)).split(max(1, _CHUNK_BYTES // (4 * width * picked))):
            some = part.to(routed.states.device)
            numbers = routed.chosen[some].flatten()
            written = expert_outputs(experts, routed.sent(some), numbers)
            lengths = written.float().norm(dim=-1).to(home).double()
            numbers = numbers.to(home)
            peaks = written.float().abs().amax(dim=-1).to(home).double()
            highest = torch.zeros(count, dtype=torch.float64, device=home)
            self.peaks = torch.maximum(self.peaks, highest.scatter_reduce_(0, numbers, peaks, "amax").cpu())
            for into, values in (
                (self.load, torch.ones_like(lengths)),
                (self.gated, lengths * shares[part.to(home)].flatten()),
                (self.norms, lengths),
            ):
                into += torch.zeros(count, dtype=torch.float64, device=home).index_add_(0, numbers, values).cpu()

    def combine(self) -> None:
        """Add the sums of the other processes."""
        add_up(self.tokens, self.entropy, self.load, self.gated, self.norms, self.together)
        take_largest(self.peaks)

    def require_finite(self, block: int) -> None:
        """Refuse NaN and infinity.

        Raises:
            NumericsError: naming the block.
        """
        if not bool(torch.isfinite(self.norms).all()):
            raise NumericsError(
                f"NaN or infinity in what the experts of block {block} write; the weights may be damaged: "
                "try --dtype float32."
            )


@torch.no_grad()
def measure_routing(
    decoder: Decoder, windows: Windows, mixture: Mixture, *, options: RunOptions = DEFAULTS
) -> tuple[RoutingSums | None, ...]:
    """Walk the windows through the model and sum up what the mixture of each block does.

    Args:
        decoder: the model; of a skeleton one block is in memory at a time.
        windows: calibration windows.
        mixture: its mixtures.
        options: batch size and progress.

    Returns:
        The sums of each block; None for a block whose MLP is dense.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    sums = tuple(None if one is None else RoutingSums(one.count) for one in mixture.sizes)
    with open_store(decoder) as store:
        batches = stored_start(decoder, share_of(windows), store, options.batch_size)
        last = max(index for index, one in enumerate(sums) if one is not None)
        for index in options.progress(range(last + 1), "routing, block by block", last + 1):
            with decoder.block(index):
                for batch in batches:
                    hidden, routed = routed_step(decoder, index, batch, store.get(batch.index))
                    store.put(batch.index, hidden)
                    add_routed(sums[index], routed, decoder, index)
    for index, one in enumerate(sums):
        if one is not None:
            one.combine()
            one.require_finite(index)
    return sums


def add_routed(sums: RoutingSums | None, routed: Sequence[Routed], decoder: Decoder, index: int) -> None:
    """Add what the mixture of block `index`, its weights present, did with a batch."""
    for one in routed:
        assert sums is not None, "only a mixture routes tokens"
        sums.update(one, experts_module(decoder.block_list[index], decoder.anatomy.family))


def routed_step(
    decoder: Decoder, index: int, batch: Batch, hidden: torch.Tensor
) -> tuple[torch.Tensor, Sequence[Routed]]:
    """Run block `index` (its weights present) on one batch; return its output and what its mixture did, if it has one.

    Raises:
        NumericsError: the output holds NaN or infinity; the message names the block.
    """
    block, family = decoder.block_list[index], decoder.anatomy.family
    if not has_experts(block, family):
        return step(decoder, index, batch, hidden), ()
    with capturing_routing(block, family, batch) as found:
        return step(decoder, index, batch, hidden), found
