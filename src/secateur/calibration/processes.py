"""Several processes, as `accelerate launch` or `torchrun` start them: shares of the windows, sums over all of them.

What is measured by sums is divided: each process walks every n-th window, and the sums are added up, so that all go on
with the same numbers. Everything else every process does by itself.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import distributed

from secateur.calibration.windows import Windows
from secateur.errors import InputError
from secateur.launcher import launched

Value = TypeVar("Value")


def process_count() -> int:
    """How many processes there are, 1 without a launcher; the first call with several of them joins the group."""
    if launched() == 1:
        return 1
    if not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    return distributed.get_world_size()


def share_numbers(windows: Windows) -> range:
    """Give the numbers of the windows that this process walks: every n-th.

    Raises:
        InputError: fewer windows than processes.
    """
    count = process_count()
    if len(windows) < count:
        raise InputError(f"{len(windows)} windows are too few for {count} processes; give more, or fewer processes.")
    return range(0 if count == 1 else distributed.get_rank(), len(windows), count)


def share_of(windows: Windows) -> Windows:
    """Give the windows that this process walks.

    Raises:
        InputError: fewer windows than processes.
    """
    numbers = share_numbers(windows)
    if len(numbers) == len(windows):
        return windows
    return windows.some(numbers)


def token_numbers(windows: Windows) -> torch.Tensor:
    """Give, for the real tokens this process walks, in order, their numbers among those of all windows."""
    real = windows.mask if windows.mask is not None else torch.ones_like(windows.tokens, dtype=torch.bool)
    numbers = (real.flatten().cumsum(0) - 1).view_as(real)
    rows = list(share_numbers(windows))
    return numbers[rows][real[rows]]


def add_up(*sums: torch.Tensor) -> None:
    """Add to each sum, in place, those of all other processes; all have the same result."""
    if process_count() == 1:
        return
    home = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
    for one in sums:
        moved = one.to(home)
        distributed.all_reduce(moved)
        one.copy_(moved)


def as_the_first(value: Value) -> Value:
    """Give what the first process has for this, so that all decide alike where their numbers differ in the last bit."""
    if process_count() == 1:
        return value
    shared = [value]
    distributed.broadcast_object_list(shared, src=0)
    return shared[0]
