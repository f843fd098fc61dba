"""What all commands do at a terminal: open a model, say what they need, answer. People read stderr, programs stdout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from secateur.checkpoints.folders import check_target, replacing
from secateur.cli.options import Opening
from secateur.distributed import is_main_process
from secateur.evaluation.results import Result, append_results
from secateur.healing.recipes import Data
from secateur.jobs.cost import estimate
from secateur.jobs.runs import run_folder, write_marker
from secateur.models.decoder import Decoder

out_console = Console()
err = Console(stderr=True, quiet=not is_main_process())

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, hub name, or 'bundled'.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Folder to write. (default: under secateur-runs/)")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for programs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would need, and stop.")]


def opened(opening: Opening, source: str, **more: bool) -> Decoder:
    """Open a model as its options say, and `more` as `Opening.open` takes it."""
    with err.status(f"opening {source}"):
        return opening.open(source, **more)


def target(out: Path | None, model: str, command: str) -> Path:
    """Return the folder to write, the one named or a new one; one that must not be replaced is refused."""
    folder = out or run_folder(model, command)
    check_target(folder)
    return folder


def announce(decoder: Decoder, windows: Data, forwards: float, *, beside: int = 0) -> None:
    """Say what is about to happen and what it needs, so many bytes beside the model counted."""
    needs = estimate(decoder, windows.token_count, forwards, beside=beside)
    how = "skeleton, block by block" if decoder.by_blocks else "in memory"
    err.print(
        f"{decoder.source}: {decoder.parameter_count:,} parameters, {decoder.block_count} blocks, {how}, "
        f"{decoder.module.dtype} on {decoder.device}".replace("torch.", "")
    )
    err.print(f"{len(windows)} windows of {windows.seq_len} tokens of {windows.source}; {needs.sentence()}")
    for note in windows.notes:
        err.print(f"[yellow]note:[/] {note}")


def announce_whole(models: Sequence[Decoder], what: str) -> None:
    """Say what is about to be done with models that are in memory, and what they take there."""
    for one in models:
        needs = estimate(one, 0, 0.0, whole=True)
        err.print(
            f"{one.source}: {one.parameter_count:,} parameters, {one.block_count} blocks, {one.module.dtype} on "
            f"{one.device}; about {needs.memory / 2**30:.1f} GiB".replace("torch.", "")
        )
    err.print(what)


def answer(data: Any, table: RenderableType | None, *, as_json: bool) -> None:
    """Print what was found: a table for people, or one JSON document for programs."""
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
    """Write results to a folder of their own, and show them."""
    with replacing(folder) as part:
        append_results(part / "results.jsonl", results)
        write_marker(part, command, details)
    answer([result.as_dict() for result in results], shown, as_json=as_json)
    err.print(f"Written: [bold]{escape(str(folder))}[/]/results.jsonl")
