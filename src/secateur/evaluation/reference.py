"""Measurements of a dense model, saved so that many pruned models can be compared with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.evaluation.results import Result, read_results, write_results
from secateur.evaluation.stability import Outcome
from secateur.files import replace_file
from secateur.reading import MIB, FileKind, from_json

ANSWERS_FILE = FileKind("list of answers", 512 * MIB, advice="Measure the dense model again.")
RESULTS = "results.jsonl"
ANSWERS = "answers.json"


@dataclass(frozen=True)
class Reference:
    """Results and answers of a dense model.

    Attributes:
        results: perplexity, then task by task, all in the role `against`.
        answers: its answers to the questions of each task.
    """

    results: tuple[Result, ...] = ()
    answers: tuple[Outcome, ...] = ()

    def metrics_on(self, windows: Windows, names: Sequence[str]) -> list[Result]:
        """Return what was measured on these windows by the metrics of these names, if anything was.

        Raises:
            InputError: it was measured on other texts only.
        """
        found = [one for one in self.results if one.task is None and one.measure in names]
        same = [one for one in found if one.texts.get("fingerprint") == windows.fingerprint]
        if found and not same:
            before = f"{found[0].texts.get('source')}, {found[0].texts.get('fingerprint')}"
            raise InputError(
                f"{found[0].model} was measured on other texts ({before}) than these ({windows.source}, "
                f"{windows.fingerprint}); measure it again."
            )
        return same

    def results_on(self, asked: Sequence[Outcome]) -> list[Result]:
        """Return the results on tasks, if there are any.

        Raises:
            InputError: the other model was asked other tasks or questions.
        """
        found = [one for one in self.results if one.task is not None]
        if found:
            self.answers_to(asked)
        return found

    def answers_to(self, asked: Sequence[Outcome]) -> list[Outcome]:
        """Return the answers to the questions another model was asked, task by task.

        Raises:
            InputError: the dense model was not asked these questions.
        """
        found = {(one.task, one.fingerprint): one for one in self.answers}
        missing = [one.task for one in asked if (one.task, one.fingerprint) not in found]
        if missing:
            raise InputError(f"the dense model was not asked the same questions of {missing[0]}; measure it again.")
        return [found[one.task, one.fingerprint] for one in asked]

    def write(self, folder: Path) -> None:
        """Write `results.jsonl` and `answers.json` into a folder."""
        write_results(folder / RESULTS, self.results)
        replace_file(folder / ANSWERS, json.dumps([one.as_dict() for one in self.answers]))

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """Read what `write` wrote.

        Raises:
            InputError: a file is missing or invalid.
        """
        path = folder / ANSWERS
        answers = ANSWERS_FILE.parsed(path, lambda text: tuple(Outcome.of(one) for one in from_json(text)))
        return cls(read_results(folder / RESULTS), answers)
