"""The commands that make a smaller model: `score`, `plan`, `prune`, `heal`, and `demo`, which does the whole job."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from secateur.checkpoints.folders import check_target, replacing
from secateur.checkpoints.save import save
from secateur.cli.demo import demo as run_demo
from secateur.cli.options import Amount, Learning, Opening, Reading, grouped
from secateur.cli.tables import healing_table, plan_summary, scores_table, showing_progress
from secateur.cli.terminal import DryRun, Json, ModelArg, Out, announce, answer, err, opened, out_console, target
from secateur.distributed import is_main_process, process_count
from secateur.errors import InputError, SecateurError, SecateurWarning, TextsWarning, unknown
from secateur.files import replace_file, require_room
from secateur.healing.heal import find_healing_recipe, require_in_memory
from secateur.healing.heal import heal as heal_model
from secateur.jobs.runs import run_folder, training_folder, write_marker
from secateur.methods.planning import make_plan, windows_of_plan
from secateur.methods.planning import prune as prune_model
from secateur.methods.sequence import read_sequence
from secateur.models.decoder import Decoder
from secateur.models.dtypes import dtype_named
from secateur.plan.plan import Plan, plans_in
from secateur.plan.steps import MergeBlocks
from secateur.scores.measure import score as score_model
from secateur.scores.pictures import draw_scores, draw_windows
from secateur.scores.profile import KINDS, ONE_PASS, Kind


@grouped
def score(
    model: ModelArg,
    reading: Reading,
    opening: Opening,
    also: Annotated[
        list[str] | None, typer.Option(help="Slower scores besides: perplexity, taylor (repeatable).")
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack/--no-pack", help="Join documents, or put each in a padded window.")
    ] = True,
    out: Out = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure where a model is redundant: a table, pictures, scores.json."""
    kinds = _kinds(also or [])
    folder = target(out, model, "score")
    decoder = opened(opening, model, only_shapes=dry_run)
    windows = reading.calibration(decoder, pack=pack)
    forwards = 1.1 + ("perplexity" in kinds) * (decoder.block_count / 2 + 1) + 4 * ("taylor" in kinds)
    announce(decoder, windows, forwards)
    if dry_run:
        return
    with showing_progress(err) as progress:
        scores = score_model(
            decoder,
            texts=windows,
            kinds=kinds,
            seed=reading.seed,
            batch_size=reading.batch_size,
            progress=progress,
        )
    if not is_main_process():
        return
    with replacing(folder) as part:
        scores.write(part / "scores.json")
        drawn = [path.name for path in draw_scores(scores, part)]
        write_marker(part, "score", {"model": model, "texts": windows.describe()})
    answer(scores.model_dump(mode="json"), scores_table(scores), as_json=as_json)
    err.print(f"Written: [bold]{escape(str(folder))}[/]/scores.json, {', '.join(drawn)}")


