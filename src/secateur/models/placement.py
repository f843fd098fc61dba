"""Where the weights of a model go, in which arithmetic, and whether they fit there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil
import torch

from secateur.distributed import launched, local_rank
from secateur.errors import InputError, first_line
from secateur.models.dtypes import dtype_named

_SHARE_OF_MEMORY = 0.7


@dataclass(frozen=True)
class Placement:
    """Devices and arithmetic of a model.

    Attributes:
        device: where it goes, or its first part.
        devices: all over which it may be spread.
        arithmetic: dtype of its weights there.
    """

    device: torch.device
    devices: tuple[torch.device, ...]
    arithmetic: torch.dtype

    @classmethod
    def of(cls, device: str, dtype: str, saved: torch.dtype) -> Placement:
        """Read what the user asked for: names, or `auto`; `saved` is the dtype of the checkpoint.

        Raises:
            InputError: the device or the dtype does not exist here.
        """
        first = _device(device)
        spread = device == "auto" and first.type == "cuda" and launched() == 1
        return cls(first, _all_gpus() if spread else (first,), _arithmetic(dtype, saved, first))

    @property
    def first(self) -> Placement:
        """The first device alone."""
        return replace(self, devices=(self.device,))

    def holds(self, needed: float) -> bool:
        """Return whether so many bytes fit, with room for computing."""
        return needed <= _SHARE_OF_MEMORY * sum(map(free_memory, self.devices))


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a GPU, or in the memory of this machine."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def _device(device: str) -> torch.device:
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local_rank()) if launched() > 1 else torch.device("cuda")
    if device == "auto":
        return torch.device("cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{device}' cannot be used here ({first_line(error)}).") from error
    return place


def _arithmetic(dtype: str, saved: torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" and not _cpu_has_fast_bfloat16(saved) else saved
    return dtype_named(dtype, "auto")


def _cpu_has_fast_bfloat16(saved: torch.dtype) -> bool:
    return saved == torch.bfloat16 and bool(torch.cpu._is_amx_tile_supported())


def _all_gpus() -> tuple[torch.device, ...]:
    return tuple(torch.device("cuda", number) for number in range(torch.cuda.device_count()))
