"""The job `bench`: speed and memory of a model, alternating with the dense one."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.evaluation.results import Result
from secateur.evaluation.speed import Timing, measure_speed
from secateur.jobs.cost import JobCost, describe_model, memory_of
from secateur.jobs.job import Job
from secateur.models.decoder import Decoder
from secateur.run_options import DEFAULTS, RunOptions


@dataclass(frozen=True)
class BenchJob(Job[list[Result]]):
    """A prepared benchmark of a model and, optionally, the one it is compared with.

    Attributes:
        model: the open model; a skeleton is read into memory.
        against: the dense model, measured alternately; None measures one model.
        timing: requests and rounds.
        options: seed of the prompts, progress.
    """

    model: Decoder
    against: Decoder | None
    timing: Timing
    options: RunOptions

    @classmethod
    def prepare(
        cls,
        model: Decoder,
        *,
        against: Decoder | None = None,
        timing: Timing | None = None,
        options: RunOptions = DEFAULTS,
    ) -> BenchJob:
        """Check a request; arguments and errors are those of `bench`."""
        return cls(model, against, timing or Timing(), options)

    def cost(self) -> JobCost:
        """Return the memory the benchmark needs; its duration is what it measures."""
        models = [one for one in (self.model, self.against) if one is not None]
        batches = ",".join(map(str, self.timing.batch_sizes))
        rounds = f"batch sizes {batches}, {self.timing.warmup} + {self.timing.repeats} rounds"
        memory = sum(memory_of(one, 0, whole=True) for one in models)
        return JobCost(models=tuple(map(describe_model, models)), reads=rounds, memory=memory)

    def run(self) -> list[Result]:
        """Run the benchmark."""
        return measure_speed(self.model, self.against, self.timing, self.options)


def bench(
    model: Decoder,
    *,
    against: Decoder | None = None,
    timing: Timing | None = None,
    options: RunOptions = DEFAULTS,
) -> list[Result]:
    """Measure prefill and decoding speed and the memory of a model, alternating with the dense model.

    Args:
        model: the open model; a skeleton is read into memory.
        against: the dense model, measured alternately.
        timing: batch sizes, prompt lengths, generated tokens, rounds; None takes the defaults of `Timing`.
        options: seed of the prompts, which are random tokens; progress.

    Returns:
        For each batch size, prompt length and model: tokens/s of prefill and decode, seconds to the first token, peak
        bytes. Then for each model: cache bytes per token, bytes of the checkpoint, parameters. `ratio` is relative to
        the dense model in the same round.

    Raises:
        InputError: more tokens than a model has positions.
        ModelError: a model without a key/value cache.
    """
    return BenchJob.prepare(model, against=against, timing=timing, options=options).run()
