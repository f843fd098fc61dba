"""The commands that produce a smaller model: `score`, `plan`, `prune`, `heal`, and `demo`, which does it all."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from secateur.checkpoints.folders import check_target, replacing
from secateur.checkpoints.save import save
from secateur.claims import claim
from secateur.cli.demo import demo as run_demo
from secateur.cli.options import (
    AmountOptions,
    Calibration,
    Learning,
    Opening,
    Output,
    Reading,
    Saving,
    Serving,
    grouped,
)
from secateur.cli.tables import healing_table, plan_summary, scores_table, showing_progress
from secateur.cli.terminal import (
    DryRun,
    Json,
    ModelArg,
    Out,
    announce,
    answer,
    err,
    opened,
    out_console,
    saying_warnings,
    target,
)
from secateur.distributed import is_main_process, process_count
from secateur.errors import InputError, NumericsError, SecateurError, TextsWarning, unknown
from secateur.evaluation.damage import damage_of
from secateur.export.plans import plan_as, require_tool
from secateur.export.serving import require_runs, serving_lines
from secateur.files import replace_file
from secateur.healing.recipes import find_healing_recipe
from secateur.jobs.heal import HealJob, dense_source, require_origin
from secateur.jobs.plan import PlanJob
from secateur.jobs.prune import PruneJob
from secateur.jobs.runs import run_folder, training_folder, write_marker
from secateur.jobs.score import ScoreJob
from secateur.models.decoder import Decoder
from secateur.models.dtypes import dtype_named
from secateur.plan.plan import Plan
from secateur.progress import Progress
from secateur.reporting.pictures import draw_scores, draw_windows
from secateur.scores.profile import KINDS, ONE_PASS, Kind
from secateur.training.trainer import Tracking


@grouped
def score(
    model: ModelArg,
    reading: Reading,
    opening: Opening,
    output: Output,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Scores to add: perplexity, taylor (slow); experts, of mixtures (repeatable)."),
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack/--no-pack", help="Pack documents into full windows, or pad each to a window.")
    ] = True,
) -> None:
    """Measure where a model is redundant: a table, plots, scores.json."""
    kinds = _kinds(also or [])
    folder = target(output.out, model, "score", dry_run=output.dry_run)
    decoder = opened(opening, model, only_shapes=output.dry_run)
    with showing_progress(err) as progress:
        job = ScoreJob.prepare(decoder, **reading.fields(), pack=pack, kinds=kinds, options=reading.options(progress))
        announce(job.cost())
        if output.dry_run:
            return
        scores = job.run()
    if not is_main_process():
        return
    with replacing(folder) as part:
        scores.write(part / "scores.json")
        drawn = [path.name for path in draw_scores(scores, part)]
        write_marker(part, "score", {"model": model, "texts": job.windows.describe()})
    answer(scores.model_dump(mode="json"), scores_table(scores), as_json=output.as_json)
    err.print(f"Written: [bold]{escape(str(folder))}[/]/scores.json, {', '.join(drawn)}")


@grouped
def plan(
    model: ModelArg,
    method: Annotated[str, typer.Option(help="See `secateur methods`; several in sequence: swm:0.5,slicegpt:0.5.")],
    amount: AmountOptions,
    reading: Calibration,
    opening: Opening,
    serving: Serving,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The plan file. (default: under secateur-runs/)")
    ] = None,
    as_tool: Annotated[
        str | None, typer.Option("--as", help="Print what does the same in mergekit or llama.cpp.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Decide what to remove: a small file to read, edit and pass to `prune`."""
    if as_tool is not None:
        require_tool(as_tool)
    file = out or run_folder(model, "plan") / "plan.json"
    check_target(file.parent, replaces=False, ours=False)
    if file.exists():
        _require_plan(file)
    if not dry_run and is_main_process():
        claim(file)
    decoder = opened(opening, model, only_shapes=dry_run)
    work = training_folder(file)
    with _keeping(work, file), showing_progress(err) as progress:
        job = _plan_job(decoder, method, amount, reading, serving, progress=progress, work=work)
        announce(job.cost())
        if dry_run:
            return
        with saying_warnings():
            made = job.run()
    if not is_main_process():
        return
    translated = None if as_tool is None else plan_as(made, as_tool, str(decoder.saved_dtype).removeprefix("torch."))
    replace_file(file, made.to_json())
    shutil.rmtree(work, ignore_errors=True)
    _draw_merged(job, made, file.with_name("windows.png"))
    if translated is not None and not as_json:
        typer.echo(translated, nl=False)
    else:
        answer(made.model_dump(mode="json"), plan_summary(made), as_json=as_json)
    err.print(f"Written: [bold]{escape(str(file))}[/]\nTo apply it: secateur prune {model} --plan {file} -o FOLDER")


