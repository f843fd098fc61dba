"""The commands that evaluate a model: `eval` for quality, `bench` for speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.checkpoints.folders import check_target
from secateur.cli.options import Asking, HeldOut, Opening, Output, Rounds, grouped
from secateur.cli.tables import results_tables, showing_progress
from secateur.cli.terminal import ModelArg, announce, err, keep, opened, target
from secateur.errors import InputError
from secateur.evaluation.damage import beyond_use
from secateur.jobs.bench import BenchJob
from secateur.jobs.evaluate import PERPLEXITY, EvaluateJob
from secateur.models.decoder import Decoder
from secateur.run_options import RunOptions


@grouped
def evaluate(
    model: ModelArg,
    asking: Asking,
    reading: HeldOut,
    opening: Opening,
    output: Output,
    against: Annotated[str | None, typer.Option(help="The dense model, measured in the same run.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric to measure on the texts (repeatable). (default: perplexity)")
    ] = None,
) -> None:
    """Measure perplexity on held-out text, or tasks (or both), of the model and of the dense one in one run."""
    folder = target(output.out, model, "eval", dry_run=output.dry_run)
    asked = asking.request()
    decoder, dense = _opened_pair(opening, model, against, folder, only_shapes=output.dry_run, whole=asked is not None)
    with showing_progress(err) as progress:
        options = reading.options(progress)
        names = tuple(metric or PERPLEXITY)
        job = EvaluateJob.prepare(
            decoder, against=dense, **reading.fields(), tasks=asked, metrics=names, options=options
        )
        announce(job.cost())
        if output.dry_run:
            return
        results = job.run()
    details: dict[str, Any] = {"model": model, "against": against, "tasks": asking.tasks}
    if job.sources:
        details["texts"] = [windows.describe() for windows in job.sources]
    keep(results, folder, "eval", details, results_tables(results), as_json=output.as_json)
    ruined = beyond_use(results)
    if ruined is not None:
        err.print(ruined, style="bold red", markup=False, highlight=False)


@grouped
def bench(
    model: ModelArg,
    rounds: Rounds,
    opening: Opening,
    output: Output,
    against: Annotated[str | None, typer.Option(help="The dense model, measured alternately with it.")] = None,
    as_draft_of: Annotated[
        str | None,
        typer.Option(help="The dense model: let it write held-out texts with MODEL as its draft, and without."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts, which are random tokens.")] = 0,
) -> None:
    """Measure speed and memory next to the dense model: prefill, decode, first token, peak, cache."""
    folder = target(output.out, model, "bench", dry_run=output.dry_run)
    timing = rounds.timing()
    if against is not None and as_draft_of is not None:
        raise InputError("--against and --as-draft-of both name the dense model; give one of them.")
    other = as_draft_of or against
    decoder, dense = _opened_pair(opening, model, other, folder, only_shapes=output.dry_run, whole=True)
    with showing_progress(err) as progress:
        options = RunOptions(seed=seed, progress=progress)
        role = "against" if as_draft_of is None else "as_draft_of"
        job = BenchJob.prepare(decoder, **{role: dense}, timing=timing, options=options)
        announce(job.cost())
        if output.dry_run:
            return
        results = job.run()
    keep(results, folder, "bench", {"model": model, "against": other}, results_tables(results), as_json=output.as_json)


def _opened_pair(
    opening: Opening, model: str, against: str | None, folder: Path, **how: bool
) -> tuple[Decoder, Decoder | None]:
    """Open the model and the dense one to compare it with; neither may lie where the results go."""
    decoder = opened(opening, model, **how)
    dense = opened(opening, against, **how) if against else None
    for one in (decoder, dense):
        if one is not None:
            check_target(folder, reads=one.folder)
    return decoder, dense
