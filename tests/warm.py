"""Fresh processes that start at once: forked from one that has imported torch and transformers, but never secateur.

What is imported takes longer than most of what tests do in a process of its own. Run as a script this is the process
that is forked: a line it reads is a list of `{arguments, environment, folder, out, err}`, and its answer
their exit codes.
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
        return self.run_together([arguments], [os.environ if environment is None else environment], folder)[0]

    def run_together(self, commands, environments, folder=None):
        """Run several commands at once; gives what each has given."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        with tempfile.TemporaryDirectory() as place:
            asked = [
                {
                    "arguments": list(map(str, arguments)),
                    "environment": dict(environment),
                    "folder": str(folder or Path.cwd()),
                    "out": f"{place}/{number}.out",
                    "err": f"{place}/{number}.err",
                }
                for number, (arguments, environment) in enumerate(zip(commands, environments, strict=True))
            ]
            self._server.stdin.write(json.dumps(asked) + "\n")
            self._server.stdin.flush()
            codes = json.loads(self._server.stdout.readline())
            return [
                subprocess.CompletedProcess(
                    one["arguments"], code, Path(one["out"]).read_text(), Path(one["err"]).read_text()
                )
                for one, code in zip(asked, codes, strict=True)
            ]

    def close(self):
        """End the process that is forked."""
        if self._server is not None:
            self._server.communicate()


def serve():
    """Fork for every command of every request; return it in the fork, None when there are no more."""
    for line in sys.stdin:
        children, stdin = [], os.pipe()
        for asked in json.loads(line):
            child = os.fork()
            if child == 0:
                os.close(stdin[1])
                _become(asked, stdin[0])
                return asked["arguments"]
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        for end in stdin:
            os.close(end)
        sys.stdout.write(json.dumps(codes) + "\n")
        sys.stdout.flush()
    return None


def _become(asked, stdin):
    """Take over the streams, the environment and the folder that were asked for; stdin stays open and empty."""
    for number, place in ((0, stdin), (1, asked["out"]), (2, asked["err"])):
        opened = place if number == 0 else os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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
