"""Tensors on disk, memory-mapped: for what a run reads again and again and memory cannot hold."""

from __future__ import annotations

import errno
import math
import shutil
import tempfile
import weakref
from pathlib import Path

import torch


class MappedTensors:
    """A temporary folder of memory-mapped tensors; it goes away with the object.

    Attributes:
        folder: where they are.
    """

    def __init__(self, what: str, needed: int) -> None:
        """Open an empty folder.

        Args:
            what: is going to be kept, for the name and for the error.
            needed: bytes it will take.

        Raises:
            OSError: there is no room for so many.
        """
        self.folder = Path(tempfile.mkdtemp(prefix=f"secateur-{what}-"))
        self._removal = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        if shutil.disk_usage(self.folder).free < needed:
            size = f"{needed / 2**30:.1f} GiB"
            raise OSError(errno.ENOSPC, f"no space left for {what} ({size}); set TMPDIR to a larger disk")

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Give a new tensor of zeros whose numbers stand in a file."""
        path = str(self.folder / name)
        return torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
