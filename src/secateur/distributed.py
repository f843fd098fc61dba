"""Multi-process runs started by `accelerate launch` or `torchrun`: process counts, ranks, sums and broadcasts.

Torch is imported on first use, because the command line asks for the rank before it loads anything.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")


def launched() -> int:
    """Return the number of processes started by the launcher, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this is the main process, the one that prints and writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """Return the local rank of this process."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def process_count() -> int:
    """Return the number of processes, 1 without a launcher; the first call in a multi-process run joins the group."""
    if launched() == 1:
        return 1
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    return distributed.get_world_size()


def add_up(*sums: torch.Tensor) -> None:
    """Add up each tensor over all processes, in place."""
    if process_count() == 1:
        return
    import torch
    from torch import distributed

    home = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
    for one in sums:
        moved = one.to(home)
        distributed.all_reduce(moved)
        one.copy_(moved)


def take_largest(values: torch.Tensor) -> None:
    """Take the largest of each value over all processes, in place."""
    if process_count() == 1:
        return
    import torch
    from torch import distributed

    moved = values.to(torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu"))
    distributed.all_reduce(moved, op=distributed.ReduceOp.MAX)
    values.copy_(moved)


def from_main_process(value: Value) -> Value:
    """Return the main process's value on every process, so that rounding differences cannot make them disagree."""
    if process_count() == 1:
        return value
    from torch import distributed

    shared = [value]
    distributed.broadcast_object_list(shared, src=0)
    return shared[0]
