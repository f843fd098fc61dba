"""Entry point of the command line. Commands are imported when they run, so that help does not wait for torch."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from secateur.distributed import is_main_process, launched
from secateur.errors import InputError, SecateurError
from secateur.versions import __version__


@dataclass(frozen=True)
class Entry:
    """Location of a command.

    Attributes:
        module: its module in this package.
        function: its function there.
        help: a short description for the list of commands.
    """

    module: str
    function: str
    help: str


COMMANDS = {
    "demo": Entry("prune", "demo", "Run the whole pipeline on the small model that ships with the package."),
    "inspect": Entry("inspect", "inspect", "Show a model's architecture and parameter counts."),
    "score": Entry("prune", "score", "Measure where a model is redundant."),
    "plan": Entry("prune", "plan", "Decide what to remove: a small file to read and edit."),
    "prune": Entry("prune", "prune", "Prune a model, save it, and check that it loads."),
    "heal": Entry("prune", "heal", "Retrain a pruned model to recover its quality."),
    "eval": Entry("evaluate", "evaluate", "Measure perplexity and tasks, next to the dense model."),
    "bench": Entry("evaluate", "bench", "Measure speed and memory, next to the dense model."),
    "compare": Entry("study", "compare", "Compare methods, amounts and healing recipes on one model."),
    "run": Entry("study", "run", "Run a recipe: a whole pipeline, or a study, from one file."),
    "report": Entry("study", "report", "Make one HTML page from the results of other commands."),
    "convert": Entry("checkpoints", "convert", "Save a model as safetensors: from GGUF, or in another dtype."),
    "export": Entry("checkpoints", "export", "Write a model as a GGUF file for llama.cpp and Ollama."),
    "push": Entry("checkpoints", "push", "Upload a checkpoint to the Hub."),
    "methods": Entry("lists", "methods", "List methods and healing recipes, or the settings of one."),
    "families": Entry("lists", "families", "List the model families that are known exactly."),
    "texts": Entry("lists", "texts", "List the named text sources."),
}
"""The commands in the order in which they are listed."""

SHARED = ("score", "plan", "prune", "heal")
"""Commands that several processes can share."""


class Commands(TyperGroup):
    """A group that lists commands without importing them, and imports the one that is called."""

    def __init__(self, **settings: Any) -> None:
        """Create a placeholder with name and help for every command."""
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=entry.help) for name, entry in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Resolve and import the command named by these arguments."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, load(str(name)), rest


def load(name: str) -> TyperCommand:
    """Import a command, with a status message because it takes seconds."""
    entry = COMMANDS[name]
    if name not in SHARED and launched() > 1:
        raise InputError(f"{name} is done by one process: start it without the launcher.")
    with Console(stderr=True, quiet=not is_main_process()).status("loading torch and transformers"):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        function: Callable[..., None] = getattr(import_module(f"secateur.cli.{entry.module}"), entry.function)
    alone = typer.Typer(add_completion=False)
    alone.command(name)(function)
    command = typer.main.get_command(alone)
    assert isinstance(command, TyperCommand)
    return command


app = typer.Typer(
    name="secateur",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Structured pruning of language models: score, plan, prune, heal, eval, bench. Start with: secateur demo."""


def main() -> None:
    """Run the command line. Errors that a user can act on become one message and exit code 2; Ctrl-C becomes 130."""
    try:
        app()
    except SecateurError as error:
        _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        hint = " Free some space, or choose another disk." if error.errno == errno.ENOSPC else ""
        _fail(f"{where}{error.strerror or error}.{hint}")
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        _fail("the device is out of memory. Use a smaller --batch-size (--batch-sizes for bench), or --skeleton.")


def _is_out_of_memory(error: RuntimeError) -> bool:
    from torch import OutOfMemoryError

    return isinstance(error, OutOfMemoryError)


def _fail(message: str) -> NoReturn:
    from secateur.cli.terminal import err

    err.print("[bold red]error:[/] ", end="")
    err.print(message, markup=False, highlight=False)
    sys.exit(2)
