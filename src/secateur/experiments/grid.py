"""The cells of a study: their names and recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from secateur.experiments.recipe import Common, Cut, Entry, Healing, Recipe, Study, as_recipe
from secateur.healing.data import TrainingTexts
from secateur.healing.recipes import find_healing_recipe
from secateur.methods.sequence import Part, names_in, read_sequence
from secateur.settings import read_settings


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        name: unique in the study, and the name of its folder: `sleb-20`, `sleb-20-lora`.
        recipe: the recipe it runs.
    """

    name: str
    recipe: Recipe


def rows_of(study: Study) -> list[list[Cell]]:
    """Return the cells of a study, grouped by those that share a plan and a pruned model.

    Raises:
        InputError: an unknown method, healing recipe or setting, or an invalid amount.
    """
    list(parts_of(study))
    taken: set[str] = set()
    shared = study.model_dump(include=set(Common.model_fields), exclude={"description"})
    rows = []
    for entry in _entries(study):
        for amount in study.compare.remove:
            base = f"{_method_name(entry)}-{100 * amount:g}"
            cut = Cut(method=entry.method, remove=amount, settings=entry.settings)
            row = []
            for healing in study.compare.heal:
                name = _unique(base + _healing_name(healing), taken)
                heal = healing if isinstance(healing, Healing) else None
                row.append(Cell(name, Recipe(**shared, prune=cut, heal=heal)))
            rows.append(row)
    return rows


def parts_of(study: Study) -> Iterator[Part]:
    """Return every method of a study with its settings.

    Raises:
        InputError: an unknown method, healing recipe or setting.
    """
    for healing in study.compare.heal:
        if isinstance(healing, Healing):
            check_healing(healing)
    for entry in _entries(study):
        yield from read_sequence(entry.method, entry.settings)


def check_healing(asked: Healing) -> None:
    """Check a request for healing.

    Raises:
        InputError: an unknown healing recipe or setting, an invalid number of tokens, or instructions without texts.
    """
    read_settings(f"heal --with {asked.with_}", find_healing_recipe(asked.with_).settings, asked.settings)
    TrainingTexts(source=asked.texts, tokens=asked.tokens, instructions=asked.instructions).check()


def _entries(study: Study) -> list[Entry]:
    return [one if isinstance(one, Entry) else Entry(method=one) for one in study.compare.methods]


def _method_name(entry: Entry) -> str:
    """Return a folder name for a method with its settings."""
    methods = "+".join(names_in(entry.method))
    settings = "".join(f"-{name}={value}" for name, value in entry.settings.items())
    return re.sub(r"[^\w.+=-]", "_", entry.name or methods + settings)


def _healing_name(healing: Literal["none"] | Healing) -> str:
    return f"-{healing.with_}" if isinstance(healing, Healing) else ""


def _unique(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    taken.add(found)
    return found


def study_of(model: str, methods: list[Any], remove: list[Any], heal: list[Any], settings: dict[str, Any]) -> Study:
    """Return the study for the arguments of `compare`.

    Raises:
        InputError: an unknown setting, or an invalid value.
    """
    grid = {"methods": methods, "remove": remove, "heal": heal or ["none"]}
    found = as_recipe({"model": model, "compare": grid, **settings}, "compare")
    assert isinstance(found, Study)
    return found
