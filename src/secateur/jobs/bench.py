"""The job `bench`: speed and memory of a model, alternating with the dense one."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.evaluation.results import Result
from secateur.evaluation.speed import Timing, measure_speed
from secateur.jobs.job import Job, JobCost, describe_model, function_of, memory_of
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
        """Measure how fast a model reads a prompt and writes, and what memory it takes, beside the dense model.

        Args:
            model: the open model; a skeleton is read into memory for this.
            against: the dense model, measured in turn with it.
            timing: batch sizes, lengths of prompts, tokens written, rounds; None takes the defaults of `Timing`.
            options: seed of the prompts, which are random tokens; progress.

        Returns:
            For each batch size and prompt length, and each model: tokens/s of prefill and decode, seconds to the first
            token, bytes at the peak. Then for each model: cache bytes per token, bytes of the checkpoint, parameters.
            `ratio` is to the dense model in the same round.

        Raises:
            InputError: more tokens than a model has positions.
            ModelError: a model without a key/value cache.
        """
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


bench = function_of(BenchJob.prepare, "bench")