@grouped
def prune(
    model: ModelArg,
    amount: AmountOptions,
    reading: Calibration,
    opening: Opening,
    saving: Saving,
    serving: Serving,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="A plan made by `secateur plan`.")] = None,
    method: Annotated[str | None, typer.Option(help="Decide and cut in one go: see `secateur methods`.")] = None,
    save_dtype: Annotated[str | None, typer.Option(help="Dtype of the saved weights. (default: as before)")] = None,
    allow_larger: Annotated[bool, typer.Option("--allow-larger", help="Accept a plan with more parameters.")] = False,
) -> None:
    """Prune a model, save a folder that plain transformers opens, and check that it does."""
    _require_plan_or_method(plan_file, method, amount, reading)
    if save_dtype is not None:
        dtype_named(save_dtype)
    made = Plan.read(plan_file) if plan_file else None
    folder = target(saving.out, model, "prune", dry_run=saving.dry_run)
    decoder = opened(opening, model, only_shapes=saving.dry_run)
    check_target(folder, reads=decoder.folder)
    work = training_folder(folder)
    with _keeping(work, folder), showing_progress(err) as progress:
        if made is None:
            assert method is not None, "either a plan or a method was given"
            planning = _plan_job(decoder, method, amount, reading, serving, progress=progress, work=work)
            announce(planning.cost())
            if saving.dry_run:
                return
            with saying_warnings():
                made = planning.run()
            _accept(made, allow_larger=allow_larger)
            texts = planning.windows
            cutting = PruneJob.prepare(decoder, made, texts=texts, options=reading.options(progress, work))
            announce(dataclasses.replace(cutting.cost(), models=(), reads="", notes=()))
        else:
            _accept(made, allow_larger=allow_larger)
            with saying_warnings():
                cutting = PruneJob.prepare(decoder, made, texts=reading.texts, options=reading.options(progress, work))
            announce(cutting.cost())
            if saving.dry_run:
                return
        with saying_warnings(without=TextsWarning):
            pruned = cutting.run()
    if not is_main_process():
        return
    require_runs(serving.engine, pruned, serving.tensor_parallel)
    if saving.check:
        pruned = _judged(decoder, pruned)
    with err.status("saving, and reopening in a fresh process" if saving.check else "saving"):
        record = save(pruned, folder, dtype=save_dtype, check=saving.check)
    shutil.rmtree(work, ignore_errors=True)
    answer(record, None, as_json=saving.as_json)
    proof = "reopened in a fresh process: same logits, same generation" if saving.check else "not checked (--no-check)"
    err.print(f"Written: [bold]{escape(str(folder))}[/]  ({record['bytes'] / 2**20:,.1f} MiB; {proof})")
    for line in serving_lines(pruned, folder):
        err.print(escape(line), soft_wrap=True)


def _require_plan_or_method(
    plan_file: Path | None, method: str | None, amount: AmountOptions, reading: Calibration
) -> None:
    """Refuse options that leave open what to remove, or say it twice.

    Raises:
        InputError: saying what to give.
    """
    if (plan_file is None) == (method is None):
        raise InputError("say what to remove: either --plan FILE, or --method NAME with an amount (--remove 25%).")
    if plan_file is not None and amount.given():
        raise InputError(
            f"{', '.join(amount.given())}: the plan already says how much to remove and how; edit it, or use --method."
        )
    if plan_file is not None and (idle := reading.beside_a_plan()):
        raise InputError(f"{', '.join(idle)}: the plan already says how texts are read; only --texts can be changed.")


def _accept(made: Plan, *, allow_larger: bool) -> None:
    """Print a plan, and refuse one that makes the model larger unless that is allowed.

    Raises:
        InputError: with the numbers and what to ask for instead.
    """
    err.print(plan_summary(made))
    before, after = made.parameters_before, made.parameters_after
    if after > before and not allow_larger:
        raise InputError(
            f"the result would have {after:,} parameters, more than the {before:,} there are: an amount of hidden "
            "directions counts none of the shortcut matrices that each block gains, nor a head that is no longer tied. "
            "Ask for a share of the parameters (--remove 20%), or say --allow-larger."
        )


def _judged(dense: Decoder, pruned: Decoder) -> Decoder:
    """Say what the cut has cost, and note it in the model's history."""
    with err.status("comparing with the dense model on a little held-out text"):
        try:
            damage = damage_of(dense, pruned)
        except NumericsError as error:  # saving names the weight, if it is one
            err.print(f"[yellow]warning:[/] not compared with the dense model: {escape(str(error))}")
            return pruned
    if damage is None or not pruned.history:
        return pruned
    colour = "bold red" if damage.ruined else "none"
    err.print(damage.sentence(), style=colour, markup=False, highlight=False)
    entry = pruned.history[-1] | {"damage": damage.as_dict()}
    return dataclasses.replace(pruned, history=(*pruned.history[:-1], entry))


