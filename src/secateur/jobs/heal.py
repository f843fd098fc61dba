"""The job `heal`: retrain a pruned model to recover its quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from secateur.errors import InputError
from secateur.healing.data import TrainingTexts, training_data
from secateur.healing.recipes import Data, HealingRecipe, HealingRun, find_healing_recipe, require_in_memory
from secateur.jobs.job import Job, JobCost, cost_of, function_of
from secateur.models.decoder import Decoder
from secateur.plan.plan import plans_in
from secateur.plan.work import Work
from secateur.run_options import DEFAULTS, RunOptions
from secateur.settings import read_settings
from secateur.training.settings import warn_of
from secateur.training.trainer import UNTRACKED, Tracking, check_trackers
from secateur.training.weights import require_router


@dataclass(frozen=True)
class HealJob(Job[Decoder]):
    """A prepared healing.

    Attributes:
        model: the pruned model; it is not changed.
        recipe: the healing recipe.
        data: the training data.
        teacher: the dense model, if the recipe needs one.
        settings: the recipe's settings.
        tracking: experiment trackers.
        options: run options.
    """

    model: Decoder
    recipe: HealingRecipe
    data: Data
    teacher: Decoder | None
    settings: Any
    tracking: Tracking
    options: RunOptions

    @classmethod
    def prepare(
        cls,
        model: Decoder,
        *,
        by: str = "lora",
        texts: TrainingTexts | Data | str | None = None,
        tokens: int | str | None = None,
        teacher: Decoder | None = None,
        settings: Mapping[str, Any] | None = None,
        tracking: Tracking = UNTRACKED,
        options: RunOptions = DEFAULTS,
    ) -> HealJob:
        """Train a pruned model, so that it gets back what the cut has cost; the given one stays as it is.

        Args:
            model: the pruned model (any decoder).
            by: a recipe: `lora`, `last-layers`, `full`, `distill`, `blocks`.
            texts: what it learns from: a source as in `secateur texts`, or `TrainingTexts` that say more of it, such as
                whether they are instruction data; None is `diverse`. One window in twenty is held back to see
                when to stop.
            tokens: how many tokens of the source, at most (also "10M"); None is a million, or what `TrainingTexts` say.
            teacher: the dense model, for `distill` and `blocks`; as a skeleton it is never whole in memory, for which
                `distill` needs its setting `top`.
            settings: the recipe's own settings by name.
            tracking: where curves go besides: tensorboard, mlflow, wandb (not those of `blocks`).
            options: seed of the order of the data and of everything drawn, batch size of walks without gradients,
                progress, and the work folder in which states are kept.

        Raises:
            InputError: an unknown recipe or setting, unusable data, a teacher with another vocabulary, or a work folder
                with the state of another healing.
            ModelError: its routers are to be trained, and it has none.
            NumericsError: the loss became NaN before anything was gained.
        """
        recipe = find_healing_recipe(by)
        read = read_settings(f"heal --with {by}", recipe.settings, dict(settings or {}))
        require_in_memory(recipe, model)
        if "router" in (by, getattr(read, "trains", None)):
            require_router(model)
        check_trackers(tracking.trackers)
        data = training_data(model, texts, tokens, seed=options.seed)
        return cls(model, recipe, data, teacher if recipe.teacher else None, read, tracking, options)

    def cost(self) -> JobCost:
        """Return the cost of training."""
        also = [] if self.teacher is None else [self.teacher]
        return cost_of(self.model, self.data, {"": Work(self.recipe.passes, losses=self.recipe.passes)}, also=also)

    def run(self) -> Decoder:
        """Train, and return the healed model."""
        facts: dict[str, Any] = {
            "with": self.recipe.name,
            "texts": self.data.describe(),
            "seed": self.options.seed,
            "settings": self.settings.model_dump(exclude_none=True),
        }
        if self.teacher is not None:
            facts["teacher"] = {"source": self.teacher.source, "fingerprint": self.teacher.fingerprint}
        healing = HealingRun(
            decoder=self.model,
            teacher=self.teacher,
            data=self.data,
            settings=self.settings,
            recipe={"model": self.model.fingerprint, **facts},
            tracking=self.tracking,
            options=self.options,
            facts=facts,
        )
        healed = self.recipe.heal(healing)
        if "stopped" in facts:
            warn_of(facts, "healing")
        entry = {"healing": facts, "applied": datetime.now(UTC).isoformat(timespec="seconds")}
        return dataclasses.replace(healed, history=(*self.model.history, entry))


heal = function_of(HealJob.prepare, "heal")


def dense_source(model: Decoder) -> str:
    """Return the source of the model that a pruned one was made from, or its own if that is unknown."""
    first = next(iter(plans_in(model.history)), None)
    return first.model.source if first else model.source


def require_origin(model: Decoder, teacher: Decoder) -> None:
    """Refuse a default teacher that is not the model the first plan was made for.

    Raises:
        InputError: the message names both.
    """
    first = next(iter(plans_in(model.history)), None)
    if first is not None and first.model.fingerprint != teacher.fingerprint:
        raise InputError(
            f"{teacher.source}: is no longer the model that {model.source} was pruned from; name the one to learn "
            "from with --teacher."
        )
