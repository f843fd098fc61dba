"""The healing recipes: what each of them trains, its loss, and its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from torch.utils.data import Dataset

from secateur.data.windows import Windows
from secateur.errors import InputError, unknown
from secateur.healing.blockwise import heal_blocks
from secateur.healing.data import Data
from secateur.healing.distill import Distillation, TaughtData, TeacherScores, require_same_vocabulary
from secateur.healing.instructions import InstructionData
from secateur.models.decoder import Decoder
from secateur.plan.plan import blocks_kept_by
from secateur.run_options import RunOptions
from secateur.training.data import LanguageModelling, WindowData, split_off_validation
from secateur.training.settings import TrainingSettings
from secateur.training.sharding import whole_parameters
from secateur.training.trainer import Tracking, TrainingRun, train
from secateur.training.weights import Prepared, Trained, prepare


class HealingSettings(TrainingSettings):
    """Settings shared by all recipes; the default learning rate depends on the model's width."""

    learning_rate: float | None = Field(  # type: ignore[assignment]
        None, gt=0, allow_inf_nan=False, description="peak learning rate of AdamW; by default set by the hidden size"
    )
    final_learning_rate: float | None = Field(  # type: ignore[assignment]
        None, ge=0, allow_inf_nan=False, description="final learning rate of the cosine; by default a tenth of the peak"
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises from 0")
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False, description="weight decay of AdamW")
    clip: float = Field(1.0, gt=0, description="gradient norm above which gradients are clipped")
    gradient_checkpointing: bool | None = Field(
        None, description="gradient checkpointing: recompute activations to save memory; by default on CUDA"
    )

    def training(self, width: int, per_width: float) -> TrainingSettings:
        """Return the settings of the training loop; the default peak learning rate is `per_width` / width."""
        given = {name: getattr(self, name) for name in TrainingSettings.model_fields}
        highest = self.learning_rate or per_width / width
        lowest = highest / 10 if self.final_learning_rate is None else self.final_learning_rate
        return TrainingSettings(**given | {"learning_rate": highest, "final_learning_rate": lowest})


class LoraSettings(HealingSettings):
    """Settings of `lora`."""

    rank: int = Field(16, ge=1, description="rank of the updates")
    alpha: int = Field(32, ge=1, description="updates are scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the inputs of the updates")


class DistillSettings(LoraSettings):
    """Settings of `distill`."""

    trains: Trained = Field("full", description="which weights are trained: full, last-layers, lora, router")
    temperature: float = Field(1.0, gt=0, description="temperature that divides the logits of both models")
    hidden_weight: float = Field(
        0.0, ge=0, description="weight of the error of each block's input, added to the divergence of the logits"
    )
    top: int | None = Field(
        None,
        ge=1,
        description="write this many of the teacher's top tokens to disk first, so that only one model is in memory",
    )


