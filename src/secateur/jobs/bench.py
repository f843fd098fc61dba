"""The job `bench`: speed and memory of a model, alternating with the dense one, or its use as the dense one's draft."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.data.texts import windows_for
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.evaluation.drafting import measure_drafting
from secateur.evaluation.results import Result
from secateur.evaluation.speed import Timing, measure_speed
from secateur.jobs.evaluate import require_same_vocabulary
from secateur.jobs.job import Job, JobCost, describe_model, function_of, memory_of
from secateur.models.decoder import Decoder
from secateur.run_options import DEFAULTS, RunOptions

_DRAFTED, _DRAFT_PROMPT = 8, 64
"""Texts that are continued with a draft, and tokens of each beginning."""


@dataclass(frozen=True)
class BenchJob(Job[list[Result]]):
    """A prepared benchmark of a model and, optionally, the one it is compared with.

    Attributes:
        model: the open model; a skeleton is read into memory.
        against: the dense model, measured alternately; None measures one model.
        prompts: beginnings of held-out texts, which the dense model continues with the model as its draft; None
            measures speed and memory.
        timing: requests and rounds.
        options: seed of the prompts, progress.
    """

    model: Decoder
    against: Decoder | None
    prompts: Windows | None
    timing: Timing
    options: RunOptions

    @classmethod
    def prepare(
        cls,
        model: Decoder,
        *,
        against: Decoder | None = None,
        as_draft_of: Decoder | None = None,
        timing: Timing | None = None,
        options: RunOptions = DEFAULTS,
    ) -> BenchJob:
        """Measure how fast a model reads a prompt and writes, and what memory it takes, beside the dense model.

        Args:
            model: the open model; a skeleton is read into memory for this.
            against: the dense model, measured in turn with it.
            as_draft_of: the dense model, which then continues held-out texts with this model as its draft, and without;
                instead of all else.
            timing: batch sizes, lengths of prompts, tokens written, rounds; None takes the defaults of `Timing`.
            options: seed of the prompts, which are random tokens; progress.

        Returns:
            For each batch size and prompt length, and each model: tokens/s of prefill and decode, seconds to the first
            token, bytes at the peak. Then for each model: cache bytes per token, bytes of the checkpoint, parameters.
            `ratio` is to the dense model in the same round. For a draft: the share of its tokens that are accepted,
            tokens per pass of the dense model, and tokens/s with the draft and without.

        Raises:
            InputError: more tokens than a model has positions, both models to compare with, or other vocabularies.
            ModelError: a model without a key/value cache, or a pair that cannot generate together.
        """
        timing = timing or Timing()
        if as_draft_of is None:
            return cls(model, against, None, timing, options)
        if against is not None:
            raise InputError("as_draft_of names the dense model; leave against out.")
        require_same_vocabulary(model, as_draft_of)
        length = (timing.prompts or (_DRAFT_PROMPT,))[0]
        windows = windows_for(as_draft_of, None, windows=_DRAFTED, seq_len=length, split="held-out", options=options)
        return cls(model, as_draft_of, windows, timing, options)

    def cost(self) -> JobCost:
        """Return the memory the benchmark needs; its duration is what it measures."""
        models = [one for one in (self.model, self.against) if one is not None]
        if self.prompts is not None:
            memory = sum(memory_of(one, 0, whole=True) for one in models)
            reads = f"{len(self.prompts)} beginnings of {self.prompts.seq_len} tokens of {self.prompts.source}"
            return JobCost(models=tuple(map(describe_model, models)), reads=reads, memory=memory)
        batches = ",".join(map(str, self.timing.batch_sizes))
        rounds = f"batch sizes {batches}, {self.timing.warmup} + {self.timing.repeats} rounds"
        memory = sum(memory_of(one, 0, whole=True) for one in models)
        return JobCost(models=tuple(map(describe_model, models)), reads=rounds, memory=memory)

    def run(self) -> list[Result]:
        """Run the benchmark."""
        if self.prompts is not None:
            assert self.against is not None, "a draft is of a model"
            return measure_drafting(self.model, self.against, self.prompts.tokens, self.timing, self.options)
        return measure_speed(self.model, self.against, self.timing, self.options)


bench = function_of(BenchJob.prepare, "bench")
