"""What every job is: prepared once (everything read and checked), it says what it needs, and runs.

`prepare` is where a request meets a model: names, settings, amounts and texts are read and checked there and nowhere
else. `cost` tells what running would take and does nothing; `run` does the work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from secateur.jobs.cost import JobCost

Result = TypeVar("Result")


class Job(ABC, Generic[Result]):
    """A prepared job."""

    @abstractmethod
    def cost(self) -> JobCost:
        """Return what running takes: time by phase, memory, disk.

        Raises:
            OSError: the disk has no room for what would be written.
        """

    @abstractmethod
    def run(self) -> Result:
        """Do the work.

        Raises:
            SecateurError: as the job's `prepare` says.
        """
