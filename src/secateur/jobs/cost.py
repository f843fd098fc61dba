"""What a command will need, said before it starts: memory from shapes, time from a short measurement here and now."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from secateur.models.decoder import Decoder

_EFFICIENCY = 0.6
"""Share of the speed of one large matrix product that a decoder's forward pass reaches, roughly."""
_OVERHEAD_BYTES = 500 << 20


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a command.

    Attributes:
        memory: bytes at the peak: weights, hidden states in flight, and the interpreter itself.
        seconds: wall time, within a factor of two or so.
        forwards: plain forward passes over all windows it amounts to.
    """

    memory: int
    seconds: float
    forwards: float

    def sentence(self) -> str:
        """Say it in one line."""
        return f"needs about {_size(self.memory)} of memory and {_duration(self.seconds)}"


def estimate(model: Decoder, tokens: int, forwards: float, *, whole: bool = False, beside: int = 0) -> Estimate:
    """Estimate a command that amounts to `forwards` forward passes over `tokens` tokens.

    With `whole` all weights count, of a skeleton too: they will be held together; and `beside` them so many bytes.
    """
    itemsize = model.module.dtype.itemsize
    blocks = model.block_parameter_counts()
    outer = model.parameter_count - sum(blocks)
    held = outer + (2 * max(blocks) if model.by_blocks and not whole else sum(blocks))
    in_flight = 16384 if model.by_blocks or model.device.type == "cuda" else 2048
    states = min(tokens, in_flight) * model.hidden_size * (model.block_count + 1) * 4
    operations = 2.0 * tokens * forwards * _active_parameters(model)
    seconds = operations / (_EFFICIENCY * _operations_per_second(model)) if forwards else 0.0
    return Estimate(held * itemsize + beside + states + _OVERHEAD_BYTES, seconds, forwards)


def _active_parameters(model: Decoder) -> float:
    """Parameters that take part for one token; of stacked experts only those the router picks."""
    picked = getattr(model.config, "num_experts_per_tok", None)
    total = 0.0
    for parameter in model.module.parameters():
        share = picked / parameter.shape[0] if picked and parameter.dim() == 3 else 1.0
        total += parameter.numel() * share
    return total


def _operations_per_second(model: Decoder) -> float:
    """Time a few matrix products of the model's width and dtype on its device."""
    width = max(256, min(model.hidden_size, 4096))
    left = torch.ones(512, width, dtype=model.module.dtype, device=model.device)
    right = torch.ones(width, 2 * width, dtype=model.module.dtype, device=model.device)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        product = left @ right
        float(product[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 2 * 512 * width * 2 * width / best


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return "a few seconds"
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
