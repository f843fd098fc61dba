"""The commands that measure what a model can do and how fast: `eval` and `bench`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur.checkpoints.folders import check_target
from secateur.cli.options import Asking, HeldOut, Opening, grouped, whole_numbers
from secateur.cli.tables import results_tables, showing_progress
from secateur.cli.terminal import DryRun, Json, ModelArg, Out, announce, err, keep, opened, target
from secateur.evaluation.speed import BATCHES, NEW_TOKENS, Timing
from secateur.jobs.bench import BenchJob
from secateur.jobs.evaluate import EvaluateJob
from secateur.run_options import RunOptions
from secateur.settings import read_settings


@grouped
def evaluate(
    model: ModelArg,
    asking: Asking,
    reading: HeldOut,
    opening: Opening,
    against: Annotated[str | None, typer.Option(help="The dense model, measured in the same run.")] = None,
    out: Out = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity on held-out text, or tasks (or both), of the model and of the dense one in one run."""
    folder = target(out, model, "eval")
    asked = asking.request()
    whole = asked is not None
    decoder = opened(opening, model, only_shapes=dry_run, whole=whole)
    dense = opened(opening, against, only_shapes=dry_run, whole=whole) if against else None
    for one in (decoder, dense):
        if one is not None:
            check_target(folder, reads=one.folder)
    with showing_progress(err) as progress:
        options = reading.options(progress)
        job = EvaluateJob.prepare(decoder, against=dense, **reading.fields(), tasks=asked, options=options)
        announce(job.cost())
        if dry_run:
            return
        results = job.run()
    details: dict[str, Any] = {"model": model, "against": against, "tasks": asking.tasks}
    if job.sources:
        details["texts"] = [windows.describe() for windows in job.sources]
    keep(results, folder, "eval", details, results_tables(results), as_json=as_json)


@grouped
def bench(
    model: ModelArg,
    opening: Opening,
    against: Annotated[str | None, typer.Option(help="The dense model, measured in turn with it.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences at a time: 1,8.")] = ",".join(map(str, BATCHES)),
    prompts: Annotated[
        str | None, typer.Option(help="Tokens of a prompt: 128,512. (default: these, as far as positions allow)")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens written after the prompt.")] = NEW_TOKENS,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before them that do not.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the prompts, which are random tokens.")] = 0,
    out: Out = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure speed and memory beside the dense model: reading, writing, first token, peak, cache."""
    folder = target(out, model, "bench")
    asked = {
        "batch_sizes": tuple(whole_numbers(batch_sizes, "--batch-sizes")),
        "prompts": None if prompts is None else tuple(whole_numbers(prompts, "--prompts")),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "warmup": warmup,
    }
    timing = read_settings("bench", Timing, asked)
    decoder = opened(opening, model, only_shapes=dry_run, whole=True)
    dense = opened(opening, against, only_shapes=dry_run, whole=True) if against else None
    for one in (decoder, dense):
        if one is not None:
            check_target(folder, reads=one.folder)
    with showing_progress(err) as progress:
        options = RunOptions(seed=seed, progress=progress)
        job = BenchJob.prepare(decoder, against=dense, timing=timing, options=options)
        announce(job.cost())
        if dry_run:
            return
        results = job.run()
    keep(results, folder, "bench", {"model": model, "against": against}, results_tables(results), as_json=as_json)
