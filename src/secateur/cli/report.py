"""The command `report`, which makes an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from secateur.cli.terminal import err
from secateur.reporting.page import report as make_report


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A study, a run, or any folder secateur wrote.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The HTML file. (default: report.html in the folder)")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Make one HTML page of a study or run: best method, what was removed, what remains. Works offline."""
    file = make_report(folder, out)
    err.print(f"Written: [bold]{escape(str(file))}[/]")
    if show:
        typer.launch(str(file))
