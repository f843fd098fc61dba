"""Tensors on disk, memory-mapped: for what a run reads again and again and memory cannot hold."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from pathlib import Path

import torch

from secateur.files import require_room


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
        require_room(self.folder, needed, f"{what} ({needed / 2**30:.1f} GiB)")

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a new tensor of zeros whose numbers stand in a file."""
        path = str(self.folder / name)
        return torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
