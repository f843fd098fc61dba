"""Sharding of weights, gradients and optimiser states over processes: FSDP2, PyTorch's `fully_shard`.

`accelerate launch --use_fsdp` asks for it. Accelerate itself does not shard on CPUs (it silently falls back to data
parallelism), so the training loop shards modules itself, the same way on every device.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from secateur.distributed import process_count

_ASKED = "ACCELERATE_USE_FSDP"


@cache
def sharding_asked() -> bool:
    """Return whether the launcher asked for sharding over several processes, and hide that request from Accelerate."""
    asked = os.environ.pop(_ASKED, "false").lower() in ("1", "true")
    return asked and process_count() > 1


def shard(module: nn.Module, units: Iterable[nn.Module]) -> None:
    """Shard a module over all processes; each of its units is gathered only while it runs.

    Raises:
        RuntimeError: some parameters were not sharded.
    """
    device = "cuda" if next(module.parameters()).is_cuda else "cpu"
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if not all(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise RuntimeError("fully_shard left parameters whole")


def sync_gradients(module: nn.Module, wanted: bool) -> None:
    """Set whether the next backward pass of a sharded module reduces gradients over the processes."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the full trained parameters of a module by name, on every process; those of a sharded one on the CPU."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            tensor = whole(parameter.detach())
            found[name] = tensor.cpu() if isinstance(parameter, DTensor) else tensor
    return found
