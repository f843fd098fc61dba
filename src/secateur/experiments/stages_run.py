"""A run in its folder: its recipe, its state, and the models it has open."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache

from secateur.data.local_files import stamp_of
from secateur.evaluation.reference import RESULTS, Reference
from secateur.experiments.recipe import Common, Recipe
from secateur.experiments.state import CUT, HEALED, PLAN, SAMPLES, SPEEDS, State
from secateur.models.decoder import Decoder
from secateur.models.fetch import fetch
from secateur.models.opening import open_model, open_shapes
from secateur.progress import SILENT, Progress
from secateur.scores.profile import Scores
from secateur.versions import digest, versions


@dataclass(frozen=True)
class Shared:
    """Results shared by the runs of a study.

    Attributes:
        scores: scores of the dense model.
        reference: measurements of the dense model.
        sibling: folder of a run whose plan and pruned model this one reuses, if made with the same settings.
    """

    scores: Scores | None = None
    reference: Reference | None = None
    sibling: Path | None = None


class Run:
    """One run in its folder.

    Attributes:
        recipe: the recipe.
        folder: the output folder.
        state: what is finished.
        keys: for each stage of the recipe, a fingerprint of what it depends on.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        shared: Shared | None = None,
        *,
        fingerprint: str | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """Read the state of the folder. The model's fingerprint is read if none is given.

        Raises:
            InputError: the folder holds another kind of state, or the model cannot be opened.
        """
        self.recipe, self.folder, self.shared, self.progress = recipe, folder, shared or Shared(), progress
        self.state = State.of(folder)
        self.keys = _keys(recipe, fingerprint or fingerprint_of(recipe))
        self._dense: Decoder | None = None

    def pending(self, only: Collection[str] | None = None) -> list[str]:
        """Return the stages to run, in order."""
        asked = [stage for stage in self.keys if only is None or stage in only]
        wanted = {stage for stage in asked if not self.state.finished(stage, self.keys[stage])}
        if wanted & {"heal", "eval", "bench", "generate"}:
            if "heal" in self.keys and not (self.healed.is_dir() and self._done("heal")):
                wanted.add("heal")
            if ("heal" not in self.keys or "heal" in wanted) and not (self.cut().is_dir() and self._done("prune")):
                wanted.add("prune")
        if "prune" in wanted and not ((self.folder / PLAN).is_file() and self._done("plan")):
            wanted.add("plan")
        return [stage for stage in self.keys if stage in wanted]

    def begin(self, stage: str) -> None:
        """Record that a stage is starting, and delete what it makes outdated."""
        self.state.begin(stage, self.keys)
        self._remove_unfinished(but=stage)

    def forget_healing(self) -> None:
        """If healing is no longer requested, delete its result and measurements."""
        if "heal" in self.state.stages and "heal" not in self.keys:
            self.state.begin("heal", self.keys)
            self._remove_unfinished()

    def _remove_unfinished(self, but: str = "") -> None:
        made = {"prune": CUT, "heal": HEALED, "eval": RESULTS, "bench": SPEEDS, "generate": SAMPLES}
        for name, what in made.items():
            if name not in self.state.stages and name != but:
                path = self.folder / what
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def work(self, name: str, stage: str) -> Path:
        """Return the folder for training states; those of other settings are deleted."""
        own = self.folder / f"{name}-{self.keys[stage]}"
        for other in self.folder.glob(f"{name}-*"):
            if other != own:
                shutil.rmtree(other)
        return own

    def _done(self, stage: str) -> bool:
        return self.state.finished(stage, self.keys[stage])

    def reuse_sibling(self, only: Collection[str] | None) -> None:
        """Reuse plan and pruned model of a sibling that was made with the same settings, if they are missing here."""
        if self.shared.sibling is None or "prune" not in self.pending(only):
            return
        other = State.of(self.shared.sibling)
        where = self.shared.sibling / other.stages.get("prune", {}).get("cut", CUT)
        if not other.finished("prune", self.keys["prune"]) or not where.is_dir():
            return
        shutil.copyfile(self.shared.sibling / PLAN, self.folder / PLAN)
        self.state.finish("plan", self.keys["plan"], 0.0, removed=other.stages["plan"]["removed"])
        self.state.finish("prune", self.keys["prune"], 0.0, cut=f"../{where.parent.name}/{where.name}")

    def cut(self) -> Path:
        """Return the folder of the pruned checkpoint, which may be a sibling's."""
        return self.folder / self.state.stages.get("prune", {}).get("cut", CUT)

    @property
    def healed(self) -> Path:
        """Return the folder of the healed checkpoint."""
        return self.folder / HEALED

    def open_dense(self) -> Decoder:
        """Return the dense model, opened once."""
        if self._dense is None:
            self._dense = open_model(self.recipe.model, **self.recipe.opening())
        return self._dense

    def open(self, folder: Path, **more: Any) -> Decoder:
        """Open a checkpoint of this run with the recipe's opening options."""
        place = self.recipe.opening()
        del place["revision"], place["allow_pickle"]
        return open_model(folder, **(place | more))

    def final(self) -> Decoder:
        """Open the model to be measured."""
        return self.open(self.healed if self.recipe.heal is not None else self.cut())

    def against(self) -> Decoder | Reference:
        """Return the dense model to compare with, or its earlier measurements."""
        if self.shared.reference is not None:
            self.close_dense()
            return self.shared.reference
        return self.open_dense()

    def close_dense(self) -> None:
        """Free the dense model to make room for the next stage."""
        self._dense = None
        clear_device_cache(garbage_collection=True)


def fingerprint_of(recipe: Common) -> str:
    """Return the fingerprint of a recipe's model, if possible without reading its weights."""
    asked = recipe.opening()
    fetch(recipe.model, **{name: asked[name] for name in ("revision", "trust_remote_code", "allow_pickle")})
    return open_shapes_of(recipe).fingerprint


def open_shapes_of(recipe: Common) -> Decoder:
    """Open a recipe's model without reading its weights, unless they are pickled."""
    return open_shapes(recipe.model, **recipe.opening())


def _keys(recipe: Recipe, fingerprint: str) -> dict[str, str]:
    """Return a fingerprint of each requested stage's dependencies: settings so far and, for measurements, versions."""
    read = (recipe.reading(), recipe.seed, recipe.batch_size, stamp_of(recipe.texts))
    plan = digest(fingerprint, recipe.opening(), read, recipe.prune.model_dump(mode="json"))
    keys = {"plan": plan, "prune": digest(plan, recipe.check)}
    final = keys["prune"]
    if recipe.heal is not None:
        final = keys["heal"] = digest(final, recipe.heal.model_dump(mode="json"), stamp_of(recipe.heal.texts))
    if recipe.eval is not None:
        keys["eval"] = digest(final, measuring_key(recipe))
    if recipe.bench is not None:
        keys["bench"] = digest(final, recipe.bench.model_dump(mode="json"), versions())
    if recipe.generate is not None:
        keys["generate"] = digest(final, recipe.generate.model_dump(mode="json"), recipe.measuring()["texts"])
    return keys


def measuring_key(recipe: Common) -> str:
    """Return a fingerprint of what a measurement depends on besides the model."""
    asked = recipe.measuring()
    return digest(asked, recipe.seed, recipe.batch_size, stamp_of(asked["texts"]), versions())
