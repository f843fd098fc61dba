"""The interface of jobs: a request is prepared once, its cost is estimated, and it is run.

`prepare` (a class method of each job) checks a request against a model: names, settings, amounts and texts are read
there and nowhere else. `cost` estimates without running anything; `run` does the work.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

from secateur.jobs.cost import JobCost

Result = TypeVar("Result")
Asked = ParamSpec("Asked")


class Job(ABC, Generic[Result]):
    """A prepared request."""

    @abstractmethod
    def cost(self) -> JobCost:
        """Return the estimated cost: time by phase, memory, disk.

        Raises:
            OSError: the disk has no room for what would be written.
        """

    @abstractmethod
    def run(self) -> Result:
        """Do the work.

        Raises:
            SecateurError: as documented for the public function.
        """


def function_of(prepare: Callable[Asked, Job[Result]], name: str) -> Callable[Asked, Result]:
    """Return the function that prepares a job and runs it, with the arguments and documentation of `prepare`."""

    @functools.wraps(prepare)
    def prepare_and_run(*given: Asked.args, **named: Asked.kwargs) -> Result:
        return prepare(*given, **named).run()

    prepare_and_run.__name__ = prepare_and_run.__qualname__ = name
    return prepare_and_run
