"""The commands that run several stages, and show what came of them: `compare`, `run`, `report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from secateur.cli.options import Asking, Opening, Output, Reading, grouped, read_pairs, read_windows
from secateur.cli.tables import showing_progress
from secateur.cli.terminal import ModelArg, announce, answer, err
from secateur.errors import InputError, unknown
from secateur.experiments.grid import study_of
from secateur.experiments.recipe import Recipe, Study, read_recipe
from secateur.experiments.run import RunJob
from secateur.experiments.state import CellOutcome
from secateur.experiments.study import Queue
from secateur.jobs.runs import run_folder
from secateur.methods.sequence import names_in
from secateur.reporting.page import report as make_report


@dataclass(frozen=True, kw_only=True)
class Queueing:
    """Where the cells of a study run, and whether their checkpoints are kept."""

    on: Annotated[str, typer.Option(help="local: this machine's devices. ray: a Ray cluster.")] = "local"
    address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster: auto, ray://… (default: start one here)")
    ] = None
    workers: Annotated[int | None, typer.Option(help="Processes at a time. (default: one per GPU, or one)")] = None
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Keep the checkpoints of measured cells.")] = True

    def queue(self) -> Queue:
        """Return the queue.

        Raises:
            InputError: an unknown engine, or no worker.
        """
        return Queue(**asdict(self))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Methods × amounts × healing recipes."""

    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; one after the other: swm:0.5+slicegpt:0.5.")
    ]
    remove: Annotated[str, typer.Option(help="Shares of all parameters: 10%,20%,30%.")]
    heal: Annotated[str, typer.Option(help="Healing recipes, or none: none,lora,distill.")] = "none"
    heal_tokens: Annotated[str, typer.Option(help="Maximum number of tokens to heal on.")] = "1M"
    heal_texts: Annotated[str | None, typer.Option(help="Texts to heal on. (default: --texts)")] = None
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.KEY=VALUE", help="A setting of one of the methods (repeatable)."),
    ] = None

    def rows(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Return methods, amounts and healing recipes.

        Raises:
            InputError: a setting that belongs to no method of this study.
        """
        healing = [_healing(name, self.heal_tokens, self.heal_texts) for name in _listed(self.heal)]
        return _methods(self.methods, read_pairs(self.set_)), _listed(self.remove), healing


@dataclass(frozen=True, kw_only=True)
class Measuring(Asking):
    """How the cells are measured."""

    eval_windows: Annotated[str, typer.Option(help="Windows of held-out text for perplexity, or 'all'.")] = "64"
    bench: Annotated[bool, typer.Option("--bench", help="Measure speed too, when nothing else runs.")] = False
    gate: Annotated[
        str | None, typer.Option(help="Rank last what keeps less of the probes the dense model can do: probes:0.9.")
    ] = None
    samples: Annotated[int, typer.Option(help="Continuations to keep per cell; 0 for none.")] = 2

    def sections(self) -> dict[str, Any]:
        """Return the sections of a recipe."""
        asked = {name: getattr(self, name) for name in ("tasks", "limit", "shots", "stability", "gate")}
        return {
            "eval": {"windows": read_windows(self.eval_windows, "--eval-windows") or "all", **asked},
            "bench": {} if self.bench else None,
            "generate": {"prompts": self.samples} if self.samples else None,
        }


@grouped
def compare(
    model: ModelArg,
    grid: Grid,
    reading: Reading,
    measuring: Measuring,
    opening: Opening,
    queueing: Queueing,
    output: Output,
) -> None:
    """Compare methods × amounts × healing on one model: a folder per cell; finished cells are not run again."""
    settings: dict[str, Any] = {
        "texts": reading.texts,
        "windows": reading.window_count or "all",
        "seq_len": reading.seq_len,
        "seed": reading.seed,
        "batch_size": reading.batch_size,
        **asdict(opening),
        **measuring.sections(),
    }
    said = {name: value for name, value in settings.items() if value is not None}
    _run(study_of(model, *grid.rows(), said), output.out or run_folder(model, "compare"), queueing, output)


@grouped
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/.")],
    queueing: Queueing,
    output: Output,
) -> None:
    """Run a recipe: prune, heal and evaluate a model, or a whole study. Started again, it resumes."""
    read = read_recipe(recipe)
    kind = "compare" if isinstance(read, Study) else "run"
    folder = output.out or run_folder(read.model, f"{recipe.stem}-{kind}")
    _run(read, folder, queueing, output)


def _run(asked: Recipe | Study, folder: Path, queueing: Queueing, output: Output) -> None:
    """Announce what will be done, do it, and show the results.

    The exit code is 1 if every cell failed.
    """
    with showing_progress(err) as progress:
        job = RunJob.prepare(
            asked,
            folder,
            queue=queueing.queue(),
            stage=lambda name: err.print(f"{name} …"),
            finished=lambda cell: err.print(_line(cell), markup=False, highlight=False),
            progress=progress,
        )
        announce(job.cost())
        if output.dry_run:
            return
        err.print(f"Finished stages are kept in {escape(str(folder))}; started again with -o there, it resumes.")
        outcomes = job.run()
    answer([one.as_dict() for one in outcomes], outcomes_table(outcomes), as_json=output.as_json)
    failed = [one for one in outcomes if one.failed]
    if failed:
        err.print(f"[yellow]{len(failed)} of {len(outcomes)} failed[/]: start again to retry them.")
    err.print(f"Written: [bold]{escape(str(folder))}[/]\nTo read it in a browser: secateur report {folder}")
    if len(failed) == len(outcomes):
        raise typer.Exit(1)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _methods(text: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Read `shortgpt,swm:0.5+slicegpt:0.5`, and settings such as `swm.rule=mean` for each method they belong to."""
    entries = [name.replace("+", ",") for name in _listed(text)]
    used: set[str] = set()
    found = []
    for entry in entries:
        names = names_in(entry)
        own = {key: value for key, value in settings.items() if key.partition(".")[0] in names}
        used |= set(own)
        plain = {key.partition(".")[2]: value for key, value in own.items()} if len(names) == 1 else own
        found.append({"method": entry, "settings": plain})
    known = [name for entry in entries for name in names_in(entry)]
    for key in settings:
        if "." not in key:
            raise InputError(f"--set {key}: say whose setting it is, such as {known[0]}.{key}.")
        if key not in used:
            raise unknown("method of this study", key.partition(".")[0], known)
    return found


def _healing(name: str, tokens: str, texts: str | None) -> str | dict[str, Any]:
    return "none" if name == "none" else {"with": name, "tokens": tokens, "texts": texts}


def _line(cell: CellOutcome) -> str:
    if cell.failed:
        return f"{cell.name}: failed ({cell.failed['stage']}): {cell.failed['error']}"
    measured = f"perplexity {cell.perplexity:.2f}, " if cell.perplexity is not None else ""
    return f"{cell.name}: {measured}{cell.seconds:.0f} s"


def outcomes_table(outcomes: Sequence[CellOutcome]) -> Table:
    """Return a table with a row per cell: best perplexity first, then what does not pass the gate, then what failed."""
    table = Table(title="outcomes", title_justify="left")
    tasks = sorted({(task, measure) for one in outcomes for task in one.tasks for measure in one.tasks[task]})
    shown = [pair for pair in tasks if pair[1] in ("acc", "stability")]
    speeds = sorted({name for one in outcomes for name in one.speedup}, reverse=True)
    several = len({task for task, _ in shown}) > 1
    asked = [f"{task} {measure}" if several else measure for task, measure in shown]
    for name in ("cell", "removed", "perplexity", *asked, *speeds, "seconds"):
        table.add_column(name, justify="left" if name == "cell" else "right", no_wrap=name == "cell")
    for one in sorted(outcomes, key=lambda one: (bool(one.failed), bool(one.fails), one.perplexity or float("inf"))):
        if one.failed:
            table.add_row(one.name, f"[red]failed: {escape(one.failed['error'][:60])}[/]")
            continue
        table.add_row(
            f"[yellow]{one.name} fails the gate[/]" if one.fails else one.name,
            "—" if one.removed is None else f"{one.removed:.1%}",
            "—" if one.perplexity is None else f"{one.perplexity:.3f}",
            *(f"{one.tasks[task][measure]:.3f}" if task in one.tasks else "—" for task, measure in shown),
            *(f"{one.speedup[name]:.2f}×" if name in one.speedup else "—" for name in speeds),
            f"{one.seconds:.0f}",
        )
    return table


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A study, a run, or any folder secateur wrote.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The HTML file. (default: report.html in the folder)")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    gate: Annotated[
        str | None,
        typer.Option(help="Rank last what keeps less of the measured probes: probes:0.9. (default: the study's)"),
    ] = None,
) -> None:
    """Make one HTML page of a study or run: best method, what was removed, what remains. Works offline."""
    file = make_report(folder, out, gate=gate)
    err.print(f"Written: [bold]{escape(str(file))}[/]")
    if show:
        typer.launch(str(file))
