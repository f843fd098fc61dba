"""How long work takes on a model, from short measurements of its parts here and now.

One block is run on a window, and one sum, fit or decomposition is made at the widths of the model; where that alone
would take long, at a smaller width, from which the time grows as the number of operations does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from secateur.calibration.inputs import InputSums
from secateur.calibration.statistics import device_with_float64
from secateur.calibration.walk import Batch, loss_sum
from secateur.models.anatomy import experts_per_token
from secateur.models.decoder import Decoder
from secateur.models.depth import first_sharing
from secateur.models.forward import capture, run_block
from secateur.models.widths import block_widths
from secateur.plan.work import Work
from secateur.scores.unit_scores import order_by_surgeon
from secateur.surgery.hidden.directions import Covariance, principal_directions, times
from secateur.surgery.width.repair import choose_fit, rewritten

_TOKENS = 512
_LOSS_TOKENS = 64
_VOCABULARY = 64
_WIDEST_SUM, _WIDEST_SOLVED = 4096, 768
_CUT = 0.25
"""Share of the inputs that a measured fit does without."""


@dataclass(frozen=True)
class Rate:
    """Seconds of a part of the work.

    Attributes:
        once: however many tokens there are.
        token: for each token.
    """

    once: float = 0.0
    token: float = 0.0

    def __add__(self, other: Rate) -> Rate:
        """Return both together."""
        return Rate(self.once + other.once, self.token + other.token)

    def __mul__(self, times: float) -> Rate:
        """Return it done so many times."""
        return Rate(times * self.once, times * self.token)


class Timing:
    """The rates of the parts of the work on a model, each measured when it is first asked for."""

    def __init__(self, decoder: Decoder, seq_len: int) -> None:
        """Prepare for windows of this length; nothing is measured yet."""
        self._decoder, self._seq_len = decoder, seq_len
        self._home = device_with_float64(decoder.device)
        alone = first_sharing(decoder.config, decoder.anatomy.family)
        self._middle = min(decoder.block_count // 2, alone - 1)

    def seconds(self, work: Work, tokens: int) -> float:
        """Return the wall time of work over so many tokens."""
        total = 0.0
        for part in fields(work):
            count = getattr(work, part.name)
            if count:
                rate: Rate = getattr(self, part.name)
                total += count * (rate.once + tokens * rate.token)
        return total

    @cached_property
    @torch.no_grad()
    def forwards(self) -> Rate:
        """All blocks; of a skeleton with the reading of their weights."""
        decoder, (batch, hidden) = self._decoder, self._start
        begin = time.perf_counter()
        with decoder.block(self._middle) as block:
            loaded = time.perf_counter() - begin if decoder.by_blocks else 0.0
            seconds = fastest(lambda: run_block(block, batch.calls[self._middle], hidden))
        active = [active_parameters(decoder, one) for one in decoder.block_list]
        blocks = sum(active) / active[self._middle]
        return Rate(blocks * loaded, blocks * seconds / batch.tokens.numel())

    @cached_property
    @torch.no_grad()
    def losses(self) -> Rate:
        """Final norm, head and loss."""
        batch, hidden = self._start
        tokens, hidden = batch.tokens[:1, :_LOSS_TOKENS], hidden[:1, :_LOSS_TOKENS]
        batch = replace(batch, tokens=tokens)
        with self._decoder.outer():
            return Rate(token=fastest(lambda: loss_sum(self._decoder, batch, hidden)) / tokens.numel())

    @cached_property
    def sums(self) -> Rate:
        """Products of the inputs of the MLPs' output projections, of the experts that a token is sent to."""
        width = min(self._channels, _WIDEST_SUM)
        sums, rows, owner = InputSums(width, self._home), self._random(width), torch.zeros(_TOKENS, dtype=torch.int64)
        seconds = fastest(lambda: sums.update(rows, owner)) * (self._channels / width) ** 2
        picked = experts_per_token(self._decoder.config, self._decoder.anatomy.family) or 1
        return Rate(token=seconds / _TOKENS) * (picked * self._decoder.block_count)

    @cached_property
    def fits(self) -> Rate:
        """Least squares of the MLPs' output projections."""

        def fit(weight: torch.Tensor, sums: InputSums) -> None:
            stay = torch.arange(weight.shape[1], device=weight.device) >= _CUT * weight.shape[1]
            rewritten(weight, sums, stay, repair=True, bias=False)
            choose_fit(weight, sums, stay, repair=True, bias=False)

        return self._solved(fit)

    @cached_property
    def orders(self) -> Rate:
        """Greedy orders of the inputs of the MLPs' output projections."""

        def order(weight: torch.Tensor, sums: InputSums) -> None:
            width = weight.shape[1]
            units = torch.arange(width, device=weight.device)[None, :, None]
            order_by_surgeon(weight, sums, units, math.ceil((1 - _CUT) * width))

        return self._solved(order)

    @cached_property
    def covariances(self) -> Rate:
        """Products of the residual stream."""
        width = min(self._decoder.hidden_size, _WIDEST_SUM)
        sums, rows = Covariance(width), self._random(width)
        seconds = fastest(lambda: sums.update(rows)) * (self._decoder.hidden_size / width) ** 2
        return Rate(token=seconds / _TOKENS) * (2 * self._decoder.block_count)

    @cached_property
    def rotations(self) -> Rate:
        """Principal directions of the residual stream, and the weights of all blocks turned to them."""
        decoder, width = self._decoder, min(self._decoder.hidden_size, _WIDEST_SOLVED)
        rows = self._random(width)
        covariance = (rows.T @ rows).to(self._home, torch.float64)
        directions = principal_directions(covariance)
        growth = decoder.hidden_size / width
        decomposed = fastest(lambda: principal_directions(covariance)) * growth**3 * 2 * decoder.block_count
        turned = fastest(lambda: times(rows, directions)) / rows.numel() * growth
        return Rate(once=decomposed + turned * sum(decoder.block_parameter_counts()))

    @cached_property
    @torch.no_grad()
    def _start(self) -> tuple[Batch, torch.Tensor]:
        """About 512 tokens, at least one window, and what enters block 0."""
        count = max(1, _TOKENS // self._seq_len)
        tokens = torch.arange(count * self._seq_len, device=self._decoder.device) % _VOCABULARY
        hidden, calls = capture(self._decoder, tokens.view(count, -1))
        return Batch(0, tokens.view(count, -1), None, calls), hidden

    @property
    def _channels(self) -> int:
        return block_widths(self._decoder, self._middle).channels

    def _random(self, width: int) -> torch.Tensor:
        rows = torch.randn(_TOKENS, width, generator=torch.Generator().manual_seed(0))
        return rows.to(self._decoder.device, self._decoder.module.dtype)

    def _solved(self, solve: Callable[[torch.Tensor, InputSums], Any]) -> Rate:
        """Time a solution for a projection from the channels to the residual stream, and count those of all blocks."""
        channels = self._channels
        width = min(channels, _WIDEST_SOLVED)
        out = max(1, self._decoder.hidden_size * width // max(1, channels))
        sums, owner = InputSums(width, self._home), torch.zeros(2 * _TOKENS, dtype=torch.int64)
        held_out = torch.arange(2 * _TOKENS) >= _TOKENS
        rows = self._random(width)
        sums.update(torch.cat((rows, rows.flip(1))), owner, held_out=held_out)
        weight = self._random(width)[:1].expand(out, width).to(self._home, torch.float64).contiguous()
        seconds = fastest(lambda: solve(weight, sums), 2) * (channels / width) ** 3
        experts = max(1, block_widths(self._decoder, self._middle).experts)
        return Rate(once=seconds) * (experts * self._decoder.block_count)


def active_parameters(decoder: Decoder, module: torch.nn.Module) -> float:
    """Return the parameters of a module that a token meets; of stacked experts, only as many as the router picks."""
    picked = experts_per_token(decoder.config, decoder.anatomy.family)
    total = 0.0
    for parameter in module.parameters():
        share = picked / parameter.shape[0] if picked and parameter.dim() == 3 else 1.0
        total += parameter.numel() * share
    return total


def fastest(run: Callable[[], Any], repeats: int = 3) -> float:
    """Return the least wall time of a few runs."""
    return min(_seconds(run) for _ in range(repeats))


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