@grouped
def plan(
    model: ModelArg,
    method: Annotated[str, typer.Option(help="See `secateur methods`; several in order: swm:0.5,slicegpt:0.5.")],
    amount: Amount,
    reading: Reading,
    opening: Opening,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The plan file. (default: under secateur-runs/)")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Decide what to cut: a small file to read, edit and give to `prune`."""
    file = out or run_folder(model, "plan") / "plan.json"
    if file.exists():
        _require_plan(file)
    decoder = opened(opening, model, only_shapes=dry_run)
    work = training_folder(file)
    with _keeping(work, file):
        made = _decide(decoder, method, amount, reading, dry_run=dry_run, work=work)
    if made is None:
        return
    if not is_main_process():
        return
    replace_file(file, made.to_json())
    shutil.rmtree(work, ignore_errors=True)
    _draw_merged(decoder, made, amount, reading, file.with_name("windows.png"))
    answer(made.model_dump(mode="json"), plan_summary(made), as_json=as_json)
    err.print(f"Written: [bold]{escape(str(file))}[/]\nTo apply it: secateur prune {model} --plan {file} -o FOLDER")


@grouped
def prune(
    model: ModelArg,
    amount: Amount,
    reading: Reading,
    opening: Opening,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="A plan made by `secateur plan`.")] = None,
    method: Annotated[str | None, typer.Option(help="Decide and cut in one go: see `secateur methods`.")] = None,
    out: Out = None,
    save_dtype: Annotated[str | None, typer.Option(help="Dtype of the saved weights. (default: as before)")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Reopen the result in a fresh process.")] = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Cut, save a folder that plain transformers opens, and prove that it does."""
    if (plan_file is None) == (method is None):
        raise InputError("say what to cut: either --plan FILE, or --method NAME with an amount (--remove 25%).")
    if plan_file is not None and amount.given():
        raise InputError(
            f"{', '.join(amount.given())}: the plan says already how much goes and how; edit it, or give --method."
        )
    if plan_file is not None and (idle := reading.beside_a_plan()):
        raise InputError(f"{', '.join(idle)}: the plan says already how texts are read; only --texts can be others.")
    if save_dtype is not None:
        dtype_named(save_dtype)
    made = Plan.read(plan_file) if plan_file else None
    folder = target(out, model, "prune")
    decoder = opened(opening, model, only_shapes=dry_run)
    check_target(folder, reads=decoder.folder)
    work = training_folder(folder)
    with _keeping(work, folder):
        if method is not None:
            made = _decide(decoder, method, amount, reading, dry_run=dry_run, work=work)
        if made is None:
            return
        err.print(plan_summary(made))
        pruned = _apply(decoder, made, reading, dry_run=dry_run, work=work)
    if pruned is None:
        return
    if not is_main_process():
        return
    with err.status("saving, and reopening in a fresh process" if check else "saving"):
        record = save(pruned, folder, dtype=save_dtype, check=check)
    shutil.rmtree(work, ignore_errors=True)
    answer(record, None, as_json=as_json)
    proof = "reopened in a fresh process: same logits, same generation" if check else "not checked (--no-check)"
    err.print(f"Written: [bold]{escape(str(folder))}[/]  ({record['bytes'] / 2**20:,.1f} MiB; {proof})")


@grouped
def heal(
    model: ModelArg,
    learning: Learning,
    opening: Opening,
    out: Out = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Reopen the result in a fresh process.")] = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a pruned model to get back what the cut has cost; killed and started again, it goes on."""
    recipe = find_healing_recipe(learning.with_)
    folder = target(out, model, "heal")
    decoder = opened(opening, model, only_shapes=dry_run, whole=recipe.whole)
    check_target(folder, reads=decoder.folder)
    require_in_memory(recipe, decoder)
    named = learning.teacher or _dense_of(decoder)
    thin = "top" in learning.settings()  # what it says is written down first, block by block
    teacher = opened(opening, named, only_shapes=dry_run, thin=thin) if recipe.teacher else None
    if teacher is not None:
        check_target(folder, reads=teacher.folder)
        if learning.teacher is None:
            _require_origin(decoder, teacher)
    data = learning.data(decoder)
    announce(decoder, data, recipe.passes)
    if dry_run:
        return
    work = training_folder(folder)
    err.print(f"{recipe.name}: {recipe.summary}. Killed, and started again with -o {folder}, it goes on.")
    with _saying_warnings(), showing_progress(err) as progress:
        healed = heal_model(
            decoder,
            by=recipe.name,
            texts=data,
            teacher=teacher,
            settings=learning.settings(),
            seed=learning.seed,
            trackers=tuple(learning.track or ()),
            tracking=folder.with_name(f"{folder.name}.tracking"),
            work=work,
            progress=progress,
        )
    if not is_main_process():
        return
    with err.status("saving, and reopening in a fresh process" if check else "saving"):
        save(healed, folder, check=check)
    shutil.rmtree(work, ignore_errors=True)
    facts = healed.history[-1]["healing"]
    answer(facts, healing_table(facts), as_json=as_json)
    err.print(f"Written: [bold]{escape(str(folder))}[/]")


def demo(out: Out = None) -> None:
    """Score, plan, cut, check and compare the small trained model that ships with the package."""
    folder = target(out, "bundled", "demo")
    with showing_progress(err) as progress:
        run_demo(folder, show=out_console.print, progress=progress)


def _dense_of(decoder: Decoder) -> str:
    """Name the model that a pruned one was made from; itself where nothing is known."""
    first = next(iter(plans_in(decoder.history)), None)
    return first.model.source if first else decoder.source


def _require_origin(decoder: Decoder, teacher: Decoder) -> None:
    """Refuse a teacher nobody named that is not the model the first plan was made for.

    Raises:
        InputError: with both names.
    """
    first = next(iter(plans_in(decoder.history)), None)
    if first is not None and first.model.fingerprint != teacher.fingerprint:
        raise InputError(
            f"{teacher.source}: is no longer the model that {decoder.source} was pruned from; name the one to learn "
            "from with --teacher."
        )


def _decide(
    decoder: Decoder, method: str, amount: Amount, reading: Reading, *, dry_run: bool, work: Path
) -> Plan | None:
    """Make a plan, the estimate printed first; None where only the estimate was asked for."""
    parts = read_sequence(method, amount.settings())
    known = amount.known_scores()
    windows = None
    if any(part.method.needs_texts(part.settings) for part in parts):
        windows = reading.calibration(decoder)
        if known is not None and known.fingerprint == decoder.fingerprint and not known.are_of(windows):
            err.print(f"[yellow]warning:[/] {amount.scores}: scores of other texts; they are measured anew.")
            known = None
        gone = amount.blocks if amount.blocks is not None else decoder.block_count // 4
        each = (part.method.forwards(decoder.block_count, gone, part.settings) for part in parts)
        announce(decoder, windows, 0.0 if known and len(parts) == 1 else sum(each))
    if dry_run:
        return None
    with _saying_warnings(), showing_progress(err) as progress:
        return make_plan(
            decoder,
            method=method,
            **amount.wanted(),
            texts=windows,
            seed=reading.seed,
            batch_size=reading.batch_size,
            settings=amount.settings(),
            scores=known,
            work=work,
            progress=progress,
        )


def _apply(decoder: Decoder, made: Plan, reading: Reading, *, dry_run: bool, work: Path) -> Decoder | None:
    """Apply a plan, the estimate printed first if it measures; None where only the estimate was asked for."""
    windows = None
    if any(step.measures for step in made.steps):
        with _saying_warnings():
            windows = windows_of_plan(decoder, made, reading.texts)
        for step in made.steps:
            kept = step.disk_bytes(decoder.hidden_size, skeleton=decoder.by_blocks)
            if kept:
                err.print(f"{step.method}: {kept / 2**30:,.2f} GiB of hidden states go to {tempfile.gettempdir()}")
        forwards = sum(step.forwards(windows.token_count) for step in made.steps)
        announce(decoder, windows, forwards, beside=_new_bytes(decoder, made))
    if dry_run:
        return None
    with _saying_warnings(without=TextsWarning), showing_progress(err) as progress:
        return prune_model(decoder, made, texts=windows, batch_size=reading.batch_size, work=work, progress=progress)


def _new_bytes(decoder: Decoder, made: Plan) -> int:
    """Count what new weights take in memory beside the old ones; those of a skeleton go to disk, where room must be.

    Raises:
        OSError: there is no room for them.
    """
    if not any(step.rebuilds for step in made.steps):
        return 0
    if not decoder.by_blocks:
        return made.parameters_after * decoder.module.dtype.itemsize
    needed = made.parameters_after * decoder.saved_dtype.itemsize
    err.print(f"{needed / 2**30:,.2f} GiB of new weights go to {tempfile.gettempdir()}, until the result is saved")
    require_room(Path(tempfile.gettempdir()), needed, "the new weights")
    return 0


@contextmanager
def _keeping(work: Path, out: Path) -> Iterator[None]:
    """Say how to go on where the block is interrupted and something is kept to go on from."""
    try:
        yield
    except KeyboardInterrupt:
        if work.is_dir():
            err.print(f"Stopped. What was done is kept: started again with -o {escape(str(out))}, it goes on.")
        raise


@contextmanager
def _saying_warnings(without: type[SecateurWarning] | None = None) -> Iterator[None]:
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


def _draw_merged(decoder: Decoder, made: Plan, amount: Amount, reading: Reading, path: Path) -> None:
    """Draw the windows that a plan merges on the model's CKA map, measured now where no scores file holds it."""
    windows = [window for step in made.steps[:1] if isinstance(step, MergeBlocks) for window in step.windows]
    if not windows or process_count() > 1:
        return
    try:
        known = amount.known_scores()
        if known is None or not known.has(["cka"]):
            with showing_progress(err) as progress:
                known = score_model(
                    decoder,
                    texts=reading.calibration(decoder),
                    kinds=("cka",),
                    seed=reading.seed,
                    batch_size=reading.batch_size,
                    progress=progress,
                )
        draw_windows(known, windows, path)
    except SecateurError as error:
        err.print(f"[yellow]note:[/] no picture of the windows: {escape(str(error))}")
        return
    err.print(f"Written: [bold]{escape(str(path))}[/] (the blocks that become one, on the CKA map)")


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
