"""The commands that measure what a model can do and how fast: `eval` and `bench`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur.checkpoints.folders import check_target
from secateur.cli.options import Asking, HeldOut, Opening, grouped, whole_numbers
from secateur.cli.tables import results_tables, showing_progress
from secateur.cli.terminal import DryRun, Json, ModelArg, Out, announce, announce_whole, err, keep, opened, target
from secateur.evaluation.evaluate import eval as eval_model
from secateur.evaluation.speed import BATCHES, NEW_TOKENS
from secateur.evaluation.speed import bench as bench_models


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
    whole = asking.tasks is not None
    decoder = opened(opening, model, only_shapes=dry_run, whole=whole)
    dense = opened(opening, against, only_shapes=dry_run, whole=whole) if against else None
    both = [one for one in (decoder, dense) if one is not None]
    for one in both:
        check_target(folder, reads=one.folder)
    windows = reading.held_out(decoder) if asking.tasks is None or reading.texts is not None else None
    if windows is not None:
        announce(decoder, windows, 1.0 + (dense.parameter_count / decoder.parameter_count if dense else 0.0))
    if asking.tasks is not None:
        announce_whole(both, f"tasks: {asking.tasks}")
    if dry_run:
        return
    with showing_progress(err) as progress:
        results = eval_model(
            decoder,
            against=dense,
            texts=windows,
            tasks=asking.tasks,
            limit=asking.limit,
            shots=asking.shots,
            stability=asking.stability,
            seed=reading.seed,
            batch_size=reading.batch_size,
            progress=progress,
        )
    details: dict[str, Any] = {"model": model, "against": against, "tasks": asking.tasks}
    if windows is not None:
        details["texts"] = windows.describe()
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
    sizes = whole_numbers(batch_sizes, "--batch-sizes")
    lengths = None if prompts is None else whole_numbers(prompts, "--prompts")
    decoder = opened(opening, model, only_shapes=dry_run, whole=True)
    dense = opened(opening, against, only_shapes=dry_run, whole=True) if against else None
    both = [one for one in (decoder, dense) if one is not None]
    for one in both:
        check_target(folder, reads=one.folder)
    announce_whole(both, f"batch sizes {batch_sizes}, {warmup} + {repeats} rounds")
    if dry_run:
        return
    with showing_progress(err) as progress:
        results = bench_models(
            decoder,
            against=dense,
            batch_sizes=sizes,
            prompts=lengths,
            new_tokens=new_tokens,
            repeats=repeats,
            warmup=warmup,
            seed=seed,
            progress=progress,
        )
    keep(results, folder, "bench", {"model": model, "against": against}, results_tables(results), as_json=as_json)
