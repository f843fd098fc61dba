"""The job `evaluate`: perplexity and tasks of a model and of the dense one, and reusable dense measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.data.texts import Count, Texts, windows_by_source
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.evaluation.metrics.metric import METRICS, measure
from secateur.evaluation.metrics.perplexity import mean_ratio
from secateur.evaluation.reference import Reference
from secateur.evaluation.results import Result
from secateur.evaluation.tasks import TaskRequest, ask_tasks, task_results
from secateur.jobs.job import Job, JobCost, cost_of, describe_model, function_of, memory_of
from secateur.models.decoder import Decoder
from secateur.plan.work import Work
from secateur.run_options import DEFAULTS, RunOptions

PERPLEXITY = ("perplexity",)
Tasks = str | Sequence[str] | TaskRequest | None
"""Names of tasks, or a `TaskRequest`, or None."""


@dataclass(frozen=True)
class EvaluateJob(Job[list[Result]]):
    """A prepared evaluation of a model and, optionally, of the one it is compared with.

    Attributes:
        model: the open model; None measures only the dense one.
        against: the dense model, or its earlier measurements; None compares with nothing.
        sources: held-out windows for perplexity, of each source; empty skips perplexity.
        tasks: tasks to run; None runs none.
        metrics: what is measured on the windows, by name.
        options: run options.
    """

    model: Decoder | None
    against: Decoder | Reference | None
    sources: tuple[Windows, ...]
    tasks: TaskRequest | None
    metrics: tuple[str, ...]
    options: RunOptions

    @classmethod
    def prepare(
        cls,
        model: Decoder,
        *,
        against: Decoder | Reference | None = None,
        texts: Texts = None,
        windows: Count = 64,
        seq_len: int | None = None,
        tasks: Tasks = None,
        metrics: Sequence[str] = PERPLEXITY,
        options: RunOptions = DEFAULTS,
    ) -> EvaluateJob:
        """Measure perplexity on held-out text, and tasks, of a model and of the one it is compared with, in one run.

        Args:
            model: the open model.
            against: the dense model to compare with, which must read the same tokens; or what it came to, measured
                before (`measure_reference`) on the same texts and questions.
            texts: see `secateur texts`; the held-out part is taken where a source has one. Several sources ("a,b") are
                measured separately, a mixture ("a:0.7,b:0.3") as one. None is the default, or no text where tasks are
                named. The dense model writes what `self` asks for.
            windows: number of windows; None takes all the text there is.
            seq_len: tokens per window; None takes 512, or the models' positions if those are fewer.
            tasks: names such as `stdlib-cloze`, `commonsense` (the seven of the papers) or `piqa,arc_easy`, any of
                lm-evaluation-harness, and folders with tasks in its form; or a `TaskRequest` that says how many
                questions and whether stability is measured. A skeleton is read into memory for them.
            metrics: what is measured on the windows: `perplexity`, and what installed packages add.
            options: seed of the choice of examples, windows or questions per batch, progress.

        Returns:
            One result per number: for each source the perplexity of the model, then of the dense one; for several
            sources the geometric mean of the ratios (`perplexity_ratio_geomean`); then task by task.

        Raises:
            InputError: unusable texts, an unknown task or one without options for stability, data that cannot be had,
                or models with different vocabularies.
            NumericsError: NaN or infinity on the way; it never becomes a number.
        """
        asked = None if tasks is None else TaskRequest.of(tasks)
        names = tuple(metrics)
        for name in names:
            METRICS.find(name)
        if isinstance(against, Decoder):
            require_same_vocabulary(model, against)
        if asked is not None and asked.stability and against is None:
            raise InputError("stability compares two models; name the dense one (--against).")
        if asked is not None and texts is None:
            return cls(model, against, (), asked, names, options)
        writer = against if isinstance(against, Decoder) and against.tokenizer is not None else model
        read = windows_by_source(writer, texts, windows=windows, seq_len=seq_len, options=options)
        return cls(model, against, read, asked, names, options)

    @property
    def models(self) -> dict[str, Decoder]:
        """Return the models that are measured, by role."""
        both = {"model": self.model, "against": self.against}
        return {role: one for role, one in both.items() if isinstance(one, Decoder)}

    def cost(self) -> JobCost:
        """Return the cost of measuring."""
        models = list(self.models.values())
        first = models[0]
        if not self.sources:
            whole = sum(memory_of(one, 0, whole=True) for one in models)
            names = ", ".join(self.tasks.names) if self.tasks else ""
            return JobCost(models=tuple(map(describe_model, models)), reads=f"tasks: {names}", memory=whole)
        passes = sum(one.parameter_count / first.parameter_count for one in models)
        return cost_of(first, _Together(self.sources), {"": Work(passes, losses=passes)}, also=models[1:])

    def run(self) -> list[Result]:
        """Run the evaluation."""
        known = self.against if isinstance(self.against, Reference) else Reference()
        asked: list[Result] = []
        if self.tasks is not None:
            outcomes = ask_tasks(self.models, self.tasks, options=self.options)
            own = outcomes.get("model", [])
            before = (outcomes.get("against") or known.answers_to(own)) if self.tasks.stability else None
            asked = task_results(self.models, outcomes, limit=self.tasks.limit, stable_to=before)
            asked += known.results_on(own)
        read: list[Result] = []
        for windows in self.sources:
            for role, one in self.models.items():
                read += measure(self.metrics, one, role, windows, self.options)
            read += known.metrics_on(windows, self.metrics)
        ratios = mean_ratio(self.model, read) if self.model is not None else []
        return read + ratios + asked


@dataclass(frozen=True)
class _Together:
    """Windows of several sources as one amount of text."""

    sources: tuple[Windows, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @property
    def source(self) -> str:
        return ", ".join(windows.source for windows in self.sources)

    @property
    def seq_len(self) -> int:
        return max(windows.seq_len for windows in self.sources)

    @property
    def token_count(self) -> int:
        return sum(windows.token_count for windows in self.sources)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for windows in self.sources for note in windows.notes)


evaluate = function_of(EvaluateJob.prepare, "evaluate")


def require_same_vocabulary(model: Decoder, against: Decoder) -> None:
    """Refuse two models with different vocabularies.

    Raises:
        InputError: the message names both.
    """
    if model.tokenizer is None or against.tokenizer is None:
        return
    if model.tokenizer.get_vocab() != against.tokenizer.get_vocab():
        raise InputError(
            f"{model.source} and {against.source} have different vocabularies; their results cannot be compared."
        )


def measure_reference(
    model: Decoder,
    *,
    texts: Texts = None,
    windows: Count = 64,
    seq_len: int | None = None,
    tasks: Tasks = None,
    options: RunOptions = DEFAULTS,
) -> Reference:
    """Measure the dense model once, for comparison with many others; the arguments are those of `evaluate`.

    Perplexity is always measured, tasks only if some are named; with stability, all of them must have options.

    Raises:
        InputError, NumericsError: as `evaluate`.
    """
    read = windows_by_source(model, texts, windows=windows, seq_len=seq_len, options=options)
    results = [found for one in read for found in measure(PERPLEXITY, model, "against", one, options)]
    if tasks is None:
        return Reference(tuple(results))
    asked, models = TaskRequest.of(tasks), {"against": model}
    outcomes = ask_tasks(models, asked, options=options)
    return Reference((*results, *task_results(models, outcomes, limit=asked.limit)), tuple(outcomes["against"]))
