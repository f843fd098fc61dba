"""The job `plan`: decide what to remove, with one or several methods."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from secateur.data.texts import FEWEST, Count, Texts, windows_for
from secateur.data.windows import Windows
from secateur.errors import InputError, TextsWarning
from secateur.jobs.job import Job, JobCost, cost_of, describe_model, function_of, memory_of
from secateur.methods.asked import Asked
from secateur.methods.budget import Budget
from secateur.methods.method import Measurements
from secateur.methods.planning import decide, model_ref
from secateur.methods.sequence import Part, parts_for, read_sequence, whole_budget
from secateur.models.decoder import Decoder
from secateur.plan.amount import Amount, AmountFields
from secateur.plan.plan import Plan
from secateur.plan.work import Work
from secateur.run_options import DEFAULTS, RunOptions
from secateur.scores.profile import Scores
from secateur.versions import __version__


@dataclass(frozen=True)
class PlanJob(Job[Plan]):
    """A prepared plan request for one model.

    Attributes:
        model: the open model; it is not changed.
        method: the methods as the user wrote them.
        parts: the methods with their settings and shares.
        budget: the total budget.
        windows: calibration windows; None if nothing is measured.
        scores: scores measured earlier on this model and these texts; None measures them.
        options: run options.
    """

    model: Decoder
    method: str
    parts: tuple[Part, ...]
    budget: Budget
    windows: Windows | None
    scores: Scores | None
    options: RunOptions

    @classmethod
    def prepare(
        cls,
        model: Decoder,
        *,
        method: str,
        texts: Texts = None,
        windows: Count = "auto",
        seq_len: int | None = None,
        settings: Mapping[str, Any] | None = None,
        scores: Scores | None = None,
        options: RunOptions = DEFAULTS,
        **amount: Unpack[AmountFields],
    ) -> PlanJob:
        """Decide what to cut.

        Args:
            model: the open model; it is not changed.
            method: a name of `secateur methods`, such as `streamline`; or several that are applied one after the
                other, each with its share of what is to go: `swm:0.5,slicegpt:0.5`.
            texts: what the model is measured on: see `secateur texts`; None is `diverse`.
            windows: number of windows; None takes all, `auto` 32, or as many as the widest projection needs if the
                method refits it.
            seq_len: tokens per window; None takes 512, or the model's positions if those are fewer.
            settings: the method's own settings by name; of several methods as `swm.rule`.
            scores: scores of this model measured earlier, so that they are not measured again.
            options: seed, batch size, progress, and the work folder in which a search keeps what it measured, and
                training its states (of methods that are not the last). Scores of other texts are dropped with a
                warning.
            amount: exactly one of `remove` (fraction of all parameters, 0.25 or "25%"), `target_params` ("5.5B"),
                `target_memory` ("12GB", of weights and the cache of one sequence of `context` tokens), `target_speedup`
                (1.3, by block times measured now on the model's device), `blocks` (4) and `slicing` ("20%" of the
                hidden directions); or none, where one of the method's own settings is an amount, such as `window`.

        Raises:
            InputError: an unknown method or setting, an amount that cannot be reached, unusable texts, or scores
                of another model.
            ModelError: the method cannot cut this model.
            NumericsError: NaN or infinity while measuring.
        """
        parts = read_sequence(method, dict(settings or {}))
        budget = whole_budget(parts, Amount.of(amount))
        if scores is not None and model.fingerprint and scores.fingerprint != model.fingerprint:
            raise InputError(f"the scores are of another model ({scores.model}); measure this one.")
        parts = parts_for(parts, model)
        used: Windows | None = None
        if any(part.method.needs_texts(part.settings) for part in parts) and not budget.is_zero:
            asked = Asked.of(budget, model)
            if windows == "auto" and not any(part.refits(asked) for part in parts):
                windows = FEWEST
            used = windows_for(model, texts, windows=windows, seq_len=seq_len, options=options)
            if scores is not None and not scores.are_of(used):
                source = (scores.texts or {}).get("source")
                warnings.warn(f"the scores are of other texts ({source}) and are measured anew", TextsWarning, 2)
                scores = None
        return cls(model, method, parts, budget, used, scores, options)

    def forwards(self) -> Work:
        """Return the work of deciding."""
        windows = self.windows
        if windows is None or (self.scores is not None and len(self.parts) == 1):
            return Work()
        return Work.total(one.method.forwards(asked, one.settings, windows) for one, asked in self._asked())

    def apply_forwards(self) -> Work:
        """Return the work of applying such a plan, estimated before there is one."""
        if self.windows is None:
            return Work()
        tokens = self.windows.token_count
        return Work.total(one.method.apply_forwards(asked, one.settings, tokens) for one, asked in self._asked())

    def _asked(self) -> list[tuple[Part, Asked]]:
        """Return the methods, and what each is asked for."""
        whole = Asked.of(self.budget, self.model)
        return [(part, whole.part(part.share)) for part in self.parts]

    def cost(self) -> JobCost:
        """Return the cost of deciding, and of applying the plan."""
        if self.windows is None:
            return JobCost(
                models=(describe_model(self.model),), reads="nothing is measured", memory=memory_of(self.model, 0)
            )
        work = {"plan": self.forwards(), "apply": self.apply_forwards()}
        return cost_of(self.model, self.windows, work)

    def run(self) -> Plan:
        """Decide, and return the plan."""
        decided = decide(self.parts, self.budget, Measurements(self.model, self.windows, self.options, self.scores))
        methods = {"methods": self.method} if len(self.parts) > 1 else {}
        return Plan(
            version=__version__,
            model=model_ref(self.model),
            requested=self.budget.describe() | methods,
            texts=None if self.windows is None else self.windows.describe(),
            seed=self.options.seed,
            steps=decided.decision.steps,
            counts_on=decided.counted,
            search=decided.decision.search,
        )


make_plan = function_of(PlanJob.prepare, "make_plan")
