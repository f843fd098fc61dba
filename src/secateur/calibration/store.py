"""Storage for hidden states: in memory as long as they fit, then on disk in float32."""

from __future__ import annotations

import shutil
from collections.abc import Hashable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

from secateur.files import read_ahead, require_room
from secateur.ownership import scratch_folder

_SHARE_OF_MEMORY = 0.25


class StateStore:
    """Tensors by key. They are held in memory up to a budget; the others go to files.

    Tensors on a GPU stay there while it has room, then go to the machine's memory.

    Files are read and written without memory mapping, so that what is on disk does not count as resident memory. The
    folder is deleted by `close` (or at the end of a `with` statement).

    Attributes:
        budget: bytes that may be held in memory.
    """

    def __init__(self, budget: int | None = None) -> None:
        """Open an empty store; the default budget is a quarter of the memory that is free now."""
        self.budget = int(psutil.virtual_memory().available * _SHARE_OF_MEMORY) if budget is None else budget
        self._memory: dict[Hashable, tuple[torch.Tensor, torch.device]] = {}
        self._files: dict[Hashable, tuple[Path, torch.Size, torch.dtype, torch.device]] = {}
        self._used = 0
        self._written = 0
        self._folder: Path | None = None

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._memory or key in self._files

    def keys(self) -> Iterator[Hashable]:
        """All keys held."""
        yield from list(self._memory)
        yield from list(self._files)

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Store a tensor under a key, replacing an earlier one."""
        self.drop(key)
        if self.has_room(tensor):
            self._memory[key] = (tensor if _stays(tensor) else tensor.cpu(), tensor.device)
            self._used += _bytes(tensor)
        else:
            self._files[key] = (self._write(tensor), tensor.shape, tensor.dtype, tensor.device)

    def has_room(self, tensor: torch.Tensor, limit: int | None = None) -> bool:
        """Return whether such a tensor would be held in memory, and with it no more than `limit` bytes in all."""
        return self._used + _bytes(tensor) <= (self.budget if limit is None else min(self.budget, limit))

    def get(self, key: Hashable) -> torch.Tensor:
        """Return a tensor as it was stored, on the device it was on."""
        if key in self._memory:
            tensor, device = self._memory[key]
            return tensor.to(device)
        path, shape, dtype, device = self._files[key]
        data = np.fromfile(path, dtype=np.float32)
        read_ahead(self._file(int(path.stem) + 1), [(0, data.nbytes)])  # walks read in the order of writing
        return torch.from_numpy(data).view(shape).to(device=device, dtype=dtype)

    def drop(self, key: Hashable) -> None:
        """Drop a key, if it is held."""
        if key in self._memory:
            self._used -= _bytes(self._memory.pop(key)[0])
        elif key in self._files:
            self._files.pop(key)[0].unlink(missing_ok=True)

    def close(self) -> None:
        """Drop everything and delete the files."""
        self._memory.clear()
        self._files.clear()
        self._used = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _file(self, number: int) -> Path:
        assert self._folder is not None, "nothing was written yet"
        return self._folder / f"{number}.f32"

    def _write(self, tensor: torch.Tensor) -> Path:
        if self._folder is None:
            self._folder = scratch_folder("states")
        require_room(self._folder, 4 * tensor.numel(), "hidden states (fewer windows need less)")
        path = self._file(self._written)
        self._written += 1
        numbers = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
        try:
            path.write_bytes(numbers.reshape(-1).view(np.uint8).data)  # numpy's `tofile` does not notice a full disk
        except OSError as error:
            raise OSError(error.errno, "no space left for hidden states", str(self._folder)) from error
        return path


def _stays(tensor: torch.Tensor) -> bool:
    """Return whether a tensor may stay on its GPU; a quarter of the GPU's memory is left free for computation."""
    if not tensor.is_cuda:
        return True
    free, whole = torch.cuda.mem_get_info(tensor.device)
    return free > whole // 4


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
