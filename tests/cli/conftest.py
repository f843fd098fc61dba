"""A command line run in this process."""

import sys

import pytest

from secateur.cli import main as cli
from secateur.cli import terminal


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command line in this process, in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, words)])
        monkeypatch.setattr(terminal.err, "width", 1000, raising=False)
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    terminal.err.width = terminal.out_console.width = 1000
    return call
