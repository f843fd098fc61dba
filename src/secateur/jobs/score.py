"""The job `score`: redundancy scores of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.data.texts import Count, Texts, windows_for
from secateur.data.windows import Windows
from secateur.errors import unknown
from secateur.jobs.job import Job, JobCost, cost_of, function_of
from secateur.models.decoder import Decoder
from secateur.models.experts import mixture_of
from secateur.plan.work import Work
from secateur.run_options import DEFAULTS, RunOptions
from secateur.scores.measure import score_model
from secateur.scores.profile import KINDS, ONE_PASS, Kind, Scores


@dataclass(frozen=True)
class ScoreJob(Job[Scores]):
    """A prepared measurement of redundancy scores.

    Attributes:
        model: the open model.
        windows: calibration windows.
        kinds: the scores to measure.
        options: run options.
    """

    model: Decoder
    windows: Windows
    kinds: tuple[Kind, ...]
    options: RunOptions

    @classmethod
    def prepare(
        cls,
        model: Decoder,
        *,
        texts: Texts = None,
        windows: Count = 32,
        seq_len: int | None = None,
        pack: bool = True,
        kinds: Sequence[Kind] = ONE_PASS,
        options: RunOptions = DEFAULTS,
    ) -> ScoreJob:
        """Measure where a model is redundant.

        Args:
            model: the open model.
            texts: what it is measured on: see `secateur texts`; None is `diverse`.
            windows: number of windows; None takes all, `auto` as many as the widest projection needs.
            seq_len: tokens per window; None takes 512, or the model's positions if those are fewer.
            pack: join documents into full windows; False puts one document in each window, padded.
            kinds: what to measure, of `cosine`, `angular`, `magnitude`, `cka` (these four in one pass), `perplexity`
                (with each block left out), `taylor` (backward passes) and `experts` (what the routers of a mixture do).
            options: seed of the documents and of the tokens that CKA looks at, batch size, progress.

        Raises:
            InputError: an unknown kind, or unusable texts.
            ModelError: `experts` of a model that has none.
            NumericsError: NaN or infinity; it never becomes a score.
        """
        for kind in kinds:
            if kind not in KINDS:
                raise unknown("score", kind, list(KINDS))
        if "experts" in kinds:
            mixture_of(model)
        used = windows_for(model, texts, windows=windows, seq_len=seq_len, pack=pack, options=options)
        return cls(model, used, tuple(kinds), options)

    def cost(self) -> JobCost:
        """Return the cost of measuring."""
        blocks = self.model.block_count
        also: dict[Kind, Work | float] = {
            "perplexity": Work((blocks + 1) / 2, losses=blocks + 1),
            "taylor": Work(4.0, losses=3.0),
            "experts": 2.0,
        }
        work = Work.total(also[kind] for kind in self.kinds if kind in also)
        return cost_of(self.model, self.windows, {"": work + 1.1})

    def run(self) -> Scores:
        """Measure the scores."""
        return score_model(self.model, self.windows, self.kinds, options=self.options)


score = function_of(ScoreJob.prepare, "score")
