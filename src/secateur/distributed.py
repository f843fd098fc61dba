"""Several processes, as `accelerate launch` or `torchrun` start them: how many, which one this is, sums over all.

Torch is imported when it is first needed: the command line asks which process this is before it loads anything.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")


def launched() -> int:
    """How many processes were started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the only process or the first of several: the one that speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """Return this process's number among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def process_count() -> int:
    """How many processes there are, 1 without a launcher; the first call with several of them joins the group."""
    if launched() == 1:
        return 1
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    return distributed.get_world_size()


def add_up(*sums: torch.Tensor) -> None:
    """Add to each sum, in place, those of all other processes; all have the same result."""
    if process_count() == 1:
        return
    import torch
    from torch import distributed

    home = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
    for one in sums:
        moved = one.to(home)
        distributed.all_reduce(moved)
        one.copy_(moved)


def from_main_process(value: Value) -> Value:
    """Return the main process's value, so that all decide alike where their numbers differ in the last bit."""
    if process_count() == 1:
        return value
    from torch import distributed

    shared = [value]
    distributed.broadcast_object_list(shared, src=0)
    return shared[0]
