"""The job `prune`: apply a plan to a model."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.data.texts import Texts
from secateur.data.windows import Windows
from secateur.errors import SecateurWarning
from secateur.files import require_room
from secateur.jobs.job import Job, JobCost, cost_of, describe_model, function_of, memory_of
from secateur.methods.method import Measurements
from secateur.methods.planning import apply_plan, require_made_for, windows_of_plan
from secateur.models.decoder import Decoder
from secateur.plan.plan import Plan
from secateur.plan.work import Work
from secateur.run_options import DEFAULTS, RunOptions


@dataclass(frozen=True)
class PruneJob(Job[Decoder]):
    """A plan prepared for application.

    Attributes:
        model: the model it was made for; it is not changed.
        plan: the plan.
        windows: calibration windows for steps that measure; None if no step does.
        options: run options; the seed is the plan's.
    """

    model: Decoder
    plan: Plan
    windows: Windows | None
    options: RunOptions

    @classmethod
    def prepare(
        cls,
        model: Decoder,
        plan: Plan | str | Path,
        *,
        texts: Texts = None,
        options: RunOptions = DEFAULTS,
    ) -> PruneJob:
        """Apply a plan; the given model stays as it is and shares its weights with the result where it can.

        Args:
            model: the model the plan was made for.
            plan: the plan, or the path of a plan file.
            texts: what edits that measure are measured on; None takes what the plan names. Others than the plan was
                made on give a warning.
            options: batch size, progress, and the work folder in which what is trained keeps its states; the seed is
                the plan's.

        Raises:
            InputError: the plan is for another model, cannot be applied to this one, or needs texts that are gone.
        """
        plan = plan if isinstance(plan, Plan) else Plan.read(plan)
        if model.fingerprint:  # a model whose weights are not available locally has none yet
            require_made_for(plan, model)
        if plan.parameters_after == plan.parameters_before:
            warnings.warn("the plan removes nothing; the result is the model as it is", SecateurWarning, 2)
        measures = any(step.measures for step in plan.steps)
        windows = windows_of_plan(model, plan, texts, progress=options.progress) if measures else None
        return cls(model, plan, windows, replace(options, seed=plan.seed))

    def cost(self) -> JobCost:
        """Return the cost of applying the plan.

        Raises:
            OSError: the disk has no room for the new weights.
        """
        disk = list(self._kept_on_disk())
        if self.windows is None:
            return JobCost(
                models=(describe_model(self.model),),
                reads="nothing is measured",
                memory=memory_of(self.model, 0),
                disk=tuple(disk),
            )
        work = Work.total(step.forwards(self.windows.token_count) for step in self.plan.steps)
        beside = 0 if self.model.by_blocks else self._new_bytes(self.model.module.dtype.itemsize)
        return cost_of(self.model, self.windows, {"apply": work}, beside=beside, disk=disk)

    def run(self) -> Decoder:
        """Apply the plan."""
        return apply_plan(self.plan, Measurements(self.model, self.windows, self.options))

    def _new_bytes(self, itemsize: int) -> int:
        """Return the bytes of newly created weights, in addition to the old ones."""
        rebuilt = any(step.rebuilds for step in self.plan.steps)
        return self.plan.parameters_after * itemsize if rebuilt else 0

    def _kept_on_disk(self) -> list[str]:
        lines = []
        for step in self.plan.steps:
            kept = step.disk_bytes(self.model.hidden_size, skeleton=self.model.by_blocks)
            if kept:
                lines.append(f"{step.method}: {kept / 2**30:,.2f} GiB of hidden states go to {tempfile.gettempdir()}")
        needed = self._new_bytes(self.model.saved_dtype.itemsize) if self.model.by_blocks else 0
        if needed:
            require_room(Path(tempfile.gettempdir()), needed, "the new weights")
            lines.append(
                f"{needed / 2**30:,.2f} GiB of new weights go to {tempfile.gettempdir()}, until the result is saved"
            )
        return lines


prune = function_of(PruneJob.prepare, "prune")
