"""The command `convert`, which saves a model as safetensors."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from secateur.checkpoints.convert import convert as convert_model
from secateur.checkpoints.folders import check_target
from secateur.cli.options import Opening, grouped
from secateur.cli.terminal import DryRun, Json, ModelArg, Out, announce, answer, err, opened, target
from secateur.jobs.job import JobCost, describe_model, memory_of
from secateur.models.dtypes import dtype_named


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
    folder = target(out, model, "convert")
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
