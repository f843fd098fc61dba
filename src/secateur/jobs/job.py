"""What every job is: prepared once, it says what it costs, and runs.

`prepare` is where a request meets a model: names, settings, amounts and texts are read and checked there and nowhere
else. `cost` tells what running would take and does nothing (memory from shapes, time from short measurements here and
now, `timing.py`); `run` does the work.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, ParamSpec, Protocol, TypeVar

import torch

from secateur.jobs.timing import Timing, active_parameters, fastest
from secateur.models.decoder import Decoder
from secateur.plan.work import Work

_EFFICIENCY = 0.6
"""Approximate throughput of a decoder's forward pass relative to one large matrix product."""
_OVERHEAD_BYTES = 500 << 20


class Counted(Protocol):
    """Windows of text or examples, with their number, length and source."""

    @property
    def source(self) -> str:
        """The source as the user wrote it."""

    @property
    def seq_len(self) -> int:
        """Tokens in each window."""

    @property
    def token_count(self) -> int:
        """Tokens in all windows."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Phase:
    """One phase of a job.

    Attributes:
        name: `plan` or `apply`; empty if the job has a single phase.
        seconds: estimated wall time, to within about a factor of 1.5.
    """

    name: str
    seconds: float


@dataclass(frozen=True)
class JobCost:
    """Estimated cost of a job.

    Attributes:
        models: a line about each model it opens.
        reads: a line about the texts it reads; empty if it reads none.
        phases: its phases in order.
        memory: peak bytes: weights, hidden states in flight, and the interpreter itself.
        disk: lines about temporary files.
        notes: remarks on the texts.
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
        """Return the estimate as a few lines of text."""
        needs = f"needs about {_size(self.memory)} of memory"
        if self.phases:
            times = [f"{phase.name}: {_duration(phase.seconds)}" for phase in self.phases if phase.name]
            needs += f" and {_duration(self.seconds)}" if not times else f"; {', '.join(times)}"
        return [*self.models, f"{self.reads}; {needs}" if self.reads else needs, *self.disk]


def describe_model(model: Decoder) -> str:
    """Return a line about a model: size, how it is held, dtype, device."""
    how = "skeleton, block by block" if model.by_blocks else "in memory"
    return (
        f"{model.source}: {model.parameter_count:,} parameters, {model.block_count} blocks, {how}, "
        f"{model.module.dtype} on {model.device}".replace("torch.", "")
    )


def cost_of(
    model: Decoder,
    data: Counted,
    work: Mapping[str, Work | float],
    *,
    also: Sequence[Decoder] = (),
    beside: int = 0,
    disk: Sequence[str] = (),
) -> JobCost:
    """Return the cost of a job that reads text.

    Args:
        model: the model it works on.
        data: the texts it reads.
        work: work on the data by phase; a number is plain forward passes.
        also: other models that are open at the same time.
        beside: bytes held in addition to the models.
        disk: lines about temporary files.
    """
    timing, tokens = Timing(model, data.seq_len), data.token_count
    seconds = timing.seconds if model.fingerprint else functools.partial(_by_size, model)
    phases = [Phase(name, seconds(Work.of(one), tokens)) for name, one in work.items()]
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
    """Return the peak bytes of walking so many tokens through a model.

    With `whole`, all weights of a skeleton count too, because they will be in memory together.
    """
    itemsize = model.module.dtype.itemsize
    blocks = model.block_parameter_counts()
    outer = model.parameter_count - sum(blocks)
    held = outer + (2 * max(blocks) if model.by_blocks and not whole else sum(blocks))
    in_flight = 16384 if model.by_blocks or model.device.type == "cuda" else 2048
    states = min(tokens, in_flight) * model.state_size * (model.block_count + 1) * 4
    return held * itemsize + states + _OVERHEAD_BYTES


def _by_size(model: Decoder, work: Work, tokens: int) -> float:
    """Estimate the wall time of work on a model whose weights are not there, from its size and one matrix product."""
    operations = 2.0 * tokens * work.forwards * active_parameters(model, model.module)
    return operations / (_EFFICIENCY * _operations_per_second(model))


def _operations_per_second(model: Decoder) -> float:
    """Return the speed of a few matrix products of the model's width and dtype on its device."""
    width = max(256, min(model.hidden_size, 4096))
    left = torch.ones(512, width, dtype=model.module.dtype, device=model.device)
    right = torch.ones(width, 2 * width, dtype=model.module.dtype, device=model.device)
    return 2 * 512 * width * 2 * width / fastest(lambda: left @ right, 4)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return "a few seconds"
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


Result = TypeVar("Result")
Asked = ParamSpec("Asked")


class Job(ABC, Generic[Result]):
    """A prepared request."""

    @abstractmethod
    def cost(self) -> JobCost:
        """Return the estimated cost: time by phase, memory, disk.

        Raises:
            OSError: the disk has no room for what would be written.
        """

    @abstractmethod
    def run(self) -> Result:
        """Do the work.

        Raises:
            SecateurError: as documented for the public function.
        """


def function_of(prepare: Callable[Asked, Job[Result]], name: str) -> Callable[Asked, Result]:
    """Return the function that prepares a job and runs it, with the arguments and documentation of `prepare`."""

    @functools.wraps(prepare)
    def prepare_and_run(*given: Asked.args, **named: Asked.kwargs) -> Result:
        return prepare(*given, **named).run()

    prepare_and_run.__name__ = prepare_and_run.__qualname__ = name
    return prepare_and_run
