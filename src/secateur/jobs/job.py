"""The interface of jobs: a request is prepared once, its cost is estimated, and it is run.

`prepare` (a class method of each job) checks a request against a model: names, settings, amounts and texts are read
there and nowhere else. `cost` estimates without running anything; `run` does the work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from secateur.jobs.cost import JobCost

Result = TypeVar("Result")


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
