"""Shared terminal behaviour of commands: opening models, announcing costs, printing and saving results.

Messages for people go to stderr, results to stdout.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from secateur.checkpoints.folders import check_target, replacing
from secateur.claims import claim
from secateur.cli.options import Opening
from secateur.distributed import is_main_process
from secateur.errors import SecateurWarning
from secateur.evaluation.results import Result, append_results
from secateur.jobs.job import JobCost
from secateur.jobs.runs import run_folder, write_marker
from secateur.models.decoder import Decoder

out_console = Console()
err = Console(stderr=True, quiet=not is_main_process())

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, GGUF file, Hub name, or 'bundled'.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Output folder. (default: under secateur-runs/)")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for programs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what it would need, and stop.")]


def opened(opening: Opening, source: str, **more: bool) -> Decoder:
    """Open a model with the given options; `more` are arguments of `Opening.open`."""
    with saying_warnings(), err.status(f"opening {source}"):
        return opening.open(source, **more)


@contextmanager
def saying_warnings(without: type[SecateurWarning] | None = None) -> Iterator[None]:
    """Print our own warnings at the end of the block; those of one kind were said before."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SecateurWarning)
        try:
            yield
        finally:
            said = [one for one in caught if issubclass(one.category, SecateurWarning)]
            for warning in said:
                if without is None or not issubclass(warning.category, without):
                    err.print(f"[yellow]warning:[/] {escape(str(warning.message))}")


def target(out: Path | None, model: str, command: str, *, dry_run: bool = False) -> Path:
    """Return the output folder, given or new; one that must not be replaced, or that is being written, is refused.

    The command holds it until it ends, unless it writes nothing.
    """
    folder = out or run_folder(model, command)
    check_target(folder)
    if not dry_run and is_main_process():
        claim(folder)
    return folder


def announce(cost: JobCost) -> None:
    """Print what a job will do and need."""
    for line in cost.lines():
        err.print(escape(line))
    for note in cost.notes:
        err.print(f"[yellow]note:[/] {note}")


def answer(data: Any, table: RenderableType | None, *, as_json: bool) -> None:
    """Print a result: a table for people, or one JSON document for programs."""
    if as_json:
        typer.echo(json.dumps(data, indent=1))
    elif table is not None:
        out_console.print(table)


def keep(
    results: Sequence[Result],
    folder: Path,
    command: str,
    details: dict[str, Any],
    shown: RenderableType,
    *,
    as_json: bool,
) -> None:
    """Write results to a new folder, and print them."""
    with replacing(folder) as part:
        append_results(part / "results.jsonl", results)
        write_marker(part, command, details)
    answer([result.as_dict() for result in results], shown, as_json=as_json)
    err.print(f"Written: [bold]{escape(str(folder))}[/]/results.jsonl")
