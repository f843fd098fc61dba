"""The commands on finished checkpoints: `push` and `convert`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from secateur.checkpoints.folders import check_target
from secateur.checkpoints.push import CardFacts
from secateur.checkpoints.push import push as upload
from secateur.checkpoints.save import convert as convert_model
from secateur.cli.options import Opening, grouped
from secateur.cli.terminal import DryRun, Json, ModelArg, Out, announce, answer, err, opened, target
from secateur.errors import SecateurWarning
from secateur.jobs.job import JobCost, describe_model, memory_of
from secateur.models.dtypes import dtype_named


@dataclass(frozen=True, kw_only=True)
class Card:
    """Additional content of the model card."""

    results: Annotated[Path | None, typer.Option(help="results.jsonl of this checkpoint, to show on its card.")] = None
    base_model: Annotated[
        str | None, typer.Option(help="The dense model's name on the hub, if it was opened from a folder.")
    ] = None


@grouped
def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder that prune or heal wrote.")],
    name: Annotated[str, typer.Argument(help="Its name on the hub: owner/name.")],
    card: Card,
    public: Annotated[bool, typer.Option("--public/--private", help="Visibility of a new repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to. (default: main)")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message. (default: what was done)")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Upload a finished checkpoint to the Hub: card, weights, record. Log in first: hf auth login, or HF_TOKEN."""
    with warnings.catch_warnings(record=True) as caught, err.status("checking and uploading"):
        warnings.simplefilter("always", SecateurWarning)
        uploaded = upload(
            folder,
            name,
            private=not public,
            revision=revision,
            message=message,
            card=CardFacts(results=card.results, base_model=card.base_model),
            dry_run=dry_run,
        )
    for warning in caught:
        if issubclass(warning.category, SecateurWarning):
            err.print(f"[yellow]warning:[/] {escape(str(warning.message))}")
    answer(uploaded, _files_table(uploaded), as_json=as_json)
    if dry_run:
        err.print(f"To {name}; nothing was sent (--dry-run).")
    else:
        err.print(f"Uploaded: [bold]{escape(uploaded['url'])}[/]")


def _files_table(uploaded: dict[str, Any]) -> Table:
    table = Table("file", "bytes")
    table.columns[1].justify = "right"
    for name, size in uploaded["files"].items():
        table.add_row(name, f"{size:,}")
    table.add_section()
    table.add_row("all", f"{uploaded['bytes']:,}")
    return table


@grouped
def convert(
    model: ModelArg,
    opening: Opening,
    out: Out = None,
    save_dtype: Annotated[str | None, typer.Option(help="Dtype of the saved weights. (default: as before)")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Reopen the result in a fresh process.")] = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Save a model (a GGUF file, a folder, a name on the hub) as safetensors, and verify that it loads."""
    if save_dtype is not None:
        dtype_named(save_dtype)
    folder = target(out, model, "convert", dry_run=dry_run)
    decoder = opened(opening, model, only_shapes=dry_run)
    check_target(folder, reads=decoder.folder)
    stored = decoder.saved_dtype if save_dtype is None else dtype_named(save_dtype)
    saved = f"saved as {stored}".replace("torch.", "")
    announce(JobCost(models=(describe_model(decoder),), reads=saved, memory=memory_of(decoder, 0)))
    if dry_run:
        return
    with err.status("saving, and reopening in a fresh process" if check else "saving"):
        record = convert_model(decoder, folder, dtype=save_dtype, check=check)
    answer(record, None, as_json=as_json)
    proof = "reopened in a fresh process: same logits, same generation" if check else "not checked (--no-check)"
    err.print(f"Written: [bold]{escape(str(folder))}[/]  ({record['bytes'] / 2**20:,.1f} MiB; {proof})")
