"""The commands that list what there is: `methods`, `families`, `texts`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from secateur.cli.tables import facts_table
from secateur.cli.terminal import Json, answer
from secateur.data.sources import text_names
from secateur.healing.recipes import HEALING_RECIPES
from secateur.methods.method import METHODS, find_method
from secateur.models.families import FAMILIES
from secateur.settings import describe_settings


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show the settings of this method or recipe.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List methods and healing recipes, or the settings of one."""
    if name is not None:
        one = HEALING_RECIPES[name] if name in HEALING_RECIPES else find_method(name)
        described = describe_settings(one.settings)
        answer(described, facts_table(f"{name}: {one.summary}", described), as_json=as_json)
        return
    table = Table("method", "what it does", "paper")
    for one in METHODS.values():
        table.add_row(one.name, one.summary, one.paper)
    table.add_section()
    for recipe in HEALING_RECIPES.values():
        table.add_row(f"heal --with {recipe.name}", recipe.summary, "")
    facts = [
        {
            "name": one.name,
            "summary": one.summary,
            "paper": one.paper,
            "settings": list(one.settings.model_fields),
        }
        for one in METHODS.values()
    ]
    answer(facts, table, as_json=as_json)


def families(as_json: Json = False) -> None:
    """List the known families; others are detected and verified on a tiny copy."""
    table = Table("family", "blocks at", "norm", "order", "residual")
    for row in FAMILIES.values():
        residual = "parallel" if row.parallel is True else f"by {row.parallel}" if row.parallel else "sequential"
        table.add_row(row.model_type, row.blocks, row.norm, row.order, residual)
    answer(list(FAMILIES), table, as_json=as_json)


def texts(as_json: Json = False) -> None:
    """List the named text sources; your own files (txt, md, json, jsonl, csv, parquet, folder, npy) work as well."""
    table = Table("name", "from", "for calibration", "held out")
    for row in text_names():
        table.add_row(row.name, row.origin, row.calibration, row.held_out)
    answer([row.name for row in text_names()], table, as_json=as_json)
