"""The windows that each process walks in a multi-process run.

Each process walks every n-th window and the sums are added up, so that all processes continue with the same numbers.
"""

from __future__ import annotations

import torch
from torch import distributed

from secateur.data.windows import Windows
from secateur.distributed import process_count
from secateur.errors import InputError


def share_numbers(windows: Windows) -> range:
    """Return the numbers of the windows that this process walks, every n-th.

    Raises:
        InputError: fewer windows than processes.
    """
    count = process_count()
    if len(windows) < count:
        raise InputError(f"{len(windows)} windows are too few for {count} processes; give more, or fewer processes.")
    return range(0 if count == 1 else distributed.get_rank(), len(windows), count)


def share_of(windows: Windows) -> Windows:
    """Return the windows that this process walks.

    Raises:
        InputError: fewer windows than processes.
    """
    numbers = share_numbers(windows)
    if len(numbers) == len(windows):
        return windows
    return windows.some(numbers)


def token_numbers(windows: Windows) -> torch.Tensor:
    """Return the numbers, among the real tokens of all windows, of those that this process walks, in order."""
    real = windows.mask if windows.mask is not None else torch.ones_like(windows.tokens, dtype=torch.bool)
    numbers = (real.flatten().cumsum(0) - 1).view_as(real)
    rows = list(share_numbers(windows))
    return numbers[rows][real[rows]]
