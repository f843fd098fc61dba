"""What a job will need, said before it starts: memory from shapes, time from a short measurement here and now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from secateur.models.decoder import Decoder

_EFFICIENCY = 0.6
"""Share of the speed of one large matrix product that a decoder's forward pass reaches, roughly."""
_OVERHEAD_BYTES = 500 << 20


class Counted(Protocol):
    """Windows of text or examples: how many, how long, and where they are from."""

    @property
    def source(self) -> str:
        """What the user typed."""

    @property
    def seq_len(self) -> int:
        """Tokens in each."""

    @property
    def token_count(self) -> int:
        """Tokens in all of them."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should be told."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Phase:
    """One part of a job.

    Attributes:
        name: what it does: `plan`, `apply`; empty where a job has one part.
        forwards: plain forward passes over all windows it amounts to.
        seconds: wall time, within a factor of two or so.
    """

    name: str
    forwards: float
    seconds: float


@dataclass(frozen=True)
class JobCost:
    """What a job takes.

    Attributes:
        models: a line about each model it opens.
        reads: what it reads, in a line; empty where it reads no text.
        phases: its parts in order.
        memory: bytes at the peak: weights, hidden states in flight, and the interpreter itself.
        disk: what is written to temporary files, in lines.
        notes: what the user should know of the texts.
    """

    models: tuple[str, ...]
    reads: str = ""
    phases: tuple[Phase, ...] = ()
    memory: int = 0
    disk: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Wall time of all phases."""
        return sum(phase.seconds for phase in self.phases)

    def lines(self) -> list[str]:
        """Say it in a few lines."""
        needs = f"needs about {_size(self.memory)} of memory"
        if self.phases:
            times = [f"{phase.name}: {_duration(phase.seconds)}" for phase in self.phases if phase.name]
            needs += f" and {_duration(self.seconds)}" if not times else f"; {', '.join(times)}"
        return [*self.models, f"{self.reads}; {needs}" if self.reads else needs, *self.disk]


def describe_model(model: Decoder) -> str:
    """Say in a line what a model is and how it is held."""
    how = "skeleton, block by block" if model.by_blocks else "in memory"
    return (
        f"{model.source}: {model.parameter_count:,} parameters, {model.block_count} blocks, {how}, "
        f"{model.module.dtype} on {model.device}".replace("torch.", "")
    )


def cost_of(
    model: Decoder,
    data: Counted,
    forwards: dict[str, float],
    *,
    also: Sequence[Decoder] = (),
    beside: int = 0,
    disk: Sequence[str] = (),
) -> JobCost:
    """Return the cost of a job that reads text.

    Args:
        model: the model it works on.
        data: what it reads.
        forwards: plain forward passes over the data, by phase.
        also: other models that are open meanwhile.
        beside: bytes that are held beside the model.
        disk: what goes to temporary files, in lines.
    """
    phases = [Phase(name, passes, seconds_of(model, data.token_count, passes)) for name, passes in forwards.items()]
    memory = memory_of(model, data.token_count) + beside + sum(memory_of(one, 0) - _OVERHEAD_BYTES for one in also)
    return JobCost(
        models=tuple(describe_model(one) for one in (model, *also)),
        reads=f"{len(data)} windows of {data.seq_len} tokens of {data.source}",
        phases=tuple(phases),
        memory=memory,
        disk=tuple(disk),
        notes=tuple(data.notes),
    )


def memory_of(model: Decoder, tokens: int, *, whole: bool = False) -> int:
    """Return the bytes a model takes at the peak of a walk over so many tokens.

    With `whole` all weights count, of a skeleton too: they will be held together.
    """
    itemsize = model.module.dtype.itemsize
    blocks = model.block_parameter_counts()
    outer = model.parameter_count - sum(blocks)
    held = outer + (2 * max(blocks) if model.by_blocks and not whole else sum(blocks))
    in_flight = 16384 if model.by_blocks or model.device.type == "cuda" else 2048
    states = min(tokens, in_flight) * model.hidden_size * (model.block_count + 1) * 4
    return held * itemsize + states + _OVERHEAD_BYTES


def seconds_of(model: Decoder, tokens: int, forwards: float) -> float:
    """Estimate the wall time of `forwards` forward passes over so many tokens; a short measurement, here and now."""
    if not forwards:
        return 0.0
    operations = 2.0 * tokens * forwards * _active_parameters(model)
    return operations / (_EFFICIENCY * _operations_per_second(model))


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
