"""How a run goes, whatever it does: one value that long-running functions pass on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from secateur.progress import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run that change nothing about what is asked for.

    Attributes:
        batch_size: windows (or questions) per batch; None chooses by the device.
        seed: of everything drawn at random.
        progress: shows how far it is.
        work: folder in which searches and training keep what they resume from after a kill; None keeps none. The
            caller removes it.
    """

    batch_size: int | None = None
    seed: int = 0
    progress: Progress = SILENT
    work: Path | None = None

    def within(self, name: str) -> RunOptions:
        """Return the same options with a folder of this name inside the work folder, where there is one."""
        return self if self.work is None else replace(self, work=self.work / name)


DEFAULTS = RunOptions()
