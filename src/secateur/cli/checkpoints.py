"""The commands on finished checkpoints: `push`, `convert` and `export`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
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
from secateur.errors import SecateurWarning, unknown
from secateur.export.gguf import Exported, GgufExport, GgufOptions
from secateur.jobs.job import JobCost, describe_model, memory_of
from secateur.jobs.runs import run_folder
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


FORMATS = ("gguf",)


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """How a GGUF file is made."""

    kind: Annotated[
        str | None,
        typer.Option("--type", help="f32, f16, bf16, q8_0, or a type of llama-quantize: q4_k_m. (default: as stored)"),
    ] = None
    like: Annotated[
        Path | None, typer.Option(help="GGUF of the dense model, for tokenizer and description. (default: if known)")
    ] = None
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Checkout of llama.cpp: its converter's tokenizer, its quantiser.")
    ] = None
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Run the file in llama.cpp, where xllamacpp is.")
    ] = True
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Write a Modelfile for Ollama beside it.")] = False


@grouped
def export(
    model: ModelArg,
    gguf: Gguf,
    opening: Opening,
    to: Annotated[str, typer.Option(help="Format: gguf.")] = "gguf",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The file. (default: under secateur-runs/)")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a model as one GGUF file for llama.cpp and Ollama, and prove that it computes the same."""
    if to not in FORMATS:
        raise unknown("format", to, list(FORMATS))
    file = out or run_folder(model, "export") / "model.gguf"
    if opening.dtype == "auto":
        opening = replace(opening, dtype="float32")
    decoder = opened(opening, model, only_shapes=dry_run, thin=True)
    job = GgufExport.prepare(decoder, file, GgufOptions(**vars(gguf)))
    announce(
        JobCost((describe_model(decoder),), f"{job.layout.name}, {job.options.kind}", memory=memory_of(decoder, 0))
    )
    if dry_run:
        return
    with err.status("writing, reading back, and running it in llama.cpp"):
        done = job.run()
    answer(done.as_dict(), None, as_json=as_json)
    _describe(done, checked=gguf.check)


def _describe(done: Exported, *, checked: bool) -> None:
    size = f"{done.bytes / 2**20:,.1f} MiB, {done.kind}, {done.tensors} tensors read back"
    err.print(f"Written: [bold]{escape(str(done.file))}[/]  ({size}; tokenizer {escape(done.vocabulary)})")
    if done.proof is not None:
        err.print(f"Run: {escape(done.proof.sentence())}.")
    elif checked:
        err.print("[yellow]unproved:[/] not run, for want of llama.cpp here: pip install 'secateur\\[llama-cpp]'.")
    else:
        err.print("[yellow]unproved:[/] not run (--no-check).")
    if done.modelfile is not None:
        name = done.file.stem.lower()
        err.print(f"For Ollama: ollama create {escape(name)} -f {escape(str(done.modelfile))}")
