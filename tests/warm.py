"""Fresh processes that start at once: forked from one that has imported torch and transformers, but never secateur.

What is imported takes longer than most of what tests do in a process of its own. Run as a script this is the process
that is forked: it reads one request a line, `{arguments, environment, folder, out, err}`, and answers the exit code.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path


class WarmPython:
    """Run commands as `python ARGUMENTS` would, each in a process forked from a warm one."""

    def __init__(self):
        self._server = None

    def run(self, *arguments, environment=None, folder=None):
        """Run `-m MODULE …`, `-c CODE …` or `SCRIPT …`; gives what `subprocess.run` gives with text captured."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        with tempfile.NamedTemporaryFile("r+") as out, tempfile.NamedTemporaryFile("r+") as err:
            asked = {
                "arguments": list(map(str, arguments)),
                "environment": dict(os.environ if environment is None else environment),
                "folder": str(folder or Path.cwd()),
                "out": out.name,
                "err": err.name,
            }
            self._server.stdin.write(json.dumps(asked) + "\n")
            self._server.stdin.flush()
            code = json.loads(self._server.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, out.read(), err.read())

    def close(self):
        """End the process that is forked."""
        if self._server is not None:
            self._server.communicate()


def serve():
    """Fork for every request; return it in the fork, None when there are no more."""
    for line in sys.stdin:
        asked = json.loads(line)
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writes)
            _become(asked, reads)
            return asked["arguments"]
        os.close(reads)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(writes)
        sys.stdout.write(json.dumps(code) + "\n")
        sys.stdout.flush()
    return None


def _become(asked, stdin):
    """Take over the streams, the environment and the folder that were asked for; stdin stays open and empty."""
    for number, place in ((0, stdin), (1, asked["out"]), (2, asked["err"])):
        opened = place if number == 0 else os.open(place, os.O_WRONLY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.path[:0] = filter(None, asked["environment"].get("PYTHONPATH", "").split(os.pathsep))


def execute(arguments):
    """Do what `python ARGUMENTS` does, in this process."""
    first, *others = [argument for argument in arguments if argument != "-P"]
    if first == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(others[0], {"__name__": "__main__"})
    else:
        sys.argv = [first, *others]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    import transformers.generation
    import transformers.modeling_utils
    import transformers.models.auto.modeling_auto  # noqa: F401

    if (asked := serve()) is not None:
        execute(asked)
