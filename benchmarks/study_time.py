"""How long the study of the README takes: `recipes/bundled-study.yaml`, two processes at a time, from nothing."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from common import keep

import secateur
from secateur.experiments.recipe import Study, read_recipe
from secateur.experiments.study import Queue

RECIPE = Path(__file__).parents[1] / "recipes" / "bundled-study.yaml"


def main(workers: int = 2) -> None:
    """Run it once in a new folder; perplexities are kept beside the time."""
    study = read_recipe(RECIPE)
    assert isinstance(study, Study)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        cells = secateur.run(study, Path(folder) / "study", queue=Queue(workers=workers))
        minutes = (time.perf_counter() - begun) / 60
        secateur.report(Path(folder) / "study")
    keep(
        "study_time",
        {"recipe": RECIPE.name, "cells": len(cells), "workers": workers},
        {
            "minutes": round(minutes, 1),
            "failed": sum(cell.failed is not None for cell in cells),
            "perplexity": {cell.name: round(cell.perplexity, 2) for cell in cells if cell.perplexity is not None},
        },
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