@grouped
def heal(
    model: ModelArg,
    learning: Learning,
    opening: Opening,
    saving: Saving,
) -> None:
    """Retrain a pruned model to recover its quality. Interrupted and started again, it resumes."""
    recipe = find_healing_recipe(learning.with_)
    folder = target(saving.out, model, "heal", dry_run=saving.dry_run)
    decoder = opened(opening, model, only_shapes=saving.dry_run, whole=recipe.whole)
    check_target(folder, reads=decoder.folder)
    teacher = _teacher(decoder, learning, opening, folder, dry_run=saving.dry_run) if recipe.teacher else None
    work = training_folder(folder)
    with showing_progress(err) as progress:
        job = HealJob.prepare(
            decoder,
            by=recipe.name,
            texts=learning.data(),
            teacher=teacher,
            settings=learning.settings(),
            tracking=Tracking(trackers=tuple(learning.track or ()), folder=folder.with_name(f"{folder.name}.tracking")),
            options=learning.options(progress, work),
        )
        announce(job.cost())
        if saving.dry_run:
            return
        err.print(f"{recipe.name}: {recipe.summary}. If interrupted, it resumes when started again with -o {folder}.")
        with saying_warnings():
            healed = job.run()
    if not is_main_process():
        return
    with err.status("saving, and reopening in a fresh process" if saving.check else "saving"):
        save(healed, folder, check=saving.check)
    shutil.rmtree(work, ignore_errors=True)
    facts = healed.history[-1]["healing"]
    answer(facts, healing_table(facts), as_json=saving.as_json)
    err.print(f"Written: [bold]{escape(str(folder))}[/]")


def demo(out: Out = None) -> None:
    """Score, plan, prune, check and evaluate the small trained model that ships with the package."""
    folder = target(out, "bundled", "demo")
    with showing_progress(err) as progress:
        run_demo(folder, show=out_console.print, progress=progress)


def _teacher(decoder: Decoder, learning: Learning, opening: Opening, folder: Path, *, dry_run: bool) -> Decoder:
    """Open the dense model: the given one, or the one that was pruned."""
    thin = "top" in learning.settings()  # its outputs are written to disk first, block by block
    named = learning.teacher or dense_source(decoder)
    teacher = opened(opening, named, only_shapes=dry_run, thin=thin)
    check_target(folder, reads=teacher.folder)
    if learning.teacher is None:
        require_origin(decoder, teacher)
    return teacher


def _plan_job(
    decoder: Decoder,
    method: str,
    amount: AmountOptions,
    reading: Calibration,
    serving: Serving,
    *,
    progress: Progress,
    work: Path,
) -> PlanJob:
    with saying_warnings():
        return PlanJob.prepare(
            decoder,
            method=method,
            **amount.amount().fields(),
            **reading.fields(),
            settings=serving.settings(decoder, method, amount.settings(method)),
            scores=amount.known_scores(),
            options=reading.options(progress, work),
        )


@contextmanager
def _keeping(work: Path, out: Path) -> Iterator[None]:
    """If the block is interrupted and there is state to resume from, say how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        if work.is_dir():
            err.print(f"Stopped. Progress is saved: started again with -o {escape(str(out))}, it resumes.")
        raise


def _draw_merged(job: PlanJob, made: Plan, path: Path) -> None:
    """Draw the windows that a plan merges on the model's CKA map, measuring CKA unless the scores hold it."""
    windows = [window for step in made.steps[:1] for window in step.merged_spans]
    if not windows or process_count() > 1 or job.windows is None:
        return
    try:
        known = job.scores
        if known is None or not known.has(["cka"]):
            with showing_progress(err) as progress:
                options = dataclasses.replace(job.options, progress=progress)
                known = ScoreJob.prepare(job.model, texts=job.windows, kinds=("cka",), options=options).run()
        draw_windows(known, windows, path)
    except SecateurError as error:
        err.print(f"[yellow]note:[/] no plot of the windows: {escape(str(error))}")
        return
    err.print(f"Written: [bold]{escape(str(path))}[/] (the merged blocks on the CKA map)")


def _kinds(also: list[str]) -> tuple[Kind, ...]:
    slower = [kind for kind in KINDS if kind not in ONE_PASS]
    for kind in also:
        if kind not in slower:
            raise unknown("score", kind, list(slower))
    return (*ONE_PASS, *(kind for kind in slower if kind in also))


def _require_plan(path: Path) -> None:
    try:
        Plan.read(path)
    except InputError as error:
        raise InputError(f"{path}: exists and is not a plan; choose another file.") from error
