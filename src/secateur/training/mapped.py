"""Memory-mapped tensors on disk, for data that a run reads repeatedly and that does not fit in memory."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from pathlib import Path

import torch

from secateur.files import require_room


class MappedTensors:
    """A temporary folder of memory-mapped tensors; it is deleted with the object.

    Attributes:
        folder: the folder.
    """

    def __init__(self, what: str, needed: int) -> None:
        """Open an empty folder.

        Args:
            what: description of the data, for the name and for the error.
            needed: bytes it will take.

        Raises:
            OSError: there is not enough room.
        """
        self.folder = Path(tempfile.mkdtemp(prefix=f"secateur-{what}-"))
        self._removal = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        require_room(self.folder, needed, f"{what} ({needed / 2**30:.1f} GiB)")

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a new file-backed tensor of zeros."""
        path = str(self.folder / name)
        return torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
