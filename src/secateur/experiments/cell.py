"""Entry point of a cell's process: `python -m secateur.experiments.cell STUDY CELL …`, started by the queue."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from pathlib import Path

from transformers.utils import logging

from secateur.errors import SecateurError
from secateur.evaluation.reference import ANSWERS, Reference
from secateur.experiments.queue import DONE
from secateur.experiments.recipe import Recipe, read_recipe
from secateur.experiments.stages import run_stages
from secateur.experiments.stages_run import Run, Shared
from secateur.experiments.state import CELLS, DENSE, RECIPE, SCORES, State
from secateur.interruption import end_with_parent, ending_as_ctrl_c
from secateur.scores.profile import Scores


def main(arguments: list[str]) -> None:
    """Run the cells one after the other; a failure is recorded in the cell's folder, and the next cell begins."""
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("cells", nargs="+")
    parser.add_argument("--first")
    parser.add_argument("--stages")
    given = parser.parse_args(arguments)
    end_with_parent()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cells = given.study / CELLS
    for name in given.cells:
        sibling = cells / given.first if given.first != name else None
        try:
            run = open_run(given.study, name, sibling)
            for _stage in run_stages(run, given.stages.split(",") if given.stages else None):
                pass
        except Exception as error:  # noqa: BLE001 - recorded in the cell's state; the others continue
            if not isinstance(error, SecateurError):
                traceback.print_exc()
            sys.stderr.write(f"{name}: {error}\n")
            state = State.of(cells / name)
            if state.failed is None:
                state.fail("open", error)
        sys.stdout.write(f"{DONE} {name}\n")
        sys.stdout.flush()


def open_run(study: Path, name: str, sibling: Path | None = None) -> Run:
    """Open a cell with the data shared by the study's cells.

    Raises:
        SecateurError: some of it cannot be read.
    """
    folder = study / CELLS / name
    recipe = read_recipe(folder / RECIPE)
    assert isinstance(recipe, Recipe)
    dense = study / DENSE
    return Run(
        recipe,
        folder,
        Shared(
            scores=Scores.read(study / SCORES),
            reference=Reference.read(dense) if (dense / ANSWERS).is_file() else None,
            sibling=sibling,
        ),
    )


if __name__ == "__main__":
    with ending_as_ctrl_c() as came:
        try:
            main(sys.argv[1:])
        except KeyboardInterrupt:
            sys.exit(128 + (came[0] if came else signal.SIGINT))
