"""Heal a pruned model: get back by training what the cut has cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from secateur.data.texts import DEFAULT_SEQ_LEN, Texts, windows_for
from secateur.data.windows import Windows
from secateur.errors import InputError, unknown
from secateur.healing.instructions import InstructionData, open_instructions
from secateur.healing.recipes import HEALING_RECIPES, Data, HealingRecipe, Job
from secateur.models.decoder import Decoder
from secateur.progress import SILENT, Progress
from secateur.settings import read_settings
from secateur.training.settings import warn_of


def heal(
    model: Decoder,
    *,
    by: str = "lora",
    texts: Texts | InstructionData = None,
    tokens: int = 1_000_000,
    instructions: bool = False,
    seq_len: int | None = None,
    teacher: Decoder | None = None,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    trackers: tuple[str, ...] = (),
    tracking: str | Path = "secateur-runs/tracking",
    work: str | Path | None = None,
    progress: Progress = SILENT,
) -> Decoder:
    """Train a pruned model, so that it gets back what the cut has cost; the given one stays as it is.

    Args:
        model: the pruned model (any decoder).
        by: a recipe: `lora`, `last-layers`, `full`, `distill`, `blocks`.
        texts: what it learns from: see `secateur texts`; None is `python-stdlib`. One window in twenty is held back to
            see when to stop.
        tokens: how many tokens of it, at most; every token is seen once unless `epochs` says otherwise.
        instructions: the texts are questions and answers (chat messages, or Alpaca's fields), of which only answers
            are learnt.
        seq_len: tokens per window; None takes 512, or the model's positions if those are fewer.
        teacher: the dense model, for `distill` and `blocks`; as a skeleton it is never whole in memory, for which
            `distill` needs its setting `top`.
        settings: the recipe's own settings by name.
        seed: of the order of the data and of everything drawn.
        batch_size: windows per batch of walks without gradients.
        trackers: where curves go besides: tensorboard, mlflow, wandb (not those of `blocks`).
        tracking: folder for what trackers write.
        work: folder in which states are kept; after a kill the same call goes on there. The caller removes it.
        progress: shows how far it is.

    Raises:
        InputError: an unknown recipe or setting, unusable data, a teacher with another vocabulary, or a folder with the
            state of another healing.
        NumericsError: the loss became NaN before anything was gained.
    """
    recipe = find_healing_recipe(by)
    read = read_settings(f"heal --with {by}", recipe.settings, settings or {})
    require_in_memory(recipe, model)
    data = training_data(model, texts, tokens, instructions=instructions, seq_len=seq_len, seed=seed)
    facts: dict[str, Any] = {"with": by, "texts": data.describe(), "seed": seed}
    facts["settings"] = read.model_dump(exclude_none=True)
    if teacher is not None:
        facts["teacher"] = {"source": teacher.source, "fingerprint": teacher.fingerprint}
    job = Job(
        decoder=model,
        teacher=teacher if recipe.teacher else None,
        data=data,
        settings=read,
        recipe={"model": model.fingerprint, **facts},
        seed=seed,
        folder=None if work is None else Path(work),
        trackers=check_trackers(trackers),
        tracking=Path(tracking),
        batch_size=batch_size,
        progress=progress,
        facts=facts,
    )
    healed = recipe.heal(job)
    if "stopped" in facts:
        warn_of(facts, "healing")
    entry = {"healing": facts, "applied": datetime.now(UTC).isoformat(timespec="seconds")}
    return dataclasses.replace(healed, history=(*model.history, entry))


def require_in_memory(recipe: HealingRecipe, model: Decoder) -> None:
    """Refuse a model that is read block by block where all of it is trained.

    Raises:
        InputError: saying what else can be done.
    """
    if recipe.whole and model.by_blocks:
        raise InputError(
            f"{recipe.name} needs the whole model in memory; open it with --in-memory, or heal with blocks."
        )


def find_healing_recipe(name: str) -> HealingRecipe:
    """Return the recipe of this name.

    Raises:
        InputError: no such recipe; the known ones are named.
    """
    if name not in HEALING_RECIPES:
        raise unknown("way of healing", name, list(HEALING_RECIPES))
    return HEALING_RECIPES[name]


TRACKERS = ("tensorboard", "mlflow", "wandb")


def check_trackers(names: Iterable[str]) -> tuple[str, ...]:
    """Return the trackers by name.

    Raises:
        InputError: an unknown one, or one that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker", name, list(TRACKERS))
        if find_spec(name) is None:
            raise InputError(f"{name} is not installed: pip install 'secateur[{name}]'.")
    return tuple(names)


def training_data(
    model: Decoder,
    texts: Texts | InstructionData,
    tokens: int,
    *,
    instructions: bool = False,
    seq_len: int | None = None,
    seed: int = 0,
) -> Data:
    """Open what a model is to learn from.

    Raises:
        InputError: unusable or too little data.
    """
    if isinstance(texts, Windows | InstructionData):
        return texts
    length = seq_len or min(DEFAULT_SEQ_LEN, model.max_positions or DEFAULT_SEQ_LEN)
    windows = tokens // length
    if windows < 2:
        raise InputError(f"{tokens} tokens are fewer than two windows of {length}; give more tokens.")
    if instructions:
        if texts is None:
            raise InputError("instruction data have to be named (--texts alpaca, or a jsonl file).")
        return open_instructions(str(texts), model.tokenizer, examples=windows, seq_len=length, seed=seed)
    return windows_for(model, texts, windows=windows, seq_len=length, seed=seed)
