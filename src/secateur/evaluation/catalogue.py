"""Find the file of a harness task by name, without importing the harness or building its whole index.

The index of lm-evaluation-harness parses some 14,000 YAML files, which takes from 15 seconds to several minutes.
Searching for the lines that name a task takes a few seconds, and also gives suggestions for misspelled names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from secateur.errors import InputError
from secateur.evaluation.cloze import NAME as CLOZE
from secateur.evaluation.probes import PROBES

COMMONSENSE = "commonsense"
STREAMLINE = "streamline"
STREAMLINE_PAPER = "streamline-paper"
OWN_TASKS = (CLOZE, *PROBES)
"""Tasks that need no data set."""
SEVEN = ("openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "boolq")
"""The seven zero-shot tasks that most pruning papers report."""
TASK_SETS: dict[str, tuple[str, ...]] = {
    COMMONSENSE: SEVEN,
    STREAMLINE: ("winogrande", "hellaswag", "arc_easy", "arc_challenge", "boolq", "openbookqa", "rte"),
    "probes": tuple(PROBES),
    "reasoning": ("gsm8k", *PROBES),
    STREAMLINE_PAPER: ("boolq", "wsc", "commonsense_qa", "hellaswag", "piqa", "race", "mmlu", "cmmlu"),
}
"""Names for several tasks. `streamline` is what the released code of LLM-Streamline reports on; `streamline-paper` are
those of its paper's twelve that lm-evaluation-harness has (it has no C3, CHID, CMNLI and middle-school RACE)."""

_VALUE = r"""["']?([^\s"'#\[{-][^"'#\n]*?)["']?[ \t]*(?:#.*)?$"""
_NAMED = re.compile(rf"""^["']?(task|group|tag)["']?:[ \t]*{_VALUE}""", re.M)
_TAGS = re.compile(r"""^["']?tag["']?:[ \t]*\n((?:[ \t]*-[^\n]*\n?)+)""", re.M)
_ENTRY = re.compile(rf"^[ \t]*-[ \t]*{_VALUE}", re.M)


@dataclass(frozen=True)
class Found:
    """Definition of a name in the harness.

    Attributes:
        kind: a task, or a name for several tasks.
        file: the YAML file; for several tasks one of the files that mention it.
    """

    kind: Literal["task", "several"]
    file: Path


def task_names(text: str) -> list[str]:
    """Read `piqa,arc_easy`: unique names, with names of task sets expanded.

    Raises:
        InputError: no task is named.
    """
    given = [name.strip() for name in text.split(",") if name.strip()]
    if not given:
        raise InputError(f"no task named; give some, such as {CLOZE}, {COMMONSENSE} or piqa,arc_easy.")
    spelled = [one for name in given for one in TASK_SETS.get(name, (name,))]
    return list(dict.fromkeys(spelled))


def find_task(name: str) -> Found:
    """Find a task, group or tag of the harness.

    Raises:
        InputError: no such name; the message suggests similar ones.
    """
    known = harness_tasks()
    if name not in known:
        near = get_close_matches(name, [*OWN_TASKS, *TASK_SETS, *known], n=5, cutoff=0.6)
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise InputError(
            f"unknown task '{name}'.{hint} Known are {CLOZE}, {', '.join(TASK_SETS)}, the names of "
            "lm-evaluation-harness, and a folder (or YAML file) of yours with tasks in the harness's form."
        )
    return known[name]


def require_known(text: str) -> None:
    """Check the names of tasks without loading any; folders and YAML files are checked later.

    Raises:
        InputError: no task is named, or an unknown one.
    """
    for name in task_names(text):
        path = Path(name).expanduser()
        if name not in OWN_TASKS and not path.is_dir() and path.suffix not in (".yaml", ".yml"):
            find_task(name)


@functools.cache
def harness_tasks() -> dict[str, Found]:
    """Return all names of the installed harness: tasks, groups and tags.

    Raises:
        InputError: the harness is not installed.
    """
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise InputError("tasks need lm-evaluation-harness; install it: pip install lm_eval.")
    found: dict[str, Found] = {}
    every = Path(spec.origin).with_name("tasks").rglob("*")
    for file in sorted(one for one in every if one.suffix in ("", ".yaml") and one.is_file()):  # templates have none
        for kind, name in _names_in(file.read_text(encoding="utf-8")):
            if name != "null" and (kind == "task" or name not in found):
                found[name] = Found("task" if kind == "task" else "several", file)
    return found


def _names_in(text: str) -> Iterator[tuple[str, str]]:
    yield from _NAMED.findall(text)
    for listed in _TAGS.findall(text):
        yield from (("tag", name) for name in _ENTRY.findall(listed))
