"""Options shared by all long-running functions: batch size, seed, progress, work folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from secateur.errors import InputError
from secateur.progress import SILENT, Progress

LARGEST_SEED = (1 << 32) - 1


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a job is run; these options do not change what is requested.

    Attributes:
        batch_size: windows (or questions) per batch; None depends on the device.
        seed: random seed.
        progress: reports progress.
        work: folder in which searches and training save the state they resume from; None saves none. The caller
            deletes it.
    """

    batch_size: int | None = None
    seed: int = 0
    progress: Progress = SILENT
    work: Path | None = None

    def __post_init__(self) -> None:
        """Check the seed.

        Raises:
            InputError: it is negative, or beyond what every generator of random numbers takes.
        """
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"seed {self.seed}: must be from 0 to {LARGEST_SEED:,}.")

    def within(self, name: str) -> RunOptions:
        """Return the same options with `name` inside the work folder as work folder, if there is one."""
        return self if self.work is None else replace(self, work=self.work / name)


DEFAULTS = RunOptions()
