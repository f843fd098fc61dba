"""Entry point of the command line. Commands are imported when they run, so that help does not wait for torch."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from secateur.claims import holding_claims
from secateur.distributed import is_main_process, launched
from secateur.errors import InputError, SecateurError, first_line
from secateur.files import is_full_disk
from secateur.interruption import ending_as_ctrl_c
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

SPINS = "10000"
"""How often a thread of GNU OpenMP, which PyTorch has on Linux, looks for more work before it sleeps.

By default that takes milliseconds at every meeting of threads, which on a machine with other busy processes are wasted
again and again (benchmarks/busy_machine.py).
"""

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
    """Run the command line. Errors that a user can act on become one message and exit code 2; Ctrl-C becomes 130.

    SIGTERM and SIGHUP end a command as Ctrl-C does, with 128 and their number as the exit code.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    with ending_as_ctrl_c() as came:
        try:
            with holding_claims():
                app()
        except SystemExit as stop:
            sys.exit(128 + came[0] if came and stop.code else stop.code)
        except KeyboardInterrupt:
            sys.exit(128 + (came[0] if came else signal.SIGINT))
        except Exception as error:
            if came or _is_interrupted(error):
                sys.exit(128 + (came[0] if came else signal.SIGINT))
            message = _message(error)
            if message is None:
                raise
            _fail(message)


_HINT = " Free some space, or choose another disk (TMPDIR for temporary files)."


def _message(error: Exception) -> str | None:
    """Return the message for a user who can do something about this error; None if it is a bug."""
    if isinstance(error, SecateurError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}.{_HINT if is_full_disk(error) else ''}"
    if is_full_disk(error):
        return f"no space left on the disk ({first_line(error)}).{_HINT}"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "there is not enough memory. Use fewer --windows, a smaller --batch-size, or --skeleton."
    if _is_out_of_memory(error):
        return "the device is out of memory. Use a smaller --batch-size (--batch-sizes for bench), or --skeleton."
    return None


def _is_interrupted(error: BaseException | None) -> bool:
    """Return whether an error arose from an interruption, in what was to clean up after it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _is_out_of_memory(error: Exception) -> bool:
    from torch import OutOfMemoryError

    return isinstance(error, OutOfMemoryError)


def _fail(message: str) -> NoReturn:
    from secateur.cli.terminal import err

    err.print("[bold red]error:[/] ", end="")
    err.print(message, markup=False, highlight=False)
    sys.exit(2)
