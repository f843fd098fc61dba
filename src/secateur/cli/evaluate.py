"""The commands that evaluate a model: `eval` for quality, `bench` for speed and memory."""

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
    """Measure perplexity on held-out text, tasks, or both, for the model and the dense one in the same run."""
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
    if job.windows is not None:
        details["texts"] = job.windows.describe()
    keep(results, folder, "eval", details, results_tables(results), as_json=as_json)


@grouped
def bench(
    model: ModelArg,
    opening: Opening,
    against: Annotated[str | None, typer.Option(help="The dense model, measured alternately.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences per request: 1,8.")] = ",".join(map(str, BATCHES)),
    prompts: Annotated[
        str | None, typer.Option(help="Tokens per prompt: 128,512. (default: these, as far as positions allow)")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated after the prompt.")] = NEW_TOKENS,
    repeats: Annotated[int, typer.Option(help="Measured rounds.")] = 5,
    warmup: Annotated[int, typer.Option(help="Warm-up rounds before them.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the prompts, which are random tokens.")] = 0,
    out: Out = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure speed and memory next to the dense model: prefill, decoding, first token, peak, cache."""
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