@dataclass
class HealingRun:
    """One healing: the model, its teacher, data and settings.

    Attributes:
        decoder: the pruned model.
        teacher: the dense model, for the recipes that have one.
        data: windows of text, or examples.
        settings: the recipe's settings.
        recipe: data that identify this healing.
        tracking: experiment trackers.
        options: batch size of walks without gradients, seed, progress, folder for states.
        facts: filled with the outcome, for the record.
    """

    decoder: Decoder
    teacher: Decoder | None
    data: Data
    settings: Any
    recipe: dict[str, Any]
    tracking: Tracking
    options: RunOptions
    facts: dict[str, Any]

    def need_teacher(self) -> Decoder:
        """Return the teacher.

        Raises:
            InputError: there is none.
        """
        if self.teacher is None:
            raise InputError("this recipe needs the dense model as teacher; name it (--teacher MODEL).")
        return self.teacher

    def need_windows(self) -> Windows:
        """Return the windows of text.

        Raises:
            InputError: the data are examples.
        """
        if isinstance(self.data, InstructionData):
            raise InputError("this recipe learns from running text, not from instruction data.")
        return self.data

    def items(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Return the training set and the held-out set."""
        numbers, held_back = split_off_validation(self.data)
        if isinstance(self.data, InstructionData):
            return self.data.part(numbers), self.data.part(held_back)
        return WindowData(self.data, numbers), WindowData(self.data, held_back)

    def run(self, prepared: Prepared, objective: Any, data: Any, held_out: Any, per_width: float) -> Decoder:
        """Train, and return the healed decoder."""
        wanted = self.settings.gradient_checkpointing
        if wanted or (wanted is None and self.decoder.device.type == "cuda"):
            if not self.decoder.module.supports_gradient_checkpointing:
                raise InputError(f"{self.decoder.source}: its architecture has no gradient checkpointing; turn it off.")
            prepared.module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            prepared.module.enable_input_require_grads()  # type: ignore[operator]
        outcome = train(
            objective,
            data,
            held_out,
            self.settings.training(self.decoder.hidden_size, per_width),
            TrainingRun(recipe=self.recipe, what="healing", units=list(prepared.blocks), tracking=self.tracking),
            device=self.decoder.device,
            options=self.options,
        )
        self.facts |= {"trained_weights": prepared.trained, **outcome.describe(), "curve": outcome.sketch()}
        return prepared.finish(whole_parameters(prepared.module))


def _prepared(job: HealingRun, which: Trained) -> tuple[Prepared, float]:
    """Prepare the trained model; return it with its peak learning rate times the hidden size."""
    settings = job.settings
    if which != "lora":
        return prepare(job.decoder, which, mixed=settings.evens_out(job.decoder.device)), _RATE
    updates = {"rank": settings.rank, "alpha": settings.alpha, "dropout": settings.dropout}
    return prepare(job.decoder, which, **updates, seed=job.options.seed), _LORA_RATE


def _by_language(which: Trained) -> Callable[[HealingRun], Decoder]:
    def heal(job: HealingRun) -> Decoder:
        prepared, rate = _prepared(job, which)
        return job.run(prepared, LanguageModelling(prepared.module), *job.items(), rate)

    return heal


def _by_distillation(job: HealingRun) -> Decoder:
    teacher, settings = job.need_teacher(), job.settings
    require_same_vocabulary(job.decoder, teacher)
    kept: tuple[int, ...] = ()
    if settings.hidden_weight:
        if settings.top is not None:
            raise InputError("hidden_weight needs the teacher beside the student; leave top out.")
        if teacher.hidden_size != job.decoder.hidden_size or job.decoder.changes_basis:
            raise InputError("hidden_weight: hidden states of the two models are in other coordinates; leave it out.")
        kept = blocks_kept_by(job.decoder.history, job.decoder.block_count)
    data, held_out = job.items()
    if settings.top is not None:
        windows = job.need_windows()
        teacher_scores = TeacherScores(
            teacher,
            windows,
            top=settings.top,
            temperature=settings.temperature,
            options=job.options,
        )
        numbers, held_back = split_off_validation(windows)
        data = TaughtData(WindowData(windows, numbers), teacher_scores)
        held_out = TaughtData(WindowData(windows, held_back), teacher_scores)
    elif teacher.is_skeleton:
        raise InputError("the teacher runs beside the student: open both with --in-memory, or set top=64.")
    prepared, rate = _prepared(job, settings.trains)
    objective = Distillation(
        prepared.module,
        None if settings.top is not None else teacher.module,
        temperature=settings.temperature,
        hidden_weight=settings.hidden_weight,
        kept=kept,
    )
    return job.run(prepared, objective, data, held_out, rate)


def _by_blocks(job: HealingRun) -> Decoder:
    teacher = job.need_teacher()
    healed, outcomes = heal_blocks(
        job.decoder,
        teacher,
        blocks_kept_by(job.decoder.history, job.decoder.block_count),
        job.need_windows(),
        job.settings.training(job.decoder.hidden_size, _RATE),
        recipe=job.recipe,
        options=job.options,
    )
    job.facts |= {"blocks": {str(block): outcome.describe() for block, outcome in outcomes.items()}}
    job.facts["tokens"] = sum(outcome.tokens for outcome in outcomes.values())
    return healed


_RATE, _LORA_RATE = 0.05, 0.4
"""Peak learning rates times the hidden size: 1.2e-5 and 1e-4 at 4096, 2.6e-4 and 2e-3 at 192."""


@dataclass(frozen=True, kw_only=True)
class HealingRecipe:
    """A way to retrain a pruned model.

    Attributes:
        name: value of `--with`.
        summary: one line.
        settings: its settings and their defaults.
        heal: the function that does it.
        teacher: whether it needs the dense model.
        whole: whether it needs the whole model in memory.
        passes: its cost in forward passes over the given tokens.
    """

    name: str
    summary: str
    settings: type[HealingSettings]
    heal: Callable[[HealingRun], Decoder]
    teacher: bool = False
    whole: bool = True
    passes: float = 3.0


HEALING_RECIPES: Mapping[str, HealingRecipe] = {
    recipe.name: recipe
    for recipe in (
        HealingRecipe(
            name="lora",
            summary="low-rank updates of all linear layers, merged back at the end (peft)",
            settings=LoraSettings,
            heal=_by_language("lora"),
        ),
        HealingRecipe(
            name="last-layers",
            summary="the head and the last three blocks",
            settings=HealingSettings,
            heal=_by_language("last-layers"),
            passes=2.0,
        ),
        HealingRecipe(
            name="router",
            summary="what sends tokens to the experts of a mixture, and nothing else",
            settings=HealingSettings,
            heal=_by_language("router"),
            passes=2.5,
        ),
        HealingRecipe(name="full", summary="all weights on text", settings=HealingSettings, heal=_by_language("full")),
        HealingRecipe(
            name="distill",
            summary="next-token distribution of the dense model (KL), optionally its hidden states",
            settings=DistillSettings,
            heal=_by_distillation,
            teacher=True,
            passes=4.5,
        ),
        HealingRecipe(
            name="blocks",
            summary="each affected block learns the dense model's hidden states, one block at a time",
            settings=HealingSettings,
            heal=_by_blocks,
            teacher=True,
            whole=False,
            passes=4.0,
        ),
    )
}


def find_healing_recipe(name: str) -> HealingRecipe:
    """Return the recipe of this name.

    Raises:
        InputError: no such recipe; the message lists the known ones.
    """
    if name not in HEALING_RECIPES:
        raise unknown("healing recipe", name, list(HEALING_RECIPES))
    return HEALING_RECIPES[name]


def require_in_memory(recipe: HealingRecipe, model: Decoder) -> None:
    """Refuse a skeleton for a recipe that needs the whole model.

    Raises:
        InputError: with the alternatives.
    """
    if recipe.whole and model.by_blocks:
        raise InputError(
            f"{recipe.name} needs the whole model in memory; open it with --in-memory, or heal with blocks."
        )
